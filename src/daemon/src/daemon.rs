//! What every call works on: the objects and the parts that were opened at the start. Finds objects by what a
//! client calls them; changes nothing.

use std::sync::Arc;

use crate::{
    calls::Calls,
    config::Config,
    containers::Container,
    error::{Error, Fault, Result},
    events::Events,
    lock::Lock,
    pods::Pod,
    store::Store,
    table::{Found, Table},
};

/// One per process, behind an Arc.
pub struct Daemon {
    config: Lock<Arc<Config>>,
    pub store: Store,
    pub pods: Table<Pod>,
    pub containers: Table<Container>,
    pub events: Events,
    /// Calls that make something, by the name of what they make.
    pub calls: Calls,
}

impl Daemon {
    pub fn new(config: Config, store: Store) -> Daemon {
        Daemon {
            config: Lock::new(Arc::new(config)),
            store,
            pods: Table::default(),
            containers: Table::default(),
            events: Events::default(),
            calls: Calls::default(),
        }
    }

    /// The configuration as it is now. Take it once per call: it changes on SIGHUP.
    pub fn config(&self) -> Arc<Config> {
        self.config.read().clone()
    }

    pub fn set_config(&self, config: Config) {
        *self.config.write() = Arc::new(config);
    }

    /// A pod by its id or a unique prefix.
    pub fn pod(&self, id: &str) -> Result<Arc<Pod>> {
        one(self.pods.find(id), id, || Fault::NoPod(id.into()))
    }

    /// A container by its id or a unique prefix.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        one(self.containers.find(id), id, || Fault::NoContainer(id.into()))
    }

    /// The containers of a pod, in the order of their ids.
    pub fn containers_of(&self, pod: &Pod) -> Vec<Arc<Container>> {
        self.containers.with(|container| container.pod.id == pod.id)
    }
}

fn one<T>(found: Found<T>, id: &str, none: impl FnOnce() -> Fault) -> Result<T, Error> {
    match found {
        Found::One(object) => Ok(object),
        Found::None => Err(none().into()),
        Found::Many => Err(Fault::Ambiguous(id.into()).into()),
    }
}

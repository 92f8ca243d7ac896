//! What every call works on: the objects and the parts that were opened at the start. Finds objects by what a
//! client calls them; changes nothing.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use image::Images;
use network::Network;
use tokio::sync::Semaphore;

use crate::{
    calls::Calls,
    config::Config,
    containers::{Container, spec::host},
    error::{Error, Fault, Result},
    events::Events,
    lock::Lock,
    pods::{Place, Pod, network::Attachments},
    shim::Program,
    stats::Sampler,
    store::Store,
    table::{Found, Table},
};

/// Run directories of pods, below the state directory.
pub const PODS: &str = "p";
/// Pinned network namespaces, below the state directory.
pub const NETNS: &str = "netns";
/// FIFOs of commands, below the state directory.
pub const IO: &str = "io";

/// So many threads at most look at host paths; far fewer than there can be, for others need some.
const LOOKS: usize = 128;

/// One per process, behind an Arc.
pub struct Daemon {
    config: Lock<Arc<Config>>,
    pub store: Store,
    pub pods: Table<Pod>,
    pub containers: Table<Container>,
    pub events: Events,
    pub sampler: Sampler,
    /// Calls that make something, by the name of what they make.
    pub calls: Calls,
    pub images: Arc<Images>,
    pub network: Network,
    /// What pods have of the network and have to give back.
    pub attachments: Attachments,
    /// The shim's program of each runtime handler.
    programs: Lock<BTreeMap<String, Arc<Program>>>,
    /// Seats of those who look at host paths, which may hang.
    pub looks: Arc<Semaphore>,
    /// Ids of objects that are being made.
    births: Lock<HashSet<String>>,
    /// The host's name, as pods with its network get it.
    pub hostname: String,
}

/// What is opened before the daemon exists.
pub struct Parts {
    pub store: Store,
    pub images: Arc<Images>,
    pub network: Network,
    pub programs: BTreeMap<String, Arc<Program>>,
}

impl Daemon {
    pub fn new(config: Config, parts: Parts) -> Daemon {
        Daemon {
            config: Lock::new(Arc::new(config)),
            store: parts.store,
            images: parts.images,
            network: parts.network,
            programs: Lock::new(parts.programs),
            attachments: Attachments::default(),
            looks: Arc::new(Semaphore::new(LOOKS)),
            births: Lock::default(),
            hostname: host::get().hostname.clone(),
            pods: Table::default(),
            containers: Table::default(),
            events: Events::default(),
            sampler: Sampler::default(),
            calls: Calls::default(),
        }
    }

    /// The configuration as it is now. Take it once per call: it changes on SIGHUP.
    pub fn config(&self) -> Arc<Config> {
        self.config.read().clone()
    }

    pub fn set_config(&self, config: Config, programs: BTreeMap<String, Arc<Program>>) {
        *self.config.write() = Arc::new(config);
        *self.programs.write() = programs;
    }

    /// The shim's program for a handler; the empty name is the default.
    pub fn program(&self, handler: &str) -> Result<Arc<Program>> {
        let config = self.config();
        let name = config.handler(handler).map(|(name, _)| name);
        let program = name.and_then(|name| self.programs.read().get(name).cloned());
        program.ok_or_else(|| Fault::invalid(format!("runtime handler {handler:?} is not configured")))
    }

    /// Whether an object of this id is being made: it is in no table yet.
    pub fn making(&self, id: &str) -> bool {
        self.births.read().contains(id)
    }

    /// Run directory and network namespace of a pod.
    pub fn place(&self, id: &str, network: bool) -> Place {
        let state = &self.config().state;
        Place { dir: state.join(PODS).join(id), netns: network.then(|| state.join(NETNS).join(id)) }
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

/// An id in the time from its making until the object is in its table, so that nobody collects what belongs to it.
pub struct Birth {
    daemon: Arc<Daemon>,
    pub id: String,
}

impl Birth {
    pub fn new(daemon: &Arc<Daemon>) -> Result<Birth> {
        Ok(Birth::of(daemon, mint()?))
    }

    /// For an object that an earlier daemon was making.
    pub fn of(daemon: &Arc<Daemon>, id: String) -> Birth {
        daemon.births.write().insert(id.clone());
        Birth { daemon: daemon.clone(), id }
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        self.daemon.births.write().remove(&self.id);
    }
}

/// 64 hex digits, made of chance: never a path, never a name of anything else.
pub fn mint() -> Result<String> {
    let mut bytes = [0_u8; 32];
    getrandom::fill(&mut bytes).map_err(|e| Fault::io("read", "random")(std::io::Error::other(e)))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Whether a name that was found on disk is an id of ours.
pub fn is_id(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Nanoseconds since 1970.
pub fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Runs what may block in a thread of its own. A panic there is one here.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(e) => std::panic::resume_unwind(e.try_into_panic().unwrap_or_else(|e| Box::new(e.to_string()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s61_ids_are_64_hex_digits() {
        let id = mint().unwrap();
        assert!(is_id(&id) && mint().unwrap() != id);
        for bad in ["", "..", &id[1..], &format!("{id}0"), &id.to_uppercase(), &format!("/{}", &id[1..])] {
            assert!(!is_id(bad) || bad == id, "{bad}");
        }
    }
}

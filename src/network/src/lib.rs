//! A pod gets an address. Makes and pins network namespaces, and connects them: through CNI plugins, or over a
//! bridge of our own that needs nothing installed. Knows neither CRI nor shims; when to attach, to detach and to
//! try again is the daemon's decision.

pub mod attachment;
pub mod bridge;
pub mod cni;
mod error;
#[cfg(fuzzing)]
pub mod fuzz;
mod netlink;
pub mod netns;
mod subnet;

use std::time::Duration;

pub use attachment::{Attached, Attachment, Bandwidth, Dns, PortMapping, Protocol};
pub use bridge::Bridge;
pub use cni::Cni;
pub use error::Error;

/// Which network, and how it is set up.
#[derive(Clone, Debug, PartialEq)]
pub enum Config {
    /// CNI plugins do it.
    Cni(cni::Config),
    /// We do it: a bridge, addresses, masquerade, host ports.
    Bridge(bridge::Config),
}

/// The network of the node's pods.
///
/// `attach` that fails may leave something behind that only `detach` takes away (a CNI plugin that was killed
/// half-way): whoever attaches must record it first, and detach until that succeeds.
#[derive(Debug)]
pub enum Network {
    /// See [`Cni`].
    Cni(Cni),
    /// See [`Bridge`].
    Bridge(Bridge),
}

impl Network {
    /// Opens the network. To be called inside a tokio runtime: CNI keeps a task there that watches the
    /// configuration and ends with the value. A missing CNI configuration is a [`Network::status`], not an error.
    pub fn open(config: Config) -> Result<Network, Error> {
        match config {
            Config::Cni(config) => Cni::open(config).map(Network::Cni),
            Config::Bridge(config) => Bridge::open(config).map(Network::Bridge),
        }
    }

    /// Connects the pod's namespace. Fails with [`Error::NotReady`] while there is no network to connect to.
    pub async fn attach(&self, attachment: &Attachment) -> Result<Attached, Error> {
        match self {
            Network::Cni(cni) => cni.attach(attachment).await,
            Network::Bridge(bridge) => bridge.attach(attachment).await,
        }
    }

    /// Disconnects the pod. Succeeds when nothing is left to do, and works when the namespace is gone.
    /// `attached` is what the daemon remembers of it, in case that we remember nothing.
    pub async fn detach(&self, attachment: &Attachment, attached: Option<&Attached>) -> Result<(), Error> {
        match self {
            Network::Cni(cni) => cni.detach(attachment, attached).await,
            Network::Bridge(bridge) => bridge.detach(attachment).await,
        }
    }

    /// Whether the pod is still connected as it was, for use after a restart.
    pub async fn check(&self, attachment: &Attachment, attached: Option<&Attached>) -> Result<(), Error> {
        match self {
            Network::Cni(cni) => cni.check(attachment, attached).await,
            Network::Bridge(bridge) => bridge.check(attachment).await,
        }
    }

    /// Takes away what belongs to no pod in `live`, nor to one that this value attached and did not detach yet.
    pub async fn gc(&self, live: &[String]) -> Result<(), Error> {
        match self {
            Network::Cni(cni) => cni.gc(live).await,
            Network::Bridge(bridge) => bridge.gc(live).await,
        }
    }

    /// Whether pods can be attached, or why not. Answers from memory.
    pub fn status(&self) -> Result<(), String> {
        match self {
            Network::Cni(cni) => cni.status(),
            Network::Bridge(bridge) => bridge.status(),
        }
    }

    /// Waits until [`Network::status`] is good, at most for `limit`.
    pub async fn ready(&self, limit: Duration) -> Result<(), Error> {
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let Err(reason) = self.status() else { return Ok(()) };
            if tokio::time::Instant::now() >= deadline {
                return Err(Error::NotReady(reason));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Tells the node's pod addresses, one or two subnets with a comma between, as the kubelet sends them.
    pub async fn set_pod_cidr(&self, cidr: &str) -> Result<(), Error> {
        match self {
            Network::Cni(cni) => cni.set_pod_cidr(cidr).await,
            Network::Bridge(bridge) => bridge.set_pod_cidr(cidr).await,
        }
    }

    /// Takes over a changed configuration. Only CNI can do that while running.
    pub fn reconfigure(&self, config: Config) -> Result<(), Error> {
        match (self, config) {
            (Network::Cni(cni), Config::Cni(config)) => {
                cni.reconfigure(config);
                Ok(())
            }
            (Network::Bridge(bridge), Config::Bridge(config)) if *bridge.config() == config => Ok(()),
            _ => Err(Error::Config("the kind of network, and the bridge, change with a restart only".into())),
        }
    }
}

//! The built-in network: a bridge, an address and a wire for each pod, masquerade and host ports. Nothing to install.

use std::path::PathBuf;

pub use crate::subnet::Subnet;

use crate::attachment::{Attached, Attachment};
use crate::error::Error;

/// How the bridge is set up.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The bridge's name, which the nftables table carries as well.
    pub name: String,
    /// One subnet, or two for dual stack. None: those that the kubelet tells.
    pub subnets: Vec<Subnet>,
    /// The largest packet; the kernel's default when absent.
    pub mtu: Option<u32>,
    /// Whether pods reach the world under the node's address.
    pub masquerade: bool,
    /// Where addresses are kept; should not outlive a reboot, as the bridge does not.
    pub state_dir: PathBuf,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            name: "crisp0".into(),
            subnets: Vec::new(),
            mtu: None,
            masquerade: true,
            state_dir: "/run/crisp/network".into(),
        }
    }
}

/// The node's built-in network.
#[derive(Debug)]
pub struct Bridge {
    config: Config,
}

impl Bridge {
    /// Reads what is remembered.
    pub fn open(config: Config) -> Result<Bridge, Error> {
        Ok(Bridge { config })
    }

    /// How it was set up.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Gives the pod an address, a wire and its host ports.
    pub async fn attach(&self, _attachment: &Attachment) -> Result<Attached, Error> {
        Err(Error::NotReady("the built-in bridge has no subnet".into()))
    }

    /// Takes all of it away.
    pub async fn detach(&self, _attachment: &Attachment) -> Result<(), Error> {
        Ok(())
    }

    /// Whether the pod still has its address and its wire.
    pub async fn check(&self, _attachment: &Attachment) -> Result<(), Error> {
        Ok(())
    }

    /// Takes away what belongs to no live pod.
    pub async fn gc(&self, _live: &[String]) -> Result<(), Error> {
        Ok(())
    }

    /// Whether there is a subnet.
    pub fn status(&self) -> Result<(), String> {
        Ok(())
    }

    /// Takes the subnets from the kubelet where the configuration names none.
    pub async fn set_pod_cidr(&self, _cidr: &str) -> Result<(), Error> {
        Ok(())
    }

    /// Removes bridge and rules when no pod is left on them. Returns whether it did.
    pub async fn teardown(&self) -> Result<bool, Error> {
        Ok(true)
    }
}

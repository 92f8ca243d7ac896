//! A pod as the daemon remembers it. One file per verb; what a pod is made of on the kernel's side is the shim's.
//!
//! ```text
//!            run                     stop                remove
//!  (none) ────────▶ Creating ─▶ Ready ────▶ Stopping ─▶ Stopped ────▶ (none)
//!                      │          │ shim dies   ▲
//!                      ▼ fails    └─────────────┘
//!                    (none)
//! ```
//! Clients see Ready, and all later states as not ready. A pod in Creating is in no table: nobody sees it.

use std::{path::PathBuf, sync::Arc};

use cri_api::v1;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::{lock::Lock, shim::Shim};

pub mod files;
pub mod forward;
pub mod network;
pub mod record;
pub mod remove;
pub mod run;
pub mod status;
pub mod stop;
pub mod sysctl;
pub mod update;
pub mod watch;
pub mod wish;

/// One pod. What does not change is here; what does is behind [`Pod::state`].
pub struct Pod {
    /// 64 hex digits.
    pub id: String,
    /// As the client sent it, byte for byte.
    pub config: v1::PodSandboxConfig,
    /// As the client sent it; empty means the default.
    pub runtime_handler: String,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// Run directory: `<state>/p/<id>`.
    pub dir: PathBuf,
    /// Where the network namespace is pinned; none with the host's network.
    pub netns: Option<PathBuf>,
    state: Lock<State>,
    shim: Lock<Option<Arc<Shim>>>,
    /// Held by the one who stops or removes the pod.
    pub act: tokio::sync::Mutex<()>,
    /// Seats of those who look at host paths for a container of this pod.
    pub looks: Arc<Semaphore>,
}

/// Where a pod is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    #[default]
    Creating,
    Ready,
    Stopping,
    Stopped,
}

/// What changes in a pod's life.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub phase: Phase,
    /// Addresses, preferred first; none with the host's network.
    pub ips: Vec<String>,
    /// What the config says, later what UpdatePodSandboxResources said.
    pub resources: Option<v1::LinuxContainerResources>,
    pub overhead: Option<v1::LinuxContainerResources>,
}

/// So many of a pod's containers at most are looked up at once.
const LOOKS: usize = 8;

/// Files in a pod's run directory that its containers get bound in.
pub const RESOLV_CONF: &str = "resolv.conf";
pub const HOSTNAME: &str = "hostname";

impl Pod {
    pub fn new(
        id: String,
        config: v1::PodSandboxConfig,
        runtime_handler: String,
        created_at: i64,
        at: Place,
    ) -> Pod {
        let linux = config.linux.clone().unwrap_or_default();
        let state = State { resources: linux.resources, overhead: linux.overhead, ..State::default() };
        Pod {
            id,
            config,
            runtime_handler,
            created_at,
            dir: at.dir,
            netns: at.netns,
            state: Lock::new(state),
            shim: Lock::default(),
            act: tokio::sync::Mutex::default(),
            looks: Arc::new(Semaphore::new(LOOKS)),
        }
    }

    /// A copy of what changes.
    pub fn state(&self) -> State {
        self.state.read().clone()
    }

    /// Looks at what changes without copying it.
    pub fn look<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.read())
    }

    /// Changes it; the closure must not block.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.write())
    }

    pub fn ready(&self) -> bool {
        self.state.read().phase == Phase::Ready
    }

    pub fn shim(&self) -> Option<Arc<Shim>> {
        self.shim.read().clone()
    }

    pub fn set_shim(&self, shim: Option<Arc<Shim>>) {
        *self.shim.write() = shim;
    }

    pub fn metadata(&self) -> v1::PodSandboxMetadata {
        self.config.metadata.clone().unwrap_or_default()
    }

    /// Which namespaces the pod has, shares or borrows.
    pub fn namespaces(&self) -> v1::NamespaceOption {
        let security = self.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        security.and_then(|security| security.namespace_options.clone()).unwrap_or_default()
    }

    pub fn host_network(&self) -> bool {
        self.namespaces().network() == v1::NamespaceMode::Node
    }

    /// The user namespace's mappings: container id, host id, size. None means that the pod has none of its own.
    pub fn user_namespace(&self) -> Option<(v1::IdMapping, v1::IdMapping)> {
        let options = self.namespaces().userns_options?;
        if options.mode() != v1::NamespaceMode::Pod {
            return None;
        }
        Some((*options.uids.first()?, *options.gids.first()?))
    }

    /// Parent of the containers' cgroups, relative to the root of the hierarchies.
    pub fn cgroup_parent(&self) -> String {
        match self.config.linux.as_ref().map(|linux| linux.cgroup_parent.as_str()) {
            Some(parent) if !parent.is_empty() => parent.into(),
            _ => self.own_cgroup_parent(),
        }
    }

    /// The parent that is made up when the client names none.
    pub fn own_cgroup_parent(&self) -> String {
        format!("/crisp-{}", self.id.get(..12).unwrap_or(&self.id))
    }

    pub fn resolv_conf(&self) -> PathBuf {
        self.dir.join(RESOLV_CONF)
    }

    pub fn hostname_file(&self) -> PathBuf {
        self.dir.join(HOSTNAME)
    }
}

/// Where the files of a pod are.
#[derive(Default)]
pub struct Place {
    pub dir: PathBuf,
    pub netns: Option<PathBuf>,
}

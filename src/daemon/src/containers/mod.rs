//! A container as the daemon remembers it. One file per verb; the process is the shim's.
//!
//! ```text
//!            create             start              exit             remove
//!  (none) ──────────▶ Created ────────▶ Running ────────▶ Exited ──────────▶ (none)
//!                        │ start fails                       ▲
//!                        └───────────────────────────────────┘
//! ```

use std::{path::PathBuf, sync::Arc};

use cri_api::v1;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{lock::Lock, pods::Pod};

pub mod create;
pub mod exec;
pub mod log;
pub mod remove;
pub mod spec;
pub mod start;
pub mod status;
pub mod stop;
pub mod update;

/// One container. What does not change is here; what does is behind [`Container::state`].
pub struct Container {
    /// 64 hex digits.
    pub id: String,
    pub pod: Arc<Pod>,
    /// As the client sent it; image mounts name the image id that was found.
    pub config: v1::ContainerConfig,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// What was decided at its creation.
    pub facts: Facts,
    state: Lock<State>,
    /// Becomes true when the exit is recorded.
    ended: watch::Sender<bool>,
    /// Held by the one who starts, updates or removes the container.
    pub act: tokio::sync::Mutex<()>,
}

/// Decided when the container was made, and kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Config digest of the image.
    pub image_id: String,
    /// `name@sha256:…`, or the id when there is no such name.
    pub image_ref: String,
    /// What users call the image: the reference of the pod.
    pub image_name: String,
    /// Relative to the root of the hierarchies.
    pub cgroup: String,
    /// Name of the stop signal that counts, a value of [`v1::Signal`]: CRI's, the image's, or SIGTERM.
    pub stop_signal: i32,
    pub uid: i64,
    pub gid: i64,
    pub groups: Vec<i64>,
}

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    #[default]
    Created,
    Running,
    Exited,
}

/// What changes in a container's life.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub phase: Phase,
    /// First process, in the host's pid namespace; 0 when there is none.
    pub pid: u32,
    /// Nanoseconds since 1970; 0 means not yet.
    pub started_at: i64,
    pub finished_at: i64,
    /// Exit code, or 128 plus the signal; 255 when nobody knows.
    pub exit_code: i32,
    /// OOMKilled, Completed, Error, StartError, ContainerCannotRun, Unknown.
    pub reason: String,
    pub message: String,
    /// Limits in force.
    pub resources: Option<v1::LinuxContainerResources>,
    /// Being removed: nothing new may begin.
    pub removing: bool,
}

impl Container {
    pub fn new(
        id: String,
        pod: Arc<Pod>,
        config: v1::ContainerConfig,
        created_at: i64,
        facts: Facts,
    ) -> Container {
        let resources = config.linux.as_ref().and_then(|linux| linux.resources.clone());
        Container {
            id,
            pod,
            config,
            created_at,
            facts,
            state: Lock::new(State { resources, ..State::default() }),
            ended: watch::Sender::new(false),
            act: tokio::sync::Mutex::default(),
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

    /// Changes it; the closure must not block. Wakes those who wait for the end.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.write();
        let result = change(&mut state);
        if state.phase == Phase::Exited {
            self.ended.send_replace(true);
        }
        result
    }

    pub fn phase(&self) -> Phase {
        self.state.read().phase
    }

    /// Returns when the exit is recorded.
    pub async fn ended(&self) {
        let mut ended = self.ended.subscribe();
        // The sender lives in self: waiting cannot fail.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    pub fn metadata(&self) -> v1::ContainerMetadata {
        self.config.metadata.clone().unwrap_or_default()
    }

    /// Holds config.json and the shim's records.
    pub fn bundle(&self) -> PathBuf {
        self.pod.dir.join(shim_api::rundir::CONTAINERS).join(&self.id)
    }

    /// Absolute path of the log file; empty when output is not logged.
    pub fn log_path(&self) -> String {
        log_path(&self.pod.config.log_directory, &self.config.log_path)
    }
}

fn log_path(directory: &str, path: &str) -> String {
    match directory.is_empty() || path.is_empty() {
        true => String::new(),
        false => format!("{}/{path}", directory.trim_end_matches('/')),
    }
}

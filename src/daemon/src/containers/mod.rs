//! A container as the daemon remembers it. One file per verb; the process is the shim's.
//!
//! ```text
//!            create             start              exit             remove
//!  (none) ──────────▶ Created ────────▶ Running ────────▶ Exited ──────────▶ (none)
//!                        │ start fails                       ▲
//!                        └───────────────────────────────────┘
//! ```

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use cri_api::v1;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{sync::watch, time::Instant};

use crate::{
    error::{Fault, Result},
    lock::Lock,
    pods::Pod,
};

pub mod attach;
pub mod create;
pub mod exec;
pub mod exit;
pub mod log;
pub mod record;
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
    /// As the client sent it.
    pub config: v1::ContainerConfig,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// What was decided at its creation.
    pub facts: Facts,
    state: Lock<State>,
    /// Becomes true when the exit is recorded.
    ended: watch::Sender<bool>,
    /// When the grace of a stop in flight is over.
    stop_by: watch::Sender<Option<Instant>>,
    /// Held by the one who starts, updates or removes the container.
    pub act: tokio::sync::Mutex<()>,
    /// `process` of config.json, read when a command is first executed.
    process: OnceLock<Value>,
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
    /// Ids of the images that are mounted, by the name that the config has for them.
    pub mounts: BTreeMap<String, String>,
    /// Namespaces of the pod that it takes part in.
    pub joins: spec::Joins,
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

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Created => "created",
            Phase::Running => "running",
            Phase::Exited => "exited",
        }
    }
}

/// The OCI runtime spec in a bundle.
const CONFIG: &str = "config.json";

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
    /// When the grace of a stop that was begun is over, in nanoseconds since 1970.
    pub stop_by: Option<i64>,
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
            stop_by: watch::Sender::new(None),
            act: tokio::sync::Mutex::default(),
            process: OnceLock::new(),
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

    /// An error that names both, unless the container is in the wanted phase.
    pub fn check_phase(&self, wanted: Phase) -> Result<()> {
        match self.phase() {
            phase if phase == wanted => Ok(()),
            phase => Err(Fault::ContainerState(self.id.clone(), phase.name(), wanted.name()).into()),
        }
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

    /// The OCI runtime spec, from the bundle.
    pub fn spec(&self) -> Result<Value> {
        let path = self.bundle().join(CONFIG);
        let text = fs::read(&path).map_err(Fault::io("read", &path))?;
        serde_json::from_slice(&text).map_err(|e| Fault::io("read", path)(e.into()))
    }

    /// Writes the OCI runtime spec, whole or not at all.
    pub fn write_spec(&self, json: &[u8]) -> Result<()> {
        let path = self.bundle().join(CONFIG);
        let new = path.with_extension("new");
        fs::write(&new, json).and_then(|()| fs::rename(&new, &path)).map_err(Fault::io("write", path))
    }

    /// The OCI process object.
    pub fn process(&self) -> Result<Value> {
        if let Some(process) = self.process.get() {
            return Ok(process.clone());
        }
        let process = self.spec()?["process"].take();
        Ok(self.process.get_or_init(|| process).clone())
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

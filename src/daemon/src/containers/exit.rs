//! What happens when a container's first process has ended: the shim's record is believed, the reason decided, all
//! who wait are told.

use std::{fs, sync::Arc, time::Duration};

use cri_api::v1::ContainerEventType;
use shim_api::rundir::{self, Exit, Init};
use tracing::{info, warn};

use super::{Container, Phase, State, record};
use crate::{
    daemon::{Daemon, now},
    events,
    shim::{self, Ended, Shim},
};

/// Records are small; a larger file is none.
const LARGEST: u64 = 64 << 10;

/// Pause before a wait that failed though the shim lives is begun anew.
const AGAIN: Duration = Duration::from_secs(1);

/// Waits for the exit of a running container. The death of the shim ends the wait too; then the pod's watch
/// reports the exit.
pub fn watch(daemon: &Arc<Daemon>, container: &Arc<Container>, shim: Arc<Shim>) {
    let (daemon, container) = (daemon.clone(), container.clone());
    tokio::spawn(async move {
        while container.phase() == Phase::Running {
            match shim.wait(&container.id).await {
                Ok(ended) => {
                    // The record also knows of the OOM killer; the answer alone must do when it cannot be read.
                    let exit = exit_record(&container).unwrap_or_else(|| told(ended));
                    finish(&daemon, &container, &exit);
                }
                // The shim lives and knows nothing of the container: nobody will ever know more.
                Err(shim::Error::NotFound(_)) => settle(&daemon, &container),
                Err(_) if shim.dead() => return,
                Err(e) if exit_record(&container).is_none() => {
                    warn!(container = %container.id, error = %e, "wait for the exit");
                    tokio::time::sleep(AGAIN).await;
                }
                Err(_) => settle(&daemon, &container),
            }
        }
    });
}

/// Ends a container whose process is known to be gone: by its record or, when there is none, with code 255.
pub fn settle(daemon: &Daemon, container: &Arc<Container>) {
    if container.phase() != Phase::Running {
        return;
    }
    let unknown = Exit { version: rundir::VERSION, code: 255, exited_at: now(), oom: false, known: false };
    finish(daemon, container, &exit_record(container).unwrap_or(unknown));
}

/// Makes an exit known, once.
pub fn finish(daemon: &Daemon, container: &Arc<Container>, exit: &Exit) {
    let first = container.change(|state| {
        let first = state.phase == Phase::Running;
        if first {
            end(state, exit);
        }
        first
    });
    if first {
        info!(container = %container.id, pod = %container.pod.id, code = exit.code, oom = exit.oom, "container exited");
        // The run directory holds the same: not worth waiting for.
        daemon.store.put_later(record::row(container));
        events::emit(daemon, ContainerEventType::ContainerStoppedEvent, container);
    }
}

fn end(state: &mut State, exit: &Exit) {
    state.phase = Phase::Exited;
    state.pid = 0;
    state.stop_by = None;
    state.exit_code = i32::try_from(exit.code).unwrap_or(255);
    // The wall clock may have been set back meanwhile.
    state.finished_at = exit.exited_at.max(state.started_at);
    state.reason = reason(exit).into();
    if !exit.known {
        state.message = "the shim was gone when the process ended: its exit code is not known".into();
    }
}

fn reason(exit: &Exit) -> &'static str {
    match exit {
        Exit { known: false, .. } => "Unknown",
        Exit { oom: true, .. } => "OOMKilled",
        Exit { code: 0, .. } => "Completed",
        _ => "Error",
    }
}

fn told(ended: Ended) -> Exit {
    let exited_at = if ended.at == 0 { now() } else { ended.at };
    Exit { version: rundir::VERSION, code: ended.code, exited_at, oom: false, known: true }
}

/// The record of a container's end, if there is a good one.
pub fn exit_record(container: &Container) -> Option<Exit> {
    read(container, rundir::EXIT)
}

/// The record of a container's first process, if there is a good one.
pub fn init_record(container: &Container) -> Option<Init> {
    read(container, rundir::INIT)
}

fn read<T: serde::de::DeserializeOwned>(container: &Container, name: &str) -> Option<T> {
    let path = container.bundle().join(name);
    if fs::metadata(&path).ok()?.len() > LARGEST {
        return None;
    }
    match rundir::decode(&fs::read(&path).ok()?) {
        Ok(record) => Some(record),
        Err(e) => {
            warn!(container = %container.id, record = %path.display(), error = %e, "set aside");
            let _ = fs::rename(&path, path.with_extension("damaged"));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_an_exit_follows_from_its_record() {
        for (code, oom, known, expected) in [
            (0, false, true, "Completed"),
            (1, false, true, "Error"),
            (137, false, true, "Error"),
            (137, true, true, "OOMKilled"),
            (0, true, true, "OOMKilled"),
            (255, false, false, "Unknown"),
        ] {
            let exit = Exit { version: rundir::VERSION, code, exited_at: 1, oom, known };
            assert_eq!(reason(&exit), expected, "{exit:?}");
        }
    }

    #[test]
    fn a_container_never_finishes_before_it_started() {
        let mut state = State { started_at: 10, phase: Phase::Running, pid: 4, ..State::default() };
        end(&mut state, &Exit { version: rundir::VERSION, code: 3, exited_at: 5, oom: false, known: true });
        assert_eq!((state.finished_at, state.exit_code, state.pid), (10, 3, 0));
    }
}

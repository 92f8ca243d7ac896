//! Runs a container that was created. A failing exec is the error of the call, and the container has ended by it.

use std::sync::Arc;

use cri_api::v1::ContainerEventType;
use tracing::info;

use super::{Container, Phase, exit, record};
use crate::{
    daemon::{Daemon, now},
    error::{Error, Fault, Result},
    events,
    shim::{self, ContainerOptions, Rootfs},
};

/// Exit code of a container whose first process could not be executed.
const NOT_STARTED: i32 = 128;

/// Starts a container; one that runs or has ended is an error.
pub async fn start(daemon: &Arc<Daemon>, id: &str) -> Result<()> {
    let container = daemon.container(id)?;
    let _act = container.act.lock().await;
    let pod = &container.pod;
    if !pod.ready() {
        return Err(Fault::PodNotReady(pod.id.clone()).into());
    }
    container.check_phase(Phase::Created)?;
    if container.look(|state| state.removing) {
        return Err(Fault::NoContainer(id.into()).into());
    }
    let shim = pod.shim().ok_or_else(|| Fault::PodNotReady(pod.id.clone()))?;
    let options = options(daemon, &container)?;
    let rootfs = rootfs(daemon, &container)?;

    match shim.run(&container.id, &container.bundle(), rootfs, options).await {
        Ok(running) => {
            container.change(|state| {
                state.phase = Phase::Running;
                (state.pid, state.started_at) = (running.pid, running.started_at);
            });
            // The shim's record says the same: not worth waiting for.
            daemon.store.put_later(record::row(&container));
            events::emit(daemon, ContainerEventType::ContainerStartedEvent, &container);
            exit::watch(daemon, &container, shim);
            info!(container = %container.id, pod = %pod.id, pid = running.pid, "container started");
            Ok(())
        }
        Err(e) => Err(failed(daemon, &container, e).await),
    }
}

/// Whether the process runs is not known after a deadline, or when the shim is gone: the container stays as it is,
/// and what becomes of it is told by the shim's record. Everything else is the end of it.
async fn failed(daemon: &Arc<Daemon>, container: &Arc<Container>, error: shim::Error) -> Error {
    let reason = match &error {
        shim::Error::Gone => return Fault::shim("start container")(error),
        shim::Error::Invalid(_) | shim::Error::State(_) => "ContainerCannotRun",
        _ => "StartError",
    };
    // Not to be left half-made: whatever of it exists or comes to exist is killed. It can be there already when a
    // start of the last daemon is still under way.
    if let (shim::Error::Deadline | shim::Error::State(_), Some(shim)) = (&error, container.pod.shim()) {
        let _ = shim.signal(&container.id, "", 9, true).await;
        let _ = shim.delete(&container.id).await;
    }
    let why = error.to_string();
    container.change(|state| {
        state.phase = Phase::Exited;
        state.exit_code = NOT_STARTED;
        // A start time of the epoch tells that it never ran; clients want a finish time all the same.
        state.finished_at = now();
        state.reason = reason.into();
        state.message = why.clone();
    });
    daemon.store.put_later(record::row(container));
    events::emit(daemon, ContainerEventType::ContainerStoppedEvent, container);
    match error {
        shim::Error::Deadline => Fault::shim(format!("start container {}", container.id))(error),
        _ => Fault::Start { id: container.id.clone(), why }.into(),
    }
}

fn options(daemon: &Daemon, container: &Container) -> Result<ContainerOptions> {
    let (config, joins) = (&container.config, &container.facts.joins);
    let logged = !container.log_path().is_empty();
    if !joins.pid_of.is_empty() {
        check_target(daemon, container, &joins.pid_of)?;
    }
    Ok(ContainerOptions {
        log_directory: if logged { container.pod.config.log_directory.clone() } else { String::new() },
        log_path: if logged { config.log_path.clone() } else { String::new() },
        max_log_record: daemon.config().logs.max_container_log_line_size,
        join_ipc: joins.ipc,
        join_uts: joins.uts,
        join_net: joins.net,
        join_user: joins.user,
        join_pid: joins.pid,
        join_pid_of: joins.pid_of.clone(),
        pod_shm: joins.shm,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        terminal: config.tty,
        ..ContainerOptions::default()
    })
}

/// The container whose pid namespace is joined must be of the same pod and run.
fn check_target(daemon: &Daemon, container: &Container, id: &str) -> Result<()> {
    let target = daemon.container(id)?;
    if target.pod.id != container.pod.id {
        return Err(Fault::invalid(format!("target container {id} is in another pod")));
    }
    target.check_phase(Phase::Running)
}

/// overlayfs: the image's layers below, the container's own directory above.
fn rootfs(daemon: &Daemon, container: &Container) -> Result<Rootfs> {
    let snapshot = daemon
        .images
        .snapshot(&container.id)
        .ok_or_else(|| Fault::Start { id: container.id.clone(), why: "its writable layer is gone".into() })?;
    let lower: Vec<_> = snapshot.lower.iter().map(|path| path.to_string_lossy()).collect();
    let mut options = vec![
        format!("lowerdir={}", lower.join(":")),
        format!("upperdir={}", snapshot.upper.display()),
        format!("workdir={}", snapshot.work.display()),
    ];
    // The ids of the image are those that the pod's user namespace sees: by a mapping of the mounts, not by a chown.
    if container.pod.user_namespace().is_some() {
        options.push("idmap".into());
    }
    Ok(Rootfs { options })
}

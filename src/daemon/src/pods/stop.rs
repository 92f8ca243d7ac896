//! Ends every process of a pod and gives its network back. May be repeated and begun anew at any point: each step
//! succeeds when there is nothing left to do.

use std::{sync::Arc, time::Duration};

use cri_api::v1::ContainerEventType;
use tokio::time::timeout;
use tracing::{info, warn};

use super::{Phase, Pod, network, record, watch};
use crate::{
    containers::{self, exit},
    daemon::Daemon,
    error::{Fault, Result},
    events, shim,
    store::Change,
    table::Found,
};

/// How long a shim may take to end after it said that it would.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long the news of an exit may be on their way after the shim recorded it.
const NEWS: Duration = Duration::from_secs(2);

/// Stops a pod; unknown ones are stopped.
pub async fn stop(daemon: &Arc<Daemon>, id: &str) -> Result<()> {
    let pod = match daemon.pods.find(id) {
        Found::One(pod) => pod,
        Found::None => return Ok(()),
        Found::Many => return Err(Fault::Ambiguous(id.into()).into()),
    };
    let _act = pod.act.lock().await;
    halt(daemon, &pod).await
}

/// The same for one who holds the pod's `act`.
pub async fn halt(daemon: &Arc<Daemon>, pod: &Arc<Pod>) -> Result<()> {
    if pod.look(|state| state.phase) == Phase::Stopped {
        return Ok(());
    }
    if pod.look(|state| state.phase) != Phase::Stopping {
        pod.change(|state| state.phase = Phase::Stopping);
        daemon.store.put_later(record::row(pod));
    }
    end_processes(daemon, pod).await?;
    network::release(daemon, &pod.id).await?;
    pod.change(|state| state.phase = Phase::Stopped);
    daemon.store.forget(vec![Change::Put(record::row(pod))]).await;
    events::emit_pod(daemon, ContainerEventType::ContainerStoppedEvent, pod);
    info!(pod = %pod.id, "pod stopped");
    Ok(())
}

/// Ends the containers, the namespaces and the shim itself.
pub async fn end_processes(daemon: &Arc<Daemon>, pod: &Arc<Pod>) -> Result<()> {
    let Some(shim) = pod.shim() else {
        watch_out(daemon, pod).await;
        return Ok(());
    };
    match shim.stop_pod(&pod.id).await {
        Ok(()) => {}
        // It never got as far as having a pod, or is dead: force does no harm then.
        Err(shim::Error::Gone | shim::Error::NotFound(_) | shim::Error::State(_)) => {
            kill_shim(daemon, pod).await;
            return Ok(());
        }
        Err(e) => return Err(unstopped(daemon, pod, e)),
    }
    for container in daemon.containers_of(pod) {
        if container.phase() == containers::Phase::Running && timeout(NEWS, container.ended()).await.is_err()
        {
            exit::settle(daemon, &container);
        }
    }
    // From here on the shim's end is no accident.
    pod.set_shim(None);
    if let Err(e) = shim.shut_down(&pod.id).await
        && !matches!(e, shim::Error::Gone)
    {
        warn!(pod = %pod.id, error = %e, "shut down shim");
    }
    if timeout(FAREWELL, shim.ended()).await.is_err() {
        warn!(pod = %pod.id, pid = shim.process.pid, "shim does not end by itself");
        shim.kill();
        shim.ended().await;
    }
    Ok(())
}

/// Ends a shim by force, then what it left behind.
pub async fn kill_shim(daemon: &Arc<Daemon>, pod: &Arc<Pod>) {
    if let Some(shim) = pod.shim() {
        pod.set_shim(None);
        shim.kill();
        // A process that was killed ends; one that cannot ends when its system call does.
        if timeout(FAREWELL, shim.ended()).await.is_err() {
            warn!(pod = %pod.id, pid = shim.process.pid, "shim cannot be killed now");
        }
        watch::clean(daemon, pod).await;
    }
}

/// A pod without a shim whose containers are still on record as running: an earlier daemon died between the two.
async fn watch_out(daemon: &Arc<Daemon>, pod: &Arc<Pod>) {
    let running = |container: &Arc<containers::Container>| container.phase() == containers::Phase::Running;
    if daemon.containers_of(pod).iter().any(running) {
        watch::clean(daemon, pod).await;
    }
}

/// Names the process that is in the way, if it is one that cannot be killed.
fn unstopped(daemon: &Daemon, pod: &Pod, error: shim::Error) -> crate::error::Error {
    let stuck = daemon
        .containers_of(pod)
        .into_iter()
        .find(|container| container.look(|state| state.pid != 0 && shim::letter(state.pid) == Some('D')));
    match (error, stuck) {
        (shim::Error::Deadline, Some(container)) => Fault::Unkillable(container.id.clone()).into(),
        (error, _) => Fault::shim("stop pod")(error),
    }
}

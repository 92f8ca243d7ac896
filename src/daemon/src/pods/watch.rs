//! Notices when a pod's shim dies. A shim that dies takes its pod with it: what is left is ended, the exits are
//! reported as far as they are known, and the network is given back.

use std::sync::Arc;

use tracing::{error, warn};

use super::{Phase, Pod, record, stop};
use crate::{containers::exit, daemon::Daemon, error::Fault, shim::Shim};

/// Watches the shim of a ready pod.
pub fn begin(daemon: &Arc<Daemon>, pod: &Arc<Pod>) {
    let Some(shim) = pod.shim() else { return };
    let (daemon, pod) = (daemon.clone(), pod.clone());
    tokio::spawn(async move {
        shim.ended().await;
        lost(&daemon, &pod, &shim).await;
    });
}

async fn lost(daemon: &Arc<Daemon>, pod: &Arc<Pod>, shim: &Arc<Shim>) {
    let _act = pod.act.lock().await;
    // A stop takes the shim out of the pod before it ends it.
    if !pod.shim().is_some_and(|current| Arc::ptr_eq(&current, shim)) {
        return;
    }
    error!(pod = %pod.id, pid = shim.process.pid, "shim died, ending its pod");
    pod.set_shim(None);
    pod.change(|state| state.phase = Phase::Stopping);
    daemon.store.put_later(record::row(pod));
    clean(daemon, pod).await;
    if let Err(e) = stop::halt(daemon, pod).await {
        warn!(pod = %pod.id, error = %e, "pod of a dead shim is not wholly stopped yet");
    }
}

/// Ends what a dead shim left behind and reports the exits of its containers.
pub async fn clean(daemon: &Arc<Daemon>, pod: &Arc<Pod>) {
    clean_run_directory(daemon, pod).await;
    for container in daemon.containers_of(pod) {
        exit::settle(daemon, &container);
    }
}

/// Ends what a dead shim left behind; the exit records are written afterwards.
pub async fn clean_run_directory(daemon: &Daemon, pod: &Pod) {
    // The handler may be gone from the configuration by now; any shim of ours can clean up.
    let cleaned = match daemon.program(&pod.runtime_handler).or_else(|_| daemon.program("")) {
        Ok(program) => program.clean(&pod.dir, &pod.id).await.map_err(Fault::shim("shim delete")),
        Err(e) => Err(e),
    };
    if let Err(e) = cleaned {
        warn!(pod = %pod.id, error = %e, "clean up after a dead shim");
    }
}

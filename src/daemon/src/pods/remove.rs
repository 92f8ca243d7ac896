//! Forgets a pod, with what containers are left, by force. May be repeated.

use std::sync::Arc;

use cri_api::v1::ContainerEventType;
use tracing::info;

use super::stop;
use crate::{
    containers,
    daemon::{Daemon, blocking},
    error::{Fault, Result},
    events,
    store::{Change, Kind},
    table::Found,
};

/// Removes a pod; unknown ones are removed.
pub async fn remove(daemon: &Arc<Daemon>, id: &str) -> Result<()> {
    let pod = match daemon.pods.find(id) {
        Found::One(pod) => pod,
        Found::None => return Ok(()),
        Found::Many => return Err(Fault::Ambiguous(id.into()).into()),
    };
    let _act = pod.act.lock().await;
    stop::halt(daemon, &pod).await?;
    for container in daemon.containers_of(&pod) {
        containers::remove::forget(daemon, &container).await?;
    }
    let dir = pod.dir.clone();
    match blocking(move || std::fs::remove_dir_all(dir)).await {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Fault::io("remove", &pod.dir)(e)),
        _ => {}
    }
    daemon.store.forget(vec![Change::Drop(Kind::Pod, pod.id.clone())]).await;
    daemon.pods.remove(&pod.id);
    events::emit_pod(daemon, ContainerEventType::ContainerDeletedEvent, &pod);
    info!(pod = %pod.id, "pod removed");
    Ok(())
}

//! Forgets a container, killing it first when it runs. May be repeated and begun anew at any point.

use std::{sync::Arc, time::Duration};

use cri_api::v1::ContainerEventType;
use tracing::info;

use super::{Container, record, spec, stop};
use crate::{
    daemon::{Daemon, blocking},
    error::{Fault, Result},
    events, shim,
    store::{Change, Kind},
    table::Found,
};

/// Removes a container; unknown ones are removed.
pub async fn remove(daemon: &Arc<Daemon>, id: &str) -> Result<()> {
    match daemon.containers.find(id) {
        Found::One(container) => forget(daemon, &container).await,
        Found::None => Ok(()),
        Found::Many => Err(Fault::Ambiguous(id.into()).into()),
    }
}

/// The same for a container at hand.
pub async fn forget(daemon: &Arc<Daemon>, container: &Arc<Container>) -> Result<()> {
    stop::end(daemon, container, Duration::ZERO).await?;
    let _act = container.act.lock().await;
    if daemon.containers.get(&container.id).is_none() {
        return Ok(());
    }
    container.change(|state| state.removing = true);
    daemon.store.put_later(record::row(container));

    if let Some(shim) = container.pod.shim() {
        match shim.delete(&container.id).await {
            // One that never ran is unknown to the shim.
            Ok(()) | Err(shim::Error::NotFound(_) | shim::Error::Gone) => {}
            Err(e) => return Err(Fault::shim(format!("delete container {}", container.id))(e)),
        }
    }
    let (bundle, root, id) = (container.bundle(), daemon.config().root.clone(), container.id.clone());
    let (released, swept) = tokio::join!(
        daemon.images.release(&container.id),
        blocking(move || {
            spec::volumes::remove(&root, &id).map_err(Fault::io("remove volumes of", id))?;
            match std::fs::remove_dir_all(&bundle) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Fault::io("remove", bundle)(e)),
                _ => Ok(()),
            }
        })
    );
    released.map_err(Fault::image("remove writable layer"))?;
    swept?;
    daemon.store.forget(vec![Change::Drop(Kind::Container, container.id.clone())]).await;
    daemon.containers.remove(&container.id);
    events::emit(daemon, ContainerEventType::ContainerDeletedEvent, container);
    info!(container = %container.id, pod = %container.pod.id, "container removed");
    Ok(())
}

//! Has a container's log file opened by its name again, after it was rotated.

use std::sync::Arc;

use super::Phase;
use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// The new file exists when this returns.
pub async fn reopen(daemon: &Arc<Daemon>, id: &str) -> Result<()> {
    let container = daemon.container(id)?;
    container.check_phase(Phase::Running)?;
    let shim = container.pod.shim().ok_or_else(|| Fault::PodNotReady(container.pod.id.clone()))?;
    shim.reopen_log(&container.id)
        .await
        .map_err(Fault::shim(format!("reopen the log of container {}", container.id)))
}

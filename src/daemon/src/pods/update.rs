//! Keeps what resources a whole pod has. Its cgroup belongs to the kubelet, who writes it: nothing to do there.

use std::sync::Arc;

use cri_api::v1;
use tracing::warn;

use super::record;
use crate::{daemon::Daemon, error::Result};

/// Always succeeds for a known pod: an error would make the kubelet give the resize up.
pub async fn update(daemon: &Arc<Daemon>, request: v1::UpdatePodSandboxResourcesRequest) -> Result<()> {
    let pod = daemon.pod(&request.pod_sandbox_id)?;
    pod.change(|state| {
        if request.resources.is_some() {
            state.resources = request.resources;
        }
        if request.overhead.is_some() {
            state.overhead = request.overhead;
        }
    });
    // Nothing else remembers it: kept before the answer.
    if let Err(e) = daemon.store.put(record::row(&pod)).await {
        warn!(pod = %pod.id, error = %e, "resources of the pod are known until the next start only");
    }
    Ok(())
}

//! Keeps the resources of a whole pod.

use std::sync::Arc;

#[allow(unused_imports)]
use cri_api::v1;

use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// Keeps the resources of a whole pod.
pub async fn update(_daemon: &Arc<Daemon>, _request: v1::UpdatePodSandboxResourcesRequest) -> Result<()> {
    Err(Fault::Unsupported("UpdatePodSandboxResources").into())
}

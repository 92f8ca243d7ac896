//! Changes limits of a container.

use std::sync::Arc;

#[allow(unused_imports)]
use cri_api::v1;

use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// Changes limits of a container.
pub async fn update(_daemon: &Arc<Daemon>, _request: v1::UpdateContainerResourcesRequest) -> Result<()> {
    Err(Fault::Unsupported("UpdateContainerResources").into())
}

//! Ends every process of a pod and gives its network back.

use std::sync::Arc;

#[allow(unused_imports)]
use cri_api::v1;

use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// Ends every process of a pod and gives its network back.
pub async fn stop(_daemon: &Arc<Daemon>, _id: &str) -> Result<()> {
    Err(Fault::Unsupported("StopPodSandbox").into())
}

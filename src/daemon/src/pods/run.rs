//! Makes and starts a pod.

use std::sync::Arc;

#[allow(unused_imports)]
use cri_api::v1;

use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// Makes and starts a pod.
pub async fn run(_daemon: &Arc<Daemon>, _request: v1::RunPodSandboxRequest) -> Result<String> {
    Err(Fault::Unsupported("RunPodSandbox").into())
}

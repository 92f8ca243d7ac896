//! Runs a command in a container.

use std::sync::Arc;

#[allow(unused_imports)]
use cri_api::v1;

use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// Runs a command in a container.
pub async fn sync(_daemon: &Arc<Daemon>, _request: v1::ExecSyncRequest) -> Result<v1::ExecSyncResponse> {
    Err(Fault::Unsupported("ExecSync").into())
}

//! Stops a container.

use std::sync::Arc;

#[allow(unused_imports)]
use cri_api::v1;

use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// Stops a container.
pub async fn stop(_daemon: &Arc<Daemon>, _id: &str, _timeout: i64) -> Result<()> {
    Err(Fault::Unsupported("StopContainer").into())
}

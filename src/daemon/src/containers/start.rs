//! Runs a container.

use std::sync::Arc;

#[allow(unused_imports)]
use cri_api::v1;

use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// Runs a container.
pub async fn start(_daemon: &Arc<Daemon>, _id: &str) -> Result<()> {
    Err(Fault::Unsupported("StartContainer").into())
}

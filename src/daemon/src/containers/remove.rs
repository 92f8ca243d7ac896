//! Forgets a container.

use std::sync::Arc;

#[allow(unused_imports)]
use cri_api::v1;

use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// Forgets a container.
pub async fn remove(_daemon: &Arc<Daemon>, _id: &str) -> Result<()> {
    Err(Fault::Unsupported("RemoveContainer").into())
}

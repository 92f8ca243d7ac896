//! Opens a log file anew.

use std::sync::Arc;

#[allow(unused_imports)]
use cri_api::v1;

use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// Opens a log file anew.
pub async fn reopen(_daemon: &Arc<Daemon>, _id: &str) -> Result<()> {
    Err(Fault::Unsupported("ReopenContainerLog").into())
}

//! Makes a container.

use std::sync::Arc;

#[allow(unused_imports)]
use cri_api::v1;

use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// Makes a container.
pub async fn create(_daemon: &Arc<Daemon>, _request: v1::CreateContainerRequest) -> Result<String> {
    Err(Fault::Unsupported("CreateContainer").into())
}

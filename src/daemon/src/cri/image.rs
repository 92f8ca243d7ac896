//! ImageService: one function per call.

use std::sync::Arc;

use crate::daemon::Daemon;

/// The service.
#[derive(Clone)]
pub struct Images(pub Arc<Daemon>);

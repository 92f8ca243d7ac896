//! Tells subscribers of GetContainerEvents what happened to containers.

use std::sync::Arc;

use cri_api::v1;

use crate::{containers::Container, daemon::Daemon};

/// Who listens.
#[derive(Default)]
pub struct Events {}

/// Tells all subscribers; never waits for one.
pub fn emit(_daemon: &Daemon, _kind: v1::ContainerEventType, _container: &Arc<Container>) {}

/// What happens from now on.
pub fn subscribe(
    _daemon: &Daemon,
) -> futures_util::stream::BoxStream<'static, Result<v1::ContainerEventResponse, tonic::Status>> {
    Box::pin(futures_util::stream::pending())
}

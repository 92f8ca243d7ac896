//! Answers the stats calls from cgroupfs.

use std::sync::Arc;

use cri_api::v1;

use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// Usage of one running container.
pub async fn container(_daemon: &Arc<Daemon>, _id: &str) -> Result<v1::ContainerStats> {
    Err(Fault::Unsupported("ContainerStats").into())
}

/// Usage of running containers.
pub async fn containers(
    _daemon: &Arc<Daemon>,
    _filter: Option<v1::ContainerStatsFilter>,
) -> Result<Vec<v1::ContainerStats>> {
    Err(Fault::Unsupported("ListContainerStats").into())
}

/// Usage of one pod.
pub async fn pod(_daemon: &Arc<Daemon>, _id: &str) -> Result<v1::PodSandboxStats> {
    Err(Fault::Unsupported("PodSandboxStats").into())
}

/// Usage of pods.
pub async fn pods(
    _daemon: &Arc<Daemon>,
    _filter: Option<v1::PodSandboxStatsFilter>,
) -> Result<Vec<v1::PodSandboxStats>> {
    Err(Fault::Unsupported("ListPodSandboxStats").into())
}

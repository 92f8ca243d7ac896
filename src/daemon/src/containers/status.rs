//! What clients see of containers. Answers from memory.

use cri_api::v1;

use super::{Container, Facts, Phase};
use crate::{daemon::Daemon, pods::status::selects};

/// The status of a container at hand.
pub fn of(container: &Container) -> v1::ContainerStatus {
    let (state, facts) = (container.state(), &container.facts);
    let user =
        v1::LinuxContainerUser { uid: facts.uid, gid: facts.gid, supplemental_groups: facts.groups.clone() };
    v1::ContainerStatus {
        id: container.id.clone(),
        metadata: container.config.metadata.clone(),
        state: shown(state.phase).into(),
        created_at: container.created_at,
        started_at: state.started_at,
        finished_at: state.finished_at,
        exit_code: state.exit_code,
        image: Some(v1::ImageSpec { image: facts.image_name.clone(), ..image(container) }),
        image_ref: facts.image_ref.clone(),
        reason: state.reason,
        message: state.message,
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
        mounts: container.config.mounts.iter().map(|mount| shown_mount(mount, facts)).collect(),
        log_path: container.log_path(),
        resources: state.resources.map(|linux| v1::ContainerResources { linux: Some(linux), windows: None }),
        image_id: facts.image_id.clone(),
        user: Some(v1::ContainerUser { linux: Some(user) }),
        stop_signal: facts.stop_signal,
    }
}

/// A mount as it was asked for, but an image by its id: the kubelet spares only images from collection whose id it
/// finds here.
fn shown_mount(mount: &v1::Mount, facts: &Facts) -> v1::Mount {
    let mut mount = mount.clone();
    if let Some(image) = &mut mount.image
        && let Some(id) = facts.mounts.get(&image.image)
    {
        (image.image, image.image_ref) = (id.clone(), id.clone());
    }
    mount
}

/// The containers that match every given part of the filter.
pub fn list(daemon: &Daemon, filter: Option<v1::ContainerFilter>) -> Vec<v1::Container> {
    let filter = filter.unwrap_or_default();
    daemon
        .containers
        .with(|container| matches(&filter, container))
        .iter()
        .map(|container| item(container))
        .collect()
}

fn item(container: &Container) -> v1::Container {
    v1::Container {
        id: container.id.clone(),
        pod_sandbox_id: container.pod.id.clone(),
        metadata: container.config.metadata.clone(),
        image: Some(image(container)),
        image_ref: container.facts.image_ref.clone(),
        state: shown(container.phase()).into(),
        created_at: container.created_at,
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
        image_id: container.facts.image_id.clone(),
    }
}

fn image(container: &Container) -> v1::ImageSpec {
    container.config.image.clone().unwrap_or_default()
}

fn matches(filter: &v1::ContainerFilter, container: &Container) -> bool {
    container.id.starts_with(&filter.id)
        && container.pod.id.starts_with(&filter.pod_sandbox_id)
        && filter.state.is_none_or(|wanted| wanted.state() == shown(container.phase()))
        && selects(&filter.label_selector, &container.config.labels)
}

fn shown(phase: Phase) -> v1::ContainerState {
    match phase {
        Phase::Created => v1::ContainerState::ContainerCreated,
        Phase::Running => v1::ContainerState::ContainerRunning,
        Phase::Exited => v1::ContainerState::ContainerExited,
    }
}

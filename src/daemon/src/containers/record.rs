//! A container as a row of the store, and back.

use std::sync::Arc;

use cri_api::v1;
use prost::Message;
use serde::{Deserialize, Serialize};

use super::{Container, Facts, Phase};
use crate::{
    pods::Pod,
    store::{Kind, Row},
};

#[derive(Serialize, Deserialize)]
struct Record {
    pod: String,
    created_at: i64,
    facts: Facts,
    phase: Phase,
    pid: u32,
    started_at: i64,
    finished_at: i64,
    exit_code: i32,
    reason: String,
    message: String,
    removing: bool,
    stop_by: Option<i64>,
}

/// The row of a container as it is now.
pub fn row(container: &Container) -> Row {
    let state = container.state();
    let mut config = container.config.clone();
    if state.resources.is_some() {
        config.linux.get_or_insert_default().resources = state.resources;
    }
    let record = Record {
        pod: container.pod.id.clone(),
        created_at: container.created_at,
        facts: container.facts.clone(),
        phase: state.phase,
        pid: state.pid,
        started_at: state.started_at,
        finished_at: state.finished_at,
        exit_code: state.exit_code,
        reason: state.reason,
        message: state.message,
        removing: state.removing,
        stop_by: state.stop_by,
    };
    Row {
        kind: Kind::Container,
        id: container.id.clone(),
        config: config.encode_to_vec(),
        state: serde_json::to_vec(&record).unwrap_or_default(),
    }
}

/// The container of a row, given how to find its pod.
pub fn read(row: &Row, pod: impl FnOnce(&str) -> Option<Arc<Pod>>) -> Result<Container, String> {
    let config = v1::ContainerConfig::decode(&*row.config).map_err(|e| e.to_string())?;
    let record: Record = serde_json::from_slice(&row.state).map_err(|e| e.to_string())?;
    if !crate::daemon::is_id(&row.id) {
        return Err(format!("{:?} is not an id", row.id));
    }
    let pod = pod(&record.pod).ok_or_else(|| format!("its pod {:?} is not on record", record.pod))?;
    let container = Container::new(row.id.clone(), pod, config, record.created_at, record.facts);
    container.change(|state| {
        state.phase = record.phase;
        state.pid = record.pid;
        state.started_at = record.started_at;
        state.finished_at = record.finished_at;
        state.exit_code = record.exit_code;
        state.reason = record.reason;
        state.message = record.message;
        state.removing = record.removing;
        state.stop_by = record.stop_by;
    });
    Ok(container)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pods::Place;

    fn container() -> Container {
        let pod = Pod::new("cd".repeat(32), Default::default(), String::new(), 1, Place::default());
        let env = v1::KeyValue { key: "A".into(), value: vec![0xff, 0xfe] };
        let config =
            v1::ContainerConfig { envs: vec![env], log_path: "c/0.log".into(), ..Default::default() };
        let facts = Facts {
            image_id: "sha256:1".into(),
            cgroup: "/x/y".into(),
            groups: vec![1, 2],
            ..Facts::default()
        };
        Container::new("ab".repeat(32), Arc::new(pod), config, 5, facts)
    }

    #[test]
    fn a_container_comes_back_from_its_row() {
        let container = container();
        let resources = v1::LinuxContainerResources { memory_limit_in_bytes: 9, ..Default::default() };
        container.change(|state| {
            state.phase = Phase::Exited;
            (state.started_at, state.finished_at, state.exit_code) = (6, 7, 137);
            state.reason = "OOMKilled".into();
            state.resources = Some(resources.clone());
        });
        let pod = container.pod.clone();
        let back = read(&row(&container), |id| (id == pod.id).then(|| pod.clone())).unwrap();
        let state = back.state();
        assert_eq!(
            (state.phase, state.started_at, state.finished_at, state.exit_code),
            (Phase::Exited, 6, 7, 137)
        );
        assert_eq!((state.reason.as_str(), state.resources), ("OOMKilled", Some(resources)));
        assert_eq!((back.facts, back.created_at), (container.facts.clone(), 5));
        assert_eq!(back.config.envs, container.config.envs);
    }

    #[test]
    fn a_row_whose_pod_is_unknown_is_refused_with_a_reason() {
        assert!(read(&row(&container()), |_| None).is_err_and(|why| why.contains("pod")));
    }

    proptest! {
        #[test]
        fn a_row_of_any_bytes_is_read_or_refused(
            config in prop::collection::vec(any::<u8>(), 0..200),
            at in 0usize..1000,
            byte in any::<u8>(),
        ) {
            let container = container();
            let mut row = row(&container);
            let place = at % row.state.len();
            row.state[place] = byte;
            let _ = read(&row, |_| Some(container.pod.clone()));
            let _ = read(&Row { config, ..row }, |_| Some(container.pod.clone()));
        }
    }
}

//! A pod as a row of the store, and back.

use cri_api::v1;
use prost::Message;
use serde::{Deserialize, Serialize};

use super::{Phase, Place, Pod};
use crate::store::{Kind, Row};

#[derive(Serialize, Deserialize)]
struct Record {
    handler: String,
    created_at: i64,
    phase: Phase,
    ips: Vec<String>,
}

/// The row of a pod as it is now.
pub fn row(pod: &Pod) -> Row {
    let state = pod.state();
    let mut config = pod.config.clone();
    if state.resources.is_some() || state.overhead.is_some() {
        let linux = config.linux.get_or_insert_default();
        (linux.resources, linux.overhead) = (state.resources, state.overhead);
    }
    let record = Record {
        handler: pod.runtime_handler.clone(),
        created_at: pod.created_at,
        phase: state.phase,
        ips: state.ips,
    };
    Row {
        kind: Kind::Pod,
        id: pod.id.clone(),
        config: config.encode_to_vec(),
        // A struct of strings and numbers always becomes JSON.
        state: serde_json::to_vec(&record).unwrap_or_default(),
    }
}

/// The pod of a row. `place` says where its files are, given its id and whether it has a network of its own.
pub fn read(row: &Row, place: impl FnOnce(&str, bool) -> Place) -> Result<Pod, String> {
    let config = v1::PodSandboxConfig::decode(&*row.config).map_err(|e| e.to_string())?;
    let record: Record = serde_json::from_slice(&row.state).map_err(|e| e.to_string())?;
    if !crate::daemon::is_id(&row.id) {
        return Err(format!("{:?} is not an id", row.id));
    }
    let mut pod = Pod::new(row.id.clone(), config, record.handler, record.created_at, Place::default());
    Place { dir: pod.dir, netns: pod.netns } = place(&row.id, !pod.host_network());
    pod.change(|state| (state.phase, state.ips) = (record.phase, record.ips));
    Ok(pod)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(network: v1::NamespaceMode) -> Pod {
        let options = v1::NamespaceOption { network: network.into(), ..Default::default() };
        let security =
            v1::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
        let config = v1::PodSandboxConfig {
            hostname: "web".into(),
            linux: Some(v1::LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() }),
            ..Default::default()
        };
        Pod::new("ab".repeat(32), config, "crisp".into(), 7, Place::default())
    }

    fn place(id: &str, network: bool) -> Place {
        Place { dir: format!("/p/{id}").into(), netns: network.then(|| format!("/n/{id}").into()) }
    }

    #[test]
    fn a_pod_comes_back_from_its_row() {
        let pod = pod(v1::NamespaceMode::Pod);
        let resources = v1::LinuxContainerResources { cpu_shares: 5, ..Default::default() };
        pod.change(|state| {
            state.phase = Phase::Ready;
            state.ips = vec!["10.0.0.2".into()];
            state.resources = Some(resources.clone());
        });
        let back = read(&row(&pod), place).unwrap();
        let state = back.state();
        assert_eq!((state.phase, state.ips), (Phase::Ready, vec!["10.0.0.2".to_string()]));
        assert_eq!(state.resources, Some(resources));
        assert_eq!(
            (back.created_at, back.runtime_handler.as_str(), back.config.hostname.as_str()),
            (7, "crisp", "web")
        );
        assert!(back.netns.is_some() && back.dir.ends_with(&pod.id));
    }

    #[test]
    fn a_pod_with_the_hosts_network_has_no_namespace() {
        assert_eq!(read(&row(&pod(v1::NamespaceMode::Node)), place).unwrap().netns, None);
    }

    #[test]
    fn an_odd_row_is_refused_with_a_reason() {
        let good = row(&pod(v1::NamespaceMode::Pod));
        for bad in [
            Row { id: "../../etc".into(), ..good.clone() },
            Row { state: b"{".to_vec(), ..good.clone() },
            Row { config: vec![255; 9], ..good.clone() },
        ] {
            assert!(read(&bad, place).is_err(), "{bad:?}");
        }
    }
}

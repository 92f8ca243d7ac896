//! What clients see of pods. Answers from memory.

use std::collections::HashMap;

use cri_api::v1;

use super::{Phase, Pod};
use crate::daemon::Daemon;

/// The status of a pod at hand.
pub fn of(pod: &Pod) -> v1::PodSandboxStatus {
    let (phase, ips) = pod.look(|state| (state.phase, state.ips.clone()));
    v1::PodSandboxStatus {
        id: pod.id.clone(),
        metadata: pod.config.metadata.clone(),
        state: shown(phase).into(),
        created_at: pod.created_at,
        network: network(&ips),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace { options: Some(pod.namespaces()) }),
        }),
        labels: pod.config.labels.clone(),
        annotations: pod.config.annotations.clone(),
        runtime_handler: pod.runtime_handler.clone(),
    }
}

/// The pods that match every given part of the filter.
pub fn list(daemon: &Daemon, filter: Option<v1::PodSandboxFilter>) -> Vec<v1::PodSandbox> {
    let filter = filter.unwrap_or_default();
    daemon.pods.with(|pod| matches(&filter, pod)).iter().map(|pod| item(pod)).collect()
}

fn item(pod: &Pod) -> v1::PodSandbox {
    v1::PodSandbox {
        id: pod.id.clone(),
        metadata: pod.config.metadata.clone(),
        state: shown(pod.look(|state| state.phase)).into(),
        created_at: pod.created_at,
        labels: pod.config.labels.clone(),
        annotations: pod.config.annotations.clone(),
        runtime_handler: pod.runtime_handler.clone(),
    }
}

fn matches(filter: &v1::PodSandboxFilter, pod: &Pod) -> bool {
    pod.id.starts_with(&filter.id)
        && filter.state.is_none_or(|wanted| wanted.state() == shown(pod.look(|state| state.phase)))
        && selects(&filter.label_selector, &pod.config.labels)
}

/// Whether all wanted labels are there with the wanted values.
pub fn selects(selector: &HashMap<String, String>, labels: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn shown(phase: Phase) -> v1::PodSandboxState {
    match phase {
        Phase::Ready => v1::PodSandboxState::SandboxReady,
        Phase::Creating | Phase::Stopping | Phase::Stopped => v1::PodSandboxState::SandboxNotready,
    }
}

/// Absent with the host's network: an empty address would make the kubelet start the pod anew.
fn network(ips: &[String]) -> Option<v1::PodSandboxNetworkStatus> {
    let (first, others) = ips.split_first()?;
    Some(v1::PodSandboxNetworkStatus {
        ip: first.clone(),
        additional_ips: others.iter().map(|ip| v1::PodIp { ip: ip.clone() }).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::Place;

    fn pod() -> Pod {
        let config = v1::PodSandboxConfig {
            labels: HashMap::from([("app".into(), "web".into()), ("tier".into(), "front".into())]),
            ..Default::default()
        };
        let pod = Pod::new("abc".into(), config, String::new(), 1, Place { dir: "/".into(), netns: None });
        pod.change(|state| state.phase = Phase::Ready);
        pod
    }

    fn filter(id: &str, state: Option<v1::PodSandboxState>, labels: &[(&str, &str)]) -> v1::PodSandboxFilter {
        v1::PodSandboxFilter {
            id: id.into(),
            state: state.map(|state| v1::PodSandboxStateValue { state: state.into() }),
            label_selector: labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        }
    }

    #[test]
    fn every_given_part_of_a_filter_must_match() {
        use v1::PodSandboxState::{SandboxNotready, SandboxReady};
        for (filter, matched) in [
            (filter("", None, &[]), true),
            (filter("ab", None, &[]), true),
            (filter("b", None, &[]), false),
            (filter("abc", Some(SandboxReady), &[("app", "web")]), true),
            (filter("abc", Some(SandboxNotready), &[("app", "web")]), false),
            (filter("", None, &[("app", "web"), ("tier", "back")]), false),
            (filter("", None, &[("none", "")]), false),
        ] {
            assert_eq!(matches(&filter, &pod()), matched, "{filter:?}");
        }
    }

    #[test]
    fn a_pod_with_the_hosts_network_has_no_address() {
        assert_eq!(network(&[]), None);
        let status = network(&["10.0.0.1".into(), "fd00::1".into()]).unwrap();
        assert_eq!((status.ip.as_str(), status.additional_ips.len()), ("10.0.0.1", 1));
    }
}

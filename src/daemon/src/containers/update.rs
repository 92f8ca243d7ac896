//! Changes limits of a container, all or nothing: written to the kernel first, then kept and reported.

use std::sync::Arc;

use cri_api::v1::{self, LinuxContainerResources};
use serde_json::Value;
use tracing::warn;

use super::{Container, Phase, record, spec};
use crate::{
    daemon::Daemon,
    error::{Fault, Result},
};

/// Fields that are zero or empty stay as they are. A container that was not started gets its limits by its start.
pub async fn update(daemon: &Arc<Daemon>, request: v1::UpdateContainerResourcesRequest) -> Result<()> {
    let container = daemon.container(&request.container_id)?;
    let wanted = request.linux.ok_or_else(|| Fault::invalid("linux is missing"))?;
    let _act = container.act.lock().await;
    let host = spec::host::get();
    let asked = container.look(|state| whole(&wanted, state.resources.as_ref()));
    let resources = spec::resources::linux(&asked, host).map_err(|e| Fault::invalid(e.to_string()))?;
    match container.phase() {
        Phase::Created => rewrite(&container, &resources, &wanted)?,
        Phase::Running => {
            let shim = container.pod.shim().ok_or_else(|| Fault::PodNotReady(container.pod.id.clone()))?;
            let json = serde_json::to_vec(&resources).map_err(|e| Fault::invalid(e.to_string()))?;
            shim.update(&container.id, json)
                .await
                .map_err(Fault::shim(format!("update limits of container {}", container.id)))?;
            adjust(&container, wanted.oom_score_adj).await;
        }
        Phase::Exited => container.check_phase(Phase::Running)?,
    }
    container.change(|state| merge(state.resources.get_or_insert_default(), wanted));
    daemon.store.put(record::row(&container)).await?;
    Ok(())
}

/// Memory and swap are limited together: whoever changes one alone leaves the other as it is.
fn whole(
    wanted: &LinuxContainerResources,
    known: Option<&LinuxContainerResources>,
) -> LinuxContainerResources {
    let mut asked = wanted.clone();
    let (memory, swap) = (wanted.memory_limit_in_bytes, wanted.memory_swap_limit_in_bytes);
    match known {
        Some(known) if memory == 0 && swap != 0 => asked.memory_limit_in_bytes = known.memory_limit_in_bytes,
        Some(known) if memory > 0 && swap == 0 => {
            asked.memory_swap_limit_in_bytes = known.memory_swap_limit_in_bytes;
        }
        _ => {}
    }
    asked
}

/// Puts limits into the config.json that the start will read.
fn rewrite(container: &Container, resources: &Value, wanted: &LinuxContainerResources) -> Result<()> {
    let mut spec = container.spec()?;
    overlay(&mut spec["linux"]["resources"], resources);
    if wanted.oom_score_adj != 0 {
        spec["process"]["oomScoreAdj"] =
            spec::resources::oom_score_adj(wanted.oom_score_adj, spec::host::get()).into();
    }
    container.write_spec(&serde_json::to_vec(&spec).map_err(|e| Fault::invalid(e.to_string()))?)
}

/// The OOM score is no cgroup's: it is written to every process of the container. Those that end meanwhile need none.
async fn adjust(container: &Container, wanted: i64) {
    let current =
        container.look(|state| state.resources.as_ref().map_or(0, |resources| resources.oom_score_adj));
    let Some(shim) = container.pod.shim() else { return };
    if wanted == 0 || wanted == current {
        return;
    }
    let score = spec::resources::oom_score_adj(wanted, spec::host::get());
    for pid in shim.pids(&container.id).await.unwrap_or_default() {
        match std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                warn!(container = %container.id, pid, score, error = %e, "OOM score stays as it is");
            }
            _ => {}
        }
    }
}

/// Values of the second replace those of the first; objects are taken key by key, lists as a whole but for
/// hugepage limits, which are one per page size.
fn overlay(old: &mut Value, new: &Value) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            for (key, value) in new {
                match (key.as_str(), old.get_mut(key)) {
                    ("hugepageLimits", Some(Value::Array(old))) => hugepages(old, value),
                    (_, Some(old)) => overlay(old, value),
                    (_, None) => drop(old.insert(key.clone(), value.clone())),
                }
            }
        }
        (old, new) => *old = new.clone(),
    }
}

fn hugepages(old: &mut Vec<Value>, new: &Value) {
    for limit in new.as_array().into_iter().flatten() {
        old.retain(|known| known["pageSize"] != limit["pageSize"]);
        old.push(limit.clone());
    }
}

fn merge(old: &mut LinuxContainerResources, new: LinuxContainerResources) {
    fn number(old: &mut i64, new: i64) {
        if new != 0 {
            *old = new;
        }
    }
    fn text(old: &mut String, new: String) {
        if !new.is_empty() {
            *old = new;
        }
    }
    number(&mut old.cpu_period, new.cpu_period);
    number(&mut old.cpu_quota, new.cpu_quota);
    number(&mut old.cpu_shares, new.cpu_shares);
    number(&mut old.memory_limit_in_bytes, new.memory_limit_in_bytes);
    number(&mut old.oom_score_adj, new.oom_score_adj);
    number(&mut old.memory_swap_limit_in_bytes, new.memory_swap_limit_in_bytes);
    text(&mut old.cpuset_cpus, new.cpuset_cpus);
    text(&mut old.cpuset_mems, new.cpuset_mems);
    for limit in new.hugepage_limits {
        old.hugepage_limits.retain(|known| known.page_size != limit.page_size);
        old.hugepage_limits.push(limit);
    }
    old.unified.extend(new.unified);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn zero_fields_stay_as_they_are() {
        let page = |size: &str, limit| v1::HugepageLimit { page_size: size.into(), limit };
        let mut old = LinuxContainerResources {
            cpu_shares: 512,
            cpu_quota: 10_000,
            memory_limit_in_bytes: 1 << 20,
            cpuset_cpus: "0".into(),
            hugepage_limits: vec![page("2MB", 0), page("1GB", 0)],
            ..Default::default()
        };
        let new = LinuxContainerResources {
            cpu_quota: -1,
            cpuset_cpus: "0-1".into(),
            hugepage_limits: vec![page("2MB", 4)],
            ..Default::default()
        };
        merge(&mut old, new);
        assert_eq!((old.cpu_shares, old.cpu_quota, old.memory_limit_in_bytes), (512, -1, 1 << 20));
        assert_eq!(old.cpuset_cpus, "0-1");
        assert_eq!(old.hugepage_limits, [page("1GB", 0), page("2MB", 4)]);
    }

    #[test]
    fn memory_and_swap_are_changed_together() {
        let pair = |memory, swap| LinuxContainerResources {
            memory_limit_in_bytes: memory,
            memory_swap_limit_in_bytes: swap,
            ..Default::default()
        };
        for (wanted, known, expected) in [
            ((0, 0), (5, 7), (0, 0)),
            ((6, 0), (5, 7), (6, 7)),
            ((0, 9), (5, 7), (5, 9)),
            ((6, 9), (5, 7), (6, 9)),
            ((6, 0), (5, 0), (6, 0)),
            ((-1, 0), (5, 7), (-1, 0)),
        ] {
            let asked = whole(&pair(wanted.0, wanted.1), Some(&pair(known.0, known.1)));
            assert_eq!(asked, pair(expected.0, expected.1), "{wanted:?} {known:?}");
        }
    }

    #[test]
    fn limits_of_a_container_that_was_not_started_go_into_its_spec() {
        let mut old =
            json!({"cpu": {"shares": 2, "quota": 5}, "hugepageLimits": [{"pageSize": "2MB", "limit": 1}]});
        let new = json!({"cpu": {"quota": 7}, "memory": {"limit": 9}, "hugepageLimits": [{"pageSize": "2MB", "limit": 3}]});
        overlay(&mut old, &new);
        let expected = json!({
            "cpu": {"shares": 2, "quota": 7},
            "memory": {"limit": 9},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 3}],
        });
        assert_eq!(old, expected);
    }
}

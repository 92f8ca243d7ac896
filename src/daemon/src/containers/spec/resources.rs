//! Limits of a container as CRI writes them, turned into the `resources` of the OCI spec. The same for a new container
//! and for an update, where what is absent stays as it is.

use cri_api::v1::LinuxContainerResources;
use serde_json::{Value, json};

use super::{Error, Host};

/// `linux.resources` without devices.
pub fn linux(wanted: &LinuxContainerResources, host: &Host) -> Result<Value, Error> {
    let mut resources = json!({});
    let mut cpu = json!({});
    if wanted.cpu_shares < 0 || wanted.cpu_period < 0 {
        return Err(Error::Resource("cpu_shares or cpu_period", "negative".to_owned()));
    }
    for (name, value) in
        [("shares", wanted.cpu_shares), ("period", wanted.cpu_period), ("quota", wanted.cpu_quota)]
    {
        if value != 0 {
            cpu[name] = value.into();
        }
    }
    for (name, list) in [("cpus", &wanted.cpuset_cpus), ("mems", &wanted.cpuset_mems)] {
        if !list.is_empty() {
            cpu[name] = cpu_list(list)?.into();
        }
    }
    put(&mut resources, "cpu", cpu);

    let mut memory = json!({});
    let (limit, swap) = (wanted.memory_limit_in_bytes, wanted.memory_swap_limit_in_bytes);
    if limit != 0 {
        memory["limit"] = limit.into();
    }
    if host.swap {
        if swap > 0 && limit > swap {
            return Err(Error::Resource(
                "memory_swap_limit_in_bytes",
                format!("{swap}, less than memory's {limit}"),
            ));
        }
        // CRI's swap limit is that of memory and swap together. A container that names none must not swap.
        let both = if swap == 0 { limit } else { swap };
        if both != 0 {
            memory["swap"] = both.into();
        }
    }
    put(&mut resources, "memory", memory);

    if host.hugetlb {
        let mut limits = Vec::with_capacity(wanted.hugepage_limits.len().min(16));
        for huge in &wanted.hugepage_limits {
            if !page_size_is_sane(&huge.page_size) {
                return Err(Error::Resource("page_size", huge.page_size.escape_debug().take(40).collect()));
            }
            limits.push(json!({"pageSize": huge.page_size, "limit": huge.limit.min(i64::MAX as u64)}));
        }
        if !limits.is_empty() {
            resources["hugepageLimits"] = limits.into();
        }
    } else if let Some(huge) = wanted.hugepage_limits.iter().find(|huge| huge.limit > 0) {
        // The kubelet fills in 0 for every size of the node: without pages there is nothing to limit.
        return Err(Error::Resource(
            "hugepage_limits",
            format!("{}: this host does not account for it", huge.page_size),
        ));
    }

    if !wanted.unified.is_empty() {
        if !host.unified {
            return Err(Error::Resource("unified", "this host has no cgroup v2 controllers".to_owned()));
        }
        for (key, value) in &wanted.unified {
            if !unified_is_sane(key, value) {
                return Err(Error::Resource("unified", key.escape_debug().take(80).collect()));
            }
        }
        // In order of their names, so that the same wish always gives the same text.
        resources["unified"] = json!(wanted.unified.iter().collect::<std::collections::BTreeMap<_, _>>());
    }
    Ok(resources)
}

/// The score that a process can really be given: less than its parent may needs a capability.
pub fn oom_score_adj(wanted: i64, host: &Host) -> i32 {
    let wanted = i32::try_from(wanted.clamp(-1000, 1000)).unwrap_or(0);
    wanted.max(host.oom_floor)
}

fn put(resources: &mut Value, name: &str, part: Value) {
    if part.as_object().is_some_and(|part| !part.is_empty()) {
        resources[name] = part;
    }
}

/// `0-3,7`: the kernel checks the numbers, we that they are such.
fn cpu_list(list: &str) -> Result<&str, Error> {
    match list.len() <= 4096 && list.bytes().all(|b| b.is_ascii_digit() || b == b',' || b == b'-') {
        true => Ok(list),
        false => Err(Error::Resource("cpuset", list.escape_debug().take(80).collect())),
    }
}

/// `2MB`, `64KB`, `1GB`: it becomes part of a file name.
fn page_size_is_sane(size: &str) -> bool {
    let digits = size.trim_end_matches(|c: char| c.is_ascii_uppercase());
    !digits.is_empty()
        && digits.bytes().all(|b| b.is_ascii_digit())
        && matches!(size.get(digits.len()..), Some("KB" | "MB" | "GB" | "TB"))
}

/// A file of a controller, never one that moves processes or subtrees.
fn unified_is_sane(key: &str, value: &str) -> bool {
    let controller = key.split('.').next().unwrap_or_default();
    key.len() <= 128
        && value.len() <= 4096
        && key.contains('.')
        && !controller.is_empty()
        && controller != "cgroup"
        && key.bytes().all(|b| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b) || b.is_ascii_uppercase()
        })
        && !key.contains("..")
        && !value.contains(['\0', '\n'])
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use cri_api::v1::HugepageLimit;

    use super::*;
    use crate::containers::spec::tests::host;

    fn v2() -> Host {
        Host { unified: true, swap: true, hugetlb: true, ..host() }
    }

    #[test]
    fn what_is_zero_or_empty_is_absent() {
        assert_eq!(linux(&LinuxContainerResources::default(), &v2()).unwrap(), json!({}));
    }

    #[test]
    fn every_limit_finds_its_place() {
        let wanted = LinuxContainerResources {
            cpu_shares: 1024,
            cpu_period: 100_000,
            cpu_quota: -1,
            cpuset_cpus: "0-1,3".into(),
            cpuset_mems: "0".into(),
            memory_limit_in_bytes: 1 << 20,
            hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit: 4 << 20 }],
            unified: HashMap::from([("memory.oom.group".into(), "1".into())]),
            ..Default::default()
        };
        let got = linux(&wanted, &v2()).unwrap();
        assert_eq!(
            got,
            json!({
                "cpu": {"shares": 1024, "period": 100_000, "quota": -1, "cpus": "0-1,3", "mems": "0"},
                "memory": {"limit": 1 << 20, "swap": 1 << 20},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
                "unified": {"memory.oom.group": "1"},
            })
        );
        let read: oci_spec::runtime::LinuxResources = serde_json::from_value(got).unwrap();
        assert_eq!(read.cpu().as_ref().unwrap().quota(), Some(-1));
        assert_eq!(read.hugepage_limits().as_ref().unwrap()[0].limit(), 4 << 20);
    }

    #[test]
    fn swap_is_the_sum_and_off_by_default() {
        for (limit, swap, accounted, expected) in [
            (100, 0, true, json!({"limit": 100, "swap": 100})),
            (100, 300, true, json!({"limit": 100, "swap": 300})),
            (100, -1, true, json!({"limit": 100, "swap": -1})),
            (0, 300, true, json!({"swap": 300})),
            (100, 300, false, json!({"limit": 100})),
        ] {
            let wanted = LinuxContainerResources {
                memory_limit_in_bytes: limit,
                memory_swap_limit_in_bytes: swap,
                ..Default::default()
            };
            let got = linux(&wanted, &Host { swap: accounted, ..v2() }).unwrap();
            assert_eq!(got["memory"], expected, "{limit} {swap}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let unified = |key: &str, value: &str| LinuxContainerResources {
            unified: HashMap::from([(key.into(), value.into())]),
            ..Default::default()
        };
        for wanted in [
            unified("../x.y", "1"),
            unified("cgroup.procs", "1"),
            unified("cgroup.subtree_control", "-memory"),
            unified("memory", "1"),
            unified(".x", "1"),
            unified("memory.max", "1\n2"),
            LinuxContainerResources { cpu_shares: -1, ..Default::default() },
            LinuxContainerResources { cpuset_cpus: "0;rm".into(), ..Default::default() },
            LinuxContainerResources {
                hugepage_limits: vec![HugepageLimit { page_size: "../2MB".into(), limit: 1 }],
                ..Default::default()
            },
            LinuxContainerResources {
                memory_limit_in_bytes: 100,
                memory_swap_limit_in_bytes: 50,
                ..Default::default()
            },
        ] {
            assert!(linux(&wanted, &v2()).is_err(), "{wanted:?}");
        }
        assert!(linux(&unified("memory.high", "1"), &Host { unified: false, ..v2() }).is_err());
    }

    #[test]
    fn hugepages_of_a_host_without_them_matter_only_when_they_are_wanted() {
        let wanted = |limit| LinuxContainerResources {
            hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit }],
            ..Default::default()
        };
        let none = Host { hugetlb: false, ..v2() };
        assert_eq!(linux(&wanted(0), &none).unwrap(), json!({}));
        assert!(linux(&wanted(1), &none).is_err());
    }

    #[test]
    fn a_score_is_clamped_to_what_the_host_permits() {
        for (wanted, floor, expected) in [
            (-998, -1000, -998),
            (-998, 0, 0),
            (500, 0, 500),
            (5000, 0, 1000),
            (i64::MIN, -1000, -1000),
            (0, 100, 100),
        ] {
            assert_eq!(oom_score_adj(wanted, &Host { oom_floor: floor, ..host() }), expected);
        }
    }
}

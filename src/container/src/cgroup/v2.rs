//! Decides what cgroup v2 controllers are told, in terms of a specification that was written for v1. Pure.

use std::borrow::Cow;

use super::Error;
use super::plan::{Now, State, Write, device};
use crate::spec;

/// Everything but devices, which are a BPF program here.
pub(super) fn decide(asked: &spec::LinuxResources, state: State, now: Now) -> Result<Vec<Write>, Error> {
    let mut writes = Vec::new();
    if let Some(cpu) = &asked.cpu {
        cpus(cpu, state, now, &mut writes)?;
    }
    if let Some(memory) = &asked.memory {
        memories(memory, state, now, &mut writes)?;
    }
    if let Some(limit) = asked.pids.as_ref().and_then(|p| p.limit) {
        super::v1::pids(limit, state, &mut writes);
    }
    if let Some(io) = &asked.block_io {
        block_io(io, &mut writes);
    }
    for huge in &asked.hugepage_limits {
        hugetlb(huge, &mut writes)?;
    }
    // net_cls and net_prio have no v2 form: there a BPF program of the network's own does that work.
    super::v1::rdma(asked, &mut writes);
    for (key, value) in &asked.unified {
        writes.push(unified(key, value)?);
    }
    Ok(writes)
}

fn cpus(cpu: &spec::Cpu, state: State, now: Now, writes: &mut Vec<Write>) -> Result<(), Error> {
    let new = state == State::New;
    if cpu.realtime_period.is_some_and(|p| p != 0) || cpu.realtime_runtime.is_some_and(|r| r != 0) {
        return Err(Error::Value {
            what: "cpu.realtimePeriod or cpu.realtimeRuntime".into(),
            why: "cgroup v2 has no realtime limits".into(),
        });
    }
    // An idle group takes no weight, so leaving idle comes before it and entering it after.
    if cpu.idle == Some(0) && !new {
        writes.push(Write::new("cpu", "cpu.idle", 0).soft(true));
    }
    if let Some(weight) = weight(cpu.shares.unwrap_or(0)).filter(|&w| !(new && w == 100)) {
        writes.push(Write::new("cpu", "cpu.weight", weight));
    }
    let quota = cpu.quota.filter(|&q| q != 0);
    let period = cpu.period.filter(|&p| p != 0);
    let max = quota.map(|q| if q < 0 { "max".to_owned() } else { q.to_string() });
    match (max, period) {
        (Some(max), Some(period)) if new && max == "max" && period == 100_000 => {}
        (Some(max), Some(period)) => writes.push(Write::new("cpu", "cpu.max", format!("{max} {period}"))),
        (Some(max), None) if new && max == "max" => {}
        // One number alone leaves the period as it is.
        (Some(max), None) => writes.push(Write::new("cpu", "cpu.max", max)),
        (None, Some(100_000)) if new => {}
        (None, Some(period)) => {
            let in_force = now("cpu", "cpu.max").unwrap_or_default();
            let quota = in_force.split_whitespace().next().unwrap_or("max");
            writes.push(Write::new("cpu", "cpu.max", format!("{quota} {period}")));
        }
        (None, None) => {}
    }
    if let Some(burst) = cpu.burst.filter(|&b| !(new && b == 0)) {
        writes.push(Write::new("cpu", "cpu.max.burst", burst).soft(burst == 0));
    }
    if let Some(idle) = cpu.idle.filter(|&i| i != 0) {
        writes.push(Write::new("cpu", "cpu.idle", idle));
    }
    if !cpu.cpus.is_empty() {
        writes.push(Write::new("cpuset", "cpuset.cpus", &cpu.cpus));
    }
    if !cpu.mems.is_empty() {
        writes.push(Write::new("cpuset", "cpuset.mems", &cpu.mems));
    }
    Ok(())
}

/// Turns v1 shares (2 to 262144, 1024 being normal) into a v2 weight (1 to 10000, 100 being normal).
///
/// The curve of opencontainers/cgroups since runc 1.3.2, which meets all three points; the line used before it
/// gave a normal container 39, less than what systemd gives everything else.
pub fn weight(shares: u64) -> Option<u64> {
    match shares {
        0 => None,
        1..=2 => Some(1),
        262_144.. => Some(10_000),
        _ => {
            // Exact in f64 up to 262144.
            #[allow(clippy::cast_precision_loss)]
            let l = (shares as f64).log2();
            let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            Some(10f64.powf(exponent).ceil() as u64)
        }
    }
}

fn memories(memory: &spec::Memory, state: State, now: Now, writes: &mut Vec<Write>) -> Result<(), Error> {
    let new = state == State::New;
    let limit = memory.limit.filter(|&l| l != 0);
    check_usage(memory, state, now("memory", "memory.current"))?;
    if let Some(asked) = memory.swap.filter(|&s| s != 0).or(limit.filter(|&l| l < 0).map(|_| -1)) {
        let effective = limit.or_else(|| now("memory", "memory.max")?.trim().parse().ok());
        let swap = swap(asked, effective)?;
        if !(new && swap == "max") {
            let soft = swap == "max" || swap == "0";
            writes.push(Write::new("memory", "memory.swap.max", swap).soft(soft));
        }
    }
    if let Some(limit) = limit.filter(|&l| !(new && l < 0)) {
        writes.push(Write::new("memory", "memory.max", bytes(limit)));
    }
    if let Some(reservation) = memory.reservation.filter(|&r| r != 0) {
        writes.push(Write::new("memory", "memory.low", bytes(reservation)));
    }
    // kernel, kernelTCP, swappiness and disableOOMKiller have no v2 form; runc and crun pass over them as well.
    Ok(())
}

/// v1 limits memory and swap together, v2 swap alone.
fn swap(both: i64, limit: Option<i64>) -> Result<String, Error> {
    let refuse = |why: &str| Err(Error::Value { what: format!("memory.swap {both}"), why: why.into() });
    match (both, limit) {
        (-1, _) => Ok("max".to_owned()),
        (..-1, _) => refuse("is negative"),
        (_, None | Some(..0)) => refuse("needs a memory limit"),
        (_, Some(limit)) if both < limit => refuse("is below the memory limit"),
        (_, Some(limit)) => Ok((both - limit).to_string()),
    }
}

fn bytes(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

/// `checkBeforeUpdate`: rather refuse a limit than let the kernel kill for it.
pub(super) fn check_usage(memory: &spec::Memory, state: State, usage: Option<String>) -> Result<(), Error> {
    let (State::Running, Some(true), Some(limit)) = (state, memory.check_before_update, memory.limit) else {
        return Ok(());
    };
    let usage: i64 = usage.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    if limit > 0 && usage > limit {
        return Err(Error::Value {
            what: format!("memory.limit {limit}"),
            why: format!("is below the {usage} bytes in use"),
        });
    }
    Ok(())
}

fn block_io(io: &spec::BlockIo, writes: &mut Vec<Write>) {
    if let Some(value) = io.weight.filter(|&w| w != 0) {
        let general = Write::new("io", "io.weight", format!("default {}", io_weight(value)));
        writes.push(Write::new("io", "io.bfq.weight", value).or(general));
    }
    for entry in &io.weight_device {
        if let Some(value) = entry.weight.filter(|&w| w != 0) {
            let device = device(entry.major, entry.minor);
            let general = Write::line("io", "io.weight", &device, io_weight(value), "default");
            writes.push(Write::line("io", "io.bfq.weight", &device, value, "default").or(general));
        }
    }
    for (key, entries) in [
        ("rbps", &io.throttle_read_bps_device),
        ("wbps", &io.throttle_write_bps_device),
        ("riops", &io.throttle_read_iops_device),
        ("wiops", &io.throttle_write_iops_device),
    ] {
        for entry in entries {
            // v1 wrote 0 for no limit.
            let rate = if entry.rate == 0 { "max".to_owned() } else { entry.rate.to_string() };
            let device = device(entry.major, entry.minor);
            let none = "rbps=max wbps=max riops=max wiops=max";
            writes.push(Write::line("io", "io.max", &device, format!("{key}={rate}"), none));
        }
    }
}

/// 10 to 1000 of v1 on 1 to 10000 of v2.
fn io_weight(v1: u16) -> u64 {
    1 + (u64::from(v1).clamp(10, 1000) - 10) * 9999 / 990
}

fn hugetlb(huge: &spec::HugepageLimit, writes: &mut Vec<Write>) -> Result<(), Error> {
    let size = super::v1::page_size(&huge.page_size)?;
    let soft = huge.limit == 0;
    writes.push(Write::new("hugetlb", format!("hugetlb.{size}.max"), huge.limit).soft(soft));
    writes.push(Write::new("hugetlb", format!("hugetlb.{size}.rsvd.max"), huge.limit).soft(true));
    Ok(())
}

/// A raw `file = value` pair. Files that move processes or shape the tree are ours, whoever asks.
fn unified(key: &str, value: &str) -> Result<Write, Error> {
    let refuse = |why: &str| Err(Error::Value { what: format!("unified[{key}]"), why: why.into() });
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let Some((controller, _)) = key.split_once('.') else { return refuse("is not controller.file") };
    if controller.is_empty() || !key.chars().all(plain) || key.contains("..") {
        return refuse("is not controller.file");
    }
    if controller == "cgroup" && !key.starts_with("cgroup.max.") {
        return refuse("is not a limit");
    }
    // The kubelet sends these neutral values for every container, also where the kernel is too old for the file.
    let soft = matches!(
        (key, value),
        ("memory.min" | "memory.low", "0")
            | ("memory.high" | "memory.swap.max", "max")
            | ("memory.oom.group", _)
    );
    Ok(Write {
        controller: Cow::Owned(controller.to_owned()),
        file: Cow::Owned(key.to_owned()),
        value: value.to_owned(),
        line: None,
        soft,
        or: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decided_with(json: &str, state: State, now: Now) -> Result<Vec<String>, Error> {
        let asked: spec::LinuxResources = serde_json::from_str(json).unwrap();
        Ok(decide(&asked, state, now)?.iter().map(|w| format!("{}={}", w.file, w.value)).collect())
    }

    fn decided(json: &str, state: State) -> Result<Vec<String>, Error> {
        decided_with(json, state, &|_, _| None)
    }

    #[test]
    fn weights_follow_the_curve() {
        let table = [(0, None), (1, Some(1)), (2, Some(1)), (1024, Some(100)), (262_144, Some(10_000))];
        for (shares, expected) in table {
            assert_eq!(weight(shares), expected, "{shares}");
        }
        assert_eq!(weight(u64::MAX), Some(10_000));
        let mut last = 0;
        for shares in 1..=262_144 {
            let now = weight(shares).unwrap();
            assert!((1..=10_000).contains(&now) && now >= last, "{shares}");
            last = now;
        }
    }

    #[test]
    fn swap_is_what_exceeds_the_memory_limit() {
        let limits = |json: &str| decided(&format!(r#"{{"memory":{json}}}"#), State::New);
        assert_eq!(limits(r#"{"limit":100,"swap":100}"#).unwrap(), ["memory.swap.max=0", "memory.max=100"]);
        assert_eq!(limits(r#"{"limit":100,"swap":150}"#).unwrap(), ["memory.swap.max=50", "memory.max=100"]);
        assert_eq!(limits(r#"{"limit":100,"swap":-1}"#).unwrap(), ["memory.max=100"]);
        assert!(limits(r#"{"limit":-1}"#).unwrap().is_empty());
        for bad in [r#"{"swap":100}"#, r#"{"limit":100,"swap":99}"#, r#"{"limit":100,"swap":-2}"#] {
            assert!(limits(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_update_of_swap_alone_takes_the_limit_in_force() {
        let now = |_: &str, file: &str| (file == "memory.max").then(|| "100\n".to_owned());
        let writes = decided_with(r#"{"memory":{"swap":130}}"#, State::Running, &now).unwrap();
        assert_eq!(writes, ["memory.swap.max=30"]);
    }

    #[test]
    fn check_before_update_refuses_what_would_kill() {
        let now = |_: &str, file: &str| (file == "memory.current").then(|| "200\n".to_owned());
        let json = r#"{"memory":{"limit":100,"checkBeforeUpdate":true}}"#;
        assert!(decided_with(json, State::Running, &now).is_err());
        let json = r#"{"memory":{"limit":300,"checkBeforeUpdate":true}}"#;
        assert_eq!(decided_with(json, State::Running, &now).unwrap(), ["memory.max=300"]);
    }

    #[test]
    fn quota_and_period_share_a_file() {
        let cpu = |json: &str, state| decided(&format!(r#"{{"cpu":{json}}}"#), state).unwrap();
        assert_eq!(cpu(r#"{"quota":5000,"period":10000}"#, State::New), ["cpu.max=5000 10000"]);
        assert!(cpu(r#"{"quota":-1,"period":100000,"shares":1024}"#, State::New).is_empty());
        assert_eq!(cpu(r#"{"quota":-1,"period":100000}"#, State::Running), ["cpu.max=max 100000"]);
        assert_eq!(cpu(r#"{"quota":7}"#, State::Running), ["cpu.max=7"]);
        assert_eq!(cpu(r#"{"shares":2}"#, State::New), ["cpu.weight=1"]);
        assert_eq!(cpu(r#"{"period":5000}"#, State::New), ["cpu.max=max 5000"]);
        let now = |_: &str, _: &str| Some("700 100000\n".to_owned());
        let writes = decided_with(r#"{"cpu":{"period":5000}}"#, State::Running, &now).unwrap();
        assert_eq!(writes, ["cpu.max=700 5000"]);
    }

    #[test]
    fn throttles_and_weights_become_io_lines() {
        let json = r#"{"blockIO":{"weight":10,"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":5}],
            "throttleWriteIOPSDevice":[{"major":8,"minor":0,"rate":0}]}}"#;
        assert_eq!(
            decided(json, State::New).unwrap(),
            ["io.bfq.weight=10", "io.max=8:0 rbps=5", "io.max=8:0 wiops=max"]
        );
        assert_eq!([10, 500, 1000].map(io_weight), [1, 4950, 10_000]);
    }

    #[test]
    fn unified_keys_cannot_leave_the_directory_or_move_processes() {
        for bad in
            ["memory", "../memory.max", "a/b.c", "cgroup.procs", "cgroup.kill", ".x", "memory..max", "a.\0"]
        {
            assert!(unified(bad, "1").is_err(), "{bad}");
        }
        assert_eq!(unified("memory.high", "9").unwrap().controller, "memory");
        assert!(unified("cgroup.max.descendants", "9").is_ok());
    }

    #[test]
    fn realtime_is_refused() {
        assert!(decided(r#"{"cpu":{"realtimeRuntime":1000}}"#, State::New).is_err());
    }
}

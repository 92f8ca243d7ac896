//! Decides what cgroup v1 controllers are told. Pure: nothing is read or written here.

use super::Error;
use super::plan::{Now, State, Write, device};
use crate::spec;

/// Everything but devices, which `device` decides.
pub(super) fn decide(asked: &spec::LinuxResources, state: State, now: Now) -> Result<Vec<Write>, Error> {
    if let Some(key) = asked.unified.keys().next() {
        return Err(Error::Value {
            what: format!("unified[{key}]"),
            why: "needs cgroup v2, this host has v1".into(),
        });
    }
    let mut writes = Vec::new();
    if let Some(cpu) = &asked.cpu {
        cpus(cpu, state, &mut writes);
    }
    if let Some(memory) = &asked.memory {
        memories(memory, state, now, &mut writes)?;
    }
    if let Some(limit) = asked.pids.as_ref().and_then(|p| p.limit) {
        pids(limit, state, &mut writes);
    }
    if let Some(io) = &asked.block_io {
        block_io(io, &mut writes);
    }
    for huge in &asked.hugepage_limits {
        hugetlb(huge, &mut writes)?;
    }
    if let Some(network) = &asked.network {
        if let Some(class) = network.class_id.filter(|&c| c != 0) {
            writes.push(Write::new("net_cls", "net_cls.classid", class));
        }
        for interface in &network.priorities {
            writes.push(Write::line(
                "net_prio",
                "net_prio.ifpriomap",
                &interface.name,
                interface.priority,
                "0",
            ));
        }
    }
    rdma(asked, &mut writes);
    Ok(writes)
}

fn cpus(cpu: &spec::Cpu, state: State, writes: &mut Vec<Write>) {
    let new = state == State::New;
    // An idle group takes no shares, so leaving idle comes before them and entering it after.
    if cpu.idle == Some(0) && !new {
        writes.push(Write::new("cpu", "cpu.idle", 0).soft(true));
    }
    // 0 stands for "not asked for" in all of these; 1024, 100 ms and no quota are what a new group has.
    if let Some(shares) = cpu.shares.filter(|&s| s != 0 && !(new && s == 1024)) {
        writes.push(Write::new("cpu", "cpu.shares", shares));
    }
    if let Some(period) = cpu.period.filter(|&p| p != 0 && !(new && p == 100_000)) {
        writes.push(Write::new("cpu", "cpu.cfs_period_us", period));
    }
    if let Some(quota) = cpu.quota.filter(|&q| q != 0 && !(new && q < 0)) {
        writes.push(Write::new("cpu", "cpu.cfs_quota_us", quota.max(-1)));
    }
    if let Some(burst) = cpu.burst.filter(|&b| !(new && b == 0)) {
        writes.push(Write::new("cpu", "cpu.cfs_burst_us", burst).soft(burst == 0));
    }
    if let Some(period) = cpu.realtime_period.filter(|&p| p != 0) {
        writes.push(Write::new("cpu", "cpu.rt_period_us", period));
    }
    if let Some(runtime) = cpu.realtime_runtime.filter(|&r| r != 0) {
        writes.push(Write::new("cpu", "cpu.rt_runtime_us", runtime));
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
}

fn memories(memory: &spec::Memory, state: State, now: Now, writes: &mut Vec<Write>) -> Result<(), Error> {
    let new = state == State::New;
    let limit = memory.limit.filter(|&l| l != 0);
    // No memory limit makes a swap limit that nobody mentioned pointless, and the kernel would refuse the pair.
    let swap = memory.swap.filter(|&s| s != 0).or(limit.filter(|&l| l < 0).map(|_| -1));
    super::v2::check_usage(memory, state, now("memory", "memory.usage_in_bytes"))?;
    if let Some(limit) = limit.filter(|&l| !(new && l < 0)) {
        writes.push(Write::new("memory", "memory.limit_in_bytes", limit.max(-1)));
    }
    if let Some(swap) = swap.filter(|&s| !(new && s < 0)) {
        // Where swap is not accounted, "no more than the memory limit" is not worth failing for.
        let soft = swap < 0 || Some(swap) == limit;
        writes.push(Write::new("memory", "memory.memsw.limit_in_bytes", swap.max(-1)).soft(soft));
    }
    if let Some(reservation) = memory.reservation.filter(|&r| r != 0 && !(new && r < 0)) {
        writes.push(Write::new("memory", "memory.soft_limit_in_bytes", reservation.max(-1)));
    }
    // memory.kernel is not honoured: the kernel dropped kmem limits in 5.16 and they deadlocked before.
    if let Some(tcp) = memory.kernel_tcp.filter(|&t| t != 0 && !(new && t < 0)) {
        writes.push(Write::new("memory", "memory.kmem.tcp.limit_in_bytes", tcp.max(-1)));
    }
    if let Some(swappiness) = memory.swappiness {
        if swappiness > 100 {
            return Err(Error::Value {
                what: format!("memory.swappiness {swappiness}"),
                why: "is not within 0 to 100".into(),
            });
        }
        writes.push(Write::new("memory", "memory.swappiness", swappiness));
    }
    if let Some(disable) = memory.disable_oom_killer.filter(|&d| d || !new) {
        writes.push(Write::new("memory", "memory.oom_control", u8::from(disable)));
    }
    Ok(())
}

pub(super) fn pids(limit: i64, state: State, writes: &mut Vec<Write>) {
    let value = if limit > 0 { limit.to_string() } else { "max".to_owned() };
    if !(state == State::New && value == "max") {
        writes.push(Write::new("pids", "pids.max", value));
    }
}

fn block_io(io: &spec::BlockIo, writes: &mut Vec<Write>) {
    // CFQ's files went in Linux 5.0, BFQ's came in 4.12 under a name of their own.
    let weight = |value: u16| {
        Write::new("blkio", "blkio.weight", value).or(Write::new("blkio", "blkio.bfq.weight", value))
    };
    writes.extend(io.weight.filter(|&w| w != 0).map(weight));
    if let Some(leaf) = io.leaf_weight.filter(|&w| w != 0) {
        writes.push(Write::new("blkio", "blkio.leaf_weight", leaf));
    }
    for entry in &io.weight_device {
        let device = device(entry.major, entry.minor);
        if let Some(value) = entry.weight.filter(|&w| w != 0) {
            let bfq = Write::line("blkio", "blkio.bfq.weight_device", &device, value, "0");
            writes.push(Write::line("blkio", "blkio.weight_device", &device, value, "0").or(bfq));
        }
        if let Some(value) = entry.leaf_weight.filter(|&w| w != 0) {
            writes.push(Write::line("blkio", "blkio.leaf_weight_device", &device, value, "0"));
        }
    }
    for (file, entries) in [
        ("blkio.throttle.read_bps_device", &io.throttle_read_bps_device),
        ("blkio.throttle.write_bps_device", &io.throttle_write_bps_device),
        ("blkio.throttle.read_iops_device", &io.throttle_read_iops_device),
        ("blkio.throttle.write_iops_device", &io.throttle_write_iops_device),
    ] {
        writes.extend(
            entries.iter().map(|e| Write::line("blkio", file, &device(e.major, e.minor), e.rate, "0")),
        );
    }
}

fn hugetlb(huge: &spec::HugepageLimit, writes: &mut Vec<Write>) -> Result<(), Error> {
    let size = page_size(&huge.page_size)?;
    let soft = huge.limit == 0;
    writes.push(Write::new("hugetlb", format!("hugetlb.{size}.limit_in_bytes"), huge.limit).soft(soft));
    // Reservations are charged apart since 5.7; without this a mapping that is reserved and then touched dies by SIGBUS.
    writes.push(Write::new("hugetlb", format!("hugetlb.{size}.rsvd.limit_in_bytes"), huge.limit).soft(true));
    Ok(())
}

/// The kubelet sends `2Mi`, the specification says `2MB`; the kernel's files say `2MB`.
pub(super) fn page_size(name: &str) -> Result<String, Error> {
    let digits = name.len() - name.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let unit = match &name[digits..] {
        "KB" | "Ki" | "KiB" => "KB",
        "MB" | "Mi" | "MiB" => "MB",
        "GB" | "Gi" | "GiB" => "GB",
        _ => "",
    };
    if digits == 0 || digits > 6 || unit.is_empty() {
        return Err(Error::Value { what: format!("huge page size {name:?}"), why: "is not like 2MB".into() });
    }
    Ok(format!("{}{unit}", &name[..digits]))
}

pub(super) fn rdma(asked: &spec::LinuxResources, writes: &mut Vec<Write>) {
    for (device, limit) in &asked.rdma {
        let number = |n: Option<u32>| n.map_or_else(|| "max".to_owned(), |n| n.to_string());
        let value =
            format!("hca_handle={} hca_object={}", number(limit.hca_handles), number(limit.hca_objects));
        writes.push(Write::line("rdma", "rdma.max", device, value, "hca_handle=max hca_object=max"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing(_: &str, _: &str) -> Option<String> {
        None
    }

    fn decided(json: &str, state: State) -> Vec<String> {
        let asked: spec::LinuxResources = serde_json::from_str(json).unwrap();
        let writes = decide(&asked, state, &nothing).unwrap();
        writes.iter().map(|w| format!("{}={}", w.file, w.value)).collect()
    }

    #[test]
    fn a_new_group_is_not_told_what_it_has_already() {
        let json = r#"{"cpu":{"shares":1024,"quota":-1,"period":100000,"burst":0,"idle":0},
            "memory":{"limit":-1,"swap":-1,"disableOOMKiller":false},"pids":{"limit":-1}}"#;
        assert!(decided(json, State::New).is_empty());
    }

    #[test]
    fn a_running_group_is_told_everything_that_was_asked() {
        let json = r#"{"cpu":{"shares":1024,"quota":-1,"period":100000,"idle":0},
            "memory":{"limit":-1,"disableOOMKiller":false},"pids":{"limit":0}}"#;
        assert_eq!(
            decided(json, State::Running),
            [
                "cpu.idle=0",
                "cpu.shares=1024",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=-1",
                "memory.limit_in_bytes=-1",
                "memory.memsw.limit_in_bytes=-1",
                "memory.oom_control=0",
                "pids.max=max"
            ]
        );
    }

    #[test]
    fn entering_idle_comes_after_the_shares() {
        assert_eq!(decided(r#"{"cpu":{"shares":2,"idle":1}}"#, State::New), ["cpu.shares=2", "cpu.idle=1"]);
    }

    #[test]
    fn block_devices_get_a_line_each() {
        let json = r#"{"blockIO":{"weight":100,"weightDevice":[{"major":8,"minor":16,"weight":300}],
            "throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1048576}],
            "throttleWriteIOPSDevice":[{"major":8,"minor":0,"rate":10}]}}"#;
        assert_eq!(
            decided(json, State::New),
            [
                "blkio.weight=100",
                "blkio.weight_device=8:16 300",
                "blkio.throttle.read_bps_device=8:0 1048576",
                "blkio.throttle.write_iops_device=8:0 10"
            ]
        );
    }

    #[test]
    fn page_sizes_are_translated_and_nonsense_is_refused() {
        assert_eq!(page_size("2Mi").unwrap(), "2MB");
        assert_eq!(page_size("1GB").unwrap(), "1GB");
        for bad in ["", "MB", "2", "2MB/../x", "2TB", "99999999MB"] {
            assert!(page_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn unified_keys_are_refused() {
        let asked: spec::LinuxResources = serde_json::from_str(r#"{"unified":{"memory.high":"1"}}"#).unwrap();
        let error = decide(&asked, State::New, &nothing).unwrap_err().to_string();
        assert!(error.contains("memory.high") && error.contains("cgroup v2"), "{error}");
    }
}

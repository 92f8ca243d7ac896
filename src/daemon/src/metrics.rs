//! Answers the metrics calls: one table of descriptors under cAdvisor's names, and a function per metric that takes
//! its values from a sample. Where the figures come from is the business of `stats.rs`; the table never changes.
//!
//! Every metric carries [`LABELS`]; some carry one or two more. A metric that the kernel gives no figure for has no
//! values, as `cri-contract` allows for pressure, huge pages and block devices.

use std::sync::Arc;

use cri_api::v1::{self, MetricType};

use crate::{
    containers::{Container, Phase},
    daemon::Daemon,
    error::Result,
    pods::Pod,
    stats::{
        self,
        cgroupfs::{Extra, MOST_PROCESSES, Stall, Usage},
        interfaces::{self, Counters},
    },
};

/// On every metric: cgroup, container id, image, and what Kubernetes calls container, pod and namespace.
const LABELS: [&str; 6] = ["id", "name", "image", "container", "pod", "namespace"];

/// One metric of a container.
struct Metric {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    /// Behind [`LABELS`].
    labels: &'static [&'static str],
    values: fn(&Sample) -> Vec<Value>,
}

/// One metric of a pod's network interface.
struct NetworkMetric {
    name: &'static str,
    help: &'static str,
    value: fn(&Counters) -> u64,
}

/// Further labels, and a figure.
type Value = (Vec<String>, u64);

/// Everything that is known of a running container at one moment.
#[derive(Default)]
struct Sample {
    usage: Usage,
    extra: Extra,
    inside: Inside,
    layer: Option<v1::FilesystemUsage>,
    disk: Disk,
    limits: v1::LinuxContainerResources,
    started_at: i64,
    now: i64,
}

/// What a look at a container's processes tells.
#[derive(Clone, Copy, Default)]
struct Inside {
    descriptors: u64,
    sockets: u64,
    threads: u64,
    open_files_soft: Option<u64>,
}

/// The file system that holds the writable layer.
#[derive(Clone, Copy, Default)]
struct Disk {
    bytes: u64,
    inodes: u64,
    inodes_free: u64,
}

const NANOSECONDS: u64 = 1_000_000_000;

/// Descriptors that a container's processes have open are counted up to this; beyond it the figure stands still.
const MOST_DESCRIPTORS: u64 = 1 << 20;

fn one(value: u64) -> Vec<Value> {
    vec![(Vec::new(), value)]
}

fn some(value: Option<u64>) -> Vec<Value> {
    value.map(one).unwrap_or_default()
}

fn positive(value: i64) -> u64 {
    u64::try_from(value).unwrap_or_default()
}

fn stalled(stall: Option<Stall>, pick: fn(&Stall) -> u64) -> Vec<Value> {
    some(stall.map(|stall| pick(&stall) / 1_000_000))
}

fn devices(sample: &Sample, pick: fn(&stats::cgroupfs::Device) -> u64) -> Vec<Value> {
    sample.extra.devices.iter().map(|device| (vec![device.number.clone()], pick(device))).collect()
}

const COUNTER: MetricType = MetricType::Counter;
const GAUGE: MetricType = MetricType::Gauge;

macro_rules! metrics {
    ($($name:literal $help:literal $kind:ident [$($label:literal)*] $values:expr;)*) => {
        &[$(Metric { name: $name, help: $help, kind: $kind, labels: &[$($label),*], values: $values }),*]
    };
}

const METRICS: &[Metric] = metrics! {
    "container_cpu_usage_seconds_total" "CPU time used, in seconds." COUNTER ["cpu"]
        |s| vec![(vec!["total".into()], s.usage.cpu / NANOSECONDS)];
    "container_cpu_user_seconds_total" "CPU time used in user mode, in seconds." COUNTER []
        |s| one(s.extra.cpu.user / NANOSECONDS);
    "container_cpu_system_seconds_total" "CPU time used in the kernel, in seconds." COUNTER []
        |s| one(s.extra.cpu.system / NANOSECONDS);
    "container_cpu_cfs_periods_total" "Periods of the CPU quota that have passed." COUNTER []
        |s| one(s.extra.cpu.periods);
    "container_cpu_cfs_throttled_periods_total" "Periods in which the quota was used up." COUNTER []
        |s| one(s.extra.cpu.throttled_periods);
    "container_cpu_cfs_throttled_seconds_total" "Time spent waiting for quota, in seconds." COUNTER []
        |s| one(s.extra.cpu.throttled / NANOSECONDS);
    "container_memory_usage_bytes" "Memory in use, with page cache." GAUGE [] |s| one(s.usage.memory.usage);
    "container_memory_working_set_bytes" "Memory in use that could not be dropped at once." GAUGE []
        |s| one(s.usage.memory.usage.saturating_sub(s.usage.memory.inactive_file));
    "container_memory_rss" "Anonymous memory in use." GAUGE [] |s| one(s.usage.memory.rss);
    "container_memory_cache" "Page cache in use." GAUGE [] |s| one(s.usage.memory.cache);
    "container_memory_mapped_file" "Files mapped into memory, in bytes." GAUGE [] |s| one(s.usage.memory.mapped_file);
    "container_memory_kernel_usage" "Kernel memory in use, in bytes." GAUGE [] |s| one(s.extra.kernel_memory);
    "container_memory_swap" "Swap in use, in bytes." GAUGE [] |s| one(s.usage.memory.swap);
    "container_memory_max_usage_bytes" "Most memory ever in use." GAUGE [] |s| one(s.extra.max_memory);
    "container_memory_failcnt" "How often the memory limit was hit." COUNTER [] |s| one(s.extra.memory_failures);
    "container_memory_failures_total" "Page faults, by kind." COUNTER ["failure_type" "scope"]
        |s| {
            let fault = |kind: &str, value| (vec![kind.to_owned(), "hierarchy".to_owned()], value);
            vec![fault("pgfault", s.usage.memory.page_faults), fault("pgmajfault", s.usage.memory.major_page_faults)]
        };
    "container_oom_events_total" "Processes that the OOM killer took." COUNTER [] |s| one(s.extra.oom_kills);
    "container_processes" "Processes." GAUGE [] |s| one(s.extra.processes);
    "container_threads" "Threads." GAUGE [] |s| one(s.inside.threads);
    "container_threads_max" "Threads allowed; 0 means any number." GAUGE [] |s| one(s.extra.threads_max.unwrap_or(0));
    "container_file_descriptors" "Open descriptors of all processes." GAUGE [] |s| one(s.inside.descriptors);
    "container_sockets" "Open sockets of all processes." GAUGE [] |s| one(s.inside.sockets);
    "container_ulimits_soft" "Soft limits of the first process." GAUGE ["ulimit"]
        |s| s.inside.open_files_soft.map(|v| vec![(vec!["max_open_files".into()], v)]).unwrap_or_default();
    "container_start_time_seconds" "When the container was started, in seconds since 1970." GAUGE []
        |s| one(positive(s.started_at) / NANOSECONDS);
    "container_last_seen" "When these figures were taken, in seconds since 1970." GAUGE []
        |s| one(positive(s.now) / NANOSECONDS);
    "container_spec_cpu_period" "Period of the CPU quota, in microseconds." GAUGE []
        |s| one(positive(s.limits.cpu_period));
    "container_spec_cpu_quota" "CPU quota, in microseconds a period." GAUGE []
        |s| some(Some(positive(s.limits.cpu_quota)).filter(|quota| *quota != 0));
    "container_spec_cpu_shares" "CPU shares." GAUGE [] |s| one(positive(s.limits.cpu_shares));
    "container_spec_memory_limit_bytes" "Memory limit; 0 means none." GAUGE []
        |s| one(s.usage.memory.limit.unwrap_or(0));
    "container_spec_memory_swap_limit_bytes" "Swap limit; 0 means none." GAUGE []
        |s| one(s.usage.memory.swap_limit.unwrap_or(0));
    "container_spec_memory_reservation_limit_bytes" "Memory that is protected from reclaim." GAUGE []
        |s| some(s.limits.unified.get("memory.low").and_then(|low| low.parse().ok()));
    "container_fs_usage_bytes" "Bytes in the writable layer." GAUGE ["device"]
        |s| {
            let used = s.layer.as_ref().and_then(|layer| layer.used_bytes).map(|used| used.value);
            vec![(vec![mountpoint(s)], used.unwrap_or(0))]
        };
    "container_fs_limit_bytes" "Size of the file system that holds the writable layer." GAUGE ["device"]
        |s| vec![(vec![mountpoint(s)], s.disk.bytes)];
    "container_fs_inodes_total" "Inodes of the file system that holds the writable layer." GAUGE ["device"]
        |s| vec![(vec![mountpoint(s)], s.disk.inodes)];
    "container_fs_inodes_free" "Free inodes of the file system that holds the writable layer." GAUGE ["device"]
        |s| vec![(vec![mountpoint(s)], s.disk.inodes_free)];
    "container_fs_reads_total" "Reads from block devices." COUNTER ["device"] |s| devices(s, |d| d.reads);
    "container_fs_reads_bytes_total" "Bytes read from block devices." COUNTER ["device"]
        |s| devices(s, |d| d.read_bytes);
    "container_fs_writes_total" "Writes to block devices." COUNTER ["device"] |s| devices(s, |d| d.writes);
    "container_fs_writes_bytes_total" "Bytes written to block devices." COUNTER ["device"]
        |s| devices(s, |d| d.write_bytes);
    "container_blkio_device_usage_total" "Bytes moved, by device and operation." COUNTER ["device" "operation"]
        |s| {
            let both = |d: &stats::cgroupfs::Device| {
                let value = |what: &str, value| (vec![d.number.clone(), what.to_owned()], value);
                [value("Read", d.read_bytes), value("Write", d.write_bytes)]
            };
            s.extra.devices.iter().flat_map(both).collect()
        };
    "container_hugetlb_usage_bytes" "Huge pages in use." GAUGE ["pagesize"]
        |s| s.extra.huge.iter().map(|h| (vec![h.size.clone()], h.usage)).collect();
    "container_hugetlb_max_usage_bytes" "Most huge pages ever in use." GAUGE ["pagesize"]
        |s| s.extra.huge.iter().filter_map(|h| Some((vec![h.size.clone()], h.max_usage?))).collect();
    "container_pressure_cpu_waiting_seconds_total" "Time in which some task waited for a CPU." COUNTER []
        |s| stalled(s.usage.pressure.cpu, |stall| stall.some.total);
    "container_pressure_cpu_stalled_seconds_total" "Time in which all tasks waited for a CPU." COUNTER []
        |s| stalled(s.usage.pressure.cpu, |stall| stall.full.total);
    "container_pressure_memory_waiting_seconds_total" "Time in which some task waited for memory." COUNTER []
        |s| stalled(s.usage.pressure.memory, |stall| stall.some.total);
    "container_pressure_memory_stalled_seconds_total" "Time in which all tasks waited for memory." COUNTER []
        |s| stalled(s.usage.pressure.memory, |stall| stall.full.total);
    "container_pressure_io_waiting_seconds_total" "Time in which some task waited for a device." COUNTER []
        |s| stalled(s.usage.pressure.io, |stall| stall.some.total);
    "container_pressure_io_stalled_seconds_total" "Time in which all tasks waited for a device." COUNTER []
        |s| stalled(s.usage.pressure.io, |stall| stall.full.total);
};

macro_rules! network {
    ($($name:literal $help:literal $value:expr;)*) => {
        &[$(NetworkMetric { name: $name, help: $help, value: $value }),*]
    };
}

const NETWORK: &[NetworkMetric] = network! {
    "container_network_receive_bytes_total" "Bytes received." |c| c.received.bytes;
    "container_network_receive_packets_total" "Packets received." |c| c.received.packets;
    "container_network_receive_packets_dropped_total" "Received packets that were dropped." |c| c.received.dropped;
    "container_network_receive_errors_total" "Errors while receiving." |c| c.received.errors;
    "container_network_transmit_bytes_total" "Bytes sent." |c| c.sent.bytes;
    "container_network_transmit_packets_total" "Packets sent." |c| c.sent.packets;
    "container_network_transmit_packets_dropped_total" "Packets to send that were dropped." |c| c.sent.dropped;
    "container_network_transmit_errors_total" "Errors while sending." |c| c.sent.errors;
};

/// What metrics there are.
pub fn descriptors() -> Vec<v1::MetricDescriptor> {
    let descriptor = |name: &str, help: &str, labels: &[&str]| v1::MetricDescriptor {
        name: name.into(),
        help: help.into(),
        label_keys: LABELS.iter().chain(labels).map(|label| (*label).to_owned()).collect(),
    };
    let of_containers = METRICS.iter().map(|m| descriptor(m.name, m.help, m.labels));
    of_containers.chain(NETWORK.iter().map(|m| descriptor(m.name, m.help, &["interface"]))).collect()
}

/// Their values for every ready pod and its running containers.
pub async fn pods(daemon: &Arc<Daemon>) -> Result<Vec<v1::PodSandboxMetrics>> {
    let mut answer = Vec::new();
    for pod in daemon.pods.with(Pod::ready) {
        let mut inside = daemon.containers_of(&pod);
        inside.retain(|container| container.phase() == Phase::Running);
        let mut container_metrics = Vec::with_capacity(inside.len());
        for container in &inside {
            let metrics = of_sample(&labels_of(container), &sample(daemon, container).await?);
            container_metrics.push(v1::ContainerMetrics { container_id: container.id.clone(), metrics });
        }
        let counters = interfaces::of_pod(&pod, &inside).await;
        answer.push(v1::PodSandboxMetrics {
            pod_sandbox_id: pod.id.clone(),
            metrics: of_network(&labels_of_pod(&pod), &counters, stats::now()),
            container_metrics,
        });
    }
    Ok(answer)
}

fn of_sample(labels: &[String; 6], sample: &Sample) -> Vec<v1::Metric> {
    let with_labels = |metric: &Metric| {
        let (name, kind) = (metric.name, metric.kind);
        let one = move |(more, value)| filled(name, kind, sample.now, labels, more, value);
        (metric.values)(sample).into_iter().map(one).collect::<Vec<_>>()
    };
    METRICS.iter().flat_map(with_labels).collect()
}

fn of_network(labels: &[String; 6], counters: &[Counters], now: i64) -> Vec<v1::Metric> {
    let each = |metric: &'static NetworkMetric| {
        counters.iter().map(move |counter| {
            filled(metric.name, COUNTER, now, labels, vec![counter.name.clone()], (metric.value)(counter))
        })
    };
    NETWORK.iter().flat_map(each).collect()
}

fn filled(
    name: &str,
    kind: MetricType,
    timestamp: i64,
    labels: &[String; 6],
    more: Vec<String>,
    value: u64,
) -> v1::Metric {
    v1::Metric {
        name: name.into(),
        timestamp,
        metric_type: kind.into(),
        label_values: labels.iter().cloned().chain(more).collect(),
        value: Some(v1::UInt64Value { value }),
    }
}

fn labels_of(container: &Container) -> [String; 6] {
    let pod = container.pod.metadata();
    [
        container.facts.cgroup.clone(),
        container.id.clone(),
        container.facts.image_name.clone(),
        container.metadata().name,
        pod.name,
        pod.namespace,
    ]
}

fn labels_of_pod(pod: &Pod) -> [String; 6] {
    let metadata = pod.metadata();
    [pod.cgroup_parent(), pod.id.clone(), String::new(), "POD".into(), metadata.name, metadata.namespace]
}

async fn sample(daemon: &Arc<Daemon>, container: &Arc<Container>) -> Result<Sample> {
    let (cgroup, state) = (container.facts.cgroup.clone(), container.state());
    let layer = daemon.sampler.layer(daemon, &container.id).await;
    let root = daemon.config().root.clone();
    stats::blocking(daemon, move |hierarchies| Sample {
        usage: hierarchies.usage(&cgroup),
        extra: hierarchies.extra(&cgroup),
        inside: look_inside(&hierarchies.pids(&cgroup), state.pid),
        layer,
        disk: disk(&root),
        limits: state.resources.unwrap_or_default(),
        started_at: state.started_at,
        now: stats::now(),
    })
    .await
}

/// Counts descriptors, sockets and threads. A process that ends meanwhile counts as far as it was seen.
fn look_inside(pids: &[u32], first: u32) -> Inside {
    let mut inside = Inside { open_files_soft: open_files_soft(first), ..Inside::default() };
    for pid in pids.iter().take(MOST_PROCESSES) {
        inside.threads +=
            std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, |tasks| tasks.count() as u64);
        for descriptor in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            if inside.descriptors >= MOST_DESCRIPTORS {
                return inside;
            }
            inside.descriptors += 1;
            let target = std::fs::read_link(descriptor.path()).unwrap_or_default();
            inside.sockets += u64::from(target.as_os_str().as_encoded_bytes().starts_with(b"socket:"));
        }
    }
    inside
}

/// proc(5), /proc/pid/limits: name, soft limit, hard limit, unit.
fn open_files_soft(pid: u32) -> Option<u64> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn disk(at: &std::path::Path) -> Disk {
    let Ok(stat) = rustix::fs::statvfs(at) else { return Disk::default() };
    Disk {
        bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        inodes: stat.f_files,
        inodes_free: stat.f_ffree,
    }
}

fn mountpoint(sample: &Sample) -> String {
    let id = sample.layer.as_ref().and_then(|layer| layer.fs_id.as_ref());
    id.map(|id| id.mountpoint.clone()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// What a kubelet's collectors know, by the kind of promise.
    const OPTIONAL: [&str; 16] = [
        "container_blkio_device_usage_total",
        "container_fs_reads_total",
        "container_fs_reads_bytes_total",
        "container_fs_writes_total",
        "container_fs_writes_bytes_total",
        "container_hugetlb_usage_bytes",
        "container_hugetlb_max_usage_bytes",
        "container_pressure_cpu_stalled_seconds_total",
        "container_pressure_cpu_waiting_seconds_total",
        "container_pressure_memory_stalled_seconds_total",
        "container_pressure_memory_waiting_seconds_total",
        "container_pressure_io_stalled_seconds_total",
        "container_pressure_io_waiting_seconds_total",
        "container_spec_cpu_quota",
        "container_spec_memory_reservation_limit_bytes",
        "container_ulimits_soft",
    ];

    #[test]
    fn there_are_56_metrics_each_with_help_and_a_name_of_its_own() {
        let all = descriptors();
        let names: std::collections::HashSet<_> = all.iter().map(|d| d.name.clone()).collect();
        assert_eq!((all.len(), names.len()), (56, 56));
        assert!(all.iter().all(|d| !d.help.is_empty() && d.label_keys.len() >= LABELS.len()));
    }

    #[test]
    fn every_value_has_as_many_labels_as_its_descriptor_and_only_optional_metrics_have_none() {
        let labels = [const { String::new() }; 6];
        let mut values = of_sample(&labels, &Sample::default());
        values.extend(of_network(&labels, &[Counters::default()], 1));
        let mut by_name: HashMap<String, Vec<v1::Metric>> = HashMap::new();
        values.into_iter().for_each(|value| by_name.entry(value.name.clone()).or_default().push(value));
        for descriptor in descriptors() {
            let values = by_name.remove(&descriptor.name).unwrap_or_default();
            assert!(
                !values.is_empty() || OPTIONAL.contains(&descriptor.name.as_str()),
                "{}",
                descriptor.name
            );
            for value in values {
                assert_eq!(value.label_values.len(), descriptor.label_keys.len(), "{}", descriptor.name);
                assert!(value.value.is_some());
            }
        }
        assert!(by_name.is_empty(), "values without a descriptor");
    }
}

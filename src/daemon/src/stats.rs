//! Answers the stats calls from cgroupfs, from the pod's network namespace and from the sizes of writable layers.
//! Waits for no operation in progress: a figure that cannot be had now is left out, one failure is one missing
//! entry. Metrics (`metrics.rs`) start from the same samples.

use std::{
    collections::HashMap,
    num::NonZero,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use cri_api::v1;

use crate::{
    containers::{Container, Phase},
    daemon::Daemon,
    error::{Fault, Result},
    lock::Lock,
    pods::{Pod, status::selects},
};

pub mod cgroupfs;
pub mod interfaces;

use cgroupfs::{Hierarchies, Stall, Usage};

/// Size of a writable layer that is older than this is walked again, in the background.
const LAYER_AGE: Duration = Duration::from_secs(10);

/// CPU use per second is worked out over at least this long.
const CPU_WINDOW: Duration = Duration::from_secs(1);

/// Threads that read for one answer, and the cgroups that are worth another one.
const MOST_READERS: usize = 4;
const LEAST_SHARE: usize = 8;

/// What is kept between two answers.
pub struct Sampler {
    pub hierarchies: Hierarchies,
    cores: Lock<HashMap<String, Cores>>,
    layers: Lock<HashMap<String, Layer>>,
}

/// CPU time of a cgroup at a moment, and the use per second worked out then.
struct Cores {
    at: Instant,
    total: u64,
    per_second: Option<u64>,
}

#[derive(Clone)]
struct Layer {
    at: Instant,
    usage: Option<v1::FilesystemUsage>,
}

impl Default for Sampler {
    fn default() -> Sampler {
        Sampler { hierarchies: Hierarchies::detect(), cores: Lock::default(), layers: Lock::default() }
    }
}

impl Sampler {
    /// Nanoseconds of CPU time used per second, since a sample at least a second old. None at first.
    fn cores(&self, key: &str, total: u64) -> Option<u64> {
        let now = Instant::now();
        let mut known = self.cores.write();
        let Some(before) = known.get_mut(key) else {
            known.insert(key.into(), Cores { at: now, total, per_second: None });
            return None;
        };
        let passed = now.duration_since(before.at);
        if passed >= CPU_WINDOW {
            before.per_second = Some(per_second(total.saturating_sub(before.total), passed));
            (before.at, before.total) = (now, total);
        }
        before.per_second
    }

    /// Forgets what belongs to none of these keys; called with all that live.
    fn keep(&self, live: impl Fn(&str) -> bool) {
        self.cores.write().retain(|key, _| live(key));
        self.layers.write().retain(|key, _| live(key));
    }

    /// Size of a container's writable layer: the last one known, walked again in the background when it is old.
    /// The first time it is walked at once.
    pub async fn layer(&self, daemon: &Arc<Daemon>, id: &str) -> Option<v1::FilesystemUsage> {
        let known = self.layers.read().get(id).cloned();
        match known {
            None => walk(daemon, id).await,
            Some(layer) => {
                if layer.at.elapsed() > LAYER_AGE {
                    // Marked as fresh first, so that one walk is under way, not one per answer.
                    self.layers.write().insert(id.into(), Layer { at: Instant::now(), ..layer.clone() });
                    let (daemon, id) = (daemon.clone(), id.to_owned());
                    tokio::spawn(async move { walk(&daemon, &id).await });
                }
                layer.usage
            }
        }
    }
}

async fn walk(daemon: &Arc<Daemon>, id: &str) -> Option<v1::FilesystemUsage> {
    let usage = daemon.images.snapshot_usage(id).await.ok().map(|usage| v1::FilesystemUsage {
        timestamp: now(),
        fs_id: Some(v1::FilesystemIdentifier { mountpoint: usage.mountpoint.display().to_string() }),
        used_bytes: number(usage.bytes),
        inodes_used: number(usage.inodes),
    });
    daemon.sampler.layers.write().insert(id.into(), Layer { at: Instant::now(), usage: usage.clone() });
    usage
}

/// Usage of one running container.
pub async fn container(daemon: &Arc<Daemon>, id: &str) -> Result<v1::ContainerStats> {
    let container = daemon.container(id)?;
    if container.phase() != Phase::Running {
        return Err(Fault::invalid(format!("container {} is not running: it has no stats", container.id)));
    }
    one_container(daemon, container).await
}

/// Usage of running containers that match every given part of the filter.
pub async fn containers(
    daemon: &Arc<Daemon>,
    filter: Option<v1::ContainerStatsFilter>,
) -> Result<Vec<v1::ContainerStats>> {
    let filter = filter.unwrap_or_default();
    let wanted = daemon.containers.with(|container| {
        container.phase() == Phase::Running
            && container.id.starts_with(&filter.id)
            && container.pod.id.starts_with(&filter.pod_sandbox_id)
            && selects(&filter.label_selector, &container.config.labels)
    });
    let cgroups = wanted.iter().map(|container| container.facts.cgroup.clone()).collect();
    let usages = read(daemon, cgroups).await?;
    let mut stats = Vec::with_capacity(wanted.len());
    for (container, usage) in wanted.iter().zip(usages) {
        stats.push(of_container(daemon, container, &usage).await);
    }
    forget_the_gone(daemon);
    Ok(stats)
}

/// Usage of one pod. The empty id is asked for by a kubelet that wants to know whether we have this call.
pub async fn pod(daemon: &Arc<Daemon>, id: &str) -> Result<v1::PodSandboxStats> {
    of_pod(daemon, daemon.pod(id)?).await
}

/// Usage of ready pods that match every given part of the filter.
pub async fn pods(
    daemon: &Arc<Daemon>,
    filter: Option<v1::PodSandboxStatsFilter>,
) -> Result<Vec<v1::PodSandboxStats>> {
    let filter = filter.unwrap_or_default();
    let wanted = daemon.pods.with(|pod| {
        pod.ready() && pod.id.starts_with(&filter.id) && selects(&filter.label_selector, &pod.config.labels)
    });
    let mut stats = Vec::with_capacity(wanted.len());
    for pod in wanted {
        stats.push(of_pod(daemon, pod).await?);
    }
    forget_the_gone(daemon);
    Ok(stats)
}

async fn one_container(daemon: &Arc<Daemon>, container: Arc<Container>) -> Result<v1::ContainerStats> {
    let usage = read(daemon, vec![container.facts.cgroup.clone()]).await?.pop().unwrap_or_default();
    Ok(of_container(daemon, &container, &usage).await)
}

async fn of_container(daemon: &Arc<Daemon>, container: &Container, usage: &Usage) -> v1::ContainerStats {
    let at = now();
    v1::ContainerStats {
        attributes: Some(v1::ContainerAttributes {
            id: container.id.clone(),
            metadata: Some(container.metadata()),
            labels: container.config.labels.clone(),
            annotations: container.config.annotations.clone(),
        }),
        cpu: Some(cpu(at, usage, daemon.sampler.cores(&container.id, usage.cpu))),
        memory: Some(memory(at, usage)),
        writable_layer: daemon.sampler.layer(daemon, &container.id).await,
        swap: Some(swap(at, usage)),
        io: Some(io(at, usage)),
    }
}

async fn of_pod(daemon: &Arc<Daemon>, pod: Arc<Pod>) -> Result<v1::PodSandboxStats> {
    let inside = daemon.containers_of(&pod);
    let running: Vec<_> =
        inside.into_iter().filter(|container| container.phase() == Phase::Running).collect();
    let mut cgroups = vec![pod.cgroup_parent()];
    cgroups.extend(running.iter().map(|container| container.facts.cgroup.clone()));
    let mut usages = read(daemon, cgroups).await?.into_iter();
    let usage = usages.next().unwrap_or_default();
    let mut containers = Vec::with_capacity(running.len());
    for (container, usage) in running.iter().zip(usages) {
        containers.push(of_container(daemon, container, &usage).await);
    }
    let at = now();
    let processes = processes(daemon, &running).await?;
    Ok(v1::PodSandboxStats {
        attributes: Some(v1::PodSandboxAttributes {
            id: pod.id.clone(),
            metadata: Some(pod.metadata()),
            labels: pod.config.labels.clone(),
            annotations: pod.config.annotations.clone(),
        }),
        linux: Some(v1::LinuxPodSandboxStats {
            cpu: Some(cpu(at, &usage, Some(daemon.sampler.cores(&pod.id, usage.cpu).unwrap_or(0)))),
            memory: Some(memory(at, &usage)),
            network: network(&pod, &running).await,
            process: Some(v1::ProcessUsage { timestamp: at, process_count: number(processes) }),
            containers,
            io: Some(io(at, &usage)),
        }),
        windows: None,
    })
}

/// Counters of the pod's own network; none with the host's.
async fn network(pod: &Pod, running: &[Arc<Container>]) -> Option<v1::NetworkUsage> {
    let counters = interfaces::of_pod(pod, running).await;
    let mut usages = counters.into_iter().map(|counter| v1::NetworkInterfaceUsage {
        name: counter.name,
        rx_bytes: number(counter.received.bytes),
        rx_errors: number(counter.received.errors),
        tx_bytes: number(counter.sent.bytes),
        tx_errors: number(counter.sent.errors),
    });
    let first = usages.next()?;
    Some(v1::NetworkUsage { timestamp: now(), default_interface: Some(first), interfaces: usages.collect() })
}

async fn processes(daemon: &Arc<Daemon>, running: &[Arc<Container>]) -> Result<u64> {
    let cgroups: Vec<_> = running.iter().map(|container| container.facts.cgroup.clone()).collect();
    blocking(daemon, move |hierarchies| cgroups.iter().map(|at| hierarchies.pids(at).len() as u64).sum())
        .await
}

/// Usage of each cgroup, in order. Many are read on several threads.
async fn read(daemon: &Arc<Daemon>, cgroups: Vec<String>) -> Result<Vec<Usage>> {
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(MOST_READERS);
    let share = cgroups.len().div_ceil(threads).max(LEAST_SHARE);
    let readers = cgroups.chunks(share).map(|share| {
        let share = share.to_vec();
        blocking(daemon, move |hierarchies| {
            share.iter().map(|at| hierarchies.usage(at)).collect::<Vec<Usage>>()
        })
    });
    Ok(futures_util::future::try_join_all(readers).await?.concat())
}

/// Reads of cgroupfs take microseconds each, but there are hundreds for one list: not on a thread that serves.
pub async fn blocking<T: Send + 'static>(
    daemon: &Arc<Daemon>,
    read: impl FnOnce(&Hierarchies) -> T + Send + 'static,
) -> Result<T> {
    let daemon = daemon.clone();
    let read = tokio::task::spawn_blocking(move || read(&daemon.sampler.hierarchies));
    read.await.map_err(|_| Fault::Panicked("reading control groups").into())
}

fn forget_the_gone(daemon: &Daemon) {
    daemon.sampler.keep(|key| daemon.containers.get(key).is_some() || daemon.pods.get(key).is_some());
}

fn cpu(timestamp: i64, usage: &Usage, cores: Option<u64>) -> v1::CpuUsage {
    v1::CpuUsage {
        timestamp,
        usage_core_nano_seconds: number(usage.cpu),
        usage_nano_cores: cores.map(|value| v1::UInt64Value { value }),
        psi: usage.pressure.cpu.map(psi),
    }
}

fn memory(timestamp: i64, usage: &Usage) -> v1::MemoryUsage {
    let memory = &usage.memory;
    let working_set = memory.usage.saturating_sub(memory.inactive_file);
    v1::MemoryUsage {
        timestamp,
        working_set_bytes: number(working_set),
        available_bytes: memory.limit.and_then(|limit| number(limit.saturating_sub(working_set))),
        usage_bytes: number(memory.usage),
        rss_bytes: number(memory.rss),
        page_faults: number(memory.page_faults),
        major_page_faults: number(memory.major_page_faults),
        psi: usage.pressure.memory.map(psi),
    }
}

fn swap(timestamp: i64, usage: &Usage) -> v1::SwapUsage {
    let memory = &usage.memory;
    v1::SwapUsage {
        timestamp,
        swap_available_bytes: memory.swap_limit.and_then(|limit| number(limit.saturating_sub(memory.swap))),
        swap_usage_bytes: number(memory.swap),
    }
}

fn io(timestamp: i64, usage: &Usage) -> v1::IoUsage {
    v1::IoUsage { timestamp, psi: usage.pressure.io.map(psi) }
}

/// The kernel counts microseconds, CRI nanoseconds.
fn psi(stall: Stall) -> v1::PsiStats {
    let data = |share: cgroupfs::Share| v1::PsiData {
        total: share.total.saturating_mul(1000),
        avg10: share.avg10,
        avg60: share.avg60,
        avg300: share.avg300,
    };
    v1::PsiStats { full: Some(data(stall.full)), some: Some(data(stall.some)) }
}

fn per_second(used: u64, passed: Duration) -> u64 {
    let nanoseconds = passed.as_nanos().max(1);
    u64::try_from(u128::from(used) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

fn number(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

/// Nanoseconds since 1970.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used() -> Usage {
        let mut usage = Usage::default();
        usage.memory = cgroupfs::Memory {
            usage: 1000,
            inactive_file: 300,
            limit: Some(2000),
            swap: 5,
            swap_limit: Some(4),
            ..Default::default()
        };
        usage
    }

    #[test]
    fn what_is_available_is_the_limit_less_the_working_set() {
        let got = memory(1, &used());
        assert_eq!((got.working_set_bytes, got.available_bytes), (number(700), number(1300)));
        assert_eq!(memory(1, &Usage::default()).available_bytes, None);
        assert_eq!(swap(1, &used()).swap_available_bytes, number(0));
    }

    #[test]
    fn cpu_use_needs_two_samples_a_second_apart() {
        let sampler = Sampler::default();
        assert_eq!(sampler.cores("a", 5), None);
        assert_eq!(sampler.cores("a", 50), None);
        assert_eq!(per_second(500, Duration::from_millis(500)), 1000);
        assert_eq!(per_second(u64::MAX, Duration::from_nanos(1)), u64::MAX);
    }

    #[test]
    fn pressure_is_told_in_nanoseconds() {
        let mut stall = Stall::default();
        stall.full.total = 2;
        assert_eq!(psi(stall).full.unwrap().total, 2000);
    }
}

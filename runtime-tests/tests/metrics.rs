//! The figures for monitoring: metrics under cAdvisor's names, pressure, swap. What the kernel of this machine does
//! not give is said and left out.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use runtime_tests::bed::{Bed, Pod, wait_log};
use runtime_tests::client::{container, resources};
use runtime_tests::image::catalog;
use runtime_tests::run::skipped;
use runtime_tests::traces::cgroup_with;

/// A container that works, holds memory, has written, and has a limit for everything.
async fn busy(bed: &Bed) -> Result<(Pod, String)> {
    bed.client.pull(catalog::TOOLS).await?;
    let pod = bed.pod("busy").await?;
    let script = "dd if=/dev/zero of=/five bs=1M count=5 oflag=direct 2>/dev/null; \
                  dd if=/five of=/dev/null bs=1M iflag=direct 2>/dev/null; hog 20 & i=0; while :; do i=$((i+1)); done";
    let mut config = container("worker", catalog::TOOLS, script);
    *resources(&mut config) = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 << 20,
        ..LinuxContainerResources::default()
    };
    let id = pod.start_with(&config).await?;
    wait_log(&pod.log("worker"), "holding 20 MiB")?;
    Ok((pod, id))
}

/// All metrics of all pods, by name, with their labels by key.
async fn metrics(bed: &Bed) -> Result<BTreeMap<String, Vec<(BTreeMap<String, String>, u64)>>> {
    let mut runtime = bed.client.runtime.clone();
    let known =
        runtime.list_metric_descriptors(ListMetricDescriptorsRequest {}).await?.into_inner().descriptors;
    let keys: BTreeMap<&str, &[String]> =
        known.iter().map(|d| (d.name.as_str(), d.label_keys.as_slice())).collect();
    let pods =
        runtime.list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {}).await?.into_inner().pod_metrics;
    let mut found: BTreeMap<String, Vec<_>> =
        keys.keys().map(|name| ((*name).to_owned(), Vec::new())).collect();
    for metric in pods.into_iter().flat_map(|pod| {
        pod.metrics.into_iter().chain(pod.container_metrics.into_iter().flat_map(|of| of.metrics))
    }) {
        let keys =
            keys.get(metric.name.as_str()).with_context(|| format!("{} has no descriptor", metric.name))?;
        assert_eq!(keys.len(), metric.label_values.len(), "labels of {}", metric.name);
        let labels = keys.iter().cloned().zip(metric.label_values).collect();
        let value = metric.value.with_context(|| format!("{} has no value", metric.name))?.value;
        found.entry(metric.name).or_default().push((labels, value));
    }
    Ok(found)
}

/// Whether the kernel has lines of `major:minor` for what a container did past the page cache.
fn counts_devices(id: &str) -> bool {
    ["io.stat", "blkio.throttle.io_service_bytes"]
        .iter()
        .filter_map(|file| std::fs::read_to_string(cgroup_with(id, file)?.join(file)).ok())
        .any(|text| text.contains(':'))
}

/// What the kernel gives no figures for on this machine.
fn absent(name: &str, id: &str) -> bool {
    let has = |file: &str| cgroup_with(id, file).is_some();
    match name {
        "container_pressure_cpu_waiting_seconds_total" | "container_pressure_cpu_stalled_seconds_total" => {
            !has("cpu.pressure")
        }
        "container_pressure_memory_waiting_seconds_total"
        | "container_pressure_memory_stalled_seconds_total" => !has("memory.pressure"),
        "container_pressure_io_waiting_seconds_total" | "container_pressure_io_stalled_seconds_total" => {
            !has("io.pressure")
        }
        "container_hugetlb_usage_bytes" => !has("hugetlb.2MB.usage_in_bytes") && !has("hugetlb.2MB.current"),
        "container_hugetlb_max_usage_bytes" => !has("hugetlb.2MB.max_usage_in_bytes"),
        // Kernels of late count on cgroup v1 only for devices that have a limit.
        "container_blkio_device_usage_total" => !counts_devices(id),
        name if name.starts_with("container_fs_reads") || name.starts_with("container_fs_writes") => {
            !counts_devices(id)
        }
        // Without memory.low there is no reservation.
        "container_spec_memory_reservation_limit_bytes" => true,
        _ => false,
    }
}

#[tokio::test]
async fn every_metric_has_values_with_the_labels_that_it_promises() -> Result<()> {
    let bed = Bed::new().await?;
    let (pod, id) = busy(&bed).await?;
    let all = metrics(&bed).await?;
    ensure!(all.len() == 56, "{} metrics", all.len());
    let plain = |labels: &BTreeMap<String, String>, key: &str| labels.get(key).cloned().unwrap_or_default();
    for (name, values) in &all {
        if values.is_empty() {
            ensure!(absent(name, &id), "{name} has no value");
            skipped(name, "there is nothing to tell here");
            continue;
        }
        let of_network = name.starts_with("container_network");
        for (labels, _) in values {
            assert_eq!(
                (plain(labels, "pod").as_str(), plain(labels, "namespace").as_str()),
                ("busy", "tests")
            );
            match of_network {
                true => {
                    assert_eq!(
                        (plain(labels, "container"), plain(labels, "name")),
                        ("POD".into(), pod.id.clone())
                    );
                    assert_eq!(plain(labels, "interface"), "eth0");
                }
                false => {
                    assert_eq!(
                        (plain(labels, "container"), plain(labels, "name")),
                        ("worker".into(), id.clone())
                    );
                    assert_eq!(plain(labels, "image"), catalog::TOOLS);
                    ensure!(plain(labels, "id").ends_with(&id), "{name}: {labels:?}");
                }
            }
        }
        let mut labels: Vec<_> = values.iter().map(|(labels, _)| labels).collect();
        labels.sort();
        labels.dedup();
        assert_eq!(labels.len(), values.len(), "{name}: two values have the same labels");
    }
    let value = |name: &str| all[name].first().map_or(0, |(_, value)| *value);
    let mib = 1 << 20;
    for (name, from, to) in [
        ("container_spec_memory_limit_bytes", 64 * mib, 64 * mib),
        ("container_spec_cpu_quota", 50_000, 50_000),
        ("container_spec_cpu_period", 100_000, 100_000),
        ("container_spec_cpu_shares", 512, 512),
        ("container_memory_rss", 20 * mib, 40 * mib),
        ("container_memory_working_set_bytes", 20 * mib, 64 * mib),
        ("container_memory_usage_bytes", 20 * mib, 64 * mib),
        ("container_memory_max_usage_bytes", 20 * mib, 65 * mib),
        ("container_fs_usage_bytes", 5 * mib, 8 * mib),
        ("container_processes", 2, 2),
        ("container_threads", 2, 2),
        ("container_file_descriptors", 6, 20),
        ("container_sockets", 0, 0),
        ("container_oom_events_total", 0, 0),
        ("container_ulimits_soft", 1, 1 << 30),
    ] {
        ensure!((from..=to).contains(&value(name)), "{name} is {}", value(name));
    }
    if counts_devices(&id) {
        let written: u64 = all["container_fs_writes_bytes_total"].iter().map(|(_, value)| value).sum();
        ensure!(written >= 5 * mib, "{written} bytes are written to devices");
    }
    let started = bed.client.status(&id).await?.started_at / 1_000_000_000;
    assert_eq!(value("container_start_time_seconds"), started.cast_unsigned());
    let faults: Vec<_> =
        all["container_memory_failures_total"].iter().map(|(l, _)| plain(l, "failure_type")).collect();
    assert_eq!(faults, ["pgfault", "pgmajfault"]);
    Ok(())
}

#[tokio::test]
async fn counters_grow_and_end_with_their_container() -> Result<()> {
    let bed = Bed::new().await?;
    let (pod, id) = busy(&bed).await?;
    let before = metrics(&bed).await?;
    let gateway = bed.client.sh(&id, "ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'").await?;
    bed.client.sh(&id, &format!("ping -c 3 -i 0.1 {gateway} >/dev/null")).await?;
    let grown = [
        "container_cpu_usage_seconds_total",
        "container_cpu_cfs_periods_total",
        "container_cpu_cfs_throttled_periods_total",
        "container_memory_failures_total",
        "container_network_receive_bytes_total",
        "container_network_receive_packets_total",
        "container_network_transmit_bytes_total",
        "container_network_transmit_packets_total",
        "container_last_seen",
    ];
    let end = tokio::time::Instant::now() + Duration::from_secs(15);
    let after = loop {
        let now = metrics(&bed).await?;
        let still: Vec<_> = grown.iter().filter(|name| now[**name][0].1 <= before[**name][0].1).collect();
        if still.is_empty() {
            break now;
        }
        ensure!(tokio::time::Instant::now() < end, "these do not grow: {still:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    for name in before.keys().filter(|name| name.ends_with("_total")) {
        for ((labels, old), (_, new)) in before[name].iter().zip(&after[name]) {
            ensure!(new >= old, "{name} {labels:?} went from {old} to {new}");
        }
    }
    bed.client.stop(&id, 0).await?;
    let ended = metrics(&bed).await?;
    assert!(ended["container_cpu_usage_seconds_total"].is_empty(), "a container that ended has metrics");
    ensure!(!ended["container_network_receive_bytes_total"].is_empty(), "the pod's network is gone");
    pod.remove().await?;
    ensure!(metrics(&bed).await?.values().all(Vec::is_empty), "a pod that was removed has metrics");
    Ok(())
}

#[tokio::test]
async fn an_oom_kill_is_counted_while_the_container_lives_on() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::TOOLS).await?;
    let pod = bed.host_pod("survivor").await?;
    let mut config = container("c", catalog::TOOLS, "hog 200; hog 200; echo twice; exec sleep 1000");
    *resources(&mut config) = LinuxContainerResources {
        memory_limit_in_bytes: 24 << 20,
        memory_swap_limit_in_bytes: 24 << 20,
        ..LinuxContainerResources::default()
    };
    let id = pod.start_with(&config).await?;
    wait_log(&pod.log("c"), "twice")?;
    let all = metrics(&bed).await?;
    let value = |name: &str| all[name].first().map_or(0, |(_, value)| *value);
    assert_eq!(value("container_oom_events_total"), 2);
    assert_eq!(bed.client.status(&id).await?.state, ContainerState::ContainerRunning as i32);
    Ok(())
}

#[tokio::test]
async fn pressure_is_reported_where_the_kernel_measures_it() -> Result<()> {
    let bed = Bed::new().await?;
    let (pod, id) = busy(&bed).await?;
    let stats = bed.client.stats(&id).await?;
    let (cpu, memory, io) =
        (stats.cpu.and_then(|c| c.psi), stats.memory.and_then(|m| m.psi), stats.io.and_then(|i| i.psi));
    for (file, found) in [("cpu.pressure", cpu), ("memory.pressure", memory), ("io.pressure", io)] {
        let Some(at) = cgroup_with(&id, file) else {
            skipped(file, "the kernel gives none for cgroups here");
            ensure!(found.is_none(), "{file} was made up");
            continue;
        };
        let found = found.with_context(|| format!("no figures of {file}"))?;
        let (some, full) = (found.some.context("no some")?, found.full.context("no full")?);
        let text = std::fs::read_to_string(at.join(file))?;
        let total = |kind: &str| -> Result<u64> {
            let line = text.lines().find(|line| line.starts_with(kind)).context("no such line")?;
            Ok(line.rsplit_once("total=").context("no total")?.1.parse::<u64>()? * 1000)
        };
        // Read later, so not less; nanoseconds here, microseconds there.
        ensure!(some.total <= total("some")? && full.total <= total("full")?, "{file}: {some:?} {full:?}");
        if file == "cpu.pressure" {
            ensure!(total("some")? - some.total < 10_000_000_000, "{some:?} is not what {text} says");
        }
    }
    let request = PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let stats = bed.client.runtime.clone().pod_sandbox_stats(request).await?.into_inner().stats;
    let linux = stats.and_then(|stats| stats.linux).context("nothing about Linux")?;
    for (file, found) in [
        ("cpu.pressure", linux.cpu.and_then(|c| c.psi)),
        ("memory.pressure", linux.memory.and_then(|m| m.psi)),
        ("io.pressure", linux.io.and_then(|i| i.psi)),
    ] {
        assert_eq!(found.is_some(), cgroup_with(&id, file).is_some(), "{file} of the pod");
    }
    Ok(())
}

#[tokio::test]
async fn swap_is_reported_as_usage_and_what_is_left() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("swap").await?;
    let limited = |name: &str, memory: i64, swap: i64| {
        let mut config = container(name, catalog::SMALL, "exec sleep 1000");
        *resources(&mut config) = LinuxContainerResources {
            memory_limit_in_bytes: memory,
            memory_swap_limit_in_bytes: swap,
            ..LinuxContainerResources::default()
        };
        config
    };
    let accounted =
        |id: &str| cgroup_with(id, "memory.memsw.limit_in_bytes").or(cgroup_with(id, "memory.swap.max"));
    for (name, memory, both, left) in [
        ("none", 0, 0, None),
        ("no-swap", 32 << 20, 0, Some(0)),
        ("some", 32 << 20, 48 << 20, Some(16 << 20)),
    ] {
        let id = pod.start_with(&limited(name, memory, both)).await?;
        let swap = bed.client.stats(&id).await?.swap.context("no swap")?;
        if accounted(&id).is_none() {
            skipped("swap", "the kernel does not account for it here");
            continue;
        }
        assert_eq!(swap.swap_usage_bytes.map(|v| v.value), Some(0), "{name}");
        assert_eq!(swap.swap_available_bytes.map(|v| v.value), left, "{name}");
        ensure!(swap.timestamp > 0);
    }
    Ok(())
}

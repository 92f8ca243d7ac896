//! Limits, what happens at them, and the figures about them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use runtime_tests::bed::Bed;
use runtime_tests::client::{container, host_pod, resources};
use runtime_tests::image::catalog;
use runtime_tests::traces::{self, cgroup_file, cgroup_with};

/// The weight that cgroup v2 has for shares (cgroup v1 keeps the shares).
fn shares_read_as(shares: &str, weight: &str, id: &str) -> Result<()> {
    match cgroup_file(id, &["cpu.shares"]) {
        Ok(found) => assert_eq!(found, shares),
        Err(_) => assert_eq!(cgroup_file(id, &["cpu.weight"])?, weight),
    }
    Ok(())
}

#[tokio::test]
async fn limits_reach_the_kernel_and_can_be_changed() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("limits").await?;
    let mut config = container("c", catalog::SMALL, "exec sleep 1000");
    *resources(&mut config) = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 1024,
        memory_limit_in_bytes: 64 << 20,
        oom_score_adj: 500,
        cpuset_cpus: "0".into(),
        ..LinuxContainerResources::default()
    };
    let id = pod.start_with(&config).await?;
    let memory = || cgroup_file(&id, &["memory.limit_in_bytes", "memory.max"]);
    assert_eq!(memory()?, (64 << 20).to_string());
    shares_read_as("1024", "100", &id)?;
    assert_eq!(cgroup_file(&id, &["cpuset.cpus"])?, "0");
    assert_eq!(bed.client.sh(&id, "cat /proc/1/oom_score_adj").await?, "500");
    let quota = cgroup_file(&id, &["cpu.cfs_quota_us", "cpu.max"])?;
    ensure!(quota.starts_with("50000"), "the quota is {quota}");

    let half =
        LinuxContainerResources { memory_limit_in_bytes: 32 << 20, ..LinuxContainerResources::default() };
    bed.client.update(&id, half).await?;
    assert_eq!(memory()?, (32 << 20).to_string());
    // What an update does not name stays.
    let reported = bed.client.status(&id).await?.resources.and_then(|r| r.linux).context("no resources")?;
    assert_eq!(
        (reported.memory_limit_in_bytes, reported.cpu_shares, reported.cpu_quota),
        (32 << 20, 1024, 50_000)
    );
    let more =
        LinuxContainerResources { cpu_shares: 2048, cpu_quota: -1, ..LinuxContainerResources::default() };
    bed.client.update(&id, more).await?;
    shares_read_as("2048", "159", &id)?;
    let quota = cgroup_file(&id, &["cpu.cfs_quota_us", "cpu.max"])?;
    ensure!(quota.starts_with("-1") || quota.starts_with("max"), "the quota is {quota}");
    Ok(())
}

#[tokio::test]
async fn an_update_that_the_kernel_refuses_changes_nothing() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("atomic").await?;
    let mut config = container("c", catalog::SMALL, "exec sleep 1000");
    *resources(&mut config) = LinuxContainerResources {
        cpu_shares: 512,
        memory_limit_in_bytes: 64 << 20,
        ..LinuxContainerResources::default()
    };
    let id = pod.start_with(&config).await?;
    let bad = LinuxContainerResources {
        memory_limit_in_bytes: 48 << 20,
        cpu_shares: 256,
        cpuset_cpus: "4000".into(),
        ..LinuxContainerResources::default()
    };
    ensure!(bed.client.update(&id, bad).await.is_err(), "CPU 4000 was accepted");
    assert_eq!(cgroup_file(&id, &["memory.limit_in_bytes", "memory.max"])?, (64 << 20).to_string());
    let reported = bed.client.status(&id).await?.resources.and_then(|r| r.linux).context("no resources")?;
    assert_eq!((reported.memory_limit_in_bytes, reported.cpu_shares), (64 << 20, 512));
    Ok(())
}

#[tokio::test]
async fn a_container_that_is_only_created_gets_an_update_at_its_start() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("early").await?;
    let config = container("c", catalog::SMALL, "exec sleep 1000");
    let id = bed.client.create(&pod.id, &config, &pod.config).await?;
    let limit =
        LinuxContainerResources { memory_limit_in_bytes: 40 << 20, ..LinuxContainerResources::default() };
    bed.client.update(&id, limit).await?;
    bed.client.start(&id).await?;
    assert_eq!(cgroup_file(&id, &["memory.limit_in_bytes", "memory.max"])?, (40 << 20).to_string());
    Ok(())
}

#[tokio::test]
async fn out_of_memory_is_called_by_its_name() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::TOOLS).await?;
    let pod = bed.host_pod("hungry").await?;
    let limited = |name: &str, script: &str| {
        let mut config = container(name, catalog::TOOLS, script);
        *resources(&mut config) = LinuxContainerResources {
            memory_limit_in_bytes: 24 << 20,
            memory_swap_limit_in_bytes: 24 << 20,
            ..LinuxContainerResources::default()
        };
        config
    };
    let id = pod.start_with(&limited("init", "exec hog 200")).await?;
    let status = bed.client.wait_exit(&id).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    // Killed by hand: the same code, another reason.
    let id = pod.start_with(&limited("innocent", "exec sleep 1000")).await?;
    bed.client.stop(&id, 0).await?;
    let status = bed.client.status(&id).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    // Within its limit.
    let id = pod.start_with(&limited("modest", "exec hog 8")).await?;
    runtime_tests::bed::wait_log(&pod.log("modest"), "holding 8 MiB")?;
    assert_eq!(bed.client.status(&id).await?.state, ContainerState::ContainerRunning as i32);
    Ok(())
}

#[tokio::test]
async fn out_of_memory_is_called_by_its_name_a_hundred_times() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::TOOLS).await?;
    let pod = bed.host_pod("crowd").await?;
    let lanes = (0..8).map(|lane| {
        let (client, pod) = (bed.client.clone(), pod.clone());
        tokio::spawn(async move {
            for number in (lane..100).step_by(8) {
                // Every second one is only the parent of the one that is killed, and tells so.
                let script = if number % 2 == 0 { "exec hog 200" } else { "hog 200; exit $?" };
                let mut config = container(&format!("c{number}"), catalog::TOOLS, script);
                resources(&mut config).memory_limit_in_bytes = 24 << 20;
                let id = pod.start_with(&config).await?;
                let status = client.wait_exit(&id).await?;
                let end = (status.exit_code, status.reason.as_str());
                ensure!(end == (137, "OOMKilled"), "container {number} ended with {end:?}");
                client.remove(&id).await?;
            }
            Ok(())
        })
    });
    for lane in lanes.collect::<Vec<_>>() {
        lane.await??;
    }
    Ok(())
}

/// A cgroup in every hierarchy, as the kubelet makes one for a pod.
struct Parent(String);

impl Parent {
    fn new(bed: &Bed) -> Result<Parent> {
        let name = bed.daemon.dir().file_name().context("no name")?.to_string_lossy().into_owned();
        for root in traces::hierarchies() {
            std::fs::create_dir(root.join(&name))?;
        }
        Ok(Parent(name))
    }

    fn limit(&self, bytes: u64) -> Result<()> {
        for file in ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max"] {
            for path in traces::hierarchies().into_iter().map(|root| root.join(&self.0).join(file)) {
                if path.exists() {
                    std::fs::write(&path, bytes.to_string())
                        .with_context(|| format!("write {}", path.display()))?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        for root in traces::hierarchies() {
            std::fs::remove_dir(root.join(&self.0)).ok();
        }
    }
}

#[tokio::test]
async fn a_pod_that_is_out_of_memory_tells_which_container_paid() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::TOOLS).await?;
    let parent = Parent::new(&bed)?;
    parent.limit(48 << 20)?;
    let mut config = host_pod("limited");
    config.linux.get_or_insert_default().cgroup_parent = format!("/{}", parent.0);
    let pod = bed.run(config).await?;
    let modest = pod.start("modest", "exec sleep 1000").await?;
    ensure!(
        cgroup_with(&modest, "memory.stat")
            .is_some_and(|at| at.parent().is_some_and(|p| p.ends_with(&parent.0))),
        "the container is not below its pod's cgroup"
    );
    let mut hungry = container("hungry", catalog::TOOLS, "exec hog 200");
    // The kubelet's scores make the larger one the victim; here the limit of the pod is all there is.
    resources(&mut hungry).oom_score_adj = 900;
    let id = pod.start_with(&hungry).await?;
    let status = bed.client.wait_exit(&id).await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    assert_eq!(bed.client.status(&modest).await?.state, ContainerState::ContainerRunning as i32);
    pod.remove().await?;
    // What the kubelet made is the kubelet's: it is empty and still there.
    for root in traces::hierarchies().into_iter().map(|root| root.join(&parent.0)) {
        let inside =
            std::fs::read_dir(&root)?.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).count();
        assert_eq!(inside, 0, "{} holds cgroups", root.display());
    }
    Ok(())
}

#[tokio::test]
async fn a_small_memory_limit_is_enough_for_a_small_container() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("tiny").await?;
    let mut config = container("c", catalog::SMALL, "exit 0");
    resources(&mut config).memory_limit_in_bytes = 8 << 20;
    assert_eq!(pod.output(&config).await?.0, 0);
    Ok(())
}

#[tokio::test]
async fn statistics_follow_what_a_container_does() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::TOOLS).await?;
    let pod = bed.pod("stats").await?;
    let script = "dd if=/dev/zero of=/tmp/five bs=1M count=5 2>/dev/null; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; exec hog 20";
    let id = pod.start_with(&container("c", catalog::TOOLS, script)).await?;
    runtime_tests::bed::wait_log(&pod.log("c"), "holding 20 MiB")?;
    let stats = bed.client.stats(&id).await?;
    let attributes = stats.attributes.context("no attributes")?;
    assert_eq!(
        (attributes.id.as_str(), attributes.metadata.map(|m| m.name)),
        (id.as_str(), Some("c".to_owned()))
    );
    let cpu = stats.cpu.and_then(|c| c.usage_core_nano_seconds).context("no CPU time")?.value;
    ensure!(cpu > 10_000_000, "{cpu} ns of CPU for a hundred thousand turns");
    let memory = stats.memory.context("no memory")?;
    let used = memory.working_set_bytes.context("no working set")?.value;
    ensure!((20 << 20..60 << 20).contains(&used), "a working set of {used} bytes with 20 MiB held");
    ensure!(memory.usage_bytes.is_some(), "no usage");
    let layer = stats.writable_layer.context("no writable layer")?;
    let (bytes, inodes) =
        (layer.used_bytes.context("no bytes")?.value, layer.inodes_used.context("no inodes")?.value);
    ensure!(
        (5 << 20..8 << 20).contains(&bytes) && inodes >= 1,
        "{bytes} bytes and {inodes} inodes with 5 MiB written"
    );

    let request = PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let stats = bed
        .client
        .runtime
        .clone()
        .pod_sandbox_stats(request)
        .await?
        .into_inner()
        .stats
        .context("no stats")?;
    let linux = stats.linux.context("nothing about Linux")?;
    ensure!(linux.cpu.is_some() && linux.memory.is_some(), "no CPU or no memory of the pod");
    assert_eq!(linux.containers.len(), 1);
    let network = linux.network.and_then(|n| n.default_interface).context("no default interface")?;
    assert_eq!(network.name, "eth0");
    ensure!(linux.process.and_then(|p| p.process_count).is_some_and(|n| n.value >= 1), "no processes");

    bed.client.stop(&id, 0).await?;
    assert!(bed.client.list_stats().await?.is_empty(), "a container that ended has statistics");
    Ok(())
}

#[tokio::test]
async fn every_process_of_a_container_is_in_its_cgroup_and_ends_with_it() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("family").await?;
    let id = pod.start("c", "for i in 1 2 3 4 5; do setsid sleep 2000.5 & done; exec sleep 1000").await?;
    bed.client.exec(&id, &["sh", "-c", "setsid sleep 2000.5 >/dev/null 2>&1 &"], 5).await?;
    let all = || traces::all_processes().filter(|pid| traces::command_line(*pid) == "sleep 2000.5").count();
    runtime_tests::run::until("six children", Duration::from_secs(5), || Ok((all() == 6).then_some(())))?;
    bed.client.stop(&id, 0).await?;
    runtime_tests::run::until("no children", Duration::from_secs(2), || Ok((all() == 0).then_some(())))?;
    Ok(())
}

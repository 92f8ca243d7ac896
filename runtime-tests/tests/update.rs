//! Limits that are changed in place: in the kernel at once, in the status, and still there for the next daemon.

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use runtime_tests::bed::{Bed, process};
use runtime_tests::client::{self, container, refused_with, resources};
use runtime_tests::image::catalog;
use runtime_tests::run::skipped;
use runtime_tests::traces::{cgroup_file, cgroup_with};
use serde_json::Value;
use tonic::Code;

const MIB: i64 = 1 << 20;

async fn reported(bed: &Bed, id: &str) -> Result<LinuxContainerResources> {
    bed.client.status(id).await?.resources.and_then(|r| r.linux).context("no resources in the status")
}

/// Memory, and memory and swap together, as the kernel has them. None: swap is not accounted for.
fn memory(id: &str) -> Result<(i64, Option<i64>)> {
    let limit: i64 = cgroup_file(id, &["memory.limit_in_bytes", "memory.max"])?.parse()?;
    let swap = match cgroup_with(id, "memory.swap.max") {
        Some(_) => Some(cgroup_file(id, &["memory.swap.max"])?.parse::<i64>()? + limit),
        None => {
            cgroup_file(id, &["memory.memsw.limit_in_bytes"]).ok().map(|text| text.parse()).transpose()?
        }
    };
    Ok((limit, swap))
}

#[tokio::test]
async fn memory_and_swap_change_in_every_direction() -> Result<()> {
    let mut bed = Bed::new().await?;
    let pod = bed.host_pod("memory").await?;
    let limits = |memory: i64, swap: i64| LinuxContainerResources {
        memory_limit_in_bytes: memory * MIB,
        memory_swap_limit_in_bytes: swap * MIB,
        ..LinuxContainerResources::default()
    };
    let mut config = container("c", catalog::SMALL, "exec sleep 1000");
    *resources(&mut config) = limits(64, 0);
    let id = pod.start_with(&config).await?;
    let swap = memory(&id)?.1.is_some();
    if !swap {
        skipped("limits of swap", "the kernel does not account for it here");
    }
    // What is asked for; what the kernel has then, both together; what the status says of swap.
    for (asked, memory_now, both, told) in [
        // Who names no swap has none, whatever the memory.
        (limits(128, 0), 128, 128, 0),
        (limits(32, 0), 32, 32, 0),
        (limits(64, 96), 64, 96, 96),
        (limits(128, 160), 128, 160, 160),
        (limits(32, 48), 32, 48, 48),
        // Each alone leaves the other as it is.
        (limits(0, 64), 32, 64, 64),
        (limits(48, 0), 48, 64, 64),
    ] {
        bed.client.update(&id, asked.clone()).await.with_context(|| format!("{asked:?}"))?;
        let (found, found_both) = memory(&id)?;
        assert_eq!(found, memory_now * MIB, "{asked:?}");
        ensure!(found_both.is_none_or(|found| found == both * MIB), "{asked:?}: {found_both:?}");
        let said = reported(&bed, &id).await?;
        assert_eq!(
            (said.memory_limit_in_bytes, said.memory_swap_limit_in_bytes),
            (memory_now * MIB, told * MIB)
        );
    }
    if swap {
        refused_with(bed.client.update(&id, limits(128, 0)).await, Code::InvalidArgument, "swap")?;
        refused_with(bed.client.update(&id, limits(0, 16)).await, Code::InvalidArgument, "swap")?;
    }
    let before = reported(&bed, &id).await?;
    bed.daemon.kill()?;
    bed.restart().await?;
    assert_eq!(reported(&bed, &id).await?, before);
    assert_eq!(memory(&id)?.0, 48 * MIB);
    Ok(())
}

#[tokio::test]
async fn less_memory_than_is_in_use_is_refused_and_kills_nobody() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::TOOLS).await?;
    let pod = bed.host_pod("squeezed").await?;
    let mut config = container("c", catalog::TOOLS, "exec hog 24");
    resources(&mut config).memory_limit_in_bytes = 64 * MIB;
    let id = pod.start_with(&config).await?;
    runtime_tests::bed::wait_log(&pod.log("c"), "holding 24 MiB")?;
    let less =
        LinuxContainerResources { memory_limit_in_bytes: 12 * MIB, ..LinuxContainerResources::default() };
    client::refused(bed.client.update(&id, less).await)?;
    assert_eq!(memory(&id)?.0, 64 * MIB);
    assert_eq!(reported(&bed, &id).await?.memory_limit_in_bytes, 64 * MIB);
    let enough =
        LinuxContainerResources { memory_limit_in_bytes: 40 * MIB, ..LinuxContainerResources::default() };
    bed.client.update(&id, enough).await?;
    assert_eq!(memory(&id)?.0, 40 * MIB);
    assert_eq!(bed.client.status(&id).await?.state, ContainerState::ContainerRunning as i32);
    Ok(())
}

#[tokio::test]
async fn processors_and_the_score_change_in_place() -> Result<()> {
    let mut bed = Bed::new().await?;
    let pod = bed.host_pod("processors").await?;
    let mut config = container("c", catalog::SMALL, "sleep 1000.4375 & exec sleep 1000.5625");
    *resources(&mut config) = LinuxContainerResources {
        cpuset_cpus: "0-1".into(),
        cpu_shares: 100,
        oom_score_adj: 500,
        ..LinuxContainerResources::default()
    };
    let id = pod.start_with(&config).await?;
    for (asked, cpus) in [("0", "0"), ("1", "1"), ("", "1"), ("0,1", "0-1")] {
        let change = LinuxContainerResources {
            cpuset_cpus: asked.into(),
            cpuset_mems: "0".into(),
            ..LinuxContainerResources::default()
        };
        bed.client.update(&id, change).await?;
        assert_eq!(cgroup_file(&id, &["cpuset.cpus"])?, cpus);
        let allowed = bed.client.sh(&id, "sed -n 's/^Cpus_allowed_list:.//p' /proc/1/status").await?;
        assert_eq!(allowed, cpus);
    }
    let change = LinuxContainerResources {
        cpu_period: 50_000,
        cpu_quota: 25_000,
        oom_score_adj: 900,
        ..LinuxContainerResources::default()
    };
    bed.client.update(&id, change).await?;
    let quota = cgroup_file(&id, &["cpu.cfs_quota_us", "cpu.max"])?;
    ensure!(quota.starts_with("25000"), "the quota is {quota}");
    for part in ["sleep 1000.4375", "sleep 1000.5625"] {
        let score = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", process(part)?))?;
        assert_eq!(score.trim(), "900", "{part}");
    }
    let whole = LinuxContainerResources {
        cpu_period: 50_000,
        cpu_quota: 25_000,
        cpu_shares: 100,
        oom_score_adj: 900,
        cpuset_cpus: "0,1".into(),
        cpuset_mems: "0".into(),
        ..LinuxContainerResources::default()
    };
    assert_eq!(reported(&bed, &id).await?, whole);
    bed.daemon.kill()?;
    bed.restart().await?;
    assert_eq!(reported(&bed, &id).await?, whole);
    Ok(())
}

#[tokio::test]
async fn huge_pages_are_limited_where_they_are_accounted_for() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("huge").await?;
    let pages = |limit| LinuxContainerResources {
        hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit }],
        ..LinuxContainerResources::default()
    };
    let mut config = container("c", catalog::SMALL, "exec sleep 1000");
    *resources(&mut config) = pages(0);
    let id = pod.start_with(&config).await?;
    let files = ["hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"];
    match cgroup_file(&id, &files) {
        Ok(none) => {
            assert_eq!(none, "0");
            bed.client.update(&id, pages(4 << 20)).await?;
            assert_eq!(cgroup_file(&id, &files)?, (4 << 20).to_string());
            assert_eq!(reported(&bed, &id).await?.hugepage_limits, pages(4 << 20).hugepage_limits);
        }
        // The kubelet fills in 0 for every size of the node: only a wish for pages must not be passed over.
        Err(_) => {
            skipped("limits of huge pages", "this host has no hugetlb controller");
            bed.client.update(&id, pages(0)).await?;
            refused_with(bed.client.update(&id, pages(4 << 20)).await, Code::InvalidArgument, "2MB")?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn updates_of_nothing_and_of_nobody_are_told_apart() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("nothing").await?;
    let mut config = container("c", catalog::SMALL, "exec sleep 1000");
    resources(&mut config).cpu_shares = 300;
    let id = pod.start_with(&config).await?;
    let before = reported(&bed, &id).await?;
    bed.client.update(&id, LinuxContainerResources::default()).await?;
    assert_eq!(reported(&bed, &id).await?, before);
    let nobody = bed.client.update(&"e".repeat(64), LinuxContainerResources::default()).await;
    refused_with(nobody, Code::NotFound, "")?;
    for (what, bad) in [
        ("cpuset", LinuxContainerResources { cpuset_cpus: "0;1".into(), ..before.clone() }),
        ("cpu_shares", LinuxContainerResources { cpu_shares: -5, ..before.clone() }),
    ] {
        refused_with(bed.client.update(&id, bad).await, Code::InvalidArgument, what)?;
    }
    assert_eq!(reported(&bed, &id).await?, before);
    bed.client.stop(&id, 0).await?;
    refused_with(bed.client.update(&id, before).await, Code::FailedPrecondition, "exited")
}

/// What a verbose status tells of a pod's resources: memory limit and CPU shares of the pod and of its overhead.
async fn of_pod(bed: &Bed, id: &str) -> Result<Value> {
    let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
    let info = bed.client.runtime.clone().pod_sandbox_status(request).await?.into_inner().info;
    let info: Value = serde_json::from_str(info.get("info").context("no info")?)?;
    let linux = &info["config"]["linux"];
    let two = |part: &Value| serde_json::json!([part["memory_limit_in_bytes"], part["cpu_shares"]]);
    Ok(serde_json::json!([two(&linux["resources"]), two(&linux["overhead"])]))
}

#[tokio::test]
async fn resources_of_a_pod_are_kept_and_its_cgroup_is_left_to_the_kubelet() -> Result<()> {
    let mut bed = Bed::new().await?;
    let limits = |memory: i64, shares: i64| {
        Some(LinuxContainerResources {
            memory_limit_in_bytes: memory * MIB,
            cpu_shares: shares,
            ..LinuxContainerResources::default()
        })
    };
    let mut config = client::host_pod("whole");
    let linux = config.linux.get_or_insert_default();
    (linux.resources, linux.overhead) = (limits(256, 512), limits(10, 20));
    let pod = bed.run(config).await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    let expected = |a: i64, b: i64, c: i64, d: i64| serde_json::json!([[a * MIB, b], [c * MIB, d]]);
    assert_eq!(of_pod(&bed, &pod.id).await?, expected(256, 512, 10, 20));
    let ours = cgroup_file(&id, &["memory.limit_in_bytes", "memory.max"])?;

    let update = async |bed: &Bed, pod: &str, resources, overhead| {
        let request =
            UpdatePodSandboxResourcesRequest { pod_sandbox_id: pod.to_owned(), resources, overhead };
        bed.client.runtime.clone().update_pod_sandbox_resources(request).await.map(drop)
    };
    update(&bed, &pod.id, limits(128, 256), limits(11, 21)).await?;
    assert_eq!(of_pod(&bed, &pod.id).await?, expected(128, 256, 11, 21));
    // The kubelet calls with one of the two as well, and with neither.
    update(&bed, &pod.id, limits(64, 128), None).await?;
    update(&bed, &pod.id, None, None).await?;
    assert_eq!(of_pod(&bed, &pod.id).await?, expected(64, 128, 11, 21));
    refused_with(update(&bed, &"e".repeat(64), None, None).await, Code::NotFound, "")?;
    bed.daemon.kill()?;
    bed.restart().await?;
    assert_eq!(of_pod(&bed, &pod.id).await?, expected(64, 128, 11, 21));
    assert_eq!(cgroup_file(&id, &["memory.limit_in_bytes", "memory.max"])?, ours);
    // A stopped pod is still one.
    bed.client.stop_pod(&pod.id).await?;
    update(&bed, &pod.id, limits(32, 64), None).await?;
    Ok(())
}

//! After many pods everything is as it was.

use anyhow::{Result, ensure};
use runtime_tests::bed::Bed;
use runtime_tests::client::{container, pod};
use runtime_tests::image::catalog;
use runtime_tests::traces;

/// One pod with everything a pod does.
async fn life(bed: &Bed, number: usize) -> Result<()> {
    let mut config = pod(&format!("life{number}"));
    config.log_directory = bed.daemon.logs("lives")?.display().to_string();
    let id = bed.client.run_pod(&config).await?;
    let inner =
        bed.client.run(&id, &container("c", catalog::SMALL, "echo alive; exec sleep 1000"), &config).await?;
    bed.client.exec(&inner, &["true"], 10).await?;
    let short = bed.client.run(&id, &container("short", catalog::SMALL, "exit 1"), &config).await?;
    bed.client.wait_exit(&short).await?;
    bed.client.stop(&inner, 0).await?;
    if number.is_multiple_of(2) {
        bed.client.remove(&inner).await?;
    }
    bed.client.stop_pod(&id).await?;
    Ok(bed.client.remove_pod(&id).await?)
}

#[tokio::test]
async fn a_hundred_pods_leave_nothing_behind() -> Result<()> {
    let mut bed = Bed::new().await?;
    // What is made once and stays: the bridge, caches, threads.
    for number in 0..8 {
        life(&bed, number).await?;
    }
    let before = bed.daemon.traces();
    let pid = bed.daemon.pid();
    let (descriptors, memory) = (traces::descriptors(pid), resident(pid)?);
    for round in 0..25 {
        futures_util::future::try_join_all((0..4).map(|n| life(&bed, 100 + round * 4 + n))).await?;
    }
    bed.nothing_left(&before)?;
    bed.unmoved(pid)?;
    runtime_tests::run::until("file descriptors are given back", std::time::Duration::from_secs(5), || {
        let now = traces::descriptors(pid);
        ensure!(now <= descriptors + 2, "{descriptors} file descriptors before, {now} after");
        Ok(Some(()))
    })?;
    let grown = resident(pid)?.saturating_sub(memory);
    ensure!(grown < 8 << 20, "the daemon has grown by {grown} bytes over a hundred pods");
    ensure!(traces::zombies_of(pid).is_empty(), "the daemon has zombies");
    Ok(())
}

#[tokio::test]
async fn pods_that_are_thrown_away_running_leave_nothing_behind() -> Result<()> {
    let mut bed = Bed::new().await?;
    life(&bed, 0).await?;
    let before = bed.daemon.traces();
    for number in 0..10 {
        let config = pod(&format!("thrown{number}"));
        let id = bed.client.run_pod(&config).await?;
        bed.client.create(&id, &container("created", catalog::SMALL, "true"), &config).await?;
        bed.client
            .run(&id, &container("c", catalog::SMALL, "trap '' TERM; while :; do sleep 1; done"), &config)
            .await?;
        // Without a stop before it.
        bed.client.remove_pod(&id).await?;
    }
    assert!(bed.client.containers(None).await?.is_empty());
    bed.nothing_left(&before)
}

/// Bytes of memory that are a process's own.
fn resident(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or("0 kB");
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

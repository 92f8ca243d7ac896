//! The daemon dies, a shim dies: what goes on, what is found again, what is said about what ended meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use runtime_tests::bed::{self, Bed};
use runtime_tests::client::{self, Client, container, refused};
use runtime_tests::image::catalog;
use runtime_tests::run;
use tonic::Code;

/// Writes the numbers from 1 on, about two hundred a second, until it is stopped.
const COUNTING: &str = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.005; done";

fn now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// The highest number of a counting container; an error when one is missing or came twice.
fn counted(log: &std::path::Path) -> Result<usize> {
    let lines = bed::lines(log)?;
    for (at, line) in lines.iter().enumerate() {
        ensure!(line.text == (at + 1).to_string() && line.whole, "line {} says {:?}", at + 1, line.text);
    }
    Ok(lines.len())
}

#[tokio::test]
async fn pods_run_on_while_the_daemon_is_dead_and_are_found_again() -> Result<()> {
    let mut bed = Bed::new().await?;
    let before = bed.daemon.traces();
    let pod = bed.pod("survivor").await?;
    let counter = pod.start("counter", COUNTING).await?;
    let dying = pod.start("dying", "until [ -e /tmp/now ]; do sleep 0.01; done; exit 7").await?;
    let done = pod.start("done", "exit 3").await?;
    bed.client.wait_exit(&done).await?;
    let created = bed
        .client
        .create(&pod.id, &container("created", catalog::SMALL, "exec sleep 1000"), &pod.config)
        .await?;
    bed::wait_log(&pod.log("counter"), "20\n")?;
    let (was_pod, was_counter) = (bed.client.pod_status(&pod.id).await?, bed.client.status(&counter).await?);
    let was_done = bed.client.status(&done).await?;

    // It ends while nobody is there to be told.
    bed.client.sh(&dying, "(sleep 0.3; touch /tmp/now) >/dev/null 2>&1 &").await?;
    bed.daemon.kill()?;
    let dead_from = now();
    let seen = counted(&pod.log("counter"))?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(counted(&pod.log("counter"))? > seen + 50, "the log stood still");
    let dead_to = now();
    bed.restart().await?;

    assert_eq!(bed.client.pod_status(&pod.id).await?, was_pod);
    assert_eq!(bed.client.status(&counter).await?, was_counter);
    assert_eq!(bed.client.status(&done).await?, was_done);
    let dead = bed.client.wait_exit(&dying).await?;
    assert_eq!((dead.exit_code, dead.reason.as_str()), (7, "Error"));
    ensure!(
        dead.finished_at > dead_from && dead.finished_at < dead_to,
        "ended at {} and not between {dead_from} and {dead_to}",
        dead.finished_at
    );
    assert_eq!(bed.client.status(&created).await?.state, ContainerState::ContainerCreated as i32);
    bed.client.start(&created).await?;
    assert_eq!(bed.client.sh(&counter, "echo still here").await?, "still here");
    bed.client.stop(&counter, 0).await?;
    counted(&pod.log("counter"))?;
    pod.start("after", "exec sleep 1000").await?;
    pod.remove().await?;
    bed.nothing_left(&before)
}

#[tokio::test]
async fn a_restart_in_order_leaves_pods_alone_too() -> Result<()> {
    let mut bed = Bed::new().await?;
    let pod = bed.host_pod("orderly").await?;
    let id = pod.start("c", COUNTING).await?;
    bed.daemon.stop()?;
    bed.restart().await?;
    let status = bed.client.status(&id).await?;
    assert_eq!(status.state, ContainerState::ContainerRunning as i32);
    bed.client.stop(&id, 0).await?;
    counted(&pod.log("c"))?;
    // The images are there as well.
    assert!(bed.client.image_status(catalog::SMALL).await?.is_some());
    bed.host_pod("new").await?.start("c", "true").await?;
    Ok(())
}

#[tokio::test]
async fn exit_codes_are_exact_however_often_the_daemon_dies() -> Result<()> {
    let mut bed = Bed::new().await?;
    let pod = bed.host_pod("codes").await?;
    let mut wanted = Vec::new();
    for code in 0..12 {
        let script = format!("sleep 0.{:02}; exit {code}", code * 8);
        wanted.push((pod.start(&format!("c{code}"), &script).await?, code));
    }
    for _ in 0..5 {
        bed.daemon.kill()?;
        bed.restart().await?;
    }
    for (id, code) in wanted {
        assert_eq!(bed.client.wait_exit(&id).await?.exit_code, code);
    }
    Ok(())
}

/// All that is done to a pod with one container.
async fn life(client: &Client, config: &PodSandboxConfig) -> Result<()> {
    let id = client.run_pod(config).await?;
    client.run(&id, &container("c", catalog::SMALL, "exec sleep 1000"), config).await?;
    client.stop_pod(&id).await?;
    Ok(client.remove_pod(&id).await?)
}

#[tokio::test]
async fn the_daemon_killed_in_the_middle_of_calls_leaves_nothing_half_done() -> Result<()> {
    let mut bed = Bed::new().await?;
    let before = bed.daemon.traces();
    let whole = {
        let clock = Instant::now();
        life(&bed.client, &client::pod("whole")).await?;
        clock.elapsed()
    };
    for part in 0..16 {
        let mut config = client::pod(&format!("part{part}"));
        let (client, asked) = (bed.client.clone(), config.clone());
        let work = tokio::spawn(async move { life(&client, &asked).await });
        tokio::time::sleep(whole * part / 16).await;
        bed.daemon.kill()?;
        // Broken off, or done before.
        drop(work.await?);
        bed.restart().await?;
        // As the kubelet does: a pod that was being stopped is followed by its next attempt.
        if bed.client.pods(None).await?.iter().any(|pod| pod.state == PodSandboxState::SandboxNotready as i32)
        {
            bed.client.remove_all_pods().await?;
            config.metadata.get_or_insert_default().attempt += 1;
        }
        let id = bed.client.run_pod(&config).await?;
        let inner = container("c", catalog::SMALL, "exec sleep 1000");
        // And what is there already is not asked for again.
        let made = match bed.client.containers(None).await?.into_iter().next() {
            Some(there) => there.id,
            None => bed.client.create(&id, &inner, &config).await?,
        };
        if bed.client.status(&made).await?.state == ContainerState::ContainerCreated as i32 {
            bed.client.start(&made).await?;
        }
        assert_eq!(bed.client.sh(&made, "echo works").await?, "works");
        bed.client.remove_all_pods().await?;
    }
    bed.nothing_left(&before)
}

#[tokio::test]
async fn a_pod_whose_shim_was_killed_is_reported_dead_and_can_be_removed() -> Result<()> {
    let mut bed = Bed::new().await?;
    let before = bed.daemon.traces();
    let pod = bed.pod("orphan").await?;
    let id = pod.start("c", "exec sleep 1000.125").await?;
    let done = pod.start("done", "exit 6").await?;
    bed.client.wait_exit(&done).await?;
    let shim = bed.daemon.shim(&pod.id)?;
    kill(Pid::from_raw(shim.cast_signed()), Signal::SIGKILL)?;
    let status = bed.client.wait_for(&id, ContainerState::ContainerExited, Duration::from_secs(5)).await?;
    ensure!(matches!(status.exit_code, 137 | 255), "exit code {}", status.exit_code);
    ensure!(!bed::alive("sleep 1000.125"), "the container's process still runs");
    assert_eq!(bed.client.status(&done).await?.exit_code, 6);
    run::until("the pod is not ready", Duration::from_secs(5), || Ok(Some(())))?;
    let end = Instant::now() + Duration::from_secs(5);
    while bed.client.pod_status(&pod.id).await?.state != PodSandboxState::SandboxNotready as i32 {
        ensure!(Instant::now() < end, "a pod without a shim is still ready");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let refused =
        refused(bed.client.create(&pod.id, &container("new", catalog::SMALL, "true"), &pod.config).await)?;
    assert_eq!(refused.code(), Code::FailedPrecondition);
    // The other pods do not notice.
    let other = bed.host_pod("other").await?;
    other.start("c", "exec sleep 1000").await?;
    other.remove().await?;
    pod.remove().await?;
    bed.nothing_left(&before)
}

#[tokio::test]
async fn shim_and_daemon_killed_together_leave_nothing_behind() -> Result<()> {
    let mut bed = Bed::new().await?;
    let before = bed.daemon.traces();
    let pod = bed.pod("both").await?;
    let id = pod.start("c", "exec sleep 1000.375").await?;
    let shim = bed.daemon.shim(&pod.id)?;
    bed.daemon.kill()?;
    kill(Pid::from_raw(shim.cast_signed()), Signal::SIGKILL)?;
    bed.restart().await?;
    let status = bed.client.wait_for(&id, ContainerState::ContainerExited, Duration::from_secs(5)).await?;
    ensure!(matches!(status.exit_code, 137 | 255), "exit code {}", status.exit_code);
    pod.remove().await?;
    bed.nothing_left(&before)
}

#[tokio::test]
async fn a_shim_that_does_not_answer_makes_nobody_else_wait() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("frozen").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    let shim = Pid::from_raw(bed.daemon.shim(&pod.id)?.cast_signed());
    kill(shim, Signal::SIGSTOP)?;
    let listed = async {
        let clock = Instant::now();
        let (pods, containers) = (bed.client.pods(None).await?, bed.client.containers(None).await?);
        ensure!(clock.elapsed() < Duration::from_secs(1), "lists took {:?}", clock.elapsed());
        ensure!(pods.len() == 1 && containers.len() == 1, "the frozen pod is not listed");
        ensure!(containers[0].state == ContainerState::ContainerRunning as i32, "it was declared dead");
        let other = bed.host_pod("lively").await?;
        other.start("c", "exec sleep 1000").await?;
        other.remove().await
    }
    .await;
    kill(shim, Signal::SIGCONT)?;
    listed?;
    assert_eq!(bed.client.sh(&id, "echo healed").await?, "healed");
    Ok(())
}

#[tokio::test]
async fn a_damaged_record_harms_only_its_own_pod() -> Result<()> {
    let mut bed = Bed::new().await?;
    let (good, bad) = (bed.host_pod("good").await?, bed.host_pod("bad").await?);
    let id = good.start("c", "exec sleep 1000").await?;
    bad.start("c", "exec sleep 1000").await?;
    let record = bed.daemon.state().join("p").join(&bad.id).join("shim");
    bed.daemon.kill()?;
    std::fs::write(&record, "{\"version\":1,\"proc")
        .with_context(|| format!("damage {}", record.display()))?;
    bed.restart().await?;
    assert_eq!(bed.client.sh(&id, "echo fine").await?, "fine");
    bad.remove().await?;
    good.remove().await?;
    assert!(bed.client.pods(None).await?.is_empty());
    Ok(())
}

//! States of pods and containers, calls that come twice, calls that come at the same time.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri_api::v1::*;
use runtime_tests::bed::Bed;
use runtime_tests::client::{container, host_pod, namespaces, refused_with, security};
use runtime_tests::image::catalog;
use tonic::Code;

const READY: i32 = PodSandboxState::SandboxReady as i32;
const NOT_READY: i32 = PodSandboxState::SandboxNotready as i32;

#[tokio::test]
async fn a_pod_reports_what_it_was_made_from() -> Result<()> {
    let bed = Bed::new().await?;
    let mut config = host_pod("facts");
    config.labels.insert("a/b".into(), "line\nbreak, comma, \u{fc}".into());
    config.annotations.insert("note".into(), "kept \"as is\"".into());
    let pod = bed.run(config.clone()).await?;
    let status = bed.client.pod_status(&pod.id).await?;
    assert_eq!(pod.id.len(), 64);
    assert!(pod.id.bytes().all(|b| b.is_ascii_hexdigit()));
    assert_eq!(status.metadata, config.metadata);
    assert_eq!((status.labels, status.annotations), (config.labels, config.annotations));
    assert_eq!(status.state, READY);
    // With a timestamp the kubelet believes that the containers' statuses came along.
    let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
    assert_eq!(bed.client.runtime.clone().pod_sandbox_status(request).await?.into_inner().timestamp, 0);
    assert!(status.created_at > 1_600_000_000_000_000_000, "created at {}", status.created_at);
    Ok(())
}

#[tokio::test]
async fn stopping_and_removing_succeed_again_and_for_unknown_ids() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("twice").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    for _ in 0..2 {
        bed.client.stop(&id, 0).await?;
    }
    for _ in 0..2 {
        bed.client.remove(&id).await?;
    }
    for _ in 0..2 {
        bed.client.stop_pod(&pod.id).await?;
        assert_eq!(bed.client.pod_status(&pod.id).await?.state, NOT_READY);
    }
    for _ in 0..2 {
        bed.client.remove_pod(&pod.id).await?;
    }
    let unknown = "f".repeat(64);
    bed.client.stop(&unknown, 1).await?;
    bed.client.remove(&unknown).await?;
    bed.client.stop_pod(&unknown).await?;
    bed.client.remove_pod(&unknown).await?;
    bed.client.remove_image("crisp.test/never-seen:1").await?;
    assert!(bed.client.image_status("crisp.test/never-seen:1").await?.is_none());
    refused_with(bed.client.pod_status(&unknown).await, Code::NotFound, "")?;
    refused_with(bed.client.status(&unknown).await, Code::NotFound, "")?;
    refused_with(bed.client.stats(&unknown).await, Code::NotFound, "")?;
    refused_with(bed.client.exec(&unknown, &["true"], 1).await, Code::NotFound, "")?;
    refused_with(bed.client.start(&unknown).await, Code::NotFound, "")?;
    refused_with(bed.client.update(&unknown, LinuxContainerResources::default()).await, Code::NotFound, "")?;
    refused_with(bed.client.reopen_log(&unknown).await, Code::NotFound, "")?;
    Ok(())
}

#[tokio::test]
async fn a_container_goes_from_created_to_running_to_exited() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("states").await?;
    let config = container("c", catalog::SMALL, "sleep 0.2; exit 9");
    let id = bed.client.create(&pod.id, &config, &pod.config).await?;
    let created = bed.client.status(&id).await?;
    assert_eq!(created.state, ContainerState::ContainerCreated as i32);
    assert_eq!((created.started_at, created.finished_at), (0, 0));
    assert!(created.log_path.ends_with("/c.log"), "{}", created.log_path);
    bed.client.start(&id).await?;
    refused_with(bed.client.start(&id).await, Code::FailedPrecondition, "")?;
    let exited = bed.client.wait_exit(&id).await?;
    assert_eq!((exited.exit_code, exited.reason.as_str()), (9, "Error"));
    assert!(created.created_at <= exited.started_at && exited.started_at < exited.finished_at, "{exited:?}");
    refused_with(bed.client.start(&id).await, Code::FailedPrecondition, "")?;
    refused_with(bed.client.exec(&id, &["true"], 1).await, Code::FailedPrecondition, "")?;
    let zero = pod.start("zero", "exit 0").await?;
    assert_eq!(bed.client.wait_exit(&zero).await?.reason, "Completed");
    Ok(())
}

#[tokio::test]
async fn killed_by_a_signal_is_128_plus_its_number() -> Result<()> {
    let bed = Bed::new().await?;
    // As the first process of a pid namespace the shell would be spared by most signals that it sends itself.
    let mut config = host_pod("signals");
    namespaces(&mut config, |o| o.pid = NamespaceMode::Node as i32);
    let pod = bed.run(config).await?;
    for (signal, number) in [("SEGV", 11), ("ABRT", 6), ("KILL", 9)] {
        let mut config = container(&signal.to_lowercase(), catalog::SMALL, &format!("kill -{signal} $$"));
        security(&mut config).namespace_options.get_or_insert_default().pid = NamespaceMode::Node as i32;
        let id = pod.start_with(&config).await?;
        assert_eq!(bed.client.wait_exit(&id).await?.exit_code, 128 + number);
    }
    Ok(())
}

#[tokio::test]
async fn stop_is_gentle_first_and_firm_after_the_grace() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("stop").await?;
    let polite = pod.start("polite", "trap 'exit 42' TERM; echo set; while :; do sleep 0.05; done").await?;
    // Before its trap is set the first process of a pid namespace is spared by SIGTERM.
    runtime_tests::bed::wait_log(&pod.log("polite"), "set")?;
    bed.client.stop(&polite, 10).await?;
    assert_eq!(bed.client.status(&polite).await?.exit_code, 42);

    let stubborn = pod.start("stubborn", "trap '' TERM; while :; do sleep 0.05; done").await?;
    let clock = Instant::now();
    bed.client.stop(&stubborn, 1).await?;
    let took = clock.elapsed();
    // Recorded before the reply: no waiting here.
    let status = bed.client.status(&stubborn).await?;
    assert_eq!((status.state, status.exit_code), (ContainerState::ContainerExited as i32, 137));
    ensure!(took >= Duration::from_millis(900) && took < Duration::from_secs(4), "stop took {took:?}");

    let shortened = pod.start("shortened", "trap '' TERM; while :; do sleep 0.05; done").await?;
    let (slow, id) = (bed.client.clone(), shortened.clone());
    let patient = tokio::spawn(async move { slow.stop(&id, 100).await });
    tokio::time::sleep(Duration::from_millis(200)).await;
    let clock = Instant::now();
    bed.client.stop(&shortened, 1).await?;
    ensure!(clock.elapsed() < Duration::from_secs(5), "the shorter grace was not honoured");
    patient.await??;
    Ok(())
}

#[tokio::test]
async fn the_stop_signal_is_the_callers_or_the_images() -> Result<()> {
    let bed = Bed::new().await?;
    bed.client.pull(catalog::CONFIGURED).await?;
    let pod = bed.host_pod("stopsignal").await?;
    let script = "trap 'exit 10' USR1; trap 'exit 15' TERM; trap 'exit 2' INT; while :; do sleep 0.05; done";
    let mut own = container("own", catalog::CONFIGURED, script);
    own.stop_signal = Signal::Sigint as i32;
    let images = container("images", catalog::CONFIGURED, script);
    for (config, code) in [(own, 2), (images, 10)] {
        let id = pod.start_with(&config).await?;
        // The traps are set when the shell sleeps.
        bed.client.sh(&id, "until ps | grep -q 'sleep 0.05'; do :; done").await?;
        bed.client.stop(&id, 10).await?;
        assert_eq!(bed.client.status(&id).await?.exit_code, code);
    }
    Ok(())
}

#[tokio::test]
async fn a_stopped_pod_takes_no_containers_and_has_ended_those_it_had() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("ended").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    bed.client.stop_pod(&pod.id).await?;
    assert_eq!(bed.client.status(&id).await?.state, ContainerState::ContainerExited as i32);
    let late = container("late", catalog::SMALL, "true");
    refused_with(bed.client.create(&pod.id, &late, &pod.config).await, Code::FailedPrecondition, "")?;
    bed.client.remove_pod(&pod.id).await?;
    refused_with(bed.client.status(&id).await, Code::NotFound, "")
}

#[tokio::test]
async fn removing_a_running_container_kills_it() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("force").await?;
    let id = pod.start("c", "exec sleep 1000.75").await?;
    bed.client.remove(&id).await?;
    assert!(!runtime_tests::bed::alive("sleep 1000.75"));
    assert!(bed.client.containers(None).await?.is_empty());
    // The same name is free again.
    pod.start("c", "exec sleep 1000.75").await?;
    Ok(())
}

#[tokio::test]
async fn a_retried_call_joins_the_first_and_finds_finished_work() -> Result<()> {
    let bed = Bed::new().await?;
    let config = host_pod("retried");
    let calls = (0..5).map(|_| {
        let (client, config) = (bed.client.clone(), config.clone());
        tokio::spawn(async move { client.run_pod(&config).await })
    });
    let mut ids = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        ids.push(call.await??);
    }
    ids.push(bed.client.run_pod(&config).await?);
    ids.dedup();
    assert_eq!(ids.len(), 1, "one pod was asked for: {ids:?}");
    assert_eq!(bed.client.pods(None).await?.len(), 1);

    let inner = container("c", catalog::SMALL, "exec sleep 1000");
    let calls = (0..5).map(|_| {
        let (client, pod, inner, config) =
            (bed.client.clone(), ids[0].clone(), inner.clone(), config.clone());
        tokio::spawn(async move { client.create(&pod, &inner, &config).await })
    });
    let mut made = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        made.push(call.await??);
    }
    made.push(bed.client.create(&ids[0], &inner, &config).await?);
    made.dedup();
    assert_eq!(made.len(), 1, "one container was asked for: {made:?}");
    assert_eq!(bed.client.containers(None).await?.len(), 1);
    Ok(())
}

#[tokio::test]
async fn a_call_that_was_given_up_can_be_made_again() -> Result<()> {
    let mut bed = Bed::new().await?;
    let before = bed.daemon.traces();
    for micros in [100, 300, 1000, 3000, 10_000] {
        let config = host_pod(&format!("given-up-{micros}"));
        let limit = Duration::from_micros(micros);
        // Whether it was done by then or not, the next call must find a way.
        tokio::time::timeout(limit, bed.client.run_pod(&config)).await.ok();
        let id = bed.client.run_pod(&config).await?;
        let inner = container("c", catalog::SMALL, "exec sleep 1000");
        tokio::time::timeout(limit, bed.client.create(&id, &inner, &config)).await.ok();
        let made = bed.client.create(&id, &inner, &config).await?;
        tokio::time::timeout(limit, bed.client.start(&made)).await.ok();
        bed.client.wait_for_start(&made).await?;
        tokio::time::timeout(limit, bed.client.stop(&made, 0)).await.ok();
        bed.client.stop(&made, 0).await?;
        tokio::time::timeout(limit, bed.client.remove_pod(&id)).await.ok();
        bed.client.remove_pod(&id).await?;
    }
    assert!(bed.client.pods(None).await?.is_empty());
    bed.nothing_left(&before)
}

/// Starts what was perhaps started already.
trait Started {
    async fn wait_for_start(&self, id: &str) -> Result<()>;
}

impl Started for runtime_tests::client::Client {
    async fn wait_for_start(&self, id: &str) -> Result<()> {
        match self.start(id).await {
            Ok(()) => Ok(()),
            Err(status) if status.code() == Code::FailedPrecondition => {
                let limit = Duration::from_secs(5);
                self.wait_for(id, ContainerState::ContainerRunning, limit).await.map(drop)
            }
            Err(status) => Err(status).context("start again"),
        }
    }
}

#[tokio::test]
async fn unique_prefixes_of_ids_are_understood() -> Result<()> {
    let bed = Bed::new().await?;
    let pod = bed.host_pod("prefix").await?;
    let id = pod.start("c", "exec sleep 1000").await?;
    assert_eq!(bed.client.pod_status(&pod.id[..13]).await?.id, pod.id);
    assert_eq!(bed.client.status(&id[..13]).await?.id, id);
    bed.client.exec(&id[..13], &["true"], 5).await?;
    refused_with(bed.client.status("").await, Code::NotFound, "")?;
    refused_with(bed.client.pod_status("").await, Code::NotFound, "")?;
    // Sixteen pods and one more: two of them begin alike.
    let mut seen: HashMap<char, String> = HashMap::new();
    let twin = loop {
        let other = bed.host_pod(&format!("prefix{}", seen.len())).await?;
        if let Some(first) = other.id.chars().next()
            && seen.insert(first, other.id.clone()).is_some()
        {
            break first.to_string();
        }
    };
    let status = bed.client.pod_status(&twin).await.err().context("an ambiguous prefix was taken")?;
    ensure!(matches!(status.code(), Code::InvalidArgument | Code::NotFound), "{status:?}");
    Ok(())
}

#[tokio::test]
async fn lists_are_filtered_by_id_state_pod_and_labels() -> Result<()> {
    let bed = Bed::new().await?;
    let mut config = host_pod("one");
    config.labels.insert("role".into(), "front".into());
    let one = bed.run(config).await?;
    let two = bed.host_pod("two").await?;
    let mut front = container("front", catalog::SMALL, "exec sleep 1000");
    front.labels.insert("role".into(), "front".into());
    let front = one.start_with(&front).await?;
    let done = two.start("done", "exit 0").await?;
    bed.client.wait_exit(&done).await?;

    let labels = |value: &str| HashMap::from([("role".to_owned(), value.to_owned())]);
    let by_label = PodSandboxFilter { label_selector: labels("front"), ..PodSandboxFilter::default() };
    let pods = bed.client.pods(Some(by_label)).await?;
    assert_eq!(pods.iter().map(|p| p.id.as_str()).collect::<Vec<_>>(), [one.id.as_str()]);
    let by_id = PodSandboxFilter { id: two.id[..12].to_owned(), ..PodSandboxFilter::default() };
    assert_eq!(bed.client.pods(Some(by_id)).await?.len(), 1);
    let nobody = PodSandboxFilter {
        id: one.id.clone(),
        label_selector: labels("back"),
        ..PodSandboxFilter::default()
    };
    assert!(bed.client.pods(Some(nobody)).await?.is_empty());

    let containers = |filter: ContainerFilter| {
        let client = bed.client.clone();
        async move {
            client.containers(Some(filter)).await.map(|l| l.into_iter().map(|c| c.id).collect::<Vec<_>>())
        }
    };
    let exited = Some(ContainerStateValue { state: ContainerState::ContainerExited as i32 });
    assert_eq!(
        containers(ContainerFilter { state: exited, ..ContainerFilter::default() }).await?,
        [done.as_str()]
    );
    let of_pod = ContainerFilter { pod_sandbox_id: one.id.clone(), ..ContainerFilter::default() };
    assert_eq!(containers(of_pod).await?, [front.as_str()]);
    let by_label = ContainerFilter { label_selector: labels("front"), ..ContainerFilter::default() };
    assert_eq!(containers(by_label).await?, [front]);
    let both =
        ContainerFilter { pod_sandbox_id: one.id.clone(), state: exited, ..ContainerFilter::default() };
    assert!(containers(both).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn many_pods_at_once_do_not_hinder_each_other() -> Result<()> {
    let mut bed = Bed::new().await?;
    let before = bed.daemon.traces();
    let work = (0..24).map(|number| {
        let client = bed.client.clone();
        tokio::spawn(async move {
            let config = host_pod(&format!("crowd{number}"));
            let id = client.run_pod(&config).await?;
            let inner = container("c", catalog::SMALL, &format!("exit {number}"));
            let inner = client.run(&id, &inner, &config).await?;
            let code = client.wait_exit(&inner).await?.exit_code;
            client.stop_pod(&id).await?;
            client.remove_pod(&id).await?;
            ensure!(code == number, "pod {number} ended with {code}");
            Ok(())
        })
    });
    for one in work.collect::<Vec<_>>() {
        one.await??;
    }
    assert!(bed.client.pods(None).await?.is_empty());
    bed.nothing_left(&before)
}

#[tokio::test]
async fn events_come_in_order_with_the_whole_pod() -> Result<()> {
    let bed = Bed::new().await?;
    let mut stream = bed.client.runtime.clone().get_container_events(GetEventsRequest {}).await?.into_inner();
    let pod = bed.host_pod("events").await?;
    let id = pod.start("c", "exit 5").await?;
    bed.client.wait_exit(&id).await?;
    bed.client.remove(&id).await?;
    let mut kinds = Vec::new();
    while kinds.last() != Some(&(ContainerEventType::ContainerDeletedEvent as i32)) {
        let event = tokio::time::timeout(Duration::from_secs(10), stream.message())
            .await??
            .context("the stream ended")?;
        if event.container_id == id {
            let of = event.pod_sandbox_status.context("an event without its pod")?;
            assert_eq!(of.metadata, pod.config.metadata);
            assert!(event.created_at > 0);
            kinds.push(event.container_event_type);
        }
    }
    assert_eq!(kinds, [0, 1, 2, 3], "created, started, stopped, deleted");
    Ok(())
}

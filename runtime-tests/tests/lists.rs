//! The streams of release 1.36 beside the lists that they will replace: the same items, each once, no empty message.

use std::time::Duration;

use anyhow::{Result, ensure};
use cri_api::v1::*;
use runtime_tests::bed::Bed;
use runtime_tests::client::{container, host_pod};
use runtime_tests::image::catalog;
use tonic::{Response, Status, Streaming};

/// All items of a stream; an error when a message has none or the stream does not end.
async fn all<M, I>(
    reply: Result<Response<Streaming<M>>, Status>,
    items: impl Fn(M) -> Vec<I>,
) -> Result<Vec<I>> {
    let mut stream = reply?.into_inner();
    let mut found = Vec::new();
    let read = async {
        while let Some(message) = stream.message().await? {
            let items = items(message);
            ensure!(!items.is_empty(), "a message without an item");
            found.extend(items);
        }
        Ok(())
    };
    tokio::time::timeout(Duration::from_secs(10), read).await??;
    Ok(found)
}

fn sorted(mut ids: Vec<String>) -> Vec<String> {
    ids.sort();
    ids
}

#[tokio::test]
async fn streams_say_what_lists_say() -> Result<()> {
    let bed = Bed::new().await?;
    let (mut runtime, mut image) = (bed.client.runtime.clone(), bed.client.image.clone());
    let nothing =
        all(runtime.stream_pod_sandboxes(StreamPodSandboxesRequest::default()).await, |m| m.pod_sandboxes);
    assert!(nothing.await?.is_empty());

    let mut pods = Vec::new();
    for name in ["one", "two", "three"] {
        let mut config = host_pod(name);
        config.labels.insert("odd".into(), (name != "two").to_string());
        let pod = bed.run(config).await?;
        let mut inner = container("c", catalog::SMALL, "exec sleep 1000");
        inner.labels = pod.config.labels.clone();
        pod.start_with(&inner).await?;
        // Listed, but without statistics.
        bed.client.create(&pod.id, &container("created", catalog::SMALL, "true"), &pod.config).await?;
        pods.push(pod);
    }
    let odd = std::collections::HashMap::from([("odd".to_owned(), "true".to_owned())]);

    for filter in
        [None, Some(PodSandboxFilter { label_selector: odd.clone(), ..PodSandboxFilter::default() })]
    {
        let listed = bed.client.pods(filter.clone()).await?;
        assert_eq!(listed.len(), if filter.is_some() { 2 } else { 3 });
        let reply = runtime.stream_pod_sandboxes(StreamPodSandboxesRequest { filter }).await;
        let mut streamed = all(reply, |m| m.pod_sandboxes).await?;
        streamed.sort_by_key(|pod| listed.iter().position(|other| other.id == pod.id));
        assert_eq!(streamed, listed);
    }
    for filter in [None, Some(ContainerFilter { label_selector: odd.clone(), ..ContainerFilter::default() })]
    {
        let listed = bed.client.containers(filter.clone()).await?;
        assert_eq!(listed.len(), if filter.is_some() { 2 } else { 6 });
        let reply = runtime.stream_containers(StreamContainersRequest { filter }).await;
        let mut streamed = all(reply, |m| m.containers).await?;
        streamed.sort_by_key(|container| listed.iter().position(|other| other.id == container.id));
        assert_eq!(streamed, listed);
    }
    let reply = image.stream_images(StreamImagesRequest::default()).await;
    assert_eq!(all(reply, |m| m.images).await?, bed.client.images().await?);

    // Figures change from one look to the next; whom they are about does not.
    let of_container = |stats: Vec<ContainerStats>| {
        sorted(stats.into_iter().filter_map(|s| s.attributes).map(|a| a.id).collect())
    };
    for filter in [
        None,
        Some(ContainerStatsFilter { pod_sandbox_id: pods[1].id.clone(), ..ContainerStatsFilter::default() }),
    ] {
        let request = ListContainerStatsRequest { filter: filter.clone() };
        let listed = of_container(runtime.list_container_stats(request).await?.into_inner().stats);
        assert_eq!(listed.len(), if filter.is_some() { 1 } else { 3 });
        let reply = runtime.stream_container_stats(StreamContainerStatsRequest { filter }).await;
        assert_eq!(of_container(all(reply, |m| m.container_stats).await?), listed);
    }
    let of_pod = |stats: Vec<PodSandboxStats>| {
        sorted(stats.into_iter().filter_map(|s| s.attributes).map(|a| a.id).collect())
    };
    for filter in
        [None, Some(PodSandboxStatsFilter { id: pods[2].id.clone(), ..PodSandboxStatsFilter::default() })]
    {
        let request = ListPodSandboxStatsRequest { filter: filter.clone() };
        let listed = of_pod(runtime.list_pod_sandbox_stats(request).await?.into_inner().stats);
        assert_eq!(listed.len(), if filter.is_some() { 1 } else { 3 });
        let reply = runtime.stream_pod_sandbox_stats(StreamPodSandboxStatsRequest { filter }).await;
        assert_eq!(of_pod(all(reply, |m| m.pod_sandbox_stats).await?), listed);
    }
    let metrics =
        |all: Vec<PodSandboxMetrics>| sorted(all.into_iter().map(|pod| pod.pod_sandbox_id).collect());
    let listed = metrics(
        runtime.list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {}).await?.into_inner().pod_metrics,
    );
    assert_eq!(listed, sorted(pods.iter().map(|pod| pod.id.clone()).collect()));
    let reply = runtime.stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest {}).await;
    assert_eq!(metrics(all(reply, |m| m.pod_sandbox_metrics).await?), listed);
    Ok(())
}

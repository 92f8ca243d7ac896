//! RuntimeService: one function per call.

use std::{collections::HashMap, sync::Arc};

use cri_api::v1::{self, runtime_service_server::RuntimeService};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use tonic::{Request, Response, Status, async_trait};

use super::{Answer, call, detached, info, pieces};
use crate::{
    containers,
    daemon::Daemon,
    error::{Fault, Result},
    events, metrics, pods, stats, status,
    streams::{self, Streaming},
};

/// The service.
#[derive(Clone)]
pub struct Runtime {
    pub daemon: Arc<Daemon>,
    pub streams: Arc<Streaming>,
}

type Pieces<T> = BoxStream<'static, Result<T, Status>>;

#[async_trait]
impl RuntimeService for Runtime {
    async fn version(&self, _: Request<v1::VersionRequest>) -> Answer<v1::VersionResponse> {
        Ok(Response::new(status::version()))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<v1::RunPodSandboxRequest>,
    ) -> Answer<v1::RunPodSandboxResponse> {
        let request = request.into_inner();
        let name = request.config.as_ref().and_then(|config| config.metadata.as_ref());
        let name = name.map(|pod| format!("{}/{}", pod.namespace, pod.name)).unwrap_or_default();
        call("RunPodSandbox", &name, async {
            let pod_sandbox_id = pods::run::run(&self.daemon, request).await?;
            Ok(v1::RunPodSandboxResponse { pod_sandbox_id })
        })
        .await
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<v1::StopPodSandboxRequest>,
    ) -> Answer<v1::StopPodSandboxResponse> {
        let (daemon, id) = (self.daemon.clone(), request.into_inner().pod_sandbox_id);
        detached("StopPodSandbox", &id.clone(), async move {
            pods::stop::stop(&daemon, &id).await.map(|()| v1::StopPodSandboxResponse {})
        })
        .await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<v1::RemovePodSandboxRequest>,
    ) -> Answer<v1::RemovePodSandboxResponse> {
        let (daemon, id) = (self.daemon.clone(), request.into_inner().pod_sandbox_id);
        detached("RemovePodSandbox", &id.clone(), async move {
            pods::remove::remove(&daemon, &id).await.map(|()| v1::RemovePodSandboxResponse {})
        })
        .await
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Answer<v1::PodSandboxStatusResponse> {
        let request = request.into_inner();
        call("PodSandboxStatus", &request.pod_sandbox_id, async {
            let pod = self.daemon.pod(&request.pod_sandbox_id)?;
            let info = if request.verbose { info::pod(&self.daemon.config(), &pod) } else { HashMap::new() };
            // No timestamp: with one the kubelet would believe containers_statuses in place of asking for each.
            Ok(v1::PodSandboxStatusResponse {
                status: Some(pods::status::of(&pod)),
                info,
                ..Default::default()
            })
        })
        .await
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<v1::ListPodSandboxRequest>,
    ) -> Answer<v1::ListPodSandboxResponse> {
        let items = pods::status::list(&self.daemon, request.into_inner().filter);
        Ok(Response::new(v1::ListPodSandboxResponse { items }))
    }

    type StreamPodSandboxesStream = Pieces<v1::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<v1::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let items = pods::status::list(&self.daemon, request.into_inner().filter);
        let stream = pieces(items, |pod_sandboxes| v1::StreamPodSandboxesResponse { pod_sandboxes });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Answer<v1::CreateContainerResponse> {
        let request = request.into_inner();
        call("CreateContainer", &request.pod_sandbox_id.clone(), async {
            let container_id = containers::create::create(&self.daemon, request).await?;
            Ok(v1::CreateContainerResponse { container_id })
        })
        .await
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Answer<v1::StartContainerResponse> {
        let (daemon, id) = (self.daemon.clone(), request.into_inner().container_id);
        detached("StartContainer", &id.clone(), async move {
            containers::start::start(&daemon, &id).await.map(|()| v1::StartContainerResponse {})
        })
        .await
    }

    async fn stop_container(
        &self,
        request: Request<v1::StopContainerRequest>,
    ) -> Answer<v1::StopContainerResponse> {
        let (daemon, request) = (self.daemon.clone(), request.into_inner());
        detached("StopContainer", &request.container_id.clone(), async move {
            containers::stop::stop(&daemon, &request.container_id, request.timeout).await?;
            Ok(v1::StopContainerResponse {})
        })
        .await
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Answer<v1::RemoveContainerResponse> {
        let (daemon, id) = (self.daemon.clone(), request.into_inner().container_id);
        detached("RemoveContainer", &id.clone(), async move {
            containers::remove::remove(&daemon, &id).await.map(|()| v1::RemoveContainerResponse {})
        })
        .await
    }

    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Answer<v1::ListContainersResponse> {
        let containers = containers::status::list(&self.daemon, request.into_inner().filter);
        Ok(Response::new(v1::ListContainersResponse { containers }))
    }

    type StreamContainersStream = Pieces<v1::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<v1::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let items = containers::status::list(&self.daemon, request.into_inner().filter);
        let stream = pieces(items, |containers| v1::StreamContainersResponse { containers });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn container_status(
        &self,
        request: Request<v1::ContainerStatusRequest>,
    ) -> Answer<v1::ContainerStatusResponse> {
        let request = request.into_inner();
        call("ContainerStatus", &request.container_id, async {
            let container = self.daemon.container(&request.container_id)?;
            let info = if request.verbose {
                info::container(&self.daemon.config(), &container)
            } else {
                HashMap::new()
            };
            Ok(v1::ContainerStatusResponse { status: Some(containers::status::of(&container)), info })
        })
        .await
    }

    async fn update_container_resources(
        &self,
        request: Request<v1::UpdateContainerResourcesRequest>,
    ) -> Answer<v1::UpdateContainerResourcesResponse> {
        let (daemon, request) = (self.daemon.clone(), request.into_inner());
        detached("UpdateContainerResources", &request.container_id.clone(), async move {
            containers::update::update(&daemon, request)
                .await
                .map(|()| v1::UpdateContainerResourcesResponse {})
        })
        .await
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Answer<v1::ReopenContainerLogResponse> {
        let id = request.into_inner().container_id;
        call("ReopenContainerLog", &id, async {
            containers::log::reopen(&self.daemon, &id).await.map(|()| v1::ReopenContainerLogResponse {})
        })
        .await
    }

    async fn exec_sync(&self, request: Request<v1::ExecSyncRequest>) -> Answer<v1::ExecSyncResponse> {
        let request = request.into_inner();
        call("ExecSync", &request.container_id.clone(), containers::exec::sync(&self.daemon, request)).await
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Answer<v1::ExecResponse> {
        let request = request.into_inner();
        call("Exec", &request.container_id.clone(), async {
            Ok(v1::ExecResponse { url: streams::exec(&self.daemon, &self.streams, request)? })
        })
        .await
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<v1::AttachResponse> {
        let request = request.into_inner();
        call("Attach", &request.container_id, async {
            Ok(v1::AttachResponse { url: streams::attach(&self.daemon, &self.streams, &request)? })
        })
        .await
    }

    async fn port_forward(
        &self,
        request: Request<v1::PortForwardRequest>,
    ) -> Answer<v1::PortForwardResponse> {
        let request = request.into_inner();
        call("PortForward", &request.pod_sandbox_id, async {
            Ok(v1::PortForwardResponse { url: streams::port_forward(&self.daemon, &self.streams, &request)? })
        })
        .await
    }

    async fn container_stats(
        &self,
        request: Request<v1::ContainerStatsRequest>,
    ) -> Answer<v1::ContainerStatsResponse> {
        let id = request.into_inner().container_id;
        call("ContainerStats", &id, async {
            let stats = stats::container(&self.daemon, &id).await?;
            Ok(v1::ContainerStatsResponse { stats: Some(stats) })
        })
        .await
    }

    async fn list_container_stats(
        &self,
        request: Request<v1::ListContainerStatsRequest>,
    ) -> Answer<v1::ListContainerStatsResponse> {
        call("ListContainerStats", "", async {
            let stats = stats::containers(&self.daemon, request.into_inner().filter).await?;
            Ok(v1::ListContainerStatsResponse { stats })
        })
        .await
    }

    type StreamContainerStatsStream = Pieces<v1::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        call("StreamContainerStats", "", async {
            let items = stats::containers(&self.daemon, request.into_inner().filter).await?;
            Ok(pieces(items, |container_stats| v1::StreamContainerStatsResponse { container_stats }).boxed())
        })
        .await
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<v1::PodSandboxStatsRequest>,
    ) -> Answer<v1::PodSandboxStatsResponse> {
        let id = request.into_inner().pod_sandbox_id;
        call("PodSandboxStats", &id, async {
            Ok(v1::PodSandboxStatsResponse { stats: Some(stats::pod(&self.daemon, &id).await?) })
        })
        .await
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<v1::ListPodSandboxStatsRequest>,
    ) -> Answer<v1::ListPodSandboxStatsResponse> {
        call("ListPodSandboxStats", "", async {
            Ok(v1::ListPodSandboxStatsResponse {
                stats: stats::pods(&self.daemon, request.into_inner().filter).await?,
            })
        })
        .await
    }

    type StreamPodSandboxStatsStream = Pieces<v1::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        call("StreamPodSandboxStats", "", async {
            let items = stats::pods(&self.daemon, request.into_inner().filter).await?;
            Ok(pieces(items, |pod_sandbox_stats| v1::StreamPodSandboxStatsResponse { pod_sandbox_stats })
                .boxed())
        })
        .await
    }

    async fn update_runtime_config(
        &self,
        request: Request<v1::UpdateRuntimeConfigRequest>,
    ) -> Answer<v1::UpdateRuntimeConfigResponse> {
        let network = request.into_inner().runtime_config.and_then(|config| config.network_config);
        let cidr = network.unwrap_or_default().pod_cidr;
        call("UpdateRuntimeConfig", &cidr, async {
            let told = self.daemon.network.set_pod_cidr(&cidr).await;
            told.map_err(Fault::network("take over the pod address range"))?;
            Ok(v1::UpdateRuntimeConfigResponse {})
        })
        .await
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        Ok(Response::new(status::status(&self.daemon, request.into_inner().verbose)))
    }

    async fn checkpoint_container(
        &self,
        _: Request<v1::CheckpointContainerRequest>,
    ) -> Answer<v1::CheckpointContainerResponse> {
        unsupported("CheckpointContainer")
    }

    async fn checkpoint_pod(
        &self,
        _: Request<v1::CheckpointPodRequest>,
    ) -> Answer<v1::CheckpointPodResponse> {
        unsupported("CheckpointPod")
    }

    async fn restore_pod(&self, _: Request<v1::RestorePodRequest>) -> Answer<v1::RestorePodResponse> {
        unsupported("RestorePod")
    }

    type GetContainerEventsStream = Pieces<v1::ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _: Request<v1::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        Ok(Response::new(events::subscribe(&self.daemon)))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<v1::ListMetricDescriptorsRequest>,
    ) -> Answer<v1::ListMetricDescriptorsResponse> {
        call("ListMetricDescriptors", "", async {
            Ok(v1::ListMetricDescriptorsResponse { descriptors: metrics::descriptors() })
        })
        .await
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<v1::ListPodSandboxMetricsRequest>,
    ) -> Answer<v1::ListPodSandboxMetricsResponse> {
        call("ListPodSandboxMetrics", "", async {
            Ok(v1::ListPodSandboxMetricsResponse { pod_metrics: metrics::pods(&self.daemon).await? })
        })
        .await
    }

    type StreamPodSandboxMetricsStream = Pieces<v1::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        call("StreamPodSandboxMetrics", "", async {
            let items = metrics::pods(&self.daemon).await?;
            Ok(pieces(items, |pod_sandbox_metrics| v1::StreamPodSandboxMetricsResponse {
                pod_sandbox_metrics,
            })
            .boxed())
        })
        .await
    }

    async fn runtime_config(
        &self,
        _: Request<v1::RuntimeConfigRequest>,
    ) -> Answer<v1::RuntimeConfigResponse> {
        Ok(Response::new(status::runtime_config(&self.daemon)))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<v1::UpdatePodSandboxResourcesResponse> {
        let (daemon, request) = (self.daemon.clone(), request.into_inner());
        detached("UpdatePodSandboxResources", &request.pod_sandbox_id.clone(), async move {
            pods::update::update(&daemon, request).await.map(|()| v1::UpdatePodSandboxResourcesResponse {})
        })
        .await
    }
}

fn unsupported<T>(name: &'static str) -> Answer<T> {
    Err(Status::unimplemented(Fault::Unsupported(name).to_string()))
}

//! A CRI client for tests: the calls of both services with the fields a test cares about, and the status as it came.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use cri_api::v1::image_service_client::ImageServiceClient;
use cri_api::v1::runtime_service_client::RuntimeServiceClient;
use cri_api::v1::*;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// What a call gives: the reply, or the status that the kubelet would see.
pub type Reply<T> = Result<T, Status>;

/// Replies are at most this long, as for the kubelet.
const MESSAGE: usize = 16 << 20;

/// Both services of one socket.
#[derive(Clone, Debug)]
pub struct Client {
    /// RuntimeService as generated.
    pub runtime: RuntimeServiceClient<Channel>,
    /// ImageService as generated.
    pub image: ImageServiceClient<Channel>,
}

impl Client {
    /// Connects; the socket must be there.
    pub async fn connect(socket: &Path) -> Result<Client> {
        let path: PathBuf = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://localhost")
            .connect_timeout(Duration::from_secs(5))
            .timeout(Duration::from_secs(300))
            .connect_with_connector(connector)
            .await
            .with_context(|| format!("connect to {}", socket.display()))?;
        Ok(Client {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE),
            image: ImageServiceClient::new(channel).max_decoding_message_size(MESSAGE),
        })
    }

    /// Version.
    pub async fn version(&self) -> Reply<VersionResponse> {
        Ok(self.runtime.clone().version(VersionRequest::default()).await?.into_inner())
    }

    /// RunPodSandbox with the default handler.
    pub async fn run_pod(&self, config: &PodSandboxConfig) -> Reply<String> {
        self.run_pod_with(config, "").await
    }

    /// RunPodSandbox with a handler.
    pub async fn run_pod_with(&self, config: &PodSandboxConfig, handler: &str) -> Reply<String> {
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        Ok(self.runtime.clone().run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    /// StopPodSandbox.
    pub async fn stop_pod(&self, id: &str) -> Reply<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.clone().stop_pod_sandbox(request).await.map(drop)
    }

    /// RemovePodSandbox.
    pub async fn remove_pod(&self, id: &str) -> Reply<()> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.clone().remove_pod_sandbox(request).await.map(drop)
    }

    /// PodSandboxStatus, not verbose.
    pub async fn pod_status(&self, id: &str) -> Reply<PodSandboxStatus> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let reply = self.runtime.clone().pod_sandbox_status(request).await?.into_inner();
        reply.status.ok_or_else(|| Status::internal("reply without a status"))
    }

    /// ListPodSandbox with an optional filter.
    pub async fn pods(&self, filter: Option<PodSandboxFilter>) -> Reply<Vec<PodSandbox>> {
        Ok(self.runtime.clone().list_pod_sandbox(ListPodSandboxRequest { filter }).await?.into_inner().items)
    }

    /// CreateContainer.
    pub async fn create(
        &self,
        pod: &str,
        container: &ContainerConfig,
        config: &PodSandboxConfig,
    ) -> Reply<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(container.clone()),
            sandbox_config: Some(config.clone()),
        };
        Ok(self.runtime.clone().create_container(request).await?.into_inner().container_id)
    }

    /// StartContainer.
    pub async fn start(&self, id: &str) -> Reply<()> {
        self.runtime
            .clone()
            .start_container(StartContainerRequest { container_id: id.to_owned() })
            .await
            .map(drop)
    }

    /// CreateContainer and StartContainer.
    pub async fn run(
        &self,
        pod: &str,
        container: &ContainerConfig,
        config: &PodSandboxConfig,
    ) -> Reply<String> {
        let id = self.create(pod, container, config).await?;
        self.start(&id).await?;
        Ok(id)
    }

    /// StopContainer.
    pub async fn stop(&self, id: &str, timeout: i64) -> Reply<()> {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout };
        self.runtime.clone().stop_container(request).await.map(drop)
    }

    /// RemoveContainer.
    pub async fn remove(&self, id: &str) -> Reply<()> {
        self.runtime
            .clone()
            .remove_container(RemoveContainerRequest { container_id: id.to_owned() })
            .await
            .map(drop)
    }

    /// ContainerStatus, not verbose.
    pub async fn status(&self, id: &str) -> Reply<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let reply = self.runtime.clone().container_status(request).await?.into_inner();
        reply.status.ok_or_else(|| Status::internal("reply without a status"))
    }

    /// ContainerStatus with its verbose map.
    pub async fn status_verbose(&self, id: &str) -> Reply<ContainerStatusResponse> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
        Ok(self.runtime.clone().container_status(request).await?.into_inner())
    }

    /// ListContainers with an optional filter.
    pub async fn containers(&self, filter: Option<ContainerFilter>) -> Reply<Vec<Container>> {
        Ok(self
            .runtime
            .clone()
            .list_containers(ListContainersRequest { filter })
            .await?
            .into_inner()
            .containers)
    }

    /// ExecSync; timeout in seconds, 0 for none.
    pub async fn exec(&self, id: &str, command: &[&str], timeout: i64) -> Reply<ExecSyncResponse> {
        let cmd = command.iter().map(|s| (*s).to_owned()).collect();
        let request = ExecSyncRequest { container_id: id.to_owned(), cmd, timeout };
        Ok(self.runtime.clone().exec_sync(request).await?.into_inner())
    }

    /// ExecSync of a shell script that must succeed; gives its stdout without the last line end.
    pub async fn sh(&self, id: &str, script: &str) -> Result<String> {
        let reply = self
            .exec(id, &["/bin/sh", "-c", script], 30)
            .await
            .with_context(|| format!("exec {script:?}"))?;
        anyhow::ensure!(
            reply.exit_code == 0,
            "{script:?}: exit code {}: {}{}",
            reply.exit_code,
            String::from_utf8_lossy(&reply.stdout),
            String::from_utf8_lossy(&reply.stderr)
        );
        Ok(String::from_utf8_lossy(&reply.stdout).trim_end_matches('\n').to_owned())
    }

    /// UpdateContainerResources.
    pub async fn update(&self, id: &str, linux: LinuxContainerResources) -> Reply<()> {
        let request = UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(linux),
            ..UpdateContainerResourcesRequest::default()
        };
        self.runtime.clone().update_container_resources(request).await.map(drop)
    }

    /// ReopenContainerLog.
    pub async fn reopen_log(&self, id: &str) -> Reply<()> {
        let request = ReopenContainerLogRequest { container_id: id.to_owned() };
        self.runtime.clone().reopen_container_log(request).await.map(drop)
    }

    /// ContainerStats.
    pub async fn stats(&self, id: &str) -> Reply<ContainerStats> {
        let request = ContainerStatsRequest { container_id: id.to_owned() };
        let reply = self.runtime.clone().container_stats(request).await?.into_inner();
        reply.stats.ok_or_else(|| Status::internal("reply without stats"))
    }

    /// ListContainerStats of everything.
    pub async fn list_stats(&self) -> Reply<Vec<ContainerStats>> {
        Ok(self
            .runtime
            .clone()
            .list_container_stats(ListContainerStatsRequest::default())
            .await?
            .into_inner()
            .stats)
    }

    /// Status, verbose.
    pub async fn runtime_status(&self) -> Reply<StatusResponse> {
        Ok(self.runtime.clone().status(StatusRequest { verbose: true }).await?.into_inner())
    }

    /// PullImage without credentials; gives the image's id.
    pub async fn pull(&self, reference: &str) -> Reply<String> {
        let request = PullImageRequest { image: Some(image(reference)), ..PullImageRequest::default() };
        Ok(self.image.clone().pull_image(request).await?.into_inner().image_ref)
    }

    /// ImageStatus; None when the image is absent.
    pub async fn image_status(&self, name: &str) -> Reply<Option<Image>> {
        let request = ImageStatusRequest { image: Some(image(name)), verbose: false };
        Ok(self.image.clone().image_status(request).await?.into_inner().image)
    }

    /// ListImages of everything.
    pub async fn images(&self) -> Reply<Vec<Image>> {
        Ok(self.image.clone().list_images(ListImagesRequest::default()).await?.into_inner().images)
    }

    /// RemoveImage.
    pub async fn remove_image(&self, name: &str) -> Reply<()> {
        self.image.clone().remove_image(RemoveImageRequest { image: Some(image(name)) }).await.map(drop)
    }

    /// ImageFsInfo.
    pub async fn image_fs(&self) -> Reply<ImageFsInfoResponse> {
        Ok(self.image.clone().image_fs_info(ImageFsInfoRequest::default()).await?.into_inner())
    }

    /// Waits until a container is in a state, at most `limit`.
    pub async fn wait_for(
        &self,
        id: &str,
        state: ContainerState,
        limit: Duration,
    ) -> Result<ContainerStatus> {
        let end = tokio::time::Instant::now() + limit;
        loop {
            let status = self.status(id).await?;
            if status.state == state as i32 {
                return Ok(status);
            }
            anyhow::ensure!(
                tokio::time::Instant::now() < end,
                "container {id} is {} and not {state:?} after {limit:?}",
                status.state
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits for the end of a container and gives its last status.
    pub async fn wait_exit(&self, id: &str) -> Result<ContainerStatus> {
        self.wait_for(id, ContainerState::ContainerExited, Duration::from_secs(30)).await
    }

    /// Stops and removes every pod.
    pub async fn remove_all_pods(&self) -> Result<()> {
        for pod in self.pods(None).await? {
            self.stop_pod(&pod.id).await?;
            self.remove_pod(&pod.id).await?;
        }
        Ok(())
    }
}

/// The code of a call that must fail; an error, with the place of the call, when it does not.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(reply: Reply<T>) -> Result<Status> {
    match reply {
        Err(status) => Ok(status),
        Ok(got) => anyhow::bail!("{}: the call succeeded with {got:?}", std::panic::Location::caller()),
    }
}

/// Asserts that a call fails with a code and a message that names something.
#[track_caller]
pub fn refused_with<T: std::fmt::Debug>(reply: Reply<T>, code: Code, says: &str) -> Result<()> {
    let at = std::panic::Location::caller();
    let status = refused(reply)?;
    let message = status.message();
    anyhow::ensure!(status.code() == code, "{at}: code {:?} instead of {code:?}: {message}", status.code());
    let said = message.to_lowercase().contains(&says.to_lowercase());
    anyhow::ensure!(said, "{at}: the message does not say {says:?}: {message}");
    Ok(())
}

/// An ImageSpec of a name.
pub fn image(name: &str) -> ImageSpec {
    ImageSpec { image: name.to_owned(), ..ImageSpec::default() }
}

/// The configuration of a pod named in a way no other pod of the test is.
pub fn pod(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "tests".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        labels: HashMap::from([("io.kubernetes.pod.uid".to_owned(), format!("uid-{name}"))]),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(NamespaceOption {
                    pid: NamespaceMode::Container as i32,
                    ..NamespaceOption::default()
                }),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

/// The same on the host's network.
pub fn host_pod(name: &str) -> PodSandboxConfig {
    let mut config = pod(name);
    config.hostname.clear();
    namespaces(&mut config, |options| options.network = NamespaceMode::Node as i32);
    config
}

/// Changes the namespace options of a pod.
pub fn namespaces(config: &mut PodSandboxConfig, change: impl FnOnce(&mut NamespaceOption)) {
    let linux = config.linux.get_or_insert_default();
    change(linux.security_context.get_or_insert_default().namespace_options.get_or_insert_default());
}

/// A container of an image that runs a shell script; its namespaces follow the pod's.
pub fn container(name: &str, reference: &str, script: &str) -> ContainerConfig {
    let command = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(ImageSpec { user_specified_image: reference.to_owned(), ..image(reference) }),
        command,
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(NamespaceOption {
                    pid: NamespaceMode::Container as i32,
                    ..NamespaceOption::default()
                }),
                ..LinuxContainerSecurityContext::default()
            }),
            ..LinuxContainerConfig::default()
        }),
        ..ContainerConfig::default()
    }
}

/// The security context of a container, to be changed.
pub fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

/// The resources of a container, to be changed.
pub fn resources(config: &mut ContainerConfig) -> &mut LinuxContainerResources {
    config.linux.get_or_insert_default().resources.get_or_insert_default()
}

/// A mount of a host path.
pub fn mount(host: &Path, inside: &str) -> Mount {
    Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: inside.to_owned(),
        ..Mount::default()
    }
}

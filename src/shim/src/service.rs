//! The door: containerd's Task and Sandbox and crisp's own Pod, over ttrpc. Checks fields, calls one function,
//! translates the answer. The only file that names ttrpc's codes.
//!
//! What changes something runs as a task of its own, so that a client that hangs up half way leaves nothing
//! half done, and a panic costs one call (the answer is INTERNAL) and not the pod. One thing ends with its
//! client: the process of `RunExec`.

use std::{future::Future, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use container::{cgroup::Stats, rootfs, spec::LinuxResources};
use shim_api::{
    containerd::{
        api::{
            CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
            CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
            PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
            ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
            StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
        },
        cgroups_v2::metrics,
        sandbox_api::{
            CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
            PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
            SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
            StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
            WaitSandboxResponse,
        },
        sandbox_async, shim_async,
    },
    protobuf::{
        Message, MessageField,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim::{
        AttachRequest, AttachResponse, ContainerOptions, NamespacesRequest, NamespacesResponse, PodOptions,
        ReopenLogRequest, ReopenLogResponse, RunExecRequest, RunExecResponse, RunRequest, RunResponse,
    },
    shim_ttrpc,
    ttrpc::{self, Code, r#async::TtrpcContext, get_status},
};
use std::os::fd::{AsRawFd, BorrowedFd};
use tokio::time;

use crate::{
    container::{Container, State, Streams, Wanted},
    error::Error,
    events::Event,
    exec::Exec,
    pod::{self, Pod, check_id},
    reap::Ended,
    record,
};

/// How long a container may take to come up when the client names no deadline: its mounts can hang.
const PATIENCE: Duration = Duration::from_secs(120);
/// Before the deadline of a call, so that the answer still says what was waited for.
const MARGIN: Duration = Duration::from_millis(50);

/// One pod's services.
#[derive(Clone)]
pub(crate) struct Service(pub(crate) Arc<Pod>);

/// All services of the shim, for a server.
pub(crate) fn register(server: ttrpc::r#async::Server, pod: &Arc<Pod>) -> ttrpc::r#async::Server {
    let service = Service(pod.clone());
    server
        .register_service(shim_async::create_task(Arc::new(service.clone())))
        .register_service(sandbox_async::create_sandbox(Arc::new(service.clone())))
        .register_service(shim_ttrpc::create_pod(Arc::new(service)))
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Id(_) | Error::Invalid(_) | Error::NoNamespace(_) => Code::INVALID_ARGUMENT,
            Error::Unknown { .. } | Error::Finished { .. } => Code::NOT_FOUND,
            Error::Exists { .. } => Code::ALREADY_EXISTS,
            Error::State { .. } | Error::ExecState { .. } | Error::Stopping => Code::FAILED_PRECONDITION,
            Error::Unsupported(_) => Code::UNIMPLEMENTED,
            Error::Deadline { .. } => Code::DEADLINE_EXCEEDED,
            Error::Container(cause) if cause.is_invalid() => Code::INVALID_ARGUMENT,
            Error::Stream(crate::stream::Error::Kind { .. }) => Code::INVALID_ARGUMENT,
            Error::Io { .. } | Error::Container(_) | Error::Cgroup(_) | Error::Log(_) | Error::Stream(_) => {
                Code::UNKNOWN
            }
        };
        ttrpc::Error::RpcStatus(get_status(code, error.to_string()))
    }
}

/// Runs to the end whatever becomes of the client.
async fn detached<T: Send + 'static>(
    act: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(act).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(ttrpc::Error::RpcStatus(get_status(Code::INTERNAL, "the call panicked"))),
    }
}

fn deadline(context: &TtrpcContext) -> time::Instant {
    let patience = match u64::try_from(context.timeout_nano) {
        Ok(0) | Err(_) => PATIENCE,
        Ok(nanos) => Duration::from_nanos(nanos).saturating_sub(MARGIN).min(Duration::from_secs(3600)),
    };
    time::Instant::now() + patience
}

/// containerd's time stamp of nanoseconds since 1970.
pub(crate) fn timestamp(nanos: i64) -> Timestamp {
    Timestamp {
        seconds: nanos.div_euclid(1_000_000_000),
        nanos: i32::try_from(nanos.rem_euclid(1_000_000_000)).unwrap_or(0),
        ..Timestamp::default()
    }
}

fn at(ended: Ended) -> MessageField<Timestamp> {
    MessageField::some(timestamp(ended.at))
}

/// Options of ours in an `Any`; absent ones are the default, those of others are not for us.
fn options<T: Message>(any: &MessageField<Any>, name: &str) -> Result<T, Error> {
    match any.as_ref() {
        Some(any) if any.type_url.rsplit('/').next() == Some(name) => {
            T::parse_from_bytes(&any.value).map_err(|cause| Error::Invalid(format!("{name}: {cause}")))
        }
        _ => Ok(T::new()),
    }
}

fn bundle(path: &str) -> Result<PathBuf, Error> {
    match path.starts_with('/') {
        true => Ok(PathBuf::from(path)),
        false => Err(Error::Invalid(format!("bundle {path:?} is not an absolute path"))),
    }
}

impl Service {
    fn pod(&self) -> &Arc<Pod> {
        &self.0
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        self.0.container(id)
    }

    fn exec(&self, id: &str, exec: &str) -> Result<(Arc<Container>, Arc<Exec>), Error> {
        let container = self.container(id)?;
        let exec = container.exec(exec)?;
        Ok((container, exec))
    }
}

#[async_trait]
impl shim_async::Task for Service {
    async fn create(&self, ctx: &TtrpcContext, req: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        check_id(&req.id)?;
        if !req.checkpoint.is_empty() {
            return Err(Error::Unsupported("restore from a checkpoint").into());
        }
        let wanted = Wanted {
            bundle: bundle(&req.bundle)?,
            rootfs: req.rootfs.iter().map(|m| mount(&m.type_, &m.source, &m.options)).collect(),
            options: options::<ContainerOptions>(&req.options, "crisp.shim.v1.ContainerOptions")?,
            streams: Streams {
                terminal: req.terminal,
                stdin: req.stdin,
                stdout: req.stdout,
                stderr: req.stderr,
            },
            id: req.id,
        };
        let (pod, deadline) = (self.pod().clone(), deadline(ctx));
        let pid = detached(async move {
            let container = Container::create(&pod, wanted, deadline).await?;
            pod.events.send(container.created(""));
            Ok(container.seen().pid)
        });
        Ok(CreateTaskResponse { pid: pid.await?, ..Default::default() })
    }

    async fn start(&self, ctx: &TtrpcContext, req: StartRequest) -> ttrpc::Result<StartResponse> {
        let (pod, deadline) = (self.pod().clone(), deadline(ctx));
        let container = self.container(&req.id)?;
        let pid = match req.exec_id.as_str() {
            "" => {
                detached(async move {
                    container.start(&pod, deadline).await?;
                    Ok(container.seen().pid)
                })
                .await?
            }
            exec => {
                let exec = container.exec(exec)?;
                detached(async move { exec.start(&pod, &container, deadline).await }).await?
            }
        };
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, req: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let pod = self.pod().clone();
        let container = self.container(&req.id)?;
        let (pid, ended) = match req.exec_id.as_str() {
            "" => detached(async move { container.delete(&pod).await }).await?,
            exec => container.exec(exec)?.delete(&pod, &container)?,
        };
        Ok(DeleteResponse { pid, exit_status: ended.code, exited_at: at(ended), ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, req: ExecProcessRequest) -> ttrpc::Result<Empty> {
        check_id(&req.exec_id)?;
        let container = self.container(&req.id)?;
        let process = req.spec.into_option().map(|any| any.value).unwrap_or_default();
        let streams =
            Streams { terminal: req.terminal, stdin: req.stdin, stdout: req.stdout, stderr: req.stderr };
        let exec = Arc::new(Exec::new(req.exec_id, process, streams));
        container.add_exec(&exec)?;
        let (id, exec) = (container.id.clone(), exec.id.clone());
        self.pod().events.send(Event::ExecAdded { id, exec });
        Ok(Empty::default())
    }

    async fn state(&self, _: &TtrpcContext, req: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.container(&req.id)?;
        let (streams, pid, status, ended) = match req.exec_id.as_str() {
            "" => {
                let seen = container.seen();
                (container.streams.clone(), seen.pid, status(seen.state, seen.ended), seen.ended)
            }
            exec => {
                let exec = container.exec(exec)?;
                let seen = exec.seen();
                let status = match (seen.ended, seen.pid) {
                    (Some(_), _) => Status::STOPPED,
                    (None, 0) => Status::CREATED,
                    (None, _) => Status::RUNNING,
                };
                (exec.streams.clone(), seen.pid, status, seen.ended)
            }
        };
        Ok(StateResponse {
            id: req.id,
            exec_id: req.exec_id,
            bundle: container.bundle.display().to_string(),
            pid,
            status: status.into(),
            stdin: streams.stdin,
            stdout: streams.stdout,
            stderr: streams.stderr,
            terminal: streams.terminal,
            exit_status: ended.map_or(0, |ended| ended.code),
            exited_at: ended.map_or_else(MessageField::none, at),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, req: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.container(&req.id)?.pids()?;
        let processes = pids.into_iter().map(|pid| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, req: PauseRequest) -> ttrpc::Result<Empty> {
        let (pod, container) = (self.pod().clone(), self.container(&req.id)?);
        detached(async move { container.pause(&pod) }).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, req: ResumeRequest) -> ttrpc::Result<Empty> {
        let (pod, container) = (self.pod().clone(), self.container(&req.id)?);
        detached(async move { container.resume(&pod) }).await?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(Error::Unsupported("checkpoint").into())
    }

    async fn kill(&self, _: &TtrpcContext, req: KillRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&req.id)?;
        match req.exec_id.as_str() {
            "" => detached(async move { container.kill(req.signal, req.all) }).await?,
            exec => container.exec(exec)?.kill(req.signal)?,
        }
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: ResizePtyRequest) -> ttrpc::Result<Empty> {
        match req.exec_id.as_str() {
            "" => self.container(&req.id)?.resize(req.width, req.height)?,
            exec => self.exec(&req.id, exec)?.1.resize(req.width, req.height)?,
        }
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, req: CloseIORequest) -> ttrpc::Result<Empty> {
        let container = self.container(&req.id)?;
        if req.stdin {
            match req.exec_id.as_str() {
                "" => container.close_stdin(),
                exec => container.exec(exec)?.close_stdin(),
            }
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, req: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&req.id)?;
        let resources = req.resources.into_option().unwrap_or_default();
        let resources: LinuxResources = serde_json::from_slice(&resources.value)
            .map_err(|cause| Error::Invalid(format!("resources: {cause}")))?;
        detached(async move { container.update(&resources) }).await?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, req: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let ended = match req.exec_id.as_str() {
            "" => self.container(&req.id)?.wait().await,
            exec => self.exec(&req.id, exec)?.1.wait().await,
        };
        Ok(WaitResponse { exit_status: ended.code, exited_at: at(ended), ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, req: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.container(&req.id)?.stats()?;
        Ok(StatsResponse { stats: MessageField::some(any_stats(stats)), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, req: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // containerd connects before it creates, too.
        let task_pid = self.container(&req.id).map_or(0, |container| container.seen().pid);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, version, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, req: ShutdownRequest) -> ttrpc::Result<Empty> {
        if req.now || self.pod().is_empty() {
            let pod = self.pod().clone();
            detached(async move {
                let stopped = pod.stop(pod::STOP).await;
                pod.shutdown.notify_one();
                stopped
            })
            .await?;
        }
        Ok(Empty::default())
    }
}

#[async_trait]
impl sandbox_async::Sandbox for Service {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        req: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        check_id(&req.sandbox_id)?;
        if req.sandbox_id != self.pod().id {
            return Err(Error::Unknown { what: "pod", id: req.sandbox_id }.into());
        }
        let options: PodOptions = options(&req.options, "crisp.shim.v1.PodOptions")?;
        let pod = self.pod().clone();
        detached(async move { pod.create(options, &req.netns_path) }).await?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        _: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let created_at = MessageField::some(timestamp(self.pod().ready()?));
        Ok(StartSandboxResponse { pid: std::process::id(), created_at, ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        let mut response = PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".into();
        platform.architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }
        .into();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        req: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let bound = match req.timeout_secs {
            0 => pod::STOP,
            seconds => Duration::from_secs(seconds.min(3600).into()),
        };
        let pod = self.pod().clone();
        detached(async move { pod.stop(bound).await }).await?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        _: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let mut over = self.pod().over.subscribe();
        let ended = over.wait_for(Option::is_some).await.ok().and_then(|over| *over);
        let ended = ended.unwrap_or(Ended { code: 255, at: record::now() });
        Ok(WaitSandboxResponse { exit_status: ended.code, exited_at: at(ended), ..Default::default() })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        req: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let (ready, created_at) = self.pod().status();
        let over = *self.pod().over.borrow();
        Ok(SandboxStatusResponse {
            sandbox_id: req.sandbox_id,
            pid: std::process::id(),
            state: if ready { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" }.into(),
            created_at: MessageField::some(timestamp(created_at)),
            exited_at: over.map_or_else(MessageField::none, at),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, _: PingRequest) -> ttrpc::Result<PingResponse> {
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let pod = self.pod().clone();
        detached(async move {
            pod.stop(pod::STOP).await?;
            pod.shutdown.notify_one();
            Ok(())
        })
        .await?;
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        _: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let mut response = SandboxMetricsResponse::default();
        if let Some(cgroup) = self.pod().parent_cgroup()? {
            let metric = response.metrics.mut_or_insert_default();
            metric.timestamp = MessageField::some(timestamp(record::now()));
            metric.id.clone_from(&self.pod().id);
            metric.data = MessageField::some(any_stats(cgroup.stats()));
        }
        Ok(response)
    }
}

#[async_trait]
impl shim_ttrpc::Pod for Service {
    async fn namespaces(&self, _: &TtrpcContext, _: NamespacesRequest) -> ttrpc::Result<NamespacesResponse> {
        let shared = self.pod().shared();
        let number = |fd: Option<BorrowedFd<'_>>| fd.map_or(0, |fd| fd.as_raw_fd());
        Ok(NamespacesResponse {
            pid: std::process::id(),
            user_fd: number(shared.user()),
            net_fd: number(shared.net()),
            ipc_fd: number(shared.ipc()),
            uts_fd: number(shared.uts()),
            pid_fd: number(shared.pid()),
            ..Default::default()
        })
    }

    async fn reopen_log(&self, _: &TtrpcContext, req: ReopenLogRequest) -> ttrpc::Result<ReopenLogResponse> {
        self.container(&req.container_id)?.reopen_log()?;
        Ok(ReopenLogResponse::default())
    }

    async fn run(&self, ctx: &TtrpcContext, req: RunRequest) -> ttrpc::Result<RunResponse> {
        check_id(&req.container_id)?;
        let options = req.options.into_option().unwrap_or_default();
        let wanted = Wanted {
            id: req.container_id,
            bundle: bundle(&req.bundle)?,
            rootfs: req.rootfs.iter().map(|m| mount(&m.type_, &m.source, &m.options)).collect(),
            streams: Streams { terminal: options.terminal, ..Streams::default() },
            options,
        };
        let (pod, deadline) = (self.pod().clone(), deadline(ctx));
        let (pid, started_at) = detached(async move {
            let container = Container::create(&pod, wanted, deadline).await?;
            pod.events.send(container.created(""));
            match container.start(&pod, deadline).await {
                Ok(started_at) => Ok((container.seen().pid, started_at)),
                Err(error) => {
                    // It has ended, or is about to.
                    let _ = time::timeout(pod::STOP, container.wait()).await;
                    let _ = container.delete(&pod).await;
                    Err(error)
                }
            }
        })
        .await?;
        Ok(RunResponse { pid, started_at, ..Default::default() })
    }

    async fn attach(&self, _: &TtrpcContext, req: AttachRequest) -> ttrpc::Result<AttachResponse> {
        let container = self.container(&req.container_id)?;
        let streams = Streams { terminal: false, stdin: req.stdin, stdout: req.stdout, stderr: req.stderr };
        container.attach(&streams)?;
        Ok(AttachResponse::default())
    }

    async fn run_exec(&self, ctx: &TtrpcContext, req: RunExecRequest) -> ttrpc::Result<RunExecResponse> {
        check_id(&req.exec_id)?;
        let container = self.container(&req.container_id)?;
        let streams = Streams { terminal: false, stdin: req.stdin, stdout: req.stdout, stderr: req.stderr };
        let exec = Arc::new(Exec::new(req.exec_id, req.process, streams));
        container.add_exec(&exec)?;
        // Ends the process and forgets the exec when the client hangs up or its time is over.
        let abandoned = Abandoned(exec.clone(), container.clone());
        let (pod, deadline) = (self.pod().clone(), deadline(ctx));
        let (started, of) = (exec.clone(), container.clone());
        detached(async move { started.start(&pod, &of, deadline).await }).await?;
        let ended = exec.wait().await;
        drop(abandoned);
        Ok(RunExecResponse { exit_status: ended.code, exited_at: ended.at, ..Default::default() })
    }
}

struct Abandoned(Arc<Exec>, Arc<Container>);

impl Drop for Abandoned {
    fn drop(&mut self) {
        self.0.abandon();
        self.1.remove_exec(&self.0.id);
    }
}

fn mount(kind: &str, source: &str, options: &[String]) -> rootfs::Mount {
    rootfs::Mount { kind: kind.to_owned(), source: source.to_owned(), options: options.to_vec() }
}

fn status(state: State, ended: Option<Ended>) -> Status {
    match state {
        // Stopped is what containerd may delete, so the end has to be settled first.
        State::Stopped if ended.is_none() => Status::RUNNING,
        State::Creating => Status::UNKNOWN,
        State::Created | State::Starting => Status::CREATED,
        State::Running => Status::RUNNING,
        State::Paused => Status::PAUSED,
        State::Stopped => Status::STOPPED,
    }
}

/// containerd's form for cgroup v2, on every host: its readers go by the name of the type.
fn any_stats(stats: Stats) -> Any {
    let mut to = metrics::Metrics::default();
    if let Some(cpu) = stats.cpu {
        to.cpu = MessageField::some(metrics::CPUStat {
            usage_usec: cpu.usage / 1000,
            user_usec: cpu.user / 1000,
            system_usec: cpu.system / 1000,
            nr_periods: cpu.periods,
            nr_throttled: cpu.throttled_periods,
            throttled_usec: cpu.throttled / 1000,
            ..Default::default()
        });
    }
    if let Some(memory) = stats.memory {
        let of = |name| memory.stat(name).unwrap_or(0);
        to.memory = MessageField::some(metrics::MemoryStat {
            usage: memory.usage,
            usage_limit: memory.limit.unwrap_or(u64::MAX),
            max_usage: memory.peak,
            swap_usage: memory.swap.unwrap_or(0),
            swap_limit: memory.swap_limit.unwrap_or(u64::MAX),
            anon: memory.anonymous(),
            file: of("file"),
            inactive_anon: of("inactive_anon"),
            active_anon: of("active_anon"),
            inactive_file: memory.usage.saturating_sub(memory.working_set()),
            active_file: of("active_file"),
            pgfault: memory.faults().0,
            pgmajfault: memory.faults().1,
            ..Default::default()
        });
        to.memory_events = MessageField::some(metrics::MemoryEvents {
            max: memory.failures,
            oom_kill: memory.oom_kills,
            ..Default::default()
        });
    }
    if let Some(pids) = stats.pids {
        to.pids = MessageField::some(metrics::PidsStat {
            current: pids.current,
            limit: pids.limit.unwrap_or(0),
            ..Default::default()
        });
    }
    if let Some(io) = stats.io {
        let usage = io.into_iter().map(|io| metrics::IOEntry {
            major: io.major.into(),
            minor: io.minor.into(),
            rbytes: io.read_bytes,
            wbytes: io.written_bytes,
            rios: io.reads,
            wios: io.writes,
            ..Default::default()
        });
        to.io = MessageField::some(metrics::IOStat { usage: usage.collect(), ..Default::default() });
    }
    to.hugetlb = stats
        .hugetlb
        .into_iter()
        .map(|huge| metrics::HugeTlbStat {
            current: huge.usage,
            max: huge.limit.unwrap_or(u64::MAX),
            pagesize: huge.page_size,
            failcnt: huge.failures,
            ..Default::default()
        })
        .collect();
    Any {
        type_url: "io.containerd.cgroups.v2.Metrics".into(),
        // Only a message without its required fields fails, and this has none.
        value: to.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

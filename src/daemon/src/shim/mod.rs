//! One pod's shim as the daemon sees it: its process and a ttrpc connection. The only part that knows ttrpc; every
//! call has a deadline, except the wait for an exit.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use protobuf::{MessageField, well_known_types::any::Any};
use rustix::fs::{Mode, OFlags};
use shim_api::{
    containerd::{api as task, sandbox_api as sandbox, sandbox_async::SandboxClient, shim_async::TaskClient},
    protobuf::{self, Message},
    rundir::{self, Process},
    shim as own,
    shim_ttrpc::PodClient,
    ttrpc::{self, context::Context},
};
use tokio::{io::unix::AsyncFd, net::UnixStream};

use crate::lock::Lock;

pub use own::{ContainerOptions, PodOptions};
pub use spawn::{Program, descriptors, find, letter};

mod spawn;

/// For calls that a living shim answers at once.
const QUICK: Duration = Duration::from_secs(10);
/// For calls that start processes: a mount source may be slow.
const SLOW: Duration = Duration::from_secs(100);

/// A shim that serves, or did.
pub struct Shim {
    pub process: Process,
    dir: PathBuf,
    pidfd: AsyncFd<OwnedFd>,
    services: Lock<Services>,
}

/// What a shim serves, on one connection.
#[derive(Clone)]
struct Services {
    task: TaskClient,
    sandbox: SandboxClient,
    pod: PodClient,
}

/// Why a shim did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("start {0}: {1}")]
    Spawn(PathBuf, io::Error),
    #[error("connect to {0}: {1}")]
    Connect(PathBuf, io::Error),
    #[error("the peer at {0} is user {1}, not root")]
    Peer(PathBuf, u32),
    #[error("the shim is gone")]
    Gone,
    #[error("the shim did not answer in time")]
    Deadline,
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    State(String),
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Failed(String),
}

type Result<T> = std::result::Result<T, Error>;

/// A first process that runs.
pub struct Running {
    pub pid: u32,
    pub started_at: i64,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ended {
    pub code: u32,
    /// Nanoseconds since 1970.
    pub at: i64,
}

/// Paths of the FIFOs of a process; empty means none.
#[derive(Default)]
pub struct Paths {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
}

/// The root file system of a container: overlayfs options.
pub struct Rootfs {
    pub options: Vec<String>,
}

impl Shim {
    /// Starts the shim of a pod whose run directory exists, and connects: the socket listens before the shim runs,
    /// so nobody waits for it.
    pub async fn start(program: &Program, dir: &Path, pod: &str) -> Result<Shim> {
        let failed = |e| Error::Spawn(program.path.clone(), e);
        let listener = listen(dir).map_err(|e| Error::Connect(dir.join(rundir::SOCKET), e))?;
        let started = spawn::spawn(program, dir, pod, listener).map_err(failed)?;
        let pidfd = spawn::watched(started.pidfd).map_err(failed)?;
        match connect(dir).await {
            Ok(services) => Ok(Shim::new(dir, started.process, pidfd, services)),
            Err(e) => {
                // Nobody else knows of the process yet.
                let _ = rustix::process::pidfd_send_signal(pidfd.get_ref(), rustix::process::Signal::KILL);
                let _ = pidfd.readable().await;
                spawn::reap(pidfd.get_ref());
                Err(e)
            }
        }
    }

    /// Connects to a shim that an earlier daemon started and whose process is known to live.
    pub async fn meet(dir: &Path, process: Process, pidfd: OwnedFd) -> Result<Shim> {
        let pidfd = spawn::watched(pidfd).map_err(|e| Error::Connect(dir.into(), e))?;
        Ok(Shim::new(dir, process, pidfd, connect(dir).await?))
    }

    fn new(dir: &Path, process: Process, pidfd: AsyncFd<OwnedFd>, services: Services) -> Shim {
        Shim { process, dir: dir.into(), pidfd, services: Lock::new(services) }
    }

    /// One exchange, bounded here: ttrpc's own deadline cannot be told from its other errors. A connection that broke
    /// though the shim lives is made anew for the next exchange; whether this one was done is not known.
    async fn ask<T, F>(&self, limit: Option<Duration>, call: impl FnOnce(Services) -> F) -> Result<T>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        let services = self.services.read().clone();
        let answer = match limit {
            Some(limit) => match tokio::time::timeout(limit, call(services)).await {
                Ok(answer) => answer,
                Err(_) => return Err(Error::Deadline),
            },
            None => call(services).await,
        };
        match answer.map_err(Error::from) {
            Err(Error::Gone) if !self.dead() => {
                if let Ok(services) = connect(&self.dir).await {
                    *self.services.write() = services;
                }
                Err(Error::Gone)
            }
            answer => answer,
        }
    }

    /// Whether the process has ended.
    pub fn dead(&self) -> bool {
        spawn::dead(self.pidfd.get_ref()).unwrap_or(false)
    }

    /// Returns when the shim's process has ended. Reaps it when it is our child.
    pub async fn ended(&self) {
        // The descriptor becomes readable once and stays so.
        let _ = self.pidfd.readable().await;
        spawn::reap(self.pidfd.get_ref());
    }

    /// Ends the shim by force.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), rustix::process::Signal::KILL);
    }

    pub async fn create_pod(
        &self,
        id: &str,
        dir: &Path,
        netns: Option<&Path>,
        options: &PodOptions,
    ) -> Result<()> {
        let request = sandbox::CreateSandboxRequest {
            sandbox_id: id.into(),
            bundle_path: dir.to_string_lossy().into_owned(),
            netns_path: netns.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default(),
            options: any("crisp.shim.v1.PodOptions", options)?,
            ..Default::default()
        };
        self.ask(Some(QUICK), async |to| to.sandbox.create_sandbox(Context::default(), &request).await)
            .await?;
        let request = sandbox::StartSandboxRequest { sandbox_id: id.into(), ..Default::default() };
        self.ask(Some(QUICK), async |to| to.sandbox.start_sandbox(Context::default(), &request).await)
            .await?;
        Ok(())
    }

    /// Whether the pod exists and nobody has begun to stop it.
    pub async fn is_ready(&self, id: &str) -> Result<bool> {
        let request = sandbox::SandboxStatusRequest { sandbox_id: id.into(), ..Default::default() };
        let answer = self
            .ask(Some(QUICK), async |to| to.sandbox.sandbox_status(Context::default(), &request).await)
            .await?;
        Ok(answer.state == "SANDBOX_READY")
    }

    /// Ends every process of the pod and returns when their exits are recorded.
    pub async fn stop_pod(&self, id: &str) -> Result<()> {
        let seconds = QUICK.as_secs();
        let request = sandbox::StopSandboxRequest {
            sandbox_id: id.into(),
            timeout_secs: u32::try_from(seconds).unwrap_or(u32::MAX),
            ..Default::default()
        };
        self.ask(Some(QUICK), async |to| to.sandbox.stop_sandbox(Context::default(), &request).await).await?;
        Ok(())
    }

    /// Asks the shim to end itself.
    pub async fn shut_down(&self, id: &str) -> Result<()> {
        let request = sandbox::ShutdownSandboxRequest { sandbox_id: id.into(), ..Default::default() };
        self.ask(Some(QUICK), async |to| to.sandbox.shutdown_sandbox(Context::default(), &request).await)
            .await?;
        Ok(())
    }

    /// A path of the network namespace that the shim made for its pod.
    pub async fn network_namespace(&self) -> Result<PathBuf> {
        let answer = self
            .ask(Some(QUICK), async |to| {
                to.pod.namespaces(Context::default(), &own::NamespacesRequest::new()).await
            })
            .await?;
        match answer.net_fd {
            0 => Err(Error::Failed("the shim holds no network namespace".into())),
            fd => Ok(format!("/proc/{}/fd/{fd}", self.process.pid).into()),
        }
    }

    /// Creates and starts a container.
    pub async fn run(
        &self,
        id: &str,
        bundle: &Path,
        rootfs: Rootfs,
        options: ContainerOptions,
    ) -> Result<Running> {
        let mount = own::RootfsMount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: rootfs.options,
            ..Default::default()
        };
        let request = own::RunRequest {
            container_id: id.into(),
            bundle: bundle.to_string_lossy().into_owned(),
            rootfs: vec![mount],
            options: MessageField::some(options),
            ..Default::default()
        };
        let answer = self.ask(Some(SLOW), async |to| to.pod.run(Context::default(), &request).await).await?;
        Ok(Running { pid: answer.pid, started_at: answer.started_at })
    }

    /// Whether a container is on its way from its creation to its program.
    pub async fn is_starting(&self, id: &str) -> Result<bool> {
        use task::Status;
        let request = task::StateRequest { id: id.into(), ..Default::default() };
        let answer =
            self.ask(Some(QUICK), async |to| to.task.state(Context::default(), &request).await).await?;
        Ok(matches!(answer.status.enum_value_or_default(), Status::UNKNOWN | Status::CREATED))
    }

    /// Returns when the first process of a container has ended and its record is written. Has no deadline.
    pub async fn wait(&self, id: &str) -> Result<Ended> {
        let request = task::WaitRequest { id: id.into(), ..Default::default() };
        let answer = self.ask(None, async |to| to.task.wait(Context::default(), &request).await).await?;
        let at = answer.exited_at.as_ref().map(|at| at.seconds * 1_000_000_000 + i64::from(at.nanos));
        Ok(Ended { code: answer.exit_status, at: at.unwrap_or_default() })
    }

    /// Sends a signal to the first process of a container or to one of its commands, or to all of the container.
    pub async fn signal(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let request =
            task::KillRequest { id: id.into(), exec_id: exec.into(), signal, all, ..Default::default() };
        self.ask(Some(QUICK), async |to| to.task.kill(Context::default(), &request).await).await?;
        Ok(())
    }

    /// Makes the shim forget a container that has ended.
    pub async fn delete(&self, id: &str) -> Result<()> {
        let request = task::DeleteRequest { id: id.into(), ..Default::default() };
        self.ask(Some(QUICK), async |to| to.task.delete(Context::default(), &request).await).await?;
        Ok(())
    }

    /// Changes limits: an OCI LinuxResources object, all or nothing.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<()> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: resources,
            ..Default::default()
        };
        let request = task::UpdateTaskRequest {
            id: id.into(),
            resources: MessageField::some(resources),
            ..Default::default()
        };
        self.ask(Some(QUICK), async |to| to.task.update(Context::default(), &request).await).await?;
        Ok(())
    }

    /// The processes of a container.
    pub async fn pids(&self, id: &str) -> Result<Vec<u32>> {
        let request = task::PidsRequest { id: id.into(), ..Default::default() };
        let answer =
            self.ask(Some(QUICK), async |to| to.task.pids(Context::default(), &request).await).await?;
        Ok(answer.processes.iter().map(|process| process.pid).collect())
    }

    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let request = own::ReopenLogRequest { container_id: id.into(), ..Default::default() };
        self.ask(Some(QUICK), async |to| to.pod.reopen_log(Context::default(), &request).await).await?;
        Ok(())
    }

    /// Connects FIFOs to the first process of a container.
    pub async fn attach(&self, id: &str, paths: Paths) -> Result<()> {
        let request = own::AttachRequest {
            container_id: id.into(),
            stdin: paths.stdin,
            stdout: paths.stdout,
            stderr: paths.stderr,
            ..Default::default()
        };
        self.ask(Some(QUICK), async |to| to.pod.attach(Context::default(), &request).await).await?;
        Ok(())
    }

    /// Sets the size of the terminal of the first process or of a command.
    pub async fn resize(&self, id: &str, exec: &str, width: u16, height: u16) -> Result<()> {
        let request = task::ResizePtyRequest {
            id: id.into(),
            exec_id: exec.into(),
            width: width.into(),
            height: height.into(),
            ..Default::default()
        };
        self.ask(Some(QUICK), async |to| to.task.resize_pty(Context::default(), &request).await).await?;
        Ok(())
    }

    /// Runs a command to its end. The caller bounds the time, and kills by [`Shim::signal`] with the exec's id.
    pub async fn exec(&self, id: &str, exec: &str, process: Vec<u8>, paths: Paths) -> Result<Ended> {
        let request = own::RunExecRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process,
            stdin: paths.stdin,
            stdout: paths.stdout,
            stderr: paths.stderr,
            ..Default::default()
        };
        let answer = self.ask(None, async |to| to.pod.run_exec(Context::default(), &request).await).await?;
        Ok(Ended { code: answer.exit_status, at: answer.exited_at })
    }
}

impl Program {
    /// Cleans up after a shim that is dead: ends what is left of its containers and writes what can be known of
    /// their exits.
    pub async fn clean(&self, dir: &Path, pod: &str) -> Result<()> {
        let failed = |e| Error::Spawn(self.path.clone(), e);
        let child = tokio::process::Command::new(self.executable())
            .arg0("containerd-shim-crisp-v1")
            .args(["-namespace", "k8s.io", "-id", pod, "-bundle"])
            .arg(dir)
            .arg("delete")
            .current_dir(dir)
            .env_clear()
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        match tokio::time::timeout(QUICK, child.wait_with_output()).await {
            Err(_) => Err(Error::Deadline),
            Ok(Err(e)) => Err(failed(e)),
            Ok(Ok(output)) if output.status.success() => Ok(()),
            Ok(Ok(output)) => {
                let text = String::from_utf8_lossy(&output.stderr);
                let last = text.lines().last().unwrap_or_default();
                Err(Error::Failed(format!("shim delete ended with {}: {last}", output.status)))
            }
        }
    }
}

/// The socket's path is longer than the 108 bytes that sockaddr_un holds (unix(7)), so it is named by a
/// descriptor of its directory.
fn short(dir: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let fd = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{}", fd.as_raw_fd(), rundir::SOCKET));
    Ok((fd, path))
}

fn listen(dir: &Path) -> io::Result<UnixListener> {
    let (_dir, path) = short(dir)?;
    UnixListener::bind(path)
}

async fn connect(dir: &Path) -> Result<Services> {
    let path = dir.join(rundir::SOCKET);
    let failed = |e| Error::Connect(path.clone(), e);
    let (_dir, short) = short(dir).map_err(failed)?;
    let stream = match tokio::time::timeout(QUICK, UnixStream::connect(short)).await {
        Err(_) => return Err(Error::Deadline),
        Ok(stream) => stream.map_err(failed)?,
    };
    let peer = stream.peer_cred().map_err(failed)?;
    if peer.uid() != 0 {
        return Err(Error::Peer(path, peer.uid()));
    }
    let client = ttrpc::asynchronous::Client::new(stream.into());
    Ok(Services {
        task: TaskClient::new(client.clone()),
        sandbox: SandboxClient::new(client.clone()),
        pod: PodClient::new(client),
    })
}

fn any(name: &str, message: &impl Message) -> Result<MessageField<Any>> {
    let value = message.write_to_bytes().map_err(|e| Error::Invalid(e.to_string()))?;
    Ok(MessageField::some(Any { type_url: name.into(), value, ..Default::default() }))
}

impl From<ttrpc::Error> for Error {
    fn from(error: ttrpc::Error) -> Error {
        use ttrpc::Code;
        match error {
            ttrpc::Error::RpcStatus(status) => {
                let text = status.message;
                match status.code.enum_value_or(Code::UNKNOWN) {
                    Code::NOT_FOUND => Error::NotFound(text),
                    Code::FAILED_PRECONDITION | Code::ALREADY_EXISTS => Error::State(text),
                    Code::INVALID_ARGUMENT => Error::Invalid(text),
                    Code::DEADLINE_EXCEEDED => Error::Deadline,
                    _ => Error::Failed(text),
                }
            }
            ttrpc::Error::Others(text) => Error::Failed(text),
            _ => Error::Gone,
        }
    }
}

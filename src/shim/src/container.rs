//! One container's life: from the clone to the record of its end. How it is made is the library's business,
//! and what its client is called the door's.
//!
//! ```text
//!   Creating ──► Created ──► Starting ──► Running ◄──► Paused
//!      │            │            │           │           │
//!      │ failed     └────────────┴───────────┴───────────┴──► Stopped ──► removed
//!      └──► removed
//! ```
//! The way to Stopped is one: the first process ends, by itself or killed, and `settle` runs, whoever else is
//! doing something to the container. It reads the OOM facts while the cgroup is there, kills what is left,
//! takes the last of the output, writes the record, and only then tells those who wait.

use std::{
    collections::HashMap,
    convert::Infallible,
    fs::File,
    future::pending,
    io::Read,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use container::{
    Created, Join, Request, Rootfs, Starting, Stdio,
    cgroup::Stats,
    rootfs,
    spec::{LinuxResources, Spec},
};
use rustix::{
    fs::OFlags,
    process::{Signal, pidfd_send_signal},
};
use shim_api::{rundir, shim::ContainerOptions};
use tokio::{
    sync::{oneshot, watch},
    time,
};

use crate::{
    attach::Client,
    error::{Act, Error},
    events::{self, Event},
    exec::Exec,
    kernel::watch_borrowed,
    lock,
    log::{Log, Place, Stream},
    pod::{Names, Pod, Shared, end, remove_cgroup},
    reap::{self, Ended, has_ended},
    record,
    stream::{self, Copies, Way},
};

/// How long the output of a container is followed after its end, when somebody outside holds its pipe.
const DRAIN: Duration = Duration::from_secs(1);
/// How long the end of a container waits for its cgroup to become empty.
const EMPTY: Duration = Duration::from_secs(2);
/// Largest config.json.
const SPEC: u64 = 16 << 20;
/// What is said of a container whose program could not be executed, as containerd does.
const NOT_STARTED: u32 = 128;

/// What a client wants to run.
pub(crate) struct Wanted {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: Vec<rootfs::Mount>,
    pub(crate) options: ContainerOptions,
    pub(crate) streams: Streams,
}

/// Paths of a process's streams; empty means none.
#[derive(Clone, Debug, Default)]
pub(crate) struct Streams {
    pub(crate) terminal: bool,
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Streams {
    fn is_nowhere(&self) -> bool {
        self.stdin.is_empty() && self.stdout.is_empty() && self.stderr.is_empty()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Creating,
    Created,
    Starting,
    Running,
    Paused,
    Stopped,
}

impl State {
    pub(crate) fn name(self) -> &'static str {
        match self {
            State::Creating => "being created",
            State::Created => "created",
            State::Starting => "being started",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
        }
    }
}

pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) streams: Streams,
    /// Input of attached clients goes to the process; the first that ends closes it with `stdin_once`.
    stdin: bool,
    stdin_once: bool,
    life: Mutex<Life>,
    ended: watch::Sender<Option<Ended>>,
    /// Held while the container is started, so that its end is settled after its beginning.
    starting: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Life {
    state: Option<State>,
    process: Option<Created>,
    pid: u32,
    /// Taken while the process cannot have ended yet.
    identity: rundir::Process,
    failed_to_start: bool,
    log: Option<Log>,
    copies: Option<Copies>,
    /// The other end of a stdin that stays open.
    stdin: Option<OwnedFd>,
    /// The first attached input has ended and was the only one.
    stdin_used: bool,
    keepers: Vec<OwnedFd>,
    execs: Names<Exec>,
}

impl Life {
    fn state(&self) -> State {
        self.state.unwrap_or(State::Creating)
    }
}

/// A container as its clients see it.
pub(crate) struct Seen {
    pub(crate) state: State,
    pub(crate) pid: u32,
    pub(crate) ended: Option<Ended>,
}

/// The parts of stdio that the shim keeps.
#[derive(Default)]
struct Ours {
    log: Option<Log>,
    stdin: Option<OwnedFd>,
    keepers: Vec<OwnedFd>,
}

impl Container {
    fn life(&self) -> MutexGuard<'_, Life> {
        lock(&self.life)
    }

    fn refuse<T>(&self, state: State) -> Result<T, Error> {
        Err(Error::State { id: self.id.clone(), state: state.name() })
    }

    pub(crate) fn seen(&self) -> Seen {
        let life = self.life();
        Seen { state: life.state(), pid: life.pid, ended: *self.ended.borrow() }
    }

    /// Makes a container up to the point where its program could be executed.
    pub(crate) async fn create(
        pod: &Arc<Pod>,
        wanted: Wanted,
        deadline: time::Instant,
    ) -> Result<Arc<Container>, Error> {
        let container = Arc::new(Container {
            id: wanted.id.clone(),
            bundle: wanted.bundle.clone(),
            streams: wanted.streams.clone(),
            stdin: wanted.options.stdin,
            stdin_once: wanted.options.stdin_once,
            life: Mutex::default(),
            ended: watch::Sender::new(None),
            starting: tokio::sync::Mutex::new(()),
        });
        pod.insert(&container)?;
        let made = container.make(pod, wanted, deadline).await;
        if made.is_err() {
            pod.remove(&container.id);
            // Nobody can wait for it any more; a stop that found it may.
            container.ended.send_replace(Some(Ended { code: NOT_STARTED, at: record::now() }));
        }
        made.map(|()| container)
    }

    async fn make(
        self: &Arc<Container>,
        pod: &Arc<Pod>,
        wanted: Wanted,
        deadline: time::Instant,
    ) -> Result<(), Error> {
        let spec = read_spec(&self.bundle)?;
        let host = pod.host()?;
        let shared = pod.shared();
        let options = &wanted.options;
        let terminal = spec.process.as_ref().is_some_and(|process| process.terminal);
        let target = self.target(pod, &options.join_pid_of)?;
        let (stdio, ours) = self.stdio(pod, &spec, options)?;
        let mut trees = Vec::new();
        if options.pod_shm {
            let tree = shared.shm()?.ok_or(Error::NoNamespace("shm"))?;
            trees.push((PathBuf::from("/dev/shm"), tree));
        }
        let request = Request {
            id: &self.id,
            spec: &spec,
            bundle: &self.bundle,
            rootfs: match wanted.rootfs.is_empty() {
                true => Rootfs::Bundle,
                false => Rootfs::Mounts(wanted.rootfs),
            },
            join: join(&shared, options, target.as_ref())?,
            trees,
            stdio,
            cgroups: &host,
        };
        let birth = pod.reaper.birth();
        let mut pending = container::create(request)?;
        drop(spec);
        let mut stopping = pod.stopping.subscribe();
        let created = loop {
            if let Some(created) = pending.try_finish()? {
                break created;
            }
            tokio::select! {
                ready = readable(pending.fd(), deadline, "the creation of the container") => ready?,
                _ = stopping.wait_for(|stopping| *stopping) => return Err(Error::Stopping),
            }
        };
        for warning in &created.warnings {
            ::log::warn!("container {}: {warning}", self.id);
        }
        let ended = birth.claim(created.pid, created.pidfd.as_fd());
        self.begin(pod, created, ours, terminal, ended)
    }

    /// From here on the container ends by its process ending.
    fn begin(
        self: &Arc<Container>,
        pod: &Arc<Pod>,
        created: Created,
        ours: Ours,
        terminal: bool,
        ended: oneshot::Receiver<Ended>,
    ) -> Result<(), Error> {
        let identity = record::process(created.pid);
        let mut life = self.life();
        life.pid = created.pid;
        life.process = Some(created);
        life.log = ours.log;
        life.stdin = ours.stdin;
        life.keepers = ours.keepers;
        life.state = Some(State::Created);
        let connected = if terminal { self.connect_terminal(pod, &mut life) } else { Ok(()) };
        drop(life);
        tokio::spawn(self.clone().settle(pod.clone(), ended));
        // What fails from here on is undone by the end of the process.
        let begun = connected.and_then(|()| {
            self.life().identity = identity.act("look at the container's process")?;
            Ok(())
        });
        if begun.is_err() {
            self.kill_all();
        }
        begun
    }

    fn connect_terminal(&self, pod: &Pod, life: &mut Life) -> Result<(), Error> {
        let Some(pty) = life.process.as_ref().and_then(|process| process.pty.as_ref()) else {
            return Err(Error::Invalid("the container has no terminal".into()));
        };
        stream::nonblocking(pty).act("prepare the terminal")?;
        match &mut life.log {
            Some(log) => {
                let side = rustix::io::fcntl_dupfd_cloexec(pty, 3).act("share the terminal")?;
                log.follow(Stream::Stdout, side).act("follow the terminal")?;
            }
            None => {
                let (stdin, stdout) = (&self.streams.stdin, &self.streams.stdout);
                life.copies = Some(Copies::start(pty, stdin, stdout, pod.foreign)?);
            }
        }
        Ok(())
    }

    /// The container's standard streams: its log, or what its client names, or nothing.
    fn stdio(&self, pod: &Pod, spec: &Spec, options: &ContainerOptions) -> Result<(Stdio, Ours), Error> {
        let mut ours = Ours::default();
        if !options.log_path.is_empty() {
            let place = Place {
                directory: PathBuf::from(&options.log_directory),
                path: PathBuf::from(&options.log_path),
            };
            ours.log = Some(Log::open(place, options.max_log_record)?);
        } else if !pod.foreign && self.streams.is_nowhere() {
            ours.log = Some(Log::nowhere()?);
        }
        let process = spec.process.as_ref();
        if process.is_some_and(|process| process.terminal) {
            let size = process.and_then(|process| process.console_size).unwrap_or_default();
            return Ok((Stdio::Terminal { width: size.width, height: size.height }, ours));
        }
        let Some(log) = &mut ours.log else {
            let (stdio, stdin, keepers) = open_streams(&self.streams, pod.foreign)?;
            (ours.stdin, ours.keepers) = (stdin, keepers);
            return Ok((stdio, ours));
        };
        let (stdout, stderr) = (log.pipe(Stream::Stdout)?, log.pipe(Stream::Stderr)?);
        let stdin = match options.stdin {
            true => {
                let (theirs, other) =
                    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).act("make a pipe for stdin")?;
                stream::nonblocking(&other).act("make a pipe for stdin")?;
                ours.stdin = Some(other);
                Some(theirs)
            }
            false => None,
        };
        Ok((Stdio::Fds { stdin, stdout: Some(stdout), stderr: Some(stderr) }, ours))
    }

    /// The pid namespace of another container of the pod.
    fn target(&self, pod: &Pod, id: &str) -> Result<Option<OwnedFd>, Error> {
        if id.is_empty() {
            return Ok(None);
        }
        let target = pod.container(id)?;
        let life = target.life();
        let Some(process) = life.process.as_ref().filter(|_| life.state() != State::Stopped) else {
            return target.refuse(State::Stopped);
        };
        let path = format!("/proc/{}/ns/pid", process.pid);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let namespace = rustix::fs::open(&path, flags, rustix::fs::Mode::empty());
        // The path speaks of a pid; only while the pidfd says that its process lives is it the right one.
        if has_ended(process.pidfd.as_fd()) {
            return target.refuse(State::Stopped);
        }
        Ok(Some(namespace.act(format!("open {path}"))?))
    }

    /// Lets the program be executed; returns the time when it was.
    pub(crate) async fn start(&self, pod: &Pod, deadline: time::Instant) -> Result<i64, Error> {
        let _starting = self.starting.lock().await;
        let mut starting = {
            let mut life = self.life();
            let state = life.state();
            let Some(process) = life.process.as_mut().filter(|_| state == State::Created) else {
                return self.refuse(state);
            };
            let starting = process.start()?;
            life.state = Some(State::Starting);
            starting
        };
        if let Err(error) = executed(&mut starting, deadline).await {
            self.life().failed_to_start = true;
            self.kill_all();
            return Err(error);
        }
        let started_at = record::now();
        let (pid, process) = {
            let mut life = self.life();
            life.state = Some(State::Running);
            (life.pid, life.identity.clone())
        };
        let init = rundir::Init { version: rundir::VERSION, process, started_at };
        let written = record::write(&self.bundle, rundir::INIT, &init);
        if written.is_err() {
            self.kill_all();
        }
        written.act("record the container's process")?;
        pod.events.send(Event::Started { id: self.id.clone(), pid });
        Ok(started_at)
    }

    /// Waits for the end.
    pub(crate) async fn wait(&self) -> Ended {
        reap::told(&self.ended).await
    }

    pub(crate) fn kill(&self, signal: u32, all: bool) -> Result<(), Error> {
        let life = self.life();
        let state = life.state();
        let Some(process) = life.process.as_ref().filter(|_| state != State::Stopped) else {
            return match state {
                State::Stopped => Err(Error::Finished { id: self.id.clone() }),
                state => self.refuse(state),
            };
        };
        if signal == Signal::KILL.as_raw().unsigned_abs() {
            if all {
                process.cgroup.kill()?;
            }
            send(process.pidfd.as_fd(), signal, &self.id)?;
            if state == State::Paused {
                process.cgroup.thaw()?;
            }
            return Ok(());
        }
        if all {
            return signal_all(process, signal);
        }
        send(process.pidfd.as_fd(), signal, &self.id)
    }

    /// Kills everything there is, in whatever state, as far as possible.
    pub(crate) fn kill_all(&self) {
        let life = self.life();
        let Some(process) = &life.process else { return };
        let _ = process.cgroup.kill();
        let _ = pidfd_send_signal(&process.pidfd, Signal::KILL);
        if life.state() == State::Paused {
            let _ = process.cgroup.thaw();
        }
    }

    pub(crate) fn pause(&self, pod: &Pod) -> Result<(), Error> {
        let mut life = self.life();
        let state = life.state();
        let Some(process) = life.process.as_ref().filter(|_| state == State::Running) else {
            return self.refuse(state);
        };
        process.cgroup.freeze()?;
        life.state = Some(State::Paused);
        pod.events.send(Event::Paused { id: self.id.clone() });
        Ok(())
    }

    pub(crate) fn resume(&self, pod: &Pod) -> Result<(), Error> {
        let mut life = self.life();
        let state = life.state();
        let Some(process) = life.process.as_ref().filter(|_| state == State::Paused) else {
            return self.refuse(state);
        };
        process.cgroup.thaw()?;
        life.state = Some(State::Running);
        pod.events.send(Event::Resumed { id: self.id.clone() });
        Ok(())
    }

    pub(crate) fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        self.with_process(|process| {
            for warning in process.cgroup.update(resources)? {
                ::log::warn!("container {}: {warning}", self.id);
            }
            Ok(())
        })
    }

    pub(crate) fn pids(&self) -> Result<Vec<u32>, Error> {
        self.with_process(|process| Ok(process.cgroup.pids()?))
    }

    pub(crate) fn stats(&self) -> Result<Stats, Error> {
        self.with_process(|process| Ok(process.cgroup.stats()))
    }

    pub(crate) fn cgroup_path(&self) -> Option<String> {
        self.life().process.as_ref().map(|process| process.cgroup.path().to_owned())
    }

    pub(crate) fn resize(&self, width: u32, height: u32) -> Result<(), Error> {
        self.with_process(|process| resize(process.pty.as_ref(), width, height))
    }

    pub(crate) fn close_stdin(&self) {
        let mut life = self.life();
        life.stdin = None;
        if let Some(copies) = &mut life.copies {
            copies.close_input();
        }
    }

    pub(crate) fn reopen_log(&self) -> Result<(), Error> {
        match &self.life().log {
            Some(log) => Ok(log.reopen()?),
            None => Err(Error::Invalid(format!("container {} has no log", self.id))),
        }
    }

    /// Connects a client's FIFOs; see the log for where output goes.
    pub(crate) fn attach(self: &Arc<Container>, paths: &Streams) -> Result<(), Error> {
        let output = |path: &str| -> Result<Option<OwnedFd>, Error> {
            Ok(stream::open(path, Way::Out, OFlags::NONBLOCK)?.map(|opened| opened.fd))
        };
        let client = Client::new(output(&paths.stdout)?, output(&paths.stderr)?);
        let input = stream::open(&paths.stdin, Way::In, OFlags::NONBLOCK)?;
        let life = self.life();
        let state = life.state();
        let Some(process) = life
            .process
            .as_ref()
            .filter(|_| matches!(state, State::Created | State::Starting | State::Running | State::Paused))
        else {
            return self.refuse(state);
        };
        let Some(log) = &life.log else {
            return Err(Error::Invalid(format!("container {} was made with streams of its own", self.id)));
        };
        if client.listens() && !log.attach(client) {
            return Err(Error::Invalid(format!("container {} has too many clients", self.id)));
        }
        let to = process.pty.as_ref().or(life.stdin.as_ref());
        if let (Some(from), Some(to), true) = (input, to, self.stdin && !life.stdin_used) {
            let to = rustix::io::fcntl_dupfd_cloexec(to, 3).act("share the container's stdin")?;
            let copy = stream::input(from.fd, to).act("copy to the container's stdin")?;
            let container = self.clone();
            tokio::spawn(async move {
                copy.await;
                if container.stdin_once {
                    let mut life = container.life();
                    (life.stdin, life.stdin_used) = (None, true);
                }
            });
        }
        Ok(())
    }

    fn with_process<T>(&self, act: impl FnOnce(&Created) -> Result<T, Error>) -> Result<T, Error> {
        let life = self.life();
        match &life.process {
            Some(process) => act(process),
            None => self.refuse(life.state()),
        }
    }

    /// Calls back with what an exec needs of a container that can take one.
    pub(crate) fn for_exec<T>(&self, act: impl FnOnce(&Created) -> Result<T, Error>) -> Result<T, Error> {
        let life = self.life();
        match (&life.process, life.state()) {
            (Some(process), State::Created | State::Running) => act(process),
            (_, state) => self.refuse(state),
        }
    }

    pub(crate) fn exec(&self, id: &str) -> Result<Arc<Exec>, Error> {
        crate::pod::check_id(id)?;
        let found = self.life().execs.get(id).cloned();
        found.ok_or_else(|| Error::Unknown { what: "exec", id: id.to_owned() })
    }

    pub(crate) fn add_exec(&self, exec: &Arc<Exec>) -> Result<(), Error> {
        let mut life = self.life();
        match life.state() {
            State::Creating | State::Stopped => self.refuse(life.state()),
            _ if life.execs.contains_key(&exec.id) => {
                Err(Error::Exists { what: "exec", id: exec.id.clone() })
            }
            _ => {
                life.execs.insert(exec.id.clone(), exec.clone());
                Ok(())
            }
        }
    }

    pub(crate) fn remove_exec(&self, id: &str) {
        self.life().execs.remove(id);
    }

    /// Takes a stopped container out of the pod; returns its pid and its end.
    pub(crate) async fn delete(&self, pod: &Pod) -> Result<(u32, Ended), Error> {
        let state = self.life().state();
        let Some(ended) = *self.ended.borrow() else { return self.refuse(state) };
        let (pid, process) = {
            let mut life = self.life();
            (life.pid, life.process.take())
        };
        if let Some(process) = process {
            // Its end could not remove the cgroup, so this is the second try.
            if let Err(error) = remove_cgroup(&process.cgroup, time::Instant::now() + EMPTY).await {
                self.life().process = Some(process);
                return Err(error);
            }
        }
        if let Ok(spec) = read_spec(&self.bundle)
            && spec.hooks.is_some()
        {
            for error in container::poststop(&self.id, &spec, &self.bundle) {
                ::log::warn!("container {}: {error}", self.id);
            }
        }
        pod.remove(&self.id);
        let event = Event::Deleted {
            id: self.id.clone(),
            process: self.id.clone(),
            pid,
            code: ended.code,
            at: ended.at,
        };
        pod.events.send(event);
        Ok((pid, ended))
    }

    /// The one way to the end; see the picture above.
    async fn settle(self: Arc<Container>, pod: Arc<Pod>, ended: oneshot::Receiver<Ended>) {
        let mut kills = 0;
        let mut ended = tokio::select! {
            ended = end(ended) => ended,
            never = self.follow_oom(&pod, &mut kills) => match never {},
        };
        let _told = Told(&self.ended);
        let starting = self.starting.lock().await;
        let (process, streams, copies) = {
            let mut life = self.life();
            if life.failed_to_start {
                ended.code = NOT_STARTED;
            }
            life.state = Some(State::Stopped);
            life.stdin = None;
            let streams = life.log.as_mut().map(Log::streams);
            (life.process.take(), streams, life.copies.take())
        };
        drop(starting);
        let count = process.as_ref().map_or(0, |process| {
            process.cgroup.oom_count().unwrap_or_else(|cause| {
                ::log::warn!("container {}: {cause}", self.id);
                0
            })
        });
        let oom = count > 0;
        if let Some(Err(cause)) = process.as_ref().map(|process| process.cgroup.kill()) {
            ::log::warn!("container {}: {cause}", self.id);
        }
        if let Some(copies) = copies {
            copies.finish(DRAIN, DRAIN).await;
        }
        if let Some(streams) = streams {
            streams.drain(DRAIN).await;
        }
        let exit = rundir::Exit {
            version: rundir::VERSION,
            code: ended.code,
            exited_at: ended.at,
            oom,
            known: true,
        };
        if let Err(cause) = record::write(&self.bundle, rundir::EXIT, &exit) {
            ::log::error!("container {}: record its exit: {cause}", self.id);
        }
        if let Some(process) = process
            && let Err(cause) = remove_cgroup(&process.cgroup, time::Instant::now() + EMPTY).await
        {
            ::log::error!("container {}: {cause}", self.id);
            self.life().process = Some(process);
        }
        let pid = {
            let mut life = self.life();
            life.keepers.clear();
            life.pid
        };
        self.ended.send_replace(Some(ended));
        if count > kills {
            pod.events.send(Event::Oom { id: self.id.clone() });
        }
        let (id, process) = (self.id.clone(), self.id.clone());
        pod.events.send(Event::Exited { id, process, pid, code: ended.code, at: ended.at });
    }

    /// Tells containerd of processes that the OOM killer takes while the first one lives on, and counts them. crispd
    /// reads the cgroup by itself.
    async fn follow_oom(&self, pod: &Pod, kills: &mut u64) -> Infallible {
        let watch = match pod.events.heard() {
            true => self.with_process(|process| Ok(process.cgroup.oom_watch()?)).ok().flatten(),
            false => None,
        };
        let Some(watch) = watch else { return pending().await };
        let Ok(ready) = watch_borrowed(watch.as_fd()) else { return pending().await };
        while let Ok(mut guard) = ready.readable().await {
            watch.clear();
            guard.clear_ready();
            // cgroup v1 tells that memory ran out before it chooses a process.
            for _ in 0..10 {
                let count = self.with_process(|process| Ok(process.cgroup.oom_count()?)).unwrap_or(0);
                if count > *kills {
                    *kills = count;
                    pod.events.send(Event::Oom { id: self.id.clone() });
                    break;
                }
                time::sleep(Duration::from_millis(20)).await;
            }
        }
        pending().await
    }

    /// The event that tells of a new container.
    pub(crate) fn created(&self, checkpoint: &str) -> Event {
        let streams = &self.streams;
        Event::Created(shim_api::containerd::events::task::TaskCreate {
            container_id: self.id.clone(),
            bundle: self.bundle.display().to_string(),
            io: events::streams(&streams.stdin, &streams.stdout, &streams.stderr, streams.terminal),
            checkpoint: checkpoint.to_owned(),
            pid: self.life().pid,
            ..Default::default()
        })
    }
}

/// Those who wait for an end are told one even if settling it panics.
struct Told<'a>(&'a watch::Sender<Option<Ended>>);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.0.send_if_modified(|ended| {
            let missing = ended.is_none();
            ended.get_or_insert_with(|| Ended { code: 255, at: record::now() });
            missing
        });
    }
}

/// Streams by path for a process without a terminal. With `keep` the shim holds them alive, stdin apart so
/// that it can be closed.
pub(crate) fn open_streams(
    streams: &Streams,
    keep: bool,
) -> Result<(Stdio, Option<OwnedFd>, Vec<OwnedFd>), Error> {
    let mut keepers = [None, None, None];
    let mut fds = [None, None, None];
    let paths = [(&streams.stdin, Way::In), (&streams.stdout, Way::Out), (&streams.stderr, Way::Out)];
    for ((path, way), (fd, keeper)) in paths.into_iter().zip(fds.iter_mut().zip(keepers.iter_mut())) {
        if let Some(opened) = stream::open(path, way, OFlags::empty())? {
            *fd = Some(opened.fd);
            *keeper = opened.keeper.filter(|_| keep);
        }
    }
    let [stdin, stdout, stderr] = fds;
    let [keep_stdin, keep_stdout, keep_stderr] = keepers;
    let rest = [keep_stdout, keep_stderr].into_iter().flatten().collect();
    Ok((Stdio::Fds { stdin, stdout, stderr }, keep_stdin, rest))
}

fn join<'a>(
    shared: &'a Shared,
    options: &ContainerOptions,
    target: Option<&'a OwnedFd>,
) -> Result<Join<'a>, Error> {
    let wanted = |wanted: bool, fd: Option<BorrowedFd<'a>>, name| match (wanted, fd) {
        (false, _) => Ok(None),
        (true, Some(fd)) => Ok(Some(fd)),
        (true, None) => Err(Error::NoNamespace(name)),
    };
    Ok(Join {
        user: wanted(options.join_user, shared.user(), "user")?,
        ipc: wanted(options.join_ipc, shared.ipc(), "ipc")?,
        uts: wanted(options.join_uts, shared.uts(), "uts")?,
        net: wanted(options.join_net, shared.net(), "network")?,
        pid: match target {
            Some(target) => Some(target.as_fd()),
            None => wanted(options.join_pid, shared.pid(), "pid")?,
        },
        cgroup: None,
    })
}

/// Reads config.json. It is read again for each exec: kept, it would cost every pod more than the shim itself.
pub(crate) fn read_spec(bundle: &Path) -> Result<Spec, Error> {
    let path = bundle.join("config.json");
    let read = |file: File| {
        let mut text = Vec::with_capacity(usize::try_from(file.metadata()?.len().min(SPEC) + 1).unwrap_or(0));
        file.take(SPEC).read_to_end(&mut text).map(|_| text)
    };
    let text = File::open(&path).and_then(read).act(format!("read {}", path.display()))?;
    Spec::from_json(&text).map_err(|cause| Error::Invalid(format!("{}: {cause}", path.display())))
}

/// Waits until a descriptor is readable.
pub(crate) async fn readable(
    fd: BorrowedFd<'_>,
    deadline: time::Instant,
    act: &'static str,
) -> Result<(), Error> {
    let fd = watch_borrowed(fd).act(act)?;
    let ready = time::timeout_at(deadline, fd.readable()).await;
    ready.map_err(|_| Error::Deadline { act })?.map(drop).act(act)
}

async fn executed(starting: &mut Starting, deadline: time::Instant) -> Result<(), Error> {
    loop {
        if starting.try_finish()?.is_some() {
            return Ok(());
        }
        readable(starting.fd(), deadline, "the start of the container").await?;
    }
}

/// Sends a signal to a process that is known by its pidfd.
pub(crate) fn send(pidfd: BorrowedFd<'_>, signal: u32, id: &str) -> Result<(), Error> {
    let wanted = crate::kernel::signal(signal);
    let wanted = wanted.ok_or_else(|| Error::Invalid(format!("there is no signal {signal}")))?;
    match pidfd_send_signal(pidfd, wanted) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::SRCH) => Err(Error::Finished { id: id.to_owned() }),
        Err(cause) => Err(cause).act(format!("send signal {signal} to {id}")),
    }
}

/// Sets the size of a terminal.
pub(crate) fn resize(pty: Option<&OwnedFd>, width: u32, height: u32) -> Result<(), Error> {
    let pty = pty.ok_or_else(|| Error::Invalid("the process has no terminal".into()))?;
    let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
    let size =
        rustix::termios::Winsize { ws_row: cells(height), ws_col: cells(width), ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(pty, size).act("resize the terminal")
}

/// Sends a signal to every process of the container. A process that is listed by its pid is taken for one only
/// if it is still listed once we hold it by a pidfd.
fn signal_all(process: &Created, signal: u32) -> Result<(), Error> {
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    let held: HashMap<u32, OwnedFd> = process
        .cgroup
        .pids()?
        .into_iter()
        .filter_map(|pid| {
            let raw = Pid::from_raw(i32::try_from(pid).ok()?)?;
            Some((pid, pidfd_open(raw, PidfdFlags::empty()).ok()?))
        })
        .collect();
    for pid in process.cgroup.pids()? {
        if let Some(pidfd) = held.get(&pid) {
            match send(pidfd.as_fd(), signal, "") {
                Ok(()) | Err(Error::Finished { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

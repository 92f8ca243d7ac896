//! One more process in a container, from its request to its end. It is our child like the first one; its streams
//! are its own, so what it says does not pass through here unless it has a terminal.
//!
//! ```text
//!   added ──► starting ──► running ──► ended ──► removed
//!               └────────────────────────┘ could not be executed
//! ```

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use container::{
    Stdio,
    exec::{self, Running},
    spec::Process,
};
use rustix::process::{Signal, pidfd_send_signal};
use tokio::{
    sync::{oneshot, watch},
    time,
};

use crate::{
    container::{Container, Streams, open_streams, read_spec, readable, resize, send},
    error::{Act, Error},
    events::Event,
    lock,
    pod::{Pod, end},
    reap::{self, Ended},
    record,
    stream::{self, Copies},
};

/// How long the last words on a terminal are waited for, and how long a client may take to read them.
const DRAIN: Duration = Duration::from_secs(1);
const SLOW: Duration = Duration::from_secs(30);
/// What is said of a process whose program could not be executed.
const NOT_STARTED: u32 = 128;

pub(crate) struct Exec {
    pub(crate) id: String,
    pub(crate) streams: Streams,
    /// OCI process object, JSON. Taken by the start.
    process: Mutex<Option<Vec<u8>>>,
    life: Mutex<Life>,
    ended: watch::Sender<Option<Ended>>,
}

#[derive(Default)]
struct Life {
    running: Option<Running>,
    pid: u32,
    copies: Option<Copies>,
    stdin: Option<OwnedFd>,
    keepers: Vec<OwnedFd>,
}

/// An exec as its clients see it.
pub(crate) struct Seen {
    pub(crate) pid: u32,
    pub(crate) ended: Option<Ended>,
}

impl Exec {
    pub(crate) fn new(id: String, process: Vec<u8>, streams: Streams) -> Exec {
        Exec {
            id,
            streams,
            process: Mutex::new(Some(process)),
            life: Mutex::default(),
            ended: watch::Sender::new(None),
        }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        lock(&self.life)
    }

    fn refuse<T>(&self, state: &'static str) -> Result<T, Error> {
        Err(Error::ExecState { id: self.id.clone(), state })
    }

    pub(crate) fn seen(&self) -> Seen {
        Seen { pid: self.life().pid, ended: *self.ended.borrow() }
    }

    /// Executes the program; returns its pid.
    pub(crate) async fn start(
        self: &Arc<Exec>,
        pod: &Arc<Pod>,
        container: &Arc<Container>,
        deadline: time::Instant,
    ) -> Result<u32, Error> {
        let Some(process) = lock(&self.process).take() else { return self.refuse("already started") };
        let started = self.execute(pod, container, process, deadline).await;
        if started.is_err() {
            self.ended.send_replace(Some(Ended { code: NOT_STARTED, at: record::now() }));
        }
        let pid = started?;
        let (id, exec) = (container.id.clone(), self.id.clone());
        pod.events.send(Event::ExecStarted { id, exec, pid });
        Ok(pid)
    }

    async fn execute(
        self: &Arc<Exec>,
        pod: &Arc<Pod>,
        container: &Arc<Container>,
        process: Vec<u8>,
        deadline: time::Instant,
    ) -> Result<u32, Error> {
        let mut process: Process = serde_json::from_slice(&process)
            .map_err(|cause| Error::Invalid(format!("process of exec {}: {cause}", self.id)))?;
        process.terminal |= self.streams.terminal;
        let terminal = process.terminal;
        let spec = read_spec(&container.bundle)?;
        let (stdio, stdin, keepers) = match terminal {
            true => {
                let size = process.console_size.unwrap_or_default();
                (Stdio::Terminal { width: size.width, height: size.height }, None, Vec::new())
            }
            false => open_streams(&self.streams, pod.foreign)?,
        };
        let birth = pod.reaper.birth();
        let mut pending = container.for_exec(|init| {
            Ok(exec::spawn(exec::Request {
                init: init.pidfd.as_fd(),
                init_pid: init.pid,
                spec: &spec,
                process: &process,
                cgroup: &init.cgroup,
                stdio,
            })?)
        })?;
        drop((spec, process));
        let running = loop {
            if let Some(running) = pending.try_finish()? {
                break running;
            }
            readable(pending.fd(), deadline, "the start of the process").await?;
        };
        for warning in &running.warnings {
            ::log::warn!("exec {} in container {}: {warning}", self.id, container.id);
        }
        let pid = running.pid;
        let ended = birth.claim(pid, running.pidfd.as_fd());
        let connected = if terminal { self.connect_terminal(pod, &running) } else { Ok(None) };
        {
            let mut life = self.life();
            (life.pid, life.running) = (pid, Some(running));
            (life.stdin, life.keepers) = (stdin, keepers);
        }
        tokio::spawn(self.clone().settle(pod.clone(), container.clone(), ended));
        match connected {
            Ok(copies) => self.life().copies = copies,
            Err(error) => {
                self.abandon();
                return Err(error);
            }
        }
        Ok(pid)
    }

    fn connect_terminal(&self, pod: &Pod, running: &Running) -> Result<Option<Copies>, Error> {
        let pty = running.pty.as_ref();
        let pty = pty.ok_or_else(|| Error::Invalid("the process has no terminal".into()))?;
        stream::nonblocking(pty).act("prepare the terminal")?;
        Ok(Some(Copies::start(pty, &self.streams.stdin, &self.streams.stdout, pod.foreign)?))
    }

    pub(crate) async fn wait(&self) -> Ended {
        reap::told(&self.ended).await
    }

    pub(crate) fn kill(&self, signal: u32) -> Result<(), Error> {
        if self.ended.borrow().is_some() {
            return Err(Error::Finished { id: self.id.clone() });
        }
        match &self.life().running {
            Some(running) => send(running.pidfd.as_fd(), signal, &self.id),
            None => self.refuse("not started"),
        }
    }

    /// Nobody wants to know its end any more.
    pub(crate) fn abandon(&self) {
        if let Some(running) = &self.life().running {
            let _ = pidfd_send_signal(&running.pidfd, Signal::KILL);
        }
    }

    pub(crate) fn resize(&self, width: u32, height: u32) -> Result<(), Error> {
        match &self.life().running {
            Some(running) => resize(running.pty.as_ref(), width, height),
            None => self.refuse("not running"),
        }
    }

    pub(crate) fn close_stdin(&self) {
        let mut life = self.life();
        life.stdin = None;
        if let Some(copies) = &mut life.copies {
            copies.close_input();
        }
    }

    /// Takes an exec out of its container; it must not be running.
    pub(crate) fn delete(&self, pod: &Pod, container: &Container) -> Result<(u32, Ended), Error> {
        let waiting = lock(&self.process).is_some();
        let ended = match *self.ended.borrow() {
            Some(ended) => ended,
            None if waiting => Ended { code: 0, at: record::now() },
            None => return self.refuse("running"),
        };
        container.remove_exec(&self.id);
        let pid = self.life().pid;
        let (id, process) = (container.id.clone(), self.id.clone());
        pod.events.send(Event::Deleted { id, process, pid, code: ended.code, at: ended.at });
        Ok((pid, ended))
    }

    async fn settle(
        self: Arc<Exec>,
        pod: Arc<Pod>,
        container: Arc<Container>,
        ended: oneshot::Receiver<Ended>,
    ) {
        let ended = end(ended).await;
        let (copies, pid) = {
            let mut life = self.life();
            (life.copies.take(), life.pid)
        };
        if let Some(copies) = copies {
            copies.finish(DRAIN, SLOW).await;
        }
        {
            let mut life = self.life();
            life.running = None;
            life.stdin = None;
            life.keepers.clear();
        }
        self.ended.send_replace(Some(ended));
        let (id, process) = (container.id.clone(), self.id.clone());
        pod.events.send(Event::Exited { id, process, pid, code: ended.code, at: ended.at });
    }
}

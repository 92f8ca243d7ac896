//! One more process in a running container. The parent's side; it enters by the pidfd of the container's first
//! process, all namespaces at once, and is then made a process by the same steps as the first one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::fs::stat;

use crate::cgroup::Cgroup;
use crate::create::{self, Stdio};
use crate::error::{At, Error, Step};
use crate::init::channel::Channel;
use crate::init::{self, Process};
use crate::kernel::{
    self, CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER,
    CLONE_NEWUTS, Cloned,
};
use crate::namespace::{self, IdMaps};
use crate::spec::{self, NamespaceKind, Spec};

/// What a process is made from.
pub struct Request<'a> {
    /// The container's first process.
    pub init: BorrowedFd<'a>,
    /// Its pid, in our pid namespace.
    pub init_pid: u32,
    /// The container's specification, which holds the seccomp profile and the id mappings.
    pub spec: &'a Spec,
    /// What is wanted.
    pub process: &'a spec::Process,
    /// Where the process goes.
    pub cgroup: &'a Cgroup,
    /// Standard streams.
    pub stdio: Stdio,
}

/// Clones the process. It enters the container while this returns.
pub fn spawn(request: Request<'_>) -> Result<Pending, Error> {
    let Request { init, init_pid, spec, process: wanted, cgroup, stdio } = request;
    let mut warnings = Vec::new();
    let filter = spec.linux.seccomp.as_ref().map(crate::seccomp::compile).transpose()?;
    let namespaces = namespaces(spec, init_pid)?;
    let maps = IdMaps { uid: spec.linux.uid_mappings.clone(), gid: spec.linux.gid_mappings.clone() };
    let maps = (namespaces & CLONE_NEWUSER != 0 && !maps.uid.is_empty()).then_some(maps);
    let streams = stdio.streams(wanted, maps.as_ref())?;
    let process = Process::new(wanted, spec.linux.personality.as_ref(), filter, streams, &mut warnings)?;
    let procfs = create::private_procfs(wanted, false)?;
    let (parent, child) = Channel::pair().at(Step::Channel, "exec")?;
    let init = rustix::io::fcntl_dupfd_cloexec(init, 3).at(Step::Namespace, "of the container")?;
    let plan = init::ExecPlan { channel: child, init, namespaces, process, procfs };

    // SAFETY: the crate's contract is one thread; the child goes into `another` and never returns.
    let cloned = unsafe { namespace::clone_into(Some(plan.init.as_fd()), 0, cgroup.clone_into_fd()) }?;
    let (pid, pidfd) = match cloned {
        Cloned::Parent { pid, pidfd } => (pid, pidfd),
        Cloned::Child => {
            drop(parent);
            init::another(&plan, cgroup)
        }
    };
    drop(plan);
    let child = Child { pid, pidfd, channel: parent, pty: None, warnings, executing: false };
    let mut pending = Pending { child: Some(child) };
    pending.release(wanted.oom_score_adj)?;
    Ok(pending)
}

/// The container's namespaces. All of them are entered, those of the host too, which is where we are anyway;
/// only the user namespace refuses that.
fn namespaces(spec: &Spec, init_pid: u32) -> Result<u64, Error> {
    let kinds = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET | CLONE_NEWCGROUP;
    if spec.namespace(NamespaceKind::User).is_none() {
        return Ok(kinds);
    }
    let identity = |path: String| {
        let stat = stat(&path).at(Step::Namespace, &path)?;
        Ok::<_, Error>((stat.st_dev, stat.st_ino))
    };
    let theirs = identity(format!("/proc/{init_pid}/ns/user"))?;
    let ours = identity("/proc/self/ns/user".into())?;
    Ok(if theirs == ours { kinds } else { kinds | CLONE_NEWUSER })
}

/// A process on its way into the container. Dropping it kills it.
#[derive(Debug)]
pub struct Pending {
    child: Option<Child>,
}

#[derive(Debug)]
struct Child {
    pid: u32,
    pidfd: OwnedFd,
    channel: Channel,
    pty: Option<OwnedFd>,
    warnings: Vec<String>,
    executing: bool,
}

/// A process that has executed its program.
#[derive(Debug)]
pub struct Running {
    /// In our pid namespace.
    pub pid: u32,
    /// The same, for good. It is our child, to be reaped by us.
    pub pidfd: OwnedFd,
    /// Master side of its terminal.
    pub pty: Option<OwnedFd>,
    /// What could not be done as asked, for the log.
    pub warnings: Vec<String>,
}

impl Pending {
    /// Becomes readable when the child has something to say: call `try_finish` then.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match &self.child {
            Some(child) => child.channel.as_fd(),
            // Only after `try_finish` gave the child away; there is nothing left to wait for.
            None => rustix::stdio::stdin(),
        }
    }

    /// Takes note of what the child said so far. None: not executed yet.
    pub fn try_finish(&mut self) -> Result<Option<Running>, Error> {
        let waiting_for = "started";
        let Some(child) = &mut self.child else { return Err(Error::Died { waiting_for }) };
        let answer =
            create::executed(&child.channel, &mut child.executing, &mut child.warnings, &mut child.pty);
        match answer {
            Ok(None) => Ok(None),
            Ok(Some(())) => {
                let running = |Child { pid, pidfd, pty, warnings, .. }| Running { pid, pidfd, pty, warnings };
                Ok(self.child.take().map(running))
            }
            Err(error) => {
                self.undo();
                Err(error)
            }
        }
    }

    /// Waits for the exec, until the deadline at most.
    pub fn finish(mut self, deadline: Instant) -> Result<Running, Error> {
        loop {
            if let Some(running) = self.try_finish()? {
                return Ok(running);
            }
            create::wait(self.fd(), deadline, "started")?;
        }
    }

    fn release(&mut self, oom_score_adj: Option<i32>) -> Result<(), Error> {
        let Some(child) = &mut self.child else { return Ok(()) };
        if let Some(score) = oom_score_adj {
            child.warnings.extend(create::set_oom_score(child.pid, score)?);
        }
        Ok(child.channel.go().at(Step::Channel, "exec")?)
    }

    fn undo(&mut self) {
        if let Some(child) = self.child.take() {
            kernel::kill_and_reap(&child.pidfd);
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.undo();
    }
}

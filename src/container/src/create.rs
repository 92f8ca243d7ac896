//! The parent's side of a container: checks the request, makes the cgroup, clones, and follows the child until it
//! has executed the program. Nothing here waits for the child unless the caller wants to: a mount source that
//! hangs, hangs in the child.
//!
//! ```text
//!   create ─► Pending ─► Created ─► start ─► Starting ─► running
//!                │           │                   │
//!                └───────────┴───────────────────┴─► an error; the child has ended
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, OFlags, fstat};
use rustix::io::Errno;

use crate::cgroup::{self, Cgroup};
use crate::error::{At, Error, Failure, Step};
use crate::hooks::Hooks;
use crate::init::channel::{Channel, Report};
use crate::init::{self, Process, Streams, sysctl};
use crate::kernel::{self, Cloned};
use crate::namespace::{self, IdMaps, Join};
use crate::rootfs;
use crate::spec::{self, Spec};

/// What a container is made from.
pub struct Request<'a> {
    /// The container's name; also its cgroup's when the specification names none.
    pub id: &'a str,
    /// What is wanted.
    pub spec: &'a Spec,
    /// The directory that relative paths of the specification start from.
    pub bundle: &'a Path,
    /// The root file system.
    pub rootfs: Rootfs,
    /// Namespaces of the caller's that take precedence over what the specification says.
    pub join: Join<'a>,
    /// Detached mounts, by destination, in place of what the specification mounts there.
    pub trees: Vec<(PathBuf, OwnedFd)>,
    /// Standard streams.
    pub stdio: Stdio,
    /// The cgroup hierarchies of this host.
    pub cgroups: &'a cgroup::Host,
}

/// Where a container's root comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rootfs {
    /// `root.path`, as it is.
    Bundle,
    /// Mounted for this container, in its own mount namespace. Exactly one.
    Mounts(Vec<rootfs::Mount>),
}

/// Standard streams of a process.
#[derive(Debug)]
pub enum Stdio {
    /// Descriptors that become 0, 1 and 2; None is the null device.
    #[allow(missing_docs)]
    Fds { stdin: Option<OwnedFd>, stdout: Option<OwnedFd>, stderr: Option<OwnedFd> },
    /// A new terminal, whose master side is handed back.
    #[allow(missing_docs)]
    Terminal { width: u16, height: u16 },
}

impl Stdio {
    /// The null device, three times.
    pub fn null() -> Stdio {
        Stdio::Fds { stdin: None, stdout: None, stderr: None }
    }

    /// Descriptors above the standard ones, readable and writable by the process's user when they are pipes: a
    /// program that opens `/dev/stdout` opens the pipe anew.
    pub(crate) fn streams(self, process: &spec::Process, maps: Option<&IdMaps>) -> Result<Streams, Error> {
        let fds = match (self, process.terminal) {
            (Stdio::Terminal { width, height }, true) => return Ok(Streams::Terminal { width, height }),
            (Stdio::Fds { stdin, stdout, stderr }, false) => [stdin, stdout, stderr],
            _ => return Err(Error::Invalid("process.terminal and the streams given disagree".into())),
        };
        let owner = match maps {
            Some(maps) => maps.host_uid(process.user.uid)?,
            None => process.user.uid,
        };
        let [stdin, stdout, stderr] = fds.map(|fd| stream(fd, owner).at(Step::Stdio, "of the process"));
        Ok(Streams::Fds([stdin?, stdout?, stderr?]))
    }
}

fn stream(fd: Option<OwnedFd>, owner: u32) -> kernel::Result<OwnedFd> {
    let Some(fd) = fd else {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
        return if rootfs::is_null(null.as_fd())? { Ok(null) } else { Err(Errno::NODEV) };
    };
    let stat = fstat(&fd)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo && stat.st_uid != owner {
        rustix::fs::fchown(&fd, Some(rustix::fs::Uid::from_raw(owner)), None)?;
    }
    rustix::io::fcntl_dupfd_cloexec(&fd, 3)
}

/// Clones the first process. It sets itself up while this returns.
pub fn create(request: Request<'_>) -> Result<Pending, Error> {
    let Request { id, spec, bundle, rootfs, join, trees, stdio, cgroups } = request;
    let wanted = spec.process.as_ref().ok_or_else(|| Error::Invalid("process is missing".into()))?;
    let path = match spec.linux.cgroups_path.as_str() {
        "" => id,
        path => path,
    };
    let mut warnings = Vec::new();
    let filter = spec.linux.seccomp.as_ref().map(crate::seccomp::compile).transpose()?;
    let namespaces = namespace::Plan::new(spec, &join)?;
    let sysctls = sysctl::check(Some(&spec.linux.sysctl), namespaces.has)?;
    let streams = stdio.streams(wanted, namespaces.maps.as_ref())?;
    let process = Process::new(wanted, spec.linux.personality.as_ref(), filter, streams, &mut warnings)?;
    let procfs = private_procfs(wanted, !sysctls.is_empty())?;
    let hooks = Hooks::new(spec, id, bundle);

    let cgroup = Made(Some(Cgroup::create(cgroups, path)?));
    let given = rootfs::Given {
        bundle,
        rootfs: match rootfs {
            Rootfs::Bundle => None,
            Rootfs::Mounts(mounts) => Some(mounts),
        },
        trees,
        mount_label: &spec.linux.mount_label,
        maps: namespaces.maps.as_ref(),
        user: namespaces.user.as_ref().map(AsFd::as_fd),
        cgroup: cgroup.get()?,
        cgroup_namespace: namespaces.cgroup,
    };
    let rootfs = rootfs::Plan::new(spec, given)?;
    if wanted.terminal && rootfs.lacks_devpts() {
        return Err(Error::Invalid("a terminal needs a devpts on /dev/pts".into()));
    }
    if let Some(resources) = &spec.linux.resources {
        warnings.extend(cgroup.get()?.apply(resources)?);
    }

    let (parent, child) = Channel::pair().at(Step::Channel, "container process")?;
    let flags = if namespaces.user.is_some() { 0 } else { namespaces.make };
    let plan = init::Plan {
        channel: child,
        namespaces,
        rootfs,
        process,
        hostname: spec.hostname.clone(),
        domainname: spec.domainname.clone(),
        sysctls,
        procfs,
        hooks: hooks.clone(),
    };
    let pid_namespace = plan.namespaces.pid.as_ref().map(AsFd::as_fd);
    let into = cgroup.get()?;
    // SAFETY: the crate's contract is one thread; the child goes into `first` and never returns.
    let cloned = unsafe { namespace::clone_into(pid_namespace, flags, into.clone_into_fd()) }?;
    let (pid, pidfd) = match cloned {
        Cloned::Parent { pid, pidfd } => (pid, pidfd),
        Cloned::Child => {
            drop(parent);
            init::first(&plan, into)
        }
    };
    drop(plan);
    let mut pending =
        Pending { child: Some(Child { pid, pidfd, channel: parent, hooks, pty: None, warnings }), cgroup };
    pending.release(wanted.oom_score_adj)?;
    Ok(pending)
}

/// Runs the hooks that follow the end of a container, and hands back how they failed.
pub fn poststop(id: &str, spec: &Spec, bundle: &Path) -> Vec<Error> {
    Hooks::new(spec, id, bundle).map(|hooks| hooks.poststop()).unwrap_or_default()
}

/// A container that is setting itself up. Dropping it undoes everything.
#[derive(Debug)]
pub struct Pending {
    child: Option<Child>,
    cgroup: Made,
}

#[derive(Debug)]
struct Child {
    pid: u32,
    pidfd: OwnedFd,
    channel: Channel,
    hooks: Option<Hooks>,
    pty: Option<OwnedFd>,
    warnings: Vec<String>,
}

/// A cgroup that is removed unless somebody takes it.
#[derive(Debug)]
struct Made(Option<Cgroup>);

/// How long a removal waits for killed processes to leave.
const REMOVAL: Duration = Duration::from_secs(1);

impl Made {
    fn get(&self) -> Result<&Cgroup, Error> {
        self.0.as_ref().ok_or(Error::Died { waiting_for: "ready" })
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(cgroup) = self.0.take() {
            let _ = cgroup.kill();
            let _ = cgroup.remove(REMOVAL);
        }
    }
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

    /// Takes note of what the child said so far. None: not ready yet.
    pub fn try_finish(&mut self) -> Result<Option<Created>, Error> {
        let answer = self.follow();
        if answer.is_err() {
            self.undo();
        }
        answer
    }

    /// Waits for the child, until the deadline at most.
    pub fn finish(mut self, deadline: Instant) -> Result<Created, Error> {
        loop {
            if let Some(created) = self.try_finish()? {
                return Ok(created);
            }
            wait(self.fd(), deadline, "ready")?;
        }
    }

    /// Lets the child go, with the score that only we may give it.
    fn release(&mut self, oom_score_adj: Option<i32>) -> Result<(), Error> {
        let Some(child) = &mut self.child else { return Ok(()) };
        if let Some(score) = oom_score_adj {
            child.warnings.extend(set_oom_score(child.pid, score)?);
        }
        Ok(child.channel.go().at(Step::Channel, "container process")?)
    }

    fn follow(&mut self) -> Result<Option<Created>, Error> {
        let waiting_for = "ready";
        let Some(child) = &mut self.child else { return Err(Error::Died { waiting_for }) };
        loop {
            let report = match child.channel.receive() {
                Err(Errno::AGAIN) => return Ok(None),
                other => other.at(Step::Wait, "container process")?,
            };
            match report {
                Some(Report::Forked(pidfd)) => child.follow_fork(pidfd)?,
                Some(Report::Terminal(pty)) => child.pty = Some(pty),
                Some(Report::Warning(text)) => child.warnings.push(text),
                Some(Report::Hooks) => {
                    if let Some(hooks) = &child.hooks {
                        hooks.create_runtime(child.pid)?;
                    }
                    child.channel.go().at(Step::Channel, "container process")?;
                }
                Some(Report::Failed(failure)) => return Err(failure.into()),
                Some(Report::HookFailed(text)) => return Err(Error::HookInside(text)),
                Some(Report::Ready) => break,
                Some(Report::Executing) | None => return Err(Error::Died { waiting_for }),
            }
        }
        let (Some(child), Some(cgroup)) = (self.child.take(), self.cgroup.0.take()) else {
            return Err(Error::Died { waiting_for });
        };
        let Child { pid, pidfd, channel, hooks, pty, warnings } = child;
        Ok(Some(Created { pid, pidfd, cgroup, pty, warnings, channel: Some(channel), hooks }))
    }

    fn undo(&mut self) {
        if let Some(child) = self.child.take() {
            kernel::kill_and_reap(&child.pidfd);
        }
        drop(std::mem::replace(&mut self.cgroup, Made(None)));
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.undo();
    }
}

impl Child {
    /// The first child has prepared the way for the real one, and is about to end.
    fn follow_fork(&mut self, pidfd: OwnedFd) -> Result<(), Failure> {
        let first = std::mem::replace(&mut self.pidfd, pidfd);
        kernel::reap(first, 1000);
        self.pid = pid(self.pidfd.as_fd()).at(Step::Wait, "container process")?;
        Ok(())
    }
}

/// A container that is set up and waits for its start. When this is dropped unstarted, the process ends by
/// itself; to reap it and to remove the cgroup is up to the caller.
#[derive(Debug)]
pub struct Created {
    /// The first process, in our pid namespace.
    pub pid: u32,
    /// The same, for good.
    pub pidfd: OwnedFd,
    /// The container's cgroup.
    pub cgroup: Cgroup,
    /// Master side of its terminal.
    pub pty: Option<OwnedFd>,
    /// What could not be done as asked, for the log.
    pub warnings: Vec<String>,
    channel: Option<Channel>,
    hooks: Option<Hooks>,
}

impl Created {
    /// Lets the process execute its program.
    pub fn start(&mut self) -> Result<Starting, Error> {
        let channel = self.channel.take().ok_or_else(|| Error::Invalid("already started".into()))?;
        channel.go().at(Step::Channel, "container process")?;
        Ok(Starting { pid: self.pid, channel, hooks: self.hooks.take(), executing: false })
    }
}

/// A process about to execute its program.
#[derive(Debug)]
pub struct Starting {
    pid: u32,
    channel: Channel,
    hooks: Option<Hooks>,
    executing: bool,
}

impl Starting {
    /// Becomes readable when there is an answer.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Whether the program was executed. None: not known yet. After an error the process has ended, or is about
    /// to, and is reaped like any other.
    pub fn try_finish(&mut self) -> Result<Option<()>, Error> {
        match executed(&self.channel, &mut self.executing, &mut Vec::new(), &mut None)? {
            None => Ok(None),
            Some(()) => {
                if let Some(hooks) = self.hooks.take() {
                    hooks.poststart(self.pid)?;
                }
                Ok(Some(()))
            }
        }
    }

    /// Waits for the answer, until the deadline at most.
    pub fn finish(mut self, deadline: Instant) -> Result<(), Error> {
        loop {
            if let Some(()) = self.try_finish()? {
                return Ok(());
            }
            wait(self.fd(), deadline, "started")?;
        }
    }
}

/// Follows a child up to its exec, which closes the channel. A child that is killed closes it too, so it says
/// before that it is about to.
pub(crate) fn executed(
    channel: &Channel,
    executing: &mut bool,
    warnings: &mut Vec<String>,
    pty: &mut Option<OwnedFd>,
) -> Result<Option<()>, Error> {
    loop {
        let report = match channel.receive() {
            Err(Errno::AGAIN) => return Ok(None),
            other => other.at(Step::Wait, "container process")?,
        };
        match report {
            Some(Report::Executing) => *executing = true,
            Some(Report::Warning(text)) => warnings.push(text),
            Some(Report::Terminal(master)) => *pty = Some(master),
            Some(Report::Failed(failure)) => return Err(failure.into()),
            Some(Report::HookFailed(text)) => return Err(Error::HookInside(text)),
            None if *executing => return Ok(Some(())),
            None => return Err(Error::Died { waiting_for: "started" }),
            // Of no meaning here; an exec says it too.
            Some(Report::Ready | Report::Hooks | Report::Forked(_)) => {}
        }
    }
}

/// Waits for a word of a child that has nothing else to report than that it is ready, or that it forked.
pub(crate) fn ready(channel: &Channel, pidfd: &mut OwnedFd, milliseconds: i64) -> Result<(), Error> {
    loop {
        poll(channel.as_fd(), milliseconds).at(Step::Wait, "child")?;
        match channel.receive().at(Step::Wait, "child")? {
            Some(Report::Ready) => return Ok(()),
            Some(Report::Forked(second)) => kernel::reap(std::mem::replace(pidfd, second), 1000),
            Some(Report::Failed(failure)) => return Err(failure.into()),
            _ => return Err(Error::Died { waiting_for: "ready" }),
        }
    }
}

/// A procfs for sysctls and labels, when there are any.
pub(crate) fn private_procfs(process: &spec::Process, sysctls: bool) -> Result<Option<OwnedFd>, Failure> {
    let labels = !process.apparmor_profile.is_empty() || !process.selinux_label.is_empty();
    if labels || sysctls { sysctl::procfs().map(Some) } else { Ok(None) }
}

/// Sets the score of a child that has not begun. To lower it takes CAP_SYS_RESOURCE; without it the score stays
/// what it is, and the caller is told.
pub(crate) fn set_oom_score(pid: u32, score: i32) -> Result<Option<String>, Failure> {
    match namespace::write_proc(pid, "oom_score_adj", &score.to_string()) {
        Err(Errno::ACCESS | Errno::PERM) => {
            Ok(Some(format!("oom_score_adj {score} is not permitted: CAP_SYS_RESOURCE is missing")))
        }
        other => other.at(Step::OomScore, score).map(|()| None),
    }
}

/// The pid behind a pidfd, in our own namespace (pidfd_open(2), NOTES).
pub(crate) fn pid(pidfd: BorrowedFd<'_>) -> kernel::Result<u32> {
    use std::os::fd::AsRawFd;
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let pid = text.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<u32>().ok());
    pid.filter(|pid| *pid != 0).ok_or(Errno::SRCH)
}

/// Waits until `fd` is readable; TIMEDOUT when it never is.
pub(crate) fn poll(fd: BorrowedFd<'_>, milliseconds: i64) -> kernel::Result<()> {
    let limit = Timespec { tv_sec: milliseconds / 1000, tv_nsec: (milliseconds % 1000) * 1_000_000 };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    match rustix::event::poll(&mut fds, Some(&limit)) {
        Ok(0) => Err(Errno::TIMEDOUT),
        Err(Errno::INTR) => Ok(()),
        other => other.map(drop),
    }
}

pub(crate) fn wait(fd: BorrowedFd<'_>, deadline: Instant, waiting_for: &'static str) -> Result<(), Error> {
    let left = deadline.saturating_duration_since(Instant::now());
    let milliseconds = i64::try_from(left.as_millis()).unwrap_or(i64::MAX).min(1 << 40);
    match poll(fd, if left.is_zero() { 0 } else { milliseconds.max(1) }) {
        Err(Errno::TIMEDOUT) => Err(Error::Deadline { waiting_for }),
        other => Ok(other.at(Step::Wait, "container process")?),
    }
}

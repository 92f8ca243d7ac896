//! The child's side: from clone3 to execve, as one flat list of steps in the kernel's order. Each step is
//! explained in the file that has it. What the steps need was prepared by `create` or `exec` before the clone;
//! failures go home over the channel, typed by step.
//!
//! ```text
//!   without a user namespace            with one
//!   clone3 (new namespaces)             clone3
//!     cgroup                              cgroup
//!     sources, with the host's rights     sources, with the host's rights
//!     join namespaces                     join namespaces, then the user namespace
//!                                         clone3 (new namespaces, CLONE_PARENT), and exit
//!     build the root, pivot, become the user, ready … go, exec
//! ```
//! With a user namespace the first child only prepares: what it opened (layers, volumes, devices) the second one
//! could not, and what the second one makes belongs to the container's user namespace.
//!
//! The child allocates: the process it was cloned from has one thread, so no lock is ever left behind.

pub(crate) mod channel;
mod home;
mod label;
mod process;
mod program;
pub mod reaper;
mod rlimit;
mod schedule;
pub(crate) mod sysctl;
mod terminal;
pub(crate) mod user;

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::Errno;

use crate::capability;
use crate::cgroup::Cgroup;
use crate::error::{At, Error, Failure, Step};
use crate::hooks::Hooks;
use crate::kernel::{self, CLONE_NEWCGROUP, CLONE_NEWUSER, CLONE_PARENT, Cloned};
use crate::{namespace, rootfs};
use channel::{Channel, Report};
pub(crate) use process::{Process, Streams};
use sysctl::Sysctl;

/// Everything that the first process of a container needs.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) channel: Channel,
    pub(crate) namespaces: namespace::Plan,
    pub(crate) rootfs: rootfs::Plan,
    pub(crate) process: Process,
    pub(crate) hostname: String,
    pub(crate) domainname: String,
    pub(crate) sysctls: Vec<Sysctl>,
    /// For sysctls and security labels; see [`sysctl::procfs`].
    pub(crate) procfs: Option<OwnedFd>,
    pub(crate) hooks: Option<Hooks>,
}

/// Everything that another process of a container needs.
#[derive(Debug)]
pub(crate) struct ExecPlan {
    pub(crate) channel: Channel,
    /// The container's first process, whose namespaces are joined.
    pub(crate) init: OwnedFd,
    /// Which of them.
    pub(crate) namespaces: u64,
    pub(crate) process: Process,
    pub(crate) procfs: Option<OwnedFd>,
}

/// Why the child gives up.
enum End {
    Failed(Failure),
    Hook(Error),
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        End::Failed(failure)
    }
}

/// Becomes the container's first process.
pub(crate) fn first(plan: &Plan, cgroup: &Cgroup) -> ! {
    never_return(&plan.channel, || first_steps(plan, cgroup))
}

/// Becomes one more process of a running container.
pub(crate) fn another(plan: &ExecPlan, cgroup: &Cgroup) -> ! {
    never_return(&plan.channel, || another_steps(plan, cgroup))
}

/// Runs the steps, which end in an exec or a failure to report.
fn never_return(channel: &Channel, steps: impl FnOnce() -> Result<Infallible, End>) -> ! {
    kernel::never_return(|| {
        let Err(end) = steps();
        let _ = channel.send(&match end {
            End::Failed(failure) => Report::Failed(failure),
            End::Hook(error) => Report::HookFailed(error.to_string()),
        });
        // And then ends with 127, which is what a shell says of a command that it could not run.
    })
}

fn first_steps(plan: &Plan, cgroup: &Cgroup) -> Result<Infallible, End> {
    let process = &plan.process;
    hide()?;
    cgroup.enter_cloned()?;
    isolate(plan.descriptors())?;
    wait(&plan.channel)?;

    let mut sources = plan.rootfs.open()?;
    plan.namespaces.enter()?;
    if let Some(user) = &plan.namespaces.user {
        // To raise a hard limit takes the host's rights.
        process.set_limits(&plan.channel)?;
        enter_user_namespace(user.as_fd(), plan)?;
    }
    if plan.namespaces.cgroup {
        kernel::unshare(CLONE_NEWCGROUP).at(Step::Namespace, "cgroup")?;
    }
    process.new_session()?;
    if plan.namespaces.names_host {
        namespace::name_host(&plan.hostname, &plan.domainname)?;
    }
    if let Some(procfs) = &plan.procfs {
        sysctl::apply(procfs.as_fd(), &plan.sysctls)?;
    }

    let null = sources.take_null();
    let built = plan.rootfs.build(sources)?;
    let console = process.open_console(&plan.channel, &built)?;
    if let Some(hooks) = &plan.hooks {
        // The parent runs those that belong to the host, we those that belong to the container.
        let _ = plan.channel.send(&Report::Hooks);
        wait(&plan.channel)?;
        hooks.create_container().map_err(End::Hook)?;
    }
    plan.rootfs.protect(&built, null)?;
    rootfs::pivot::enter(&built.root)?;
    drop(built);
    plan.rootfs.finish()?;

    if plan.namespaces.user.is_none() {
        // As late as possible: a small limit on descriptors is meant for the program, not for us.
        process.set_limits(&plan.channel)?;
    }
    let ready = become_process(process, console, plan.procfs.as_ref(), &plan.channel)?;
    let _ = plan.channel.send(&Report::Ready);
    wait(&plan.channel)?;

    if let Some(hooks) = &plan.hooks {
        hooks.start_container().map_err(End::Hook)?;
    }
    Err(ready.exec(process, &plan.channel).into())
}

fn another_steps(plan: &ExecPlan, cgroup: &Cgroup) -> Result<Infallible, End> {
    let process = &plan.process;
    hide()?;
    cgroup.enter_cloned()?;
    isolate(plan.descriptors())?;
    wait(&plan.channel)?;
    process.set_limits(&plan.channel)?;
    process.set_affinity()?;
    kernel::setns(plan.init.as_fd(), plan.namespaces).at(Step::Namespace, "of the container")?;
    if plan.namespaces & CLONE_NEWUSER != 0 {
        user::become_root()?;
    }
    process.new_session()?;
    let console = process.open_terminal(&plan.channel)?;
    let ready = become_process(process, console, plan.procfs.as_ref(), &plan.channel)?;
    Err(ready.exec(process, &plan.channel).into())
}

/// Closes itself to others who may be in the namespaces that we join (CVE-2016-9962).
fn hide() -> Result<(), Failure> {
    kernel::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::Descriptors, "container process").map(drop)
}

/// Lets go of what belongs to the parent: its descriptors, its signal handlers.
fn isolate(mut keep: Vec<RawFd>) -> Result<(), Failure> {
    kernel::close_others(&mut keep).at(Step::Descriptors, "container process")?;
    kernel::default_signals();
    // Modes of what we make are meant as written; the process's own umask comes later.
    rustix::process::umask(rustix::fs::Mode::empty());
    Ok(())
}

fn wait(channel: &Channel) -> Result<(), Failure> {
    channel.wait().at(Step::Wait, "the parent")
}

/// Goes on as a child within the user namespace, which owns all that is new. The process that called ends here.
fn enter_user_namespace(user: BorrowedFd<'_>, plan: &Plan) -> Result<(), Failure> {
    kernel::setns(user, CLONE_NEWUSER).at(Step::Namespace, "user")?;
    // SAFETY: this process has one thread, being a clone itself, and both sides end by `kernel::exit` or exec.
    match unsafe { kernel::clone(plan.namespaces.make | CLONE_PARENT, None) }
        .at(Step::Clone, "container process")?
    {
        Cloned::Parent { pidfd, .. } => {
            let _ = plan.channel.send(&Report::Forked(pidfd));
            kernel::exit(0)
        }
        Cloned::Child => user::become_root(),
    }
}

/// What is done in the container's own file system, from the label to the last capability.
fn become_process(
    process: &Process,
    console: Option<OwnedFd>,
    procfs: Option<&OwnedFd>,
    channel: &Channel,
) -> Result<process::Ready, Failure> {
    process.set_streams(console)?;
    process.set_scheduling()?;
    if let (Some(label), Some(procfs)) = (&process.label, procfs) {
        label.set(procfs.as_fd())?;
    }
    let home = process.find_home();
    let entered = process.enter_cwd();
    let capabilities = process.become_user(channel)?;
    if entered.is_err() {
        // Directories that only the user may enter, such as those of a root-squashing server.
        process.enter_cwd()?;
    }
    Ok(process::Ready { home, capabilities })
}

impl process::Ready {
    /// The last steps. Comes back only with a failure.
    fn exec(self, process: &Process, channel: &Channel) -> Failure {
        let exec = || -> Result<Infallible, Failure> {
            let program = process.find_program()?;
            kernel::close_on_exec().at(Step::Descriptors, "container process")?;
            let _ = channel.send(&Report::Executing);
            if process.no_new_privileges {
                kernel::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0)
                    .at(Step::NoNewPrivileges, "container process")?;
            }
            if let Some(filter) = &process.seccomp {
                let installed = filter.install();
                installed
                    .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::BUSY))
                    .at(Step::Seccomp, "container process")?;
                if process.keeps_admin() {
                    capability::apply(&self.capabilities).at(Step::Capabilities, "container process")?;
                }
            }
            Err(process.execute(&program, self.home)).at(Step::Exec, process.name())
        };
        match exec() {
            Err(failure) => failure,
        }
    }
}

impl Plan {
    fn descriptors(&self) -> Vec<RawFd> {
        let mut keep = vec![self.channel.as_fd().as_raw_fd()];
        keep.extend(self.procfs.as_ref().map(AsRawFd::as_raw_fd));
        self.namespaces.descriptors(&mut keep);
        self.rootfs.descriptors(&mut keep);
        self.process.descriptors(&mut keep);
        keep
    }
}

impl ExecPlan {
    fn descriptors(&self) -> Vec<RawFd> {
        let mut keep = vec![self.channel.as_fd().as_raw_fd(), self.init.as_raw_fd()];
        keep.extend(self.procfs.as_ref().map(AsRawFd::as_raw_fd));
        self.process.descriptors(&mut keep);
        keep
    }
}

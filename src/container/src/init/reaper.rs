//! The first process of a pid namespace that the containers of a pod share. It reaps, and does nothing else: with
//! SIGCHLD ignored the kernel reaps its children without waking it (wait(2), NOTES), so it sleeps for ever.
//!
//! It is a copy of its parent, whose memory it shares for as long as neither writes. As containers can see it, it
//! holds no descriptors, no capabilities, no root but an empty one, and cannot be traced. The kernel lets no
//! signal from within the namespace reach it; its parent's SIGKILL ends it and with it the namespace, and so does
//! its parent's death.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::channel::{Channel, Report};
use super::user;
use crate::capability::{self, Sets};
use crate::error::{At, Error, Failure, Step};
use crate::kernel::{
    self, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER, CLONE_NEWUTS, CLONE_PARENT,
    Cloned, MountAttr,
};
use crate::rootfs::mount;
use crate::rootfs::options::Options;
use crate::rootfs::pivot;
use crate::rootfs::root::Root;

/// A pid namespace and its first process.
#[derive(Debug)]
pub struct Reaper {
    /// In our own pid namespace.
    pub pid: u32,
    /// Of the same process, which is our child and to be reaped by us.
    pub pidfd: OwnedFd,
    /// For [`crate::Join::pid`].
    pub pid_namespace: OwnedFd,
}

/// Ids that own nothing.
const NOBODY: u32 = 65534;
const LIMIT: i64 = 10_000;

/// Makes the pid namespace, owned by `user` when given, and its reaper.
pub fn spawn(user: Option<BorrowedFd<'_>>) -> Result<Reaper, Error> {
    let (parent, child) = Channel::pair().at(Step::Channel, "reaper")?;
    let flags = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWUTS;
    // In a user namespace the first child only enters it, and the second one is the reaper.
    let first = if user.is_some() { 0 } else { flags };
    // SAFETY: the crate's contract is one thread; `run` never returns.
    let cloned = unsafe { kernel::clone(first, None) }.at(Step::Clone, "reaper")?;
    let mut pidfd = match cloned {
        Cloned::Parent { pidfd, .. } => pidfd,
        Cloned::Child => {
            drop(parent);
            kernel::never_return(|| run(&child, user, flags))
        }
    };
    drop(child);
    let made = crate::create::ready(&parent, &mut pidfd, LIMIT).and_then(|()| {
        let pid = crate::create::pid(pidfd.as_fd()).at(Step::Namespace, "pid")?;
        let path = format!("/proc/{pid}/ns/pid");
        let pid_namespace = kernel::open_host(Path::new(&path)).at(Step::Namespace, path)?;
        Ok((pid, pid_namespace))
    });
    match made {
        Ok((pid, pid_namespace)) => Ok(Reaper { pid, pidfd, pid_namespace }),
        Err(error) => {
            kernel::kill_and_reap(&pidfd);
            Err(error)
        }
    }
}

fn run(channel: &Channel, user: Option<BorrowedFd<'_>>, flags: u64) -> ! {
    let done = become_reaper(channel, user, flags);
    let failed = done.is_err();
    let _ = channel.send(&done.map_or_else(Report::Failed, |()| Report::Ready));
    if failed {
        kernel::exit(1);
    }
    kernel::close_all();
    loop {
        // SAFETY: sleeps until a signal, of which only SIGKILL arrives.
        unsafe { libc::pause() };
    }
}

fn become_reaper(channel: &Channel, user: Option<BorrowedFd<'_>>, flags: u64) -> Result<(), Failure> {
    kernel::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::Descriptors, "reaper")?;
    kernel::ignore_signals();
    if let Some(user) = user {
        kernel::setns(user, CLONE_NEWUSER).at(Step::Namespace, "user")?;
        // SAFETY: this process has one thread, and both sides end by `kernel::exit`.
        match unsafe { kernel::clone(flags | CLONE_PARENT, None) }.at(Step::Clone, "reaper")? {
            Cloned::Parent { pidfd, .. } => {
                let _ = channel.send(&Report::Forked(pidfd));
                kernel::exit(0);
            }
            Cloned::Child => user::become_root()?,
        }
        // The second clone cleared what the first one ignored.
        kernel::ignore_signals();
    }
    rustix::process::setsid().at(Step::Session, "reaper")?;
    kernel::prctl_name(c"reaper").at(Step::Descriptors, "reaper")?;
    let host = kernel::open_path(Path::new("/")).at(Step::Rootfs, "/")?;
    kernel::mount_setattr(host.as_fd(), true, MountAttr::propagation(libc::MS_SLAVE))
        .at(Step::Rootfs, "/")?;
    let options = Options::parse(["ro", "nosuid", "nodev", "noexec", "nr_blocks=1", "nr_inodes=1"]);
    let empty =
        mount::new("tmpfs", "tmpfs", &options).map_err(|refused| refused.failure("tmpfs", Path::new("/")))?;
    mount::attach(empty.as_fd(), host.as_fd()).at(Step::Rootfs, "/")?;
    pivot::enter(&Root::new(empty))?;
    capability::limit_bounding(0, capability::last()).at(Step::Capabilities, "reaper")?;
    let nobody = (rustix::fs::Uid::from_raw(NOBODY), rustix::fs::Gid::from_raw(NOBODY));
    // A mapping may lack them; what counts are the capabilities.
    let _ = user::become_user(nobody.0, nobody.1, &[]);
    capability::apply(&Sets::default()).at(Step::Capabilities, "reaper")?;
    kernel::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).at(Step::NoNewPrivileges, "reaper")?;
    kernel::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::User, "reaper")?;
    // Its parent may be killed and then nobody is left to end it. Last, since a change of ids takes it back.
    kernel::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64, 0).at(Step::User, "reaper").map(drop)
}

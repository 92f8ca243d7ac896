//! Collects every child that ends, known or not: the shim is the subreaper of its pod. Who makes a child opens
//! a [`Birth`] before, and claims the child's end once its pid is known; ends that nobody has claimed are kept
//! as long as any birth is open, since a child may end before the library has told its pid. What an exit means
//! is left to the one who waits.
//!
//! SIGCHLD is blocked and read from a signalfd, which costs neither a handler nor a thread. The library
//! `container` gives its children a clean mask.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard},
};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{WaitOptions, WaitStatus, wait},
};
use tokio::{
    io::unix::AsyncFd,
    sync::{oneshot, watch},
};

use crate::{lock, record};

/// The most ends that are kept for somebody to claim. Orphans end as they like, births take milliseconds.
const UNCLAIMED: usize = 4096;

/// End of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Exit code, or 128 plus the signal.
    pub(crate) code: u32,
    /// Nanoseconds since 1970.
    pub(crate) at: i64,
}

/// Who waits for which child.
#[derive(Default)]
pub(crate) struct Reaper {
    children: Mutex<Children>,
}

#[derive(Default)]
struct Children {
    expected: HashMap<u32, oneshot::Sender<Ended>>,
    births: usize,
    unclaimed: HashMap<u32, Ended>,
}

/// A child is being made.
pub(crate) struct Birth(Arc<Reaper>);

impl Birth {
    /// Tells the end of a child, which may be over.
    pub(crate) fn claim(self, pid: u32, pidfd: BorrowedFd<'_>) -> oneshot::Receiver<Ended> {
        let (tell, told) = oneshot::channel();
        let mut children = self.0.children();
        match children.unclaimed.remove(&pid) {
            // Without the second look this could be the end of an earlier process with the same pid.
            Some(ended) if has_ended(pidfd) => {
                let _ = tell.send(ended);
            }
            _ => {
                children.expected.insert(pid, tell);
            }
        }
        drop(children);
        told
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        let mut children = self.0.children();
        children.births -= 1;
        if children.births == 0 {
            children.unclaimed = HashMap::new();
        }
    }
}

impl Reaper {
    /// To be called before a child is made.
    pub(crate) fn birth(self: &Arc<Self>) -> Birth {
        self.children().births += 1;
        Birth(self.clone())
    }

    /// Collects children for as long as the shim lives. SIGTERM and its like are taken and not followed:
    /// a shim ends when it is told to over its socket, never because a service manager stops everything
    /// in sight, which would take the pod with it.
    pub(crate) async fn run(&self, signals: AsyncFd<OwnedFd>) {
        loop {
            self.collect();
            let Ok(mut ready) = signals.readable().await else { return };
            // Which ones they were does not matter.
            while rustix::io::read(ready.get_inner(), &mut [0; 1024]).is_ok() {}
            ready.clear_ready();
        }
    }

    /// Signals coalesce, so one of them stands for any number of children.
    fn collect(&self) {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(code) = code(status) {
                        let pid = pid.as_raw_nonzero().get().unsigned_abs();
                        self.settle(pid, Ended { code, at: record::now() });
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn settle(&self, pid: u32, ended: Ended) {
        let mut children = self.children();
        if let Some(tell) = children.expected.remove(&pid) {
            // Nobody listening any more is fine: the process is collected all the same.
            let _ = tell.send(ended);
        } else if children.births > 0 && children.unclaimed.len() < UNCLAIMED {
            children.unclaimed.insert(pid, ended);
        }
    }

    fn children(&self) -> MutexGuard<'_, Children> {
        lock(&self.children)
    }
}

/// Waits for an end to be told. The caller has the one who tells, so there is always an answer.
pub(crate) async fn told(ended: &watch::Sender<Option<Ended>>) -> Ended {
    let mut ended = ended.subscribe();
    let told = ended.wait_for(Option::is_some).await.ok().and_then(|ended| *ended);
    told.unwrap_or(Ended { code: 255, at: record::now() })
}

/// Blocks the signals that the reaper takes, and SIGXFSZ, which a log file at its limit would send. Called
/// before the first child exists.
pub(crate) fn signals() -> io::Result<OwnedFd> {
    let mut mask = SigSet::empty();
    for signal in
        [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGXFSZ]
    {
        mask.add(signal);
    }
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    signals.as_fd().try_clone_to_owned()
}

/// A pidfd is readable once its process has ended, collected or not.
pub(crate) fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}

fn code(status: WaitStatus) -> Option<u32> {
    let code = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => return None,
    };
    Some(code.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;

    fn me() -> OwnedFd {
        pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).unwrap()
    }

    fn gone() -> (u32, OwnedFd) {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        child.wait().unwrap();
        (child.id(), pidfd)
    }

    #[test]
    fn a_child_that_ends_before_its_pid_is_known_is_claimed() {
        let reaper = Arc::new(Reaper::default());
        let birth = reaper.birth();
        let (pid, pidfd) = gone();
        let ended = Ended { code: 3, at: 1 };
        reaper.settle(pid, ended);
        assert_eq!(birth.claim(pid, pidfd.as_fd()).blocking_recv(), Ok(ended));
    }

    #[test]
    fn the_end_of_an_earlier_process_with_the_same_pid_is_not_taken() {
        let reaper = Arc::new(Reaper::default());
        let birth = reaper.birth();
        reaper.settle(std::process::id(), Ended { code: 3, at: 1 });
        let told = birth.claim(std::process::id(), me().as_fd());
        let ended = Ended { code: 4, at: 2 };
        reaper.settle(std::process::id(), ended);
        assert_eq!(told.blocking_recv(), Ok(ended));
    }

    #[test]
    fn orphans_are_not_remembered_after_the_last_birth() {
        let reaper = Arc::new(Reaper::default());
        reaper.settle(7, Ended { code: 3, at: 1 });
        let births = [reaper.birth(), reaper.birth()];
        for pid in 0..10_000 {
            reaper.settle(pid, Ended { code: 3, at: 1 });
        }
        assert_eq!(reaper.children().unclaimed.len(), UNCLAIMED);
        drop(births);
        assert!(reaper.children().unclaimed.is_empty());
    }
}

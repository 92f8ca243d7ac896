//! Tells when a cgroup ran out of memory and how many processes that cost.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags, inotify};
use rustix::io::Errno;

use super::{Cgroup, Error, Layout, dir, stats};

/// Becomes readable when the cgroup ran out of memory, changed its memory events otherwise, or was removed. So it is
/// a reason to look at `oom_count`, not the news itself.
#[derive(Debug)]
pub struct OomWatch {
    fd: OwnedFd,
}

impl OomWatch {
    /// Takes what has been reported so far, so that the descriptor can become readable again.
    pub fn clear(&self) {
        let mut buffer = [0; 4096];
        // Non-blocking. More than a page of events only means to be woken once more.
        let _ = rustix::io::read(&self.fd, &mut buffer);
    }
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Cgroup {
    /// How many processes of this cgroup, or of one below it, the OOM killer has ended.
    pub fn oom_count(&self) -> Result<u64, Error> {
        let Some(memory) = self.dir("memory") else { return Ok(0) };
        let v2 = self.host.layout() == Layout::Unified;
        let file = if v2 { "memory.events" } else { "memory.oom_control" };
        let mut count = 0;
        let read = if v2 {
            // Counts the whole subtree by itself.
            dir::read_at(memory, file).map(|text| count = stats::get(&stats::pairs(&text), "oom_kill"))
        } else {
            dir::walk(memory, &mut |dir| {
                match dir::read_at(dir, file) {
                    Ok(text) => count += stats::get(&stats::pairs(&text), "oom_kill"),
                    Err(Errno::NOENT | Errno::NODEV) => {}
                    Err(cause) => return Err(cause),
                }
                Ok(())
            })
        };
        match read {
            Ok(()) | Err(Errno::NOENT | Errno::NODEV) => Ok(count),
            Err(cause) => {
                let file = if v2 { "memory.events" } else { "memory.oom_control" };
                Err(Error::Read { file, path: self.path().to_owned(), cause })
            }
        }
    }

    /// A descriptor to poll for lack of memory. None when the memory controller is not there.
    pub fn oom_watch(&self) -> Result<Option<OomWatch>, Error> {
        let Some(memory) = self.dir("memory") else { return Ok(None) };
        let fd = if self.host.layout() == Layout::Unified { modified(memory) } else { notified(memory) };
        fd.map(|fd| Some(OomWatch { fd }))
            .map_err(|cause| Error::Watch { path: self.path().to_owned(), cause })
    }
}

/// v2: `memory.events` counts as modified when a number in it changes.
fn modified(memory: BorrowedFd) -> Result<OwnedFd, Errno> {
    let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    // inotify takes no descriptor, but it follows the link of one.
    let path = format!("/proc/self/fd/{}/memory.events", memory.as_raw_fd());
    inotify::add_watch(&fd, path, inotify::WatchFlags::MODIFY)?;
    Ok(fd)
}

/// v1: an eventfd that is registered for `memory.oom_control`, see the kernel's cgroup-v1/memory.rst section 9.
fn notified(memory: BorrowedFd) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let control = rustix::fs::openat(memory, "memory.oom_control", flags, Mode::empty())?;
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let line = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
    dir::write_at(memory, "cgroup.event_control", &line)?;
    Ok(event)
}

//! Stops, continues and ends all processes of a cgroup at once.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use super::{Cgroup, Error, dir};

/// A task in uninterruptible sleep cannot be frozen; nobody waits for one longer than this.
const FREEZE: Duration = Duration::from_secs(2);
/// Rounds of freeze, kill, thaw where the kernel has no `cgroup.kill`. Each ends all processes that are there, so
/// the second is needed only when the first could not freeze.
const ROUNDS: u32 = 40;

impl Cgroup {
    /// Stops all processes and returns when they stand still.
    pub fn freeze(&self) -> Result<(), Error> {
        match self.start_freezing(FREEZE) {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.thaw()?;
                Err(Error::FreezeTimeout { path: self.path().to_owned() })
            }
            Err(cause) => Err(Error::Freeze { path: self.path().to_owned(), cause }),
        }
    }

    /// Lets frozen processes go on.
    pub fn thaw(&self) -> Result<(), Error> {
        let done = match (self.unified(), self.dir("freezer")) {
            (Some(dir), _) => dir::write_at(dir, "cgroup.freeze", "0"),
            (None, Some(dir)) => dir::write_at(dir, "freezer.state", "THAWED"),
            (None, None) => Ok(()),
        };
        match done {
            Ok(()) | Err(Errno::NOENT | Errno::NODEV) => Ok(()),
            Err(cause) => Err(Error::Freeze { path: self.path().to_owned(), cause }),
        }
    }

    /// Sends SIGKILL to every process, those included that are forked meanwhile. Succeeds when there is none.
    ///
    /// Does not wait for them to be gone when the kernel does it by itself (`cgroup.kill`, Linux 5.14); `remove` does.
    pub fn kill(&self) -> Result<(), Error> {
        if let Some(dir) = self.unified() {
            match dir::write_at(dir, "cgroup.kill", "1") {
                Ok(()) | Err(Errno::NODEV) => return Ok(()),
                // An old kernel, or a threaded cgroup.
                Err(Errno::NOENT | Errno::OPNOTSUPP) => {}
                Err(cause) => return Err(Error::Kill { path: self.path().to_owned(), cause }),
            }
        }
        let mut wait = Duration::from_millis(1);
        let mut left = self.pids()?;
        for _ in 0..ROUNDS {
            if left.is_empty() {
                return Ok(());
            }
            // Frozen processes cannot fork, so the list is complete and no number in it can pass to someone else.
            let _ = self.start_freezing(Duration::from_millis(100));
            for pid in self.pids()? {
                if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            self.thaw()?;
            std::thread::sleep(wait);
            wait = (wait * 2).min(Duration::from_millis(50));
            left = self.pids()?;
        }
        Err(Error::Undead { path: self.path().to_owned(), count: left.len() })
    }

    /// Says whether everything stood still in time.
    fn start_freezing(&self, within: Duration) -> Result<bool, Errno> {
        let until = Instant::now() + within;
        match (self.unified(), self.dir("freezer")) {
            (Some(dir), _) => {
                dir::write_at(dir, "cgroup.freeze", "1")?;
                wait_frozen(dir, until)
            }
            (None, Some(dir)) => loop {
                // FREEZING can stay for ever when a fork got in between; asking again moves it on.
                dir::write_at(dir, "freezer.state", "FROZEN")?;
                if dir::read_at(dir, "freezer.state")?.trim() == "FROZEN" {
                    return Ok(true);
                }
                if Instant::now() >= until {
                    return Ok(false);
                }
                std::thread::sleep(Duration::from_micros(500));
            },
            (None, None) => Err(Errno::NOSYS),
        }
    }
}

/// `cgroup.events` raises POLLPRI when it changes.
fn wait_frozen(dir: BorrowedFd, until: Instant) -> Result<bool, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let events = rustix::fs::openat(dir, "cgroup.events", flags, Mode::empty())?;
    loop {
        // Reading re-arms the notification, so it comes before the wait.
        let mut buffer = [0; 256];
        let len = rustix::io::pread(&events, &mut buffer, 0)?;
        let text = String::from_utf8_lossy(&buffer[..len]);
        if text.lines().any(|l| l == "frozen 1") {
            return Ok(true);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        match poll(&mut [PollFd::new(&events.as_fd(), PollFlags::PRI)], Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(cause) => return Err(cause),
        }
    }
}

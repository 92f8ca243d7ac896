//! Stays with a process in the foreground: passes signals and a terminal on, and takes its exit code.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, pidfd_send_signal, waitid};

use crate::terminal::{self, Raw};

/// What a person or a service manager sends us and means for the container.
const PASSED: [Signal; 7] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

/// Waits for the end of a child. The result is its exit code, or 128 and the signal that ended it.
pub(crate) fn follow(process: BorrowedFd, pty: Option<OwnedFd>) -> Result<u8> {
    let mut set = SigSet::empty();
    PASSED.iter().for_each(|&signal| set.add(signal));
    set.thread_block().context("block signals")?;
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("make a signalfd")?;
    let raw = pty.as_ref().map(|pty| {
        terminal::follow_size(pty);
        Raw::new()
    });
    let mut typing = pty.is_some();
    let stdin = rustix::stdio::stdin();
    loop {
        let mut fds =
            vec![PollFd::from_borrowed_fd(process, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
        if let Some(pty) = &pty {
            fds.push(PollFd::new(pty, PollFlags::IN));
        }
        if typing {
            fds.push(PollFd::new(&stdin, PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("wait"),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let is = |i: usize| ready.get(i).copied().unwrap_or(false);
        while let (true, Ok(Some(info))) = (is(1), signals.read_signal()) {
            pass(process, info.ssi_signo, pty.as_ref());
        }
        if let Some(pty) = &pty {
            if is(2) {
                copy(pty.as_fd(), rustix::stdio::stdout());
            }
            if typing && is(3) {
                typing = copy(stdin, pty.as_fd());
            }
        }
        if is(0) {
            break;
        }
    }
    if let Some(pty) = &pty {
        drain(pty);
    }
    drop(raw);
    let status = waitid(WaitId::PidFd(process), WaitIdOptions::EXITED).context("take the exit status")?;
    let code = status.and_then(|status| {
        status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal))
    });
    Ok(u8::try_from(code.unwrap_or(255)).unwrap_or(255))
}

fn pass(process: BorrowedFd, number: u32, pty: Option<&OwnedFd>) {
    let number = number.cast_signed();
    if let (Signal::SIGWINCH, Some(pty)) = (Signal::try_from(number).unwrap_or(Signal::SIGTERM), pty) {
        return terminal::follow_size(pty);
    }
    if let Some(signal) = rustix::process::Signal::from_named_raw(number) {
        let _ = pidfd_send_signal(process, signal);
    }
}

/// Copies what is there. False at the end.
fn copy(from: BorrowedFd, to: BorrowedFd) -> bool {
    let mut buffer = [0; 8192];
    match rustix::io::read(from, &mut buffer) {
        Ok(0) => false,
        Ok(n) => {
            let mut rest = &buffer[..n];
            while !rest.is_empty() {
                match rustix::io::write(to, rest) {
                    Ok(n) => rest = &rest[n..],
                    Err(Errno::INTR) => {}
                    Err(_) => return false,
                }
            }
            true
        }
        Err(Errno::INTR | Errno::AGAIN) => true,
        Err(_) => false,
    }
}

/// What the container wrote last. Others may still hold its terminal, so this does not wait for its end.
fn drain(pty: &OwnedFd) {
    let nothing = Timespec { tv_sec: 0, tv_nsec: 0 };
    for _ in 0..1000 {
        let mut fds = [PollFd::new(pty, PollFlags::IN)];
        let ready = poll(&mut fds, Some(&nothing)).is_ok_and(|n| n > 0);
        if !ready || !fds[0].revents().contains(PollFlags::IN) || !copy(pty.as_fd(), rustix::stdio::stdout())
        {
            return;
        }
    }
}

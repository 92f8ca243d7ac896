//! Standard streams of a container that is run from a shell, and terminals, ours and its.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use container::Stdio;
use container::spec::Process;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::termios::{OptionalActions, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

/// Our own streams for the process, or a terminal as large as the process wants or ours is.
pub(crate) fn stdio(process: &Process) -> Stdio {
    if !process.terminal {
        let copy = |fd: BorrowedFd| rustix::io::fcntl_dupfd_cloexec(fd, 3).ok();
        return Stdio::Fds {
            stdin: copy(rustix::stdio::stdin()),
            stdout: copy(rustix::stdio::stdout()),
            stderr: copy(rustix::stdio::stderr()),
        };
    }
    let (width, height) = match (&process.console_size, tcgetwinsize(rustix::stdio::stdin())) {
        (Some(size), _) => (size.width, size.height),
        (None, Ok(size)) => (size.ws_col, size.ws_row),
        (None, Err(_)) => (0, 0),
    };
    Stdio::Terminal { width, height }
}

/// Hands a terminal's master side to whoever listens on `socket`.
pub(crate) fn send(pty: BorrowedFd, socket: &Path) -> Result<()> {
    let stream = UnixStream::connect(socket)
        .with_context(|| format!("connect to console socket {}", socket.display()))?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [pty];
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(&stream, &[IoSlice::new(b"/dev/ptmx")], &mut ancillary, SendFlags::NOSIGNAL)
        .context("send the terminal")?;
    Ok(())
}

/// Our terminal passing every key on; as it was again when this is dropped.
pub(crate) struct Raw(Option<Termios>);

impl Raw {
    pub(crate) fn new() -> Raw {
        let stdin = rustix::stdio::stdin();
        let Ok(before) = tcgetattr(stdin) else { return Raw(None) };
        let mut raw = before.clone();
        raw.make_raw();
        let _ = tcsetattr(stdin, OptionalActions::Now, &raw);
        Raw(Some(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Flush, before);
        }
    }
}

/// Gives a terminal the size of ours.
pub(crate) fn follow_size(pty: &OwnedFd) {
    if let Ok(Winsize { ws_row, ws_col, ws_xpixel, ws_ypixel }) = tcgetwinsize(rustix::stdio::stdin()) {
        let _ = tcsetwinsize(pty.as_fd(), Winsize { ws_row, ws_col, ws_xpixel, ws_ypixel });
    }
}

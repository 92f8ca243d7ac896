//! The wire between parent and child: a pair of sequenced-packet sockets, so that each message arrives whole and
//! the end of the child is seen as the end of the stream. Knows messages; when to send which is written in
//! `init` and in `create`.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::error::Failure;
use crate::kernel::Result;

/// What the child tells its parent.
#[derive(Debug)]
pub(crate) enum Report {
    /// The container's first process is another than the one that was cloned: this one, by its pidfd.
    Forked(OwnedFd),
    /// The terminal's master side.
    Terminal(OwnedFd),
    /// Something had to be done without.
    Warning(String),
    /// Namespaces exist, the root is still the host's: hooks of the runtime may run, then say [`Channel::go`].
    Hooks,
    /// All is set up; waiting for [`Channel::go`].
    Ready,
    /// The next thing is exec, and the end of the stream means that it succeeded.
    Executing,
    /// It cannot be done; the child ends.
    Failed(Failure),
    /// A hook that runs in the container failed; the child ends.
    HookFailed(String),
}

/// The one thing that the parent tells its child.
const GO: u8 = b'g';

/// One end.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl Channel {
    /// The parent's end and the child's.
    pub(crate) fn pair() -> Result<(Channel, Channel)> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Channel(ours), Channel(theirs)))
    }

    /// Parent: lets the child go on.
    pub(crate) fn go(&self) -> Result<()> {
        rustix::net::send(&self.0, &[GO], SendFlags::NOSIGNAL).map(drop)
    }

    /// Child: waits until it may go on. A parent that is gone never says so.
    pub(crate) fn wait(&self) -> Result<()> {
        let mut byte = [0u8];
        loop {
            match rustix::net::recv(&self.0, &mut byte, RecvFlags::empty()) {
                Ok((1, _)) if byte[0] == GO => return Ok(()),
                Ok(_) => return Err(Errno::CONNRESET),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Child: reports.
    pub(crate) fn send(&self, report: &Report) -> Result<()> {
        let (bytes, fd) = match report {
            Report::Forked(fd) => (vec![b'f'], Some(fd.as_fd())),
            Report::Terminal(fd) => (vec![b't'], Some(fd.as_fd())),
            Report::Warning(text) => (tagged(b'w', text.as_bytes()), None),
            Report::Hooks => (vec![b'h'], None),
            Report::Ready => (vec![b'r'], None),
            Report::Executing => (vec![b'x'], None),
            Report::Failed(failure) => (tagged(b'e', &failure.encode()), None),
            Report::HookFailed(text) => (tagged(b'k', text.as_bytes()), None),
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        }
        sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL).map(drop)
    }

    /// Parent: the next report, None at the end of the stream, EAGAIN when there is none yet.
    pub(crate) fn receive(&self) -> Result<Option<Report>> {
        let mut bytes = [0u8; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = loop {
            match recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
                Err(Errno::INTR) => {}
                // The child died with our word unread, which a socket calls a reset.
                Err(Errno::CONNRESET) => return Ok(None),
                other => break other?,
            }
        };
        let mut fd = None;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(mut fds) = message {
                fd = fds.next();
            }
        }
        let Some((tag, rest)) = bytes.get(..received.bytes).and_then(<[u8]>::split_first) else {
            return Ok(None);
        };
        let text = || String::from_utf8_lossy(rest).into_owned();
        let report = match (tag, fd) {
            (b'f', Some(fd)) => Report::Forked(fd),
            (b't', Some(fd)) => Report::Terminal(fd),
            (b'w', _) => Report::Warning(text()),
            (b'h', _) => Report::Hooks,
            (b'r', _) => Report::Ready,
            (b'x', _) => Report::Executing,
            (b'k', _) => Report::HookFailed(text()),
            (b'e', _) => Report::Failed(Failure::decode(rest).ok_or(Errno::BADMSG)?),
            _ => return Err(Errno::BADMSG),
        };
        Ok(Some(report))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Longest text that is sent; the rest is cut.
const TEXT: usize = 3000;

fn tagged(tag: u8, rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag];
    bytes.extend(rest.iter().take(TEXT));
    bytes
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::error::Step;

    #[test]
    fn reports_arrive_in_order_and_whole_and_the_end_is_seen() {
        let (parent, child) = Channel::pair().unwrap();
        let failure = Failure { step: Step::Mount, errno: Errno::INVAL, object: "x".repeat(10_000) };
        child.send(&Report::Warning("w".repeat(9000))).unwrap();
        child.send(&Report::Terminal(crate::kernel::own_namespace("uts").unwrap())).unwrap();
        child.send(&Report::Failed(failure)).unwrap();
        drop(child);
        assert!(matches!(parent.receive(), Ok(Some(Report::Warning(text))) if text.len() == TEXT));
        assert!(matches!(parent.receive(), Ok(Some(Report::Terminal(_)))));
        assert!(matches!(parent.receive(), Ok(Some(Report::Failed(f))) if f.errno == Errno::INVAL));
        // A child that another test has cloned meanwhile holds a copy of the other end until it has its own program.
        let deadline = Instant::now() + Duration::from_secs(30);
        let end = loop {
            match parent.receive() {
                Err(Errno::AGAIN) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
                end => break end,
            }
        };
        assert!(matches!(end, Ok(None)));
    }

    #[test]
    fn a_child_that_says_nothing_is_not_waited_for() {
        let (parent, _child) = Channel::pair().unwrap();
        assert!(matches!(parent.receive(), Err(Errno::AGAIN)));
    }

    #[test]
    fn a_parent_that_is_gone_never_says_go() {
        let (parent, child) = Channel::pair().unwrap();
        parent.go().unwrap();
        drop(parent);
        assert_eq!(child.wait(), Ok(()));
        assert!(child.wait().is_err());
    }
}

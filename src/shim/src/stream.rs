//! Standard streams that a client names by path: FIFOs, or a file to append to. A process gets its own
//! descriptor of each, so nothing of what it says passes through the shim; only a terminal is copied, because
//! a terminal cannot be a FIFO. What becomes of the output is the business of whoever reads.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustix::{
    fs::{FileType, Mode, OFlags},
    io::Errno,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::JoinHandle,
    time,
};

use crate::kernel::watch;

/// One read from a terminal or towards one. The kernel hands out no more at a time.
const CHUNK: usize = 4096;

/// Why a stream cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("open stream {path}: {cause}")]
    Open { path: String, cause: Errno },
    #[error("stream {path} is not a FIFO")]
    NotFifo { path: String },
    #[error("streams of kind {kind}: are not supported")]
    Kind { kind: String },
    #[error("copy a terminal: {0}")]
    Copy(io::Error),
}

/// Which way a stream goes, seen from the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    In,
    Out,
}

/// A stream for a process, and what keeps it alive.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) fd: OwnedFd,
    /// Both ends of the FIFO. As long as it is held the process finds its partner there, even while the
    /// program at the other end is restarted.
    pub(crate) keeper: Option<OwnedFd>,
}

/// Opens the stream at a path; an empty one is none. Never waits for a partner: opening both ways at once
/// does not, and after that neither does opening one.
pub(crate) fn open(path: &str, way: Way, flags: OFlags) -> Result<Option<Opened>, Error> {
    let path = path.strip_prefix("fifo://").unwrap_or(path);
    if path.is_empty() {
        return Ok(None);
    }
    let failed = |cause| Error::Open { path: path.to_owned(), cause };
    if let Some((kind, file)) = path.split_once("://") {
        if kind != "file" || way == Way::In {
            return Err(Error::Kind { kind: kind.to_owned() });
        }
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOCTTY;
        let fd = rustix::fs::open(file, flags, Mode::from_raw_mode(0o640)).map_err(failed)?;
        return Ok(Some(Opened { fd, keeper: None }));
    }
    let both = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
    let keeper = rustix::fs::open(path, both, Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&keeper).map_err(failed)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo {
        return Err(Error::NotFifo { path: path.to_owned() });
    }
    let access = match way {
        Way::In => OFlags::RDONLY,
        Way::Out => OFlags::WRONLY,
    };
    let again = format!("/proc/self/fd/{}", keeper.as_raw_fd());
    let fd = rustix::fs::open(again, access | flags | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    Ok(Some(Opened { fd, keeper: Some(keeper) }))
}

/// The copies between a terminal and the streams of its client.
#[derive(Default)]
pub(crate) struct Copies {
    output: Option<JoinHandle<()>>,
    input: Option<JoinHandle<()>>,
    /// The output waits for its client.
    full: Arc<AtomicBool>,
    keepers: Vec<OwnedFd>,
}

impl Copies {
    /// Copies between the master side of a terminal and the streams at two paths. `keep` holds them alive
    /// without a partner.
    pub(crate) fn start(pty: &OwnedFd, stdin: &str, stdout: &str, keep: bool) -> Result<Copies, Error> {
        let mut copies = Copies::default();
        if let Some(to) = open(stdout, Way::Out, OFlags::NONBLOCK)? {
            copies.keepers.extend(to.keeper.filter(|_| keep));
            let pty = side(pty).map_err(Error::Copy)?;
            let (to, full) = (watch(to.fd).map_err(Error::Copy)?, copies.full.clone());
            copies.output = Some(tokio::spawn(copy(pty, to, Way::Out, full)));
        }
        if let Some(from) = open(stdin, Way::In, OFlags::NONBLOCK)? {
            copies.keepers.extend(from.keeper.filter(|_| keep));
            let pty = side(pty).map_err(Error::Copy)?;
            let from = watch(from.fd).map_err(Error::Copy)?;
            copies.input = Some(tokio::spawn(copy(from, pty, Way::In, Arc::default())));
        }
        Ok(copies)
    }

    /// Ends the copies after the process: its last words are delivered. Whoever still holds the terminal is not
    /// waited for longer than `quiet`, a client that is slow to read not longer than `slow`.
    pub(crate) async fn finish(mut self, quiet: Duration, slow: Duration) {
        let Some(mut output) = self.output.take() else { return };
        let end = time::Instant::now() + slow;
        while time::timeout(quiet, &mut output).await.is_err() {
            if !self.full.load(Ordering::Relaxed) || time::Instant::now() >= end {
                return output.abort();
            }
        }
    }

    /// Hangs up on the client's input.
    pub(crate) fn close_input(&mut self) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for copy in [&self.output, &self.input].into_iter().flatten() {
            copy.abort();
        }
    }
}

/// One more descriptor of a terminal that is non-blocking already.
fn side(pty: &OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    watch(rustix::io::fcntl_dupfd_cloexec(pty, 3)?)
}

/// The master side of a terminal, ready to be waited for.
pub(crate) fn nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
}

/// Copies what comes from a FIFO into a container's stdin, until either ends. Both are non-blocking.
pub(crate) fn input(from: OwnedFd, to: OwnedFd) -> io::Result<impl Future<Output = ()> + Send> {
    Ok(copy(watch(from)?, watch(to)?, Way::In, Arc::default()))
}

async fn copy(mut from: AsyncFd<OwnedFd>, mut to: AsyncFd<OwnedFd>, way: Way, full: Arc<AtomicBool>) {
    let mut buffer = vec![0; CHUNK];
    let mut deaf = false;
    loop {
        let read = when(&mut from, Interest::READABLE, |fd| {
            rustix::io::retry_on_intr(|| rustix::io::read(fd, &mut buffer[..]))
        });
        // A terminal whose last user is gone says EIO.
        let count = match read.await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        let mut rest = &buffer[..count];
        while !deaf && !rest.is_empty() {
            let write = when(&mut to, Interest::WRITABLE, |fd| {
                rustix::io::retry_on_intr(|| rustix::io::write(fd, rest))
            });
            full.store(true, Ordering::Relaxed);
            let written = write.await;
            full.store(false, Ordering::Relaxed);
            match written {
                Ok(count) => rest = &rest[count..],
                // Nobody reads any more. The process may go on talking.
                Err(_) if way == Way::Out => deaf = true,
                Err(_) => return,
            }
        }
    }
}

/// Acts as soon as the descriptor is ready for it.
async fn when<T>(
    fd: &mut AsyncFd<OwnedFd>,
    interest: Interest,
    mut act: impl FnMut(&OwnedFd) -> rustix::io::Result<T>,
) -> io::Result<T> {
    loop {
        let mut ready = fd.ready(interest).await?;
        match act(ready.get_inner()) {
            Err(Errno::AGAIN) if ready.ready().is_read_closed() || ready.ready().is_write_closed() => {
                drop(ready);
                *fd = rewatch(fd)?;
            }
            Err(Errno::AGAIN) => ready.clear_ready(),
            done => return Ok(done?),
        }
    }
}

/// Waits for a descriptor anew. That a terminal was hung up once sticks to an `AsyncFd` and makes it ready for
/// ever, though a process has the terminal open again.
pub(crate) fn rewatch(fd: &AsyncFd<OwnedFd>) -> io::Result<AsyncFd<OwnedFd>> {
    watch(fd.get_ref().try_clone()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fifo(dir: &tempfile::TempDir) -> String {
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn opening_does_not_wait_for_a_partner() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir);
        for way in [Way::In, Way::Out] {
            let opened = open(&path, way, OFlags::empty()).unwrap().unwrap();
            let flags = rustix::fs::fcntl_getfl(&opened.fd).unwrap();
            assert!(!flags.contains(OFlags::NONBLOCK), "{way:?}");
            assert_eq!(flags & OFlags::ACCMODE, if way == Way::In { OFlags::RDONLY } else { OFlags::WRONLY });
        }
    }

    #[test]
    fn what_is_not_a_fifo_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(open(link.to_str().unwrap(), Way::Out, OFlags::empty()), Err(Error::Open { .. })));
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(
            open(file.to_str().unwrap(), Way::Out, OFlags::empty()),
            Err(Error::NotFifo { .. })
        ));
        assert!(matches!(open("binary:///bin/true", Way::Out, OFlags::empty()), Err(Error::Kind { .. })));
        assert!(open("", Way::Out, OFlags::empty()).unwrap().is_none());
    }
}

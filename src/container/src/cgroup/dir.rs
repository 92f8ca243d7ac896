//! The small files of one cgroup directory, always reached from a held descriptor. Knows no controllers.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir};
use rustix::io::{Errno, Result};

/// No file of a controller that we read is near this; a foreign tree cannot make us read on.
const LARGEST: usize = 4 << 20;
/// A container can nest cgroups in its own tree. Deeper or wider than this is an attack, not a workload.
const DEEPEST: usize = 128;
const WIDEST: usize = 100_000;

pub(super) fn open(parent: BorrowedFd, path: &str) -> Result<OwnedFd> {
    rustix::fs::openat(
        parent,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

pub(super) fn read_at(dir: BorrowedFd, file: &str) -> Result<String> {
    let fd =
        rustix::fs::openat(dir, file, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let mut bytes = vec![0; 4096];
    let mut len = 0;
    loop {
        match rustix::io::read(&fd, &mut bytes[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(Errno::INTR) => {}
            Err(cause) => return Err(cause),
        }
        if len == bytes.len() {
            if len >= LARGEST {
                return Err(Errno::FBIG);
            }
            bytes.resize(len * 4, 0);
        }
    }
    bytes.truncate(len);
    String::from_utf8(bytes).map_err(|_| Errno::ILSEQ)
}

pub(super) fn write_at(dir: BorrowedFd, file: &str, value: &str) -> Result<()> {
    let fd =
        rustix::fs::openat(dir, file, OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    write(fd.as_fd(), value)
}

/// One value is one write(2): the kernel takes no halves.
pub(super) fn write(fd: BorrowedFd, value: &str) -> Result<()> {
    loop {
        match rustix::io::write(fd, value.as_bytes()) {
            Ok(n) if n == value.len() => return Ok(()),
            Ok(_) => return Err(Errno::IO),
            Err(Errno::INTR) => {}
            Err(cause) => return Err(cause),
        }
    }
}

/// Makes `path` below `root`, parents included. Says whether the last directory is new.
pub(super) fn make(root: BorrowedFd, path: &str) -> Result<bool> {
    let mode = Mode::from_raw_mode(0o755);
    // A parent can be removed under us by its owner between two steps, so go round a few times.
    for _ in 0..3 {
        match rustix::fs::mkdirat(root, path, mode) {
            Ok(()) => return Ok(true),
            Err(Errno::EXIST) => return Ok(false),
            Err(Errno::NOENT) => {}
            Err(cause) => return Err(cause),
        }
        for (at, _) in path.match_indices('/') {
            match rustix::fs::mkdirat(root, &path[..at], mode) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(Errno::NOENT) => break,
                Err(cause) => return Err(cause),
            }
        }
    }
    Err(Errno::NOENT)
}

/// Names of the directories in `dir`.
pub(super) fn children(dir: BorrowedFd) -> Result<Vec<String>> {
    let fd =
        rustix::fs::openat(dir, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut buffer = Vec::with_capacity(8192);
    let mut entries = RawDir::new(fd, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if entry.file_type() == FileType::Directory && name != b"." && name != b".." {
            names.push(String::from_utf8(name.to_vec()).map_err(|_| Errno::ILSEQ)?);
        }
        if names.len() > WIDEST {
            return Err(Errno::MLINK);
        }
    }
    Ok(names)
}

/// Calls `visit` on `dir` and on every directory below, children first. What vanishes meanwhile is passed over.
pub(super) fn walk(dir: BorrowedFd, visit: &mut dyn FnMut(BorrowedFd) -> Result<()>) -> Result<()> {
    let mut left = WIDEST;
    descend(dir, DEEPEST, &mut left, visit)
}

fn descend(
    dir: BorrowedFd,
    depth: usize,
    left: &mut usize,
    visit: &mut dyn FnMut(BorrowedFd) -> Result<()>,
) -> Result<()> {
    if depth == 0 || *left == 0 {
        return Err(Errno::MLINK);
    }
    *left -= 1;
    let names = match children(dir) {
        Err(Errno::NOENT | Errno::NODEV) => return Ok(()),
        other => other?,
    };
    for name in names {
        match open(dir, &name) {
            Ok(child) => descend(child.as_fd(), depth - 1, left, visit)?,
            Err(Errno::NOENT | Errno::NODEV) => {}
            Err(cause) => return Err(cause),
        }
    }
    visit(dir)
}

/// Removes every directory below `dir`, not `dir` itself. Goes on past what is busy and reports that.
pub(super) fn clear(dir: BorrowedFd) -> Result<()> {
    let mut worst = Ok(());
    walk(dir, &mut |parent| {
        for name in children(parent).unwrap_or_default() {
            match rustix::fs::unlinkat(parent, &name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(cause) => worst = Err(cause),
            }
        }
        Ok(())
    })?;
    worst
}

/// Processes of `dir` and below. A process that our pid namespace cannot see reads as 0 and is left out.
pub(super) fn pids(dir: BorrowedFd) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    walk(dir, &mut |dir| {
        match read_at(dir, "cgroup.procs") {
            Ok(text) => {
                found.extend(text.lines().filter_map(|l| l.parse().ok()).filter(|&pid: &u32| pid != 0))
            }
            // Gone while we looked, or a threaded child whose processes its parent lists.
            Err(Errno::NODEV | Errno::NOENT | Errno::OPNOTSUPP) => {}
            Err(cause) => return Err(cause),
        }
        Ok(())
    })?;
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

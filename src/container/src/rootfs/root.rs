//! The container's root directory as a descriptor, and paths below it. Nothing here takes a path of the host:
//! every name comes from the specification and is looked up with openat2(2) in the root, where `..` and links
//! end at the root, and links of procfs are not followed.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat2, readlinkat};
use rustix::io::Errno;

use crate::kernel::Result;

/// What a mount point must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File,
}

/// The root of the container's mount tree.
#[derive(Debug)]
pub(crate) struct Root(OwnedFd);

/// Links followed on one path before we give up, as the kernel does (path_resolution(7)).
const LINKS: usize = 40;
/// Components of one path, links included.
const COMPONENTS: usize = 1024;

impl Root {
    pub(crate) fn new(fd: OwnedFd) -> Root {
        Root(fd)
    }

    /// An `O_PATH` descriptor of what is there, whatever it is.
    pub(crate) fn find(&self, path: &Path) -> Result<OwnedFd> {
        self.open(path, OFlags::PATH)
    }

    /// The same without following a single link on the way, for places that must be ordinary directories.
    pub(crate) fn find_plain(&self, path: &Path) -> Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
        retry(|| openat2(&self.0, below(path), OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve))
    }

    /// Opens what is there.
    pub(crate) fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        retry(|| openat2(&self.0, below(path), flags | OFlags::CLOEXEC, Mode::empty(), resolve))
    }

    /// What is there, made first when it is missing, together with the directories on the way. A link whose
    /// target is missing has its target made: images link `/etc/resolv.conf` to places that only a booted
    /// system has.
    pub(crate) fn find_or_make(&self, path: &Path, kind: Kind) -> Result<OwnedFd> {
        match self.find(path) {
            Err(Errno::NOENT) => self.make(path, kind),
            other => other,
        }
    }

    /// As `find_or_make`, but refuses links.
    pub(crate) fn find_or_make_plain(&self, path: &Path, kind: Kind) -> Result<OwnedFd> {
        match self.find_plain(path) {
            Err(Errno::NOENT) => self.make(path, kind).and_then(|_| self.find_plain(path)),
            other => other,
        }
    }

    /// Walks one component at a time, each from the descriptor of its parent and none through a link, so that
    /// nothing a neighbour swaps meanwhile can lead a mkdir out of the root (CVE-2024-45310).
    fn make(&self, path: &Path, kind: Kind) -> Result<OwnedFd> {
        let mut left: VecDeque<PathBuf> = components(path);
        let mut done = PathBuf::new();
        let mut links = 0;
        let mut here = self.find_plain(&done)?;
        for _ in 0..COMPONENTS {
            let Some(name) = left.pop_front() else { return Ok(here) };
            if name == Path::new("..") {
                done.pop();
                here = self.find_plain(&done)?;
                continue;
            }
            let last = left.is_empty();
            let found = match step(here.as_fd(), &name) {
                Err(Errno::NOENT) => {
                    make_one(here.as_fd(), &name, if last { kind } else { Kind::Directory })?;
                    step(here.as_fd(), &name)?
                }
                other => other?,
            };
            if FileType::from_raw_mode(fstat(&found)?.st_mode) != FileType::Symlink {
                done.push(name);
                here = found;
                continue;
            }
            links += 1;
            if links > LINKS {
                return Err(Errno::LOOP);
            }
            let target = readlinkat(&found, c"", Vec::new())?;
            let target = PathBuf::from(std::ffi::OsStr::from_bytes(target.as_bytes()));
            if target.has_root() {
                done.clear();
                here = self.find_plain(&done)?;
            }
            for name in components(&target).into_iter().rev() {
                left.push_front(name);
            }
        }
        Err(Errno::NAMETOOLONG)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One component, not followed when it is a link.
fn step(directory: BorrowedFd<'_>, name: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    retry(|| openat2(directory, name, flags, Mode::empty(), resolve))
}

/// A neighbour that made it first is welcome.
fn make_one(directory: BorrowedFd<'_>, name: &Path, kind: Kind) -> Result<()> {
    let made = match kind {
        Kind::Directory => mkdirat(directory, name, Mode::from_raw_mode(0o755)),
        Kind::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY;
            rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        }
    };
    match made {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// The path without its leading slashes; the root itself is ".".
fn below(path: &Path) -> &Path {
    let path = path.strip_prefix("/").unwrap_or(path);
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

/// Names and `..`, without the root and `.`.
fn components(path: &Path) -> VecDeque<PathBuf> {
    use std::path::Component;
    path.components()
        .filter(|component| matches!(component, Component::Normal(_) | Component::ParentDir))
        .map(|component| PathBuf::from(component.as_os_str()))
        .collect()
}

/// openat2(2) answers EAGAIN when a rename or a mount raced with `..`; a neighbour can cause that at will, so
/// the number of tries is bounded.
fn retry<T>(mut open: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 0..128 {
        match open() {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

/// What kind of mount point fits on top of, or below, what `fd` stands on.
pub(crate) fn kind(fd: BorrowedFd<'_>) -> Result<Kind> {
    let mode = rustix::fs::statat(fd, c"", AtFlags::EMPTY_PATH)?.st_mode;
    Ok(if FileType::from_raw_mode(mode) == FileType::Directory { Kind::Directory } else { Kind::File })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        let fd = crate::kernel::open_host(&dir.path().join("root")).unwrap();
        (dir, Root::new(fd))
    }

    fn names(path: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn missing_directories_are_made_on_the_way() {
        let (dir, root) = root();
        root.find_or_make(Path::new("/a/b/c"), Kind::Directory).unwrap();
        root.find_or_make(Path::new("/a/b/f"), Kind::File).unwrap();
        assert!(dir.path().join("root/a/b/c").is_dir());
        assert!(dir.path().join("root/a/b/f").is_file());
    }

    #[test]
    fn a_dangling_link_has_its_target_made_inside_the_root() {
        let (dir, root) = root();
        std::fs::create_dir(dir.path().join("root/etc")).unwrap();
        symlink("../../../run/x/stub", dir.path().join("root/etc/resolv.conf")).unwrap();
        symlink("/var/y", dir.path().join("root/etc/absolute")).unwrap();
        root.find_or_make(Path::new("/etc/resolv.conf"), Kind::File).unwrap();
        root.find_or_make(Path::new("/etc/absolute/z"), Kind::Directory).unwrap();
        assert!(dir.path().join("root/run/x/stub").is_file());
        assert!(dir.path().join("root/var/y/z").is_dir());
        assert_eq!(names(dir.path()), ["root"]);
    }

    #[test]
    fn dot_dot_ends_at_the_root() {
        let (dir, root) = root();
        root.find_or_make(Path::new("/../../../out/there"), Kind::Directory).unwrap();
        assert!(dir.path().join("root/out/there").is_dir());
        assert_eq!(names(dir.path()), ["root"]);
    }

    #[test]
    fn a_loop_of_links_is_an_error() {
        let (dir, root) = root();
        symlink("b", dir.path().join("root/a")).unwrap();
        symlink("a", dir.path().join("root/b")).unwrap();
        assert_eq!(root.find_or_make(Path::new("/a"), Kind::Directory).err(), Some(Errno::LOOP));
        assert_eq!(root.make(Path::new("/a/c"), Kind::Directory).err(), Some(Errno::LOOP));
    }

    #[test]
    fn plain_refuses_links() {
        let (dir, root) = root();
        std::fs::create_dir(dir.path().join("root/evil")).unwrap();
        symlink("/evil", dir.path().join("root/proc")).unwrap();
        assert_eq!(root.find_or_make_plain(Path::new("/proc"), Kind::Directory).err(), Some(Errno::LOOP));
        assert!(root.find_or_make_plain(Path::new("/sys"), Kind::Directory).is_ok());
    }

    #[test]
    fn a_file_in_the_way_of_a_directory_is_an_error() {
        let (dir, root) = root();
        std::fs::write(dir.path().join("root/f"), "").unwrap();
        assert_eq!(root.find_or_make(Path::new("/f/d"), Kind::Directory).err(), Some(Errno::NOTDIR));
    }
}

//! Hides paths and makes paths read-only. What hides them is ours: the host's null device, checked, for files,
//! and one empty read-only tmpfs for directories. The container's own `/dev/null` is never trusted with that
//! (CVE-2025-31133).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, StatVfsMountFlags, fstat, fstatvfs, major, minor};
use rustix::io::Errno;

use super::mount;
use super::options::Options;
use super::root::{self, Kind, Root};
use crate::error::{At, Failure, Step};
use crate::kernel::{MOUNT_ATTR_RDONLY, MountAttr, mount_setattr};

/// The host's null device as a detached mount.
pub(crate) fn null() -> Result<OwnedFd, Failure> {
    let null = mount::clone(Path::new("/dev/null"), false).at(Step::Source, "/dev/null")?;
    if is_null(null.as_fd()).at(Step::Source, "/dev/null")? {
        Ok(null)
    } else {
        Err(Errno::NODEV).at(Step::Source, "/dev/null: not the null device")
    }
}

/// Character device 1:3.
pub(crate) fn is_null(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let stat = fstat(fd)?;
    let number = (major(stat.st_rdev), minor(stat.st_rdev));
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && number == (1, 3))
}

/// Covers every path that exists.
pub(crate) fn hide(root: &Root, paths: &[PathBuf], null: OwnedFd) -> Result<(), Failure> {
    let mut files = Cover::new(null);
    let mut directories = None;
    for path in paths {
        let target = match root.find(path) {
            Err(Errno::NOENT) => continue,
            other => other.at(Step::Mask, path.display())?,
        };
        let cover = match root::kind(target.as_fd()).at(Step::Mask, path.display())? {
            Kind::File => files.take(),
            Kind::Directory => match &mut directories {
                Some(cover) => Cover::take(cover),
                none => none.insert(Cover::new(empty().at(Step::Mask, path.display())?)).take(),
            },
        };
        let cover = cover.at(Step::Mask, path.display())?;
        mount::attach(cover.as_fd(), target.as_fd()).at(Step::Mask, path.display())?;
    }
    Ok(())
}

/// One mount that covers many places. The first place gets the mount itself, the others copies: a mount that is
/// attached can be copied by every kernel, a detached one only since Linux 6.15.
struct Cover {
    first: OwnedFd,
    used: bool,
}

impl Cover {
    fn new(first: OwnedFd) -> Cover {
        Cover { first, used: false }
    }

    fn take(&mut self) -> Result<OwnedFd, Errno> {
        if std::mem::replace(&mut self.used, true) {
            mount::clone_fd(self.first.as_fd(), false)
        } else {
            mount::own(&self.first)
        }
    }
}

fn empty() -> Result<OwnedFd, Errno> {
    let options = Options::parse(["ro", "nosuid", "nodev", "noexec", "nr_blocks=1", "nr_inodes=1"]);
    mount::new("tmpfs", "tmpfs", &options).map_err(|refused| refused.errno)
}

/// Covers every path that exists with a read-only copy of itself.
pub(crate) fn read_only(root: &Root, paths: &[PathBuf]) -> Result<(), Failure> {
    for path in paths {
        let target = match root.find(path) {
            Err(Errno::NOENT) => continue,
            other => other.at(Step::ReadOnly, path.display())?,
        };
        let protect = || {
            let copy = mount::clone_fd(target.as_fd(), true)?;
            mount_setattr(copy.as_fd(), true, MountAttr::set(MOUNT_ATTR_RDONLY))?;
            mount::attach(copy.as_fd(), target.as_fd())?;
            Ok(copy)
        };
        let copy = protect().at(Step::ReadOnly, path.display())?;
        check_read_only(copy.as_fd(), path)?;
    }
    Ok(())
}

/// Looks again (S09).
pub(crate) fn check_read_only(fd: BorrowedFd<'_>, path: &Path) -> Result<(), Failure> {
    let flags = fstatvfs(fd).at(Step::ReadOnly, path.display())?.f_flag;
    if flags.contains(StatVfsMountFlags::RDONLY) {
        return Ok(());
    }
    Err(Errno::ROFS).at(Step::ReadOnly, format_args!("{}: still writable", path.display()))
}

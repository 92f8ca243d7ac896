//! Makes, changes and attaches mounts, by descriptor (fsopen(2), open_tree(2), mount_setattr(2), move_mount(2)).
//! Nothing here knows what the mounts are for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, fstatfs};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use super::options::Options;
use crate::error::{Failure, Step};
use crate::kernel::{MountAttr, Result, mount_setattr};

/// File systems that must be what they seem to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum System {
    Proc,
    Sysfs,
}

impl System {
    pub(crate) fn named(kind: &str) -> Option<System> {
        match kind {
            "proc" => Some(System::Proc),
            "sysfs" => Some(System::Sysfs),
            _ => None,
        }
    }
}

/// Whether `fd` stands on one of them.
pub(crate) fn system(fd: BorrowedFd<'_>) -> Result<Option<System>> {
    Ok(match fstatfs(fd)?.f_type as i64 {
        magic if magic == i64::from(libc::PROC_SUPER_MAGIC as i32) => Some(System::Proc),
        SYSFS_MAGIC => Some(System::Sysfs),
        _ => None,
    })
}

const SYSFS_MAGIC: i64 = 0x6265_6572;

/// A file system that could not be mounted, with what the kernel had to say about it.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) errno: Errno,
    reason: String,
}

impl Refused {
    pub(crate) fn failure(self, kind: &str, destination: &Path) -> Failure {
        let object = match self.reason.as_str() {
            "" => format!("{kind} on {}", destination.display()),
            reason => format!("{kind} on {} ({reason})", destination.display()),
        };
        Failure { step: Step::Mount, errno: self.errno, object }
    }
}

impl From<Errno> for Refused {
    fn from(errno: Errno) -> Self {
        Refused { errno, reason: String::new() }
    }
}

/// A new instance of a file system, detached, with its attributes and propagation.
pub(crate) fn new(kind: &str, source: &str, options: &Options) -> std::result::Result<OwnedFd, Refused> {
    let context = Context::open(kind)?;
    if !source.is_empty() {
        context.string("source", source)?;
    }
    for (key, value) in &options.data {
        match value {
            Some(value) => context.string(key, value)?,
            None => context.flag(key)?,
        }
    }
    let mount = context.mount(options.attr.set)?;
    if options.below != MountAttr::default() {
        mount_setattr(mount.as_fd(), true, options.below)?;
    }
    for propagation in &options.propagation {
        mount_setattr(mount.as_fd(), propagation.recursive, MountAttr::propagation(propagation.kind))?;
    }
    Ok(mount)
}

/// A file system that is being configured.
pub(crate) struct Context(OwnedFd);

impl Context {
    pub(crate) fn open(kind: &str) -> Result<Context> {
        fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map(Context)
    }

    pub(crate) fn string(&self, key: &str, value: &str) -> std::result::Result<(), Refused> {
        fsconfig_set_string(&self.0, key, value).map_err(|errno| self.refused(errno))
    }

    pub(crate) fn flag(&self, key: &str) -> std::result::Result<(), Refused> {
        fsconfig_set_flag(&self.0, key).map_err(|errno| self.refused(errno))
    }

    /// `attributes` are `MOUNT_ATTR_*`.
    pub(crate) fn mount(self, attributes: u64) -> std::result::Result<OwnedFd, Refused> {
        fsconfig_create(&self.0).map_err(|errno| self.refused(errno))?;
        let attributes = MountAttrFlags::from_bits_retain(attributes as u32);
        fsmount(&self.0, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(|errno| self.refused(errno))
    }

    /// The kernel leaves messages in the context, such as `e tmpfs: Unknown parameter 'sise'`.
    fn refused(&self, errno: Errno) -> Refused {
        let mut text = [0u8; 512];
        let length = rustix::io::read(&self.0, &mut text).unwrap_or(0);
        let text = String::from_utf8_lossy(text.get(..length).unwrap_or_default());
        Refused { errno, reason: text.trim_start_matches("e ").trim().to_owned() }
    }
}

/// A detached copy of the mount at a path of the host.
pub(crate) fn clone(path: &Path, recursive: bool) -> Result<OwnedFd> {
    open_tree(CWD, path, clone_flags(recursive))
}

/// A detached copy of the mount that `fd` stands on.
pub(crate) fn clone_fd(fd: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd> {
    open_tree(fd, c"", clone_flags(recursive) | OpenTreeFlags::AT_EMPTY_PATH)
}

fn clone_flags(recursive: bool) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive { flags | OpenTreeFlags::AT_RECURSIVE } else { flags }
}

/// Another descriptor of a tree that the caller of `create` handed over.
pub(crate) fn own(tree: &OwnedFd) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(tree, 3)
}

/// Attributes and propagation of a bind: private unless it says otherwise.
pub(crate) fn set_attributes(tree: BorrowedFd<'_>, options: &Options) -> Result<()> {
    if options.below != MountAttr::default() {
        mount_setattr(tree, true, options.below)?;
    }
    if options.attr != MountAttr::default() {
        mount_setattr(tree, false, options.attr)?;
    }
    if options.propagation.is_empty() && !options.remount {
        return mount_setattr(tree, true, MountAttr::propagation(libc::MS_PRIVATE));
    }
    for propagation in &options.propagation {
        mount_setattr(tree, propagation.recursive, MountAttr::propagation(propagation.kind))?;
    }
    Ok(())
}

/// Mounts the tree on what `target` stands on.
pub(crate) fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, c"", target, c"", flags)
}

//! `/sys/fs/cgroup` of the container. On cgroup v2 it is the file system itself, seen through the cgroup
//! namespace; on v1 a tmpfs in which each hierarchy shows the container's own directory and nothing above it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, mkdirat, symlinkat};
use rustix::io::Errno;

use super::mount;
use super::options::Options;
use crate::cgroup::{Cgroup, Layout};
use crate::error::{At, Failure, Step};
use crate::kernel::{MOUNT_ATTR_RDONLY, MountAttr, mount_setattr};

const PATH: &str = "/sys/fs/cgroup";

#[derive(Debug)]
pub(crate) struct Plan {
    /// Name of the hierarchy and the container's directory in it, on the host.
    directories: Vec<(String, PathBuf)>,
    /// cgroup v2 alone.
    unified: bool,
    /// A new instance shows the right thing only in a cgroup namespace.
    namespace: bool,
}

impl Plan {
    pub(crate) fn new(cgroup: &Cgroup, namespace: bool, wanted: bool) -> Plan {
        let unified = cgroup.host().layout() == Layout::Unified;
        let mut directories = Vec::new();
        if wanted {
            for tree in cgroup.host().trees() {
                directories.push((tree.name.clone(), tree.mount.join(cgroup.path())));
            }
        }
        Plan { directories, unified, namespace }
    }

    /// With the host's rights: the container's directories as detached mounts.
    pub(crate) fn open(&self) -> Result<Vec<OwnedFd>, Failure> {
        if self.unified && self.namespace {
            return Ok(Vec::new());
        }
        let mut open = Vec::with_capacity(self.directories.len());
        for (_, path) in &self.directories {
            let tree = mount::clone(path, false).at(Step::Source, path.display())?;
            mount_setattr(tree.as_fd(), true, MountAttr::propagation(libc::MS_PRIVATE))
                .at(Step::MountAttributes, path.display())?;
            open.push(tree);
        }
        Ok(open)
    }

    /// Mounts what `open` gathered, or a new instance, on `target`.
    pub(crate) fn mount(
        &self,
        target: BorrowedFd<'_>,
        options: &Options,
        open: Vec<OwnedFd>,
    ) -> Result<(), Failure> {
        let attributes = MountAttr { set: options.attr.set, ..MountAttr::default() };
        if self.unified {
            let tree = match open.into_iter().next() {
                Some(tree) => {
                    mount_setattr(tree.as_fd(), false, attributes).map(|()| tree).map_err(Into::into)
                }
                None => mount::new("cgroup2", "cgroup", &without_data(options)),
            };
            let tree = tree.map_err(|refused: mount::Refused| refused.failure("cgroup2", Path::new(PATH)))?;
            return mount::attach(tree.as_fd(), target).at(Step::Mount, PATH);
        }
        self.compose(target, options, attributes, open).at(Step::Mount, PATH)
    }

    fn compose(
        &self,
        target: BorrowedFd<'_>,
        options: &Options,
        attributes: MountAttr,
        open: Vec<OwnedFd>,
    ) -> Result<(), Errno> {
        let mut writable = Options::parse(["nosuid", "nodev", "noexec", "mode=755", "size=64k"]);
        writable.attr.set |= options.attr.set & !MOUNT_ATTR_RDONLY;
        let tmpfs = mount::new("tmpfs", "tmpfs", &writable).map_err(|refused| refused.errno)?;
        for (name, _) in &self.directories {
            mkdirat(&tmpfs, name, Mode::from_raw_mode(0o755))?;
            // `cpu,cpuacct` is also found as `cpu` and as `cpuacct`.
            for alias in name.split(',').filter(|alias| alias != name) {
                symlinkat(name, &tmpfs, alias)?;
            }
        }
        mount::attach(tmpfs.as_fd(), target)?;
        for ((name, _), tree) in self.directories.iter().zip(open) {
            mount_setattr(tree.as_fd(), false, attributes)?;
            let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC;
            let place = rustix::fs::openat(&tmpfs, name, flags, Mode::empty())?;
            mount::attach(tree.as_fd(), place.as_fd())?;
        }
        mount_setattr(tmpfs.as_fd(), false, attributes)
    }
}

fn without_data(options: &Options) -> Options {
    let mut options = options.clone();
    // What v1 understands, such as `xattr` and `none`, means nothing to v2.
    options.data.retain(|(key, _)| matches!(key.as_str(), "nsdelegate" | "memory_recursiveprot"));
    options
}

//! Makes the container's tree the root and lets go of the host's.

use std::os::fd::AsFd;
use std::path::Path;

use super::root::Root;
use crate::error::{At, Failure, Step};
use crate::kernel::{self, MountAttr, detach_here, mount_setattr, pivot_here};

/// By descriptor: the tree is mounted on top of the host's root, so that there is no path to it at all.
pub(crate) fn enter(root: &Root) -> Result<(), Failure> {
    let pivot = || {
        let old = kernel::open_path(Path::new("/"))?;
        rustix::process::fchdir(root)?;
        pivot_here()?;
        // The old root now lies below the new one. What happens to it must not reach its peers on the host.
        rustix::process::fchdir(&old)?;
        mount_setattr(old.as_fd(), true, MountAttr::propagation(libc::MS_SLAVE))?;
        detach_here()?;
        rustix::process::chdir("/")
    };
    pivot().at(Step::Pivot, "rootfs")
}

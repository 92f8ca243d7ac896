//! The `/dev/shm` that the containers of a pod share: one tmpfs, mounted nowhere, of which each container gets a
//! copy.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::mount;
use super::options::Options;
use crate::error::{At, Error, Failure, Step};
use crate::kernel;

/// A tmpfs that lives as long as this value and its copies.
#[derive(Debug)]
pub struct Shm {
    tmpfs: OwnedFd,
    /// Where it had to be mounted on a kernel that copies no detached mounts.
    attached: Option<PathBuf>,
}

/// Makes a tmpfs of `size` bytes for a pod whose root is `uid` and `gid` on the host. Kernels before 6.15 copy
/// only mounts that are attached somewhere; for them it is mounted on the directory `fallback`, and unmounted
/// when the value is dropped.
pub fn shm(size: u64, owner: (u32, u32), fallback: &Path) -> Result<Shm, Error> {
    let (uid, gid) = owner;
    let (size, uid, gid) = (format!("size={size}"), format!("uid={uid}"), format!("gid={gid}"));
    let options = Options::parse(["nosuid", "nodev", "noexec", "mode=1777", &size, &uid, &gid]);
    let tmpfs = mount::new("tmpfs", "shm", &options)
        .map_err(|refused| refused.failure("tmpfs", Path::new("/dev/shm")))?;
    let mut shm = Shm { tmpfs, attached: None };
    if let Err(Errno::INVAL) = mount::clone_fd(shm.tmpfs.as_fd(), false) {
        shm.attach(fallback)?;
    }
    Ok(shm)
}

impl Shm {
    /// A detached mount of the same tmpfs, for one container.
    pub fn tree(&self) -> Result<OwnedFd, Error> {
        Ok(mount::clone_fd(self.tmpfs.as_fd(), false).at(Step::Source, "/dev/shm")?)
    }

    fn attach(&mut self, directory: &Path) -> Result<(), Failure> {
        let target = kernel::open_path(directory).at(Step::Source, directory.display())?;
        mount::attach(self.tmpfs.as_fd(), target.as_fd()).at(Step::Mount, directory.display())?;
        self.attached = Some(directory.to_owned());
        Ok(())
    }
}

impl Drop for Shm {
    fn drop(&mut self) {
        if let Some(directory) = &self.attached {
            let _ = unmount(directory, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        }
    }
}

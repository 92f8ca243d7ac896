//! A terminal from the container's own devpts. The other side is reached through the master's descriptor, never by
//! a path that somebody could swap (CVE-2025-52565).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags, Uid, fstat, fstatfs, major, openat2};
use rustix::io::Errno;
use rustix::termios::{Winsize, tcsetwinsize};

use crate::error::{At, Failure, Step};
use crate::kernel::{self, Result};
use crate::rootfs::mount;
use crate::rootfs::root::{Kind, Root};

pub(super) struct Pty {
    pub(super) master: OwnedFd,
    pub(super) slave: OwnedFd,
}

/// A new terminal of the devpts that `devpts` is the root of, owned by the user.
pub(super) fn open(
    devpts: BorrowedFd<'_>,
    width: u16,
    height: u16,
    owner: Uid,
) -> std::result::Result<Pty, Failure> {
    let pty = || {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let master = rustix::fs::openat(devpts, "ptmx", flags, Mode::empty())?;
        rustix::pty::unlockpt(&master)?;
        let slave = peer(master.as_fd())?;
        // Unix98 slaves have the majors 136 to 143.
        let is_slave = (136..=143).contains(&major(fstat(&slave)?.st_rdev));
        if !is_slave || fstatfs(&slave)?.f_type as i64 != DEVPTS {
            return Err(Errno::NOTTY);
        }
        if width != 0 && height != 0 {
            let size = Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
            tcsetwinsize(&slave, size)?;
        }
        rustix::fs::fchown(&slave, Some(owner), None)?;
        Ok(Pty { master, slave })
    };
    pty().at(Step::Terminal, "/dev/pts/ptmx")
}

const DEVPTS: i64 = 0x1cd1;

/// ioctl_tty(2), TIOCGPTPEER.
fn peer(master: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the ioctl takes open flags and returns a new descriptor, which nobody else owns.
    unsafe {
        let fd = kernel::check(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER as _, flags).into())?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Mounts the terminal at `/dev/console`, which is a plain file that we made, or the user's own `/dev` has.
pub(super) fn mount_console(root: &Root, slave: BorrowedFd<'_>) -> std::result::Result<(), Failure> {
    let mount = || {
        let target = root.find_or_make(Path::new("/dev/console"), Kind::File)?;
        let console = mount::clone_fd(slave, false)?;
        mount::attach(console.as_fd(), target.as_fd())
    };
    mount().at(Step::Mount, "terminal on /dev/console")
}

/// The devpts of a running container, for an exec.
pub(super) fn find_devpts() -> std::result::Result<OwnedFd, Failure> {
    let find = || {
        let root = kernel::open_path(Path::new("/"))?;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let devpts = openat2(root, "dev/pts", flags, Mode::empty(), resolve)?;
        if fstatfs(&devpts)?.f_type as i64 == DEVPTS { Ok(devpts) } else { Err(Errno::NODEV) }
    };
    find().at(Step::Terminal, "/dev/pts")
}

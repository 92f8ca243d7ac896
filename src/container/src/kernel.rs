//! System calls that rustix has no safe form of. The structures are our own, because those of libc differ
//! between gnu and musl (`libc::CLONE_INTO_CGROUP` is even an `int` that overflows to 0 on gnu).

use std::ffi::{CStr, c_long};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

pub(crate) type Result<T> = std::result::Result<T, Errno>;

// clone(2). u64 because the later ones do not fit an int.
pub(crate) const CLONE_PIDFD: u64 = 0x0000_1000;
pub(crate) const CLONE_PARENT: u64 = 0x0000_8000;
pub(crate) const CLONE_NEWNS: u64 = 0x0002_0000;
pub(crate) const CLONE_NEWCGROUP: u64 = 0x0200_0000;
pub(crate) const CLONE_NEWUTS: u64 = 0x0400_0000;
pub(crate) const CLONE_NEWIPC: u64 = 0x0800_0000;
pub(crate) const CLONE_NEWUSER: u64 = 0x1000_0000;
pub(crate) const CLONE_NEWPID: u64 = 0x2000_0000;
pub(crate) const CLONE_NEWNET: u64 = 0x4000_0000;
pub(crate) const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
pub(crate) const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args`, version 2 (Linux 5.7).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}
const _: () = assert!(size_of::<CloneArgs>() == 88);

/// Which side of a clone this is.
pub(crate) enum Cloned {
    Parent { pid: u32, pidfd: OwnedFd },
    Child,
}

/// Clones this process; the child continues here with a copy of everything.
///
/// # Safety
/// The process has one thread, and the child ends by exec or `_exit`: it never returns into its caller's
/// event loop and runs no destructors of the parent's.
pub(crate) unsafe fn clone(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned> {
    let mut pidfd: RawFd = -1;
    let mut args = CloneArgs {
        flags: flags | CLONE_PIDFD | CLONE_CLEAR_SIGHAND,
        pidfd: &raw mut pidfd as u64,
        // With CLONE_PARENT the child takes over the exit signal of its sibling, and naming one is an error.
        exit_signal: if flags & CLONE_PARENT == 0 { libc::SIGCHLD as u64 } else { 0 },
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: `args` has the size we name and points at a live integer; without CLONE_VM the child has its own
    // stack and memory. The rest is the caller's promise.
    let answer = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match check(answer)? {
        0 => Ok(Cloned::Child),
        // SAFETY: with CLONE_PIDFD the kernel stored a new descriptor, CLOEXEC, that nobody else owns.
        pid => Ok(Cloned::Parent { pid: pid as u32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } }),
    }
}

/// `struct mount_attr`, version 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MountAttr {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    pub(crate) propagation: u64,
    pub(crate) userns: u64,
}
const _: () = assert!(size_of::<MountAttr>() == 32);

pub(crate) const MOUNT_ATTR_RDONLY: u64 = 0x1;
pub(crate) const MOUNT_ATTR_NOSUID: u64 = 0x2;
pub(crate) const MOUNT_ATTR_NODEV: u64 = 0x4;
pub(crate) const MOUNT_ATTR_NOEXEC: u64 = 0x8;
pub(crate) const MOUNT_ATTR_ATIME: u64 = 0x70;
pub(crate) const MOUNT_ATTR_NOATIME: u64 = 0x10;
pub(crate) const MOUNT_ATTR_STRICTATIME: u64 = 0x20;
pub(crate) const MOUNT_ATTR_NODIRATIME: u64 = 0x80;
pub(crate) const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;
pub(crate) const MOUNT_ATTR_NOSYMFOLLOW: u64 = 0x20_0000;

impl MountAttr {
    pub(crate) const fn propagation(kind: libc::c_ulong) -> MountAttr {
        MountAttr { set: 0, clear: 0, propagation: kind, userns: 0 }
    }

    pub(crate) const fn set(set: u64) -> MountAttr {
        MountAttr { set, clear: 0, propagation: 0, userns: 0 }
    }

    pub(crate) fn idmap(userns: BorrowedFd<'_>) -> MountAttr {
        MountAttr { set: MOUNT_ATTR_IDMAP, userns: userns.as_raw_fd() as u64, ..MountAttr::default() }
    }
}

/// mount_setattr(2) on the mount that `fd` stands on.
pub(crate) fn mount_setattr(fd: BorrowedFd<'_>, recursive: bool, attr: MountAttr) -> Result<()> {
    let flags = AtFlags::EMPTY_PATH.bits() | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string, the structure has the size we name, and both outlive the call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    check(answer).map(drop)
}

const AT_RECURSIVE: u32 = 0x8000;

/// setns(2).
pub(crate) fn setns(fd: BorrowedFd<'_>, kinds: u64) -> Result<()> {
    // SAFETY: takes two integers; the descriptor is borrowed and thus open.
    check(unsafe { libc::setns(fd.as_raw_fd(), kinds as libc::c_int) }.into()).map(drop)
}

/// unshare(2) of namespaces.
pub(crate) fn unshare(kinds: u64) -> Result<()> {
    // SAFETY: takes one integer, and only namespaces are named here, so no memory or descriptors are unshared
    // behind the back of safe code.
    check(unsafe { libc::unshare(kinds as libc::c_int) }.into()).map(drop)
}

/// pivot_root(".", "."): the working directory becomes the root, the old root is stacked upon it.
pub(crate) fn pivot_here() -> Result<()> {
    // SAFETY: two constant C strings.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) }).map(drop)
}

/// Detaches what is mounted on top of the working directory.
pub(crate) fn detach_here() -> Result<()> {
    // SAFETY: one constant C string.
    check(unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) }.into()).map(drop)
}

/// prctl(2) with integers only.
pub(crate) fn prctl(option: i32, one: u64, two: u64) -> Result<i32> {
    // SAFETY: every option we pass takes integers and touches no memory of ours.
    check(unsafe { libc::prctl(option, one, two, 0u64, 0u64) }.into()).map(|answer| answer as i32)
}

/// Sets every signal to its default and lets all of them in. CLONE_CLEAR_SIGHAND leaves ignored ones
/// ignored, and the Rust runtime ignores SIGPIPE.
pub(crate) fn default_signals() {
    set_signals(libc::SIG_DFL);
    let none = 0u64;
    // SAFETY: the set is 8 bytes long, as said, and live.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, 0usize, size_of::<u64>())
    };
}

/// Ignores what can be ignored. With SIGCHLD ignored, children are reaped by the kernel.
pub(crate) fn ignore_signals() {
    set_signals(libc::SIG_IGN);
}

/// By raw system call, because libc keeps 32 and 33 to itself, and whoever started us may have ignored them.
fn set_signals(handler: libc::sighandler_t) {
    /// The kernel's `struct sigaction`.
    #[repr(C)]
    struct Action {
        handler: usize,
        flags: u64,
        restorer: usize,
        mask: u64,
    }
    const { assert!(size_of::<Action>() == 32) };
    let action = Action { handler, flags: 0, restorer: 0, mask: 0 };
    for signal in 1..=64 {
        // SAFETY: the structure is the kernel's and live, and neither of our handlers runs code. Signals that
        // cannot be set answer EINVAL.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, &raw const action, 0usize, size_of::<u64>());
        }
    }
}

/// Uses the file system as these ids, with all capabilities kept, until the value is dropped (setfsuid(2)).
pub(crate) fn act_as((uid, gid): (u32, u32)) -> Result<Acting> {
    const NO_SETUID_FIXUP: u64 = 1 << 2;
    let bits = prctl(libc::PR_GET_SECUREBITS, 0, 0)? as u64;
    prctl(libc::PR_SET_SECUREBITS, bits | NO_SETUID_FIXUP, 0)?;
    let acting = Acting { bits };
    fs_ids(uid, gid);
    // The call itself never fails; asked again with an id that is none, it tells what holds.
    // SAFETY: takes a number and returns one.
    match unsafe { libc::setfsuid(u32::MAX) } as u32 == uid {
        true => Ok(acting),
        false => Err(Errno::PERM),
    }
}

/// Ends with its drop.
pub(crate) struct Acting {
    bits: u64,
}

impl Drop for Acting {
    fn drop(&mut self) {
        fs_ids(0, 0);
        // What was allowed before is allowed again.
        let _ = prctl(libc::PR_SET_SECUREBITS, self.bits, 0);
    }
}

fn fs_ids(uid: u32, gid: u32) {
    // SAFETY: both take a number and change the calling thread only.
    unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
    }
}

/// keyctl(2): a new, anonymous session keyring.
pub(crate) fn new_keyring() -> Result<()> {
    const JOIN_SESSION_KEYRING: u32 = 1;
    // SAFETY: a null name asks for an anonymous one.
    check(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, std::ptr::null::<u8>()) }).map(drop)
}

/// personality(2).
pub(crate) fn set_personality(persona: u64) -> Result<()> {
    // SAFETY: takes a number.
    check(unsafe { libc::syscall(libc::SYS_personality, persona) }).map(drop)
}

/// prctl(2), PR_SET_NAME: what `ps` shows.
pub(crate) fn prctl_name(name: &CStr) -> Result<()> {
    // SAFETY: reads a C string of at most 16 bytes.
    check(unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) }.into()).map(drop)
}

/// Closes every descriptor.
pub(crate) fn close_all() {
    let _ = close_range(0, u32::MAX, 0);
}

/// Closes all descriptors from 3 upwards but those in `keep`.
pub(crate) fn close_others(keep: &mut [RawFd]) -> Result<()> {
    keep.sort_unstable();
    let mut next = 3;
    for &fd in keep.iter().filter(|fd| **fd >= 3) {
        let fd = fd as u32;
        if fd > next {
            close_range(next, fd - 1, 0)?;
        }
        next = fd + 1;
    }
    close_range(next, u32::MAX, 0)
}

/// Marks all descriptors from 3 upwards to be closed by the exec.
pub(crate) fn close_on_exec() -> Result<()> {
    close_range(3, u32::MAX, CLOSE_RANGE_CLOEXEC)
}

const CLOSE_RANGE_CLOEXEC: u32 = 4;

fn close_range(first: u32, last: u32, flags: u32) -> Result<()> {
    // SAFETY: only the child calls this, whose copies of the parent's owned descriptors are never used or
    // dropped afterwards, because it leaves by exec or `_exit`.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) }).map(drop)
}

/// Runs what a child has to do. It must end there: neither a return nor a panic may lead it on into the parent's code,
/// of which it is a copy.
pub(crate) fn never_return(child: impl FnOnce()) -> ! {
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
    exit(127)
}

/// Ends the child at once, without exit handlers or destructors.
pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: `_exit` is always sound.
    unsafe { libc::_exit(code) }
}

/// execve(2); returns only when it failed.
pub(crate) fn execve(program: &CStr, args: &[*const libc::c_char], env: &[*const libc::c_char]) -> Errno {
    debug_assert!(args.last().is_some_and(|last| last.is_null()));
    debug_assert!(env.last().is_some_and(|last| last.is_null()));
    // SAFETY: both vectors end in a null pointer and hold C strings that outlive the call.
    let answer = unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    check(answer.into()).err().unwrap_or(Errno::IO)
}

/// Opens a namespace or another file of this host by its path.
pub(crate) fn open_host(path: &std::path::Path) -> Result<OwnedFd> {
    rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// An `O_PATH` descriptor of a path of this host.
pub(crate) fn open_path(path: &std::path::Path) -> Result<OwnedFd> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// One of our own namespaces.
pub(crate) fn own_namespace(kind: &str) -> Result<OwnedFd> {
    rustix::fs::openat(CWD, format!("/proc/self/ns/{kind}"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// Kills the process and waits for it, but not for ever: one that hangs in the kernel is left to the reaper.
pub(crate) fn kill_and_reap(pidfd: impl AsFd) {
    let _ = rustix::process::pidfd_send_signal(pidfd.as_fd(), rustix::process::Signal::KILL);
    reap(pidfd, 1000);
}

/// Waits for a child that is about to end.
pub(crate) fn reap(pidfd: impl AsFd, milliseconds: i64) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Timespec { tv_sec: milliseconds / 1000, tv_nsec: (milliseconds % 1000) * 1_000_000 };
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    if let Ok(1) = poll(&mut fds, Some(&limit)) {
        let _ = rustix::process::waitid(
            rustix::process::WaitId::PidFd(pidfd.as_fd()),
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOHANG,
        );
    }
}

pub(crate) fn check(answer: c_long) -> Result<c_long> {
    if answer >= 0 {
        return Ok(answer);
    }
    let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    Err(Errno::from_raw_os_error(errno))
}

//! Two calls that no crate offers without `unsafe`, which makes this the one file of the crate that has any: closing
//! what was inherited, and the filter.
//!
//! The filter is the last thing that the unpack child takes from itself: every system call that is not for files,
//! memory or its own threads. A short list and a linear program; what is not on the list fails with EPERM, so that a
//! C library which tries something new gets an answer in place of a signal.

#![allow(unsafe_code)]

use std::io;

/// What unpacking calls, seen with strace and read in the sources of the C library and of std.
const ALLOWED: &[libc::c_long] = &[
    // Streams and files.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fcntl,
    libc::SYS_ftruncate,
    libc::SYS_fchdir,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_unlinkat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fsetxattr,
    libc::SYS_lsetxattr,
    libc::SYS_utimensat,
    libc::SYS_umask,
    // Memory.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_getrandom,
    // One more thread, and its end.
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_prctl,
    libc::SYS_futex,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// Closes every descriptor but the three that everyone has. To be called first: whoever opened something before
/// would find it gone.
pub(super) fn close_inherited() -> io::Result<()> {
    // SAFETY: no descriptor above 2 has an owner yet in this process, it was only just started (close_range(2)).
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Installs the filter for this thread and all that it starts.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) fn file_system_only() -> io::Result<()> {
    let mut program = filter();
    let length = u16::try_from(program.len()).map_err(|_| io::Error::other("the filter is too long"))?;
    let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: the program lives until the call returns, which copies it (seccomp(2)); its length is its own.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Other machines do without; all else that confines the child is there.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) fn file_system_only() -> io::Result<()> {
    let _ = ALLOWED;
    Ok(())
}

/// Another architecture's calls and unlisted ones get EPERM. x32 numbers have a high bit set and are on no list.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn filter() -> Vec<libc::sock_filter> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // struct seccomp_data: the number at 0, the architecture at 4.
    let mut program = vec![step(LOAD, 0, 0, 4), step(EQUAL, 1, 0, ARCHITECTURE)];
    let refuse = libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned();
    program.push(step(RETURN, 0, 0, refuse));
    program.push(step(LOAD, 0, 0, 0));
    for call in ALLOWED {
        program.push(step(EQUAL, 0, 1, u32::try_from(*call).unwrap_or(u32::MAX)));
        program.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    }
    program.push(step(RETURN, 0, 0, refuse));
    program
}

//! Loads device programs and attaches them to a v2 cgroup by bpf(2). Knows nothing of devices.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use super::Error;
use super::device::Insn;

const PROG_LOAD: i32 = 5;
const PROG_ATTACH: i32 = 8;
const PROG_DETACH: i32 = 9;
const PROG_GET_FD_BY_ID: i32 = 13;
const PROG_QUERY: i32 = 16;

const TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const ALLOW_MULTI: u32 = 1 << 1;
const REPLACE: u32 = 1 << 2;

#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

#[repr(C)]
#[derive(Default)]
struct Attach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

#[repr(C)]
#[derive(Default)]
struct Query {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    padding: u32,
}

#[repr(C)]
#[derive(Default)]
struct ById {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

const _: () = assert!(size_of::<Load>() == 64 && size_of::<Attach>() == 20 && size_of::<Query>() == 32);

/// Makes `code` the device program of `cgroup`. A program that is there already is replaced in one step, so that no
/// access in between is judged by both or by none.
pub(super) fn attach(cgroup: BorrowedFd, code: &[Insn]) -> Result<(), Error> {
    let program = load(code)?;
    let old = attached(cgroup)?;
    let mut request = Attach {
        target_fd: number(cgroup.as_raw_fd()),
        attach_bpf_fd: number(program.as_raw_fd()),
        attach_type: ATTACH_CGROUP_DEVICE,
        attach_flags: ALLOW_MULTI,
        replace_bpf_fd: 0,
    };
    let (first, rest) = match old.as_slice() {
        [] => (None, &[][..]),
        [first, rest @ ..] => (Some(first), rest),
    };
    if let Some(first) = first {
        request.attach_flags |= REPLACE;
        request.replace_bpf_fd = number(first.as_raw_fd());
    }
    bpf(PROG_ATTACH, &mut request).map_err(|cause| Error::Bpf { step: "attach", cause })?;
    for stale in rest {
        let mut request = Attach {
            target_fd: number(cgroup.as_raw_fd()),
            attach_bpf_fd: number(stale.as_raw_fd()),
            attach_type: ATTACH_CGROUP_DEVICE,
            ..Attach::default()
        };
        bpf(PROG_DETACH, &mut request).map_err(|cause| Error::Bpf { step: "detach", cause })?;
    }
    Ok(())
}

fn load(code: &[Insn]) -> Result<OwnedFd, Error> {
    let mut name = [0; 16];
    name[..12].copy_from_slice(b"crisp_device");
    let mut request = Load {
        prog_type: TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(code.len()).unwrap_or(u32::MAX),
        insns: code.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        prog_name: name,
        ..Load::default()
    };
    let fd = bpf(PROG_LOAD, &mut request).map_err(|cause| Error::Bpf { step: "load", cause })?;
    // SAFETY: BPF_PROG_LOAD returned a new descriptor that nobody else owns; the kernel sets CLOEXEC on it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The device programs of this very cgroup, ancestors' not counted.
pub(super) fn attached(cgroup: BorrowedFd) -> Result<Vec<OwnedFd>, Error> {
    let mut ids = [0u32; 64];
    let mut request = Query {
        target_fd: number(cgroup.as_raw_fd()),
        attach_type: ATTACH_CGROUP_DEVICE,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: 64,
        ..Query::default()
    };
    bpf(PROG_QUERY, &mut request).map_err(|cause| Error::Bpf { step: "query", cause })?;
    let mut programs = Vec::new();
    for &id in ids.iter().take(usize::try_from(request.prog_cnt).unwrap_or(0)) {
        let mut request = ById { id, ..ById::default() };
        match bpf(PROG_GET_FD_BY_ID, &mut request) {
            // SAFETY: BPF_PROG_GET_FD_BY_ID returned a new descriptor that nobody else owns.
            Ok(fd) => programs.push(unsafe { OwnedFd::from_raw_fd(fd) }),
            Err(Errno::NOENT) => {}
            Err(cause) => return Err(Error::Bpf { step: "look up", cause }),
        }
    }
    Ok(programs)
}

fn number(fd: i32) -> u32 {
    fd.cast_unsigned()
}

fn bpf<T>(command: i32, request: &mut T) -> Result<i32, Errno> {
    // SAFETY: `request` is one of the structures above, laid out as the union bpf_attr member for `command`; the size
    // bounds what the kernel touches, and the pointers inside it are to memory that outlives the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(request), size_of::<T>() as libc::c_uint)
    };
    if result < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(i32::try_from(result).unwrap_or(i32::MAX))
}

//! Starts shims from one sealed copy of their program, and tells whether a process is the one that a record names.
//! What is said to a shim is in the parent module.
//!
//! The one file of the daemon with unsafe code: posix_spawn(3) is used in place of fork, because a fork copies the
//! page tables of a daemon with many threads, and no safe wrapper offers the change of directory.

#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString, c_char},
    fs::File,
    io::{self, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, fs::OpenOptionsExt, net::UnixListener},
    },
    path::{Path, PathBuf},
    ptr,
    sync::OnceLock,
};

use rustix::{
    fs::{MemfdFlags, SealFlags},
    process::{Pid, PidfdFlags, Rlimit},
};
use shim_api::rundir::{self, Process};
use tokio::io::unix::AsyncFd;

/// The shim's program, copied once into memory that cannot be changed: an upgrade of the file or a container that
/// reaches `/proc/<pid>/exe` changes nothing (CVE-2019-5736).
pub struct Program {
    copy: OwnedFd,
    pub path: PathBuf,
}

impl Program {
    pub fn load(path: &Path) -> io::Result<Program> {
        let mut from = File::open(path)?;
        // MFD_EXEC: hosts may have vm.memfd_noexec=1, which needs it said.
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let copy = rustix::fs::memfd_create("crisp-shim", flags | MemfdFlags::EXEC)
            .or_else(|_| rustix::fs::memfd_create("crisp-shim", flags))?;
        let mut to = File::from(copy);
        io::copy(&mut from, &mut to)?;
        let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
        rustix::fs::fcntl_add_seals(&to, seals)?;
        // The kernel executes nothing that somebody holds open for writing.
        let copy = File::open(format!("/proc/self/fd/{}", to.as_raw_fd()))?;
        Ok(Program { copy: copy.into(), path: path.into() })
    }

    /// A path under which this process and its children execute the copy.
    pub fn executable(&self) -> String {
        format!("/proc/self/fd/{}", self.copy.as_raw_fd())
    }
}

/// How many descriptors a shim may have: as many as the daemon might before it raised its own limit.
static DESCRIPTORS: OnceLock<Rlimit> = OnceLock::new();

/// Sets the limit of descriptors for all shims, once.
pub fn descriptors(limit: Rlimit) {
    let _ = DESCRIPTORS.set(limit);
}

/// A process that was started, and a descriptor that stays its own when the pid is used again.
pub struct Started {
    pub process: Process,
    pub pidfd: OwnedFd,
}

/// Starts the shim of a pod in the pod's run directory: a session of its own, the listening socket as fd 3, stderr
/// to the shim's log. Everything else of ours is closed by CLOEXEC.
pub fn spawn(program: &Program, dir: &Path, pod: &str, listener: UnixListener) -> io::Result<Started> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let log = File::options().create(true).append(true).mode(0o600).open(dir.join(rundir::LOG))?;
    let path = CString::new(program.executable())?;
    let dir = CString::new(dir.as_os_str().as_bytes())?;
    let args = ["containerd-shim-crisp-v1", "-namespace", "k8s.io", "-id", pod, "serve"]
        .into_iter()
        .map(CString::new)
        .collect::<Result<Vec<_>, _>>()?;
    // Log level and a TTRPC_ADDRESS of somebody else's have no business in our shim.
    let env = [CString::from(c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")];

    let fds = [
        (null.as_raw_fd(), 0),
        (null.as_raw_fd(), 1),
        (log.as_raw_fd(), 2),
        (listener.as_raw_fd(), rundir::LISTEN_FD),
    ];
    let pid = posix_spawn(&path, &dir, &args, &env, &fds)?;
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other("posix_spawn gave no pid"))?;
    // Our own child cannot be reaped by another: the pid is still its own.
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    if let Some(limit) = DESCRIPTORS.get() {
        // Before it is asked to start anything: containers inherit what the shim has.
        rustix::process::prlimit(Some(pid), rustix::process::Resource::Nofile, *limit)?;
    }
    let process = identify(pid.as_raw_nonzero().get().cast_unsigned())?;
    Ok(Started { process, pidfd })
}

fn posix_spawn(
    path: &CStr,
    dir: &CStr,
    args: &[CString],
    env: &[CString],
    fds: &[(RawFd, RawFd)],
) -> io::Result<libc::pid_t> {
    fn ok(code: libc::c_int) -> io::Result<()> {
        if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
    }
    let pointers = |list: &[CString]| -> Vec<*mut c_char> {
        list.iter().map(|text| text.as_ptr().cast_mut()).chain([ptr::null_mut()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    let mut actions = MaybeUninit::uninit();
    let mut attributes = MaybeUninit::uninit();
    let mut signals = MaybeUninit::uninit();
    let mut pid = 0;
    // SAFETY: every object is initialised by its init call before it is used and destroyed once; the strings and
    // arrays outlive the call; posix_spawn copies what it needs before it returns.
    unsafe {
        ok(libc::posix_spawn_file_actions_init(actions.as_mut_ptr()))?;
        let actions = actions.as_mut_ptr();
        let result = (|| {
            ok(libc::posix_spawnattr_init(attributes.as_mut_ptr()))?;
            let attributes = attributes.as_mut_ptr();
            let result = (|| {
                for (from, to) in fds {
                    ok(libc::posix_spawn_file_actions_adddup2(actions, *from, *to))?;
                }
                ok(libc::posix_spawn_file_actions_addchdir_np(actions, dir.as_ptr()))?;
                let signal_flags =
                    (libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF) as libc::c_short;
                ok(libc::posix_spawnattr_setflags(attributes, signal_flags | libc::POSIX_SPAWN_SETSID))?;
                libc::sigemptyset(signals.as_mut_ptr());
                ok(libc::posix_spawnattr_setsigmask(attributes, signals.as_ptr()))?;
                libc::sigfillset(signals.as_mut_ptr());
                ok(libc::posix_spawnattr_setsigdefault(attributes, signals.as_ptr()))?;
                ok(libc::posix_spawn(
                    &raw mut pid,
                    path.as_ptr(),
                    actions,
                    attributes,
                    args.as_ptr(),
                    env.as_ptr(),
                ))
            })();
            libc::posix_spawnattr_destroy(attributes);
            result
        })();
        libc::posix_spawn_file_actions_destroy(actions);
        result?;
    }
    Ok(pid)
}

/// The identity of a process that lives now.
pub fn identify(pid: u32) -> io::Result<Process> {
    Ok(Process { pid, start_ticks: start_ticks(pid)?, boot_id: boot_id()? })
}

/// A descriptor of the process that a record names, if it lives still.
pub fn find(process: &Process) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    if process.boot_id != boot_id()? {
        return Ok(None);
    }
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    // Compared after the descriptor was opened: what it names cannot change any more.
    match start_ticks(process.pid) {
        Ok(ticks) if ticks == process.start_ticks && !dead(&pidfd)? => Ok(Some(pidfd)),
        Ok(_) => Ok(None),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether the process has ended, also when nobody has reaped it yet.
pub fn dead(pidfd: impl AsFd) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    Ok(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? > 0)
}

/// Field 22 of proc(5) stat; the second field, in parentheses, may hold anything.
fn start_ticks(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat"))?;
    ticks_of(&stat)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat is odd")))
}

fn ticks_of(stat: &[u8]) -> Option<u64> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    std::str::from_utf8(stat.get(end + 1..)?).ok()?.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The state letter of a process: `D` cannot be killed.
pub fn letter(pid: u32) -> Option<char> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    stat.get(end + 2).map(|byte| char::from(*byte))
}

/// Changes with every boot of the machine.
pub fn boot_id() -> io::Result<String> {
    static ONCE: OnceLock<String> = OnceLock::new();
    if let Some(id) = ONCE.get() {
        return Ok(id.clone());
    }
    let mut id = String::new();
    File::open("/proc/sys/kernel/random/boot_id")?.read_to_string(&mut id)?;
    Ok(ONCE.get_or_init(|| id.trim().into()).clone())
}

/// A pidfd on which can be waited without a thread.
pub fn watched(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open for as long as it lives and is the same descriptor all the time.
    unsafe { AsyncFd::register(pidfd) }.map_err(io::Error::from)
}

/// Reaps a child of ours by its descriptor. A shim that an earlier daemon started is init's to reap.
pub fn reap(pidfd: impl AsFd) {
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21";
        for name in ["sh", "a) S 1 2", ")", "x y z"] {
            assert_eq!(ticks_of(format!("42 ({name}) {tail}\n").as_bytes()), Some(4711), "{name}");
        }
        assert_eq!(ticks_of(b"42 (sh"), None);
        assert_eq!(ticks_of(b"42 (sh) S 1"), None);
    }

    #[test]
    fn a_process_is_found_by_pid_start_time_and_boot_together() {
        let me = identify(std::process::id()).unwrap();
        assert!(find(&me).unwrap().is_some());
        assert!(find(&Process { start_ticks: me.start_ticks + 1, ..me.clone() }).unwrap().is_none());
        assert!(find(&Process { boot_id: "other".into(), ..me.clone() }).unwrap().is_none());
        assert!(find(&Process { pid: 0, ..me }).unwrap().is_none());
    }

    #[test]
    fn the_copy_of_the_program_cannot_be_changed() {
        let program = Program::load(Path::new("/bin/true")).unwrap();
        let mut file = File::options().write(true).open(program.executable()).unwrap();
        assert!(file.write(b"x").is_err());
        drop(file);
        assert!(std::process::Command::new(program.executable()).status().unwrap().success());
    }

    #[test]
    fn a_child_starts_in_its_directory_with_its_four_descriptors_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("show");
        let out = dir.path().join("out");
        std::fs::write(&script, "pwd; ls -l /proc/self/fd").unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let shell = CString::new("/bin/sh").unwrap();
        let cwd = CString::new(dir.path().as_os_str().as_bytes()).unwrap();
        let log = File::create(&out).unwrap();
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let args = ["sh", "show"].map(|text| CString::new(text).unwrap());
        let fds =
            [(null.as_raw_fd(), 0), (log.as_raw_fd(), 1), (log.as_raw_fd(), 2), (listener.as_raw_fd(), 3)];
        let pid = posix_spawn(&shell, &cwd, &args, &[], &fds).unwrap();
        rustix::process::waitpid(Pid::from_raw(pid), rustix::process::WaitOptions::empty()).unwrap();
        let shown = std::fs::read_to_string(&out).unwrap();
        let real = dir.path().canonicalize().unwrap();
        assert!(shown.starts_with(real.to_str().unwrap()), "{shown}");
        assert!(shown.contains("3 -> socket:"), "{shown}");
        assert_eq!(shown.matches(" -> socket:").count(), 1, "{shown}");
    }
}

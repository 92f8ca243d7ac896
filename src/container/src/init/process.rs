//! What the specification says about a process, checked and in the kernel's terms; the steps that put it in
//! force. The same for the first process and for every exec.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode, OFlags, ResolveFlags, Uid, openat2};
use rustix::io::Errno;

use super::channel::{Channel, Report};
use super::label::Label;
use super::rlimit::Limit;
use super::schedule::Scheduling;
use super::{home, program, terminal, user};
use crate::capability::{self, Sets};
use crate::error::{At, Error, Failure, Step};
use crate::kernel;
use crate::rootfs::Built;
use crate::seccomp::Program;
use crate::spec;

/// Standard streams.
#[derive(Debug)]
pub(crate) enum Streams {
    Fds([OwnedFd; 3]),
    Terminal { width: u16, height: u16 },
}

#[derive(Debug)]
pub(crate) struct Process {
    args: Vec<CString>,
    env: Vec<CString>,
    cwd: PathBuf,
    pub(super) uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
    umask: Mode,
    capabilities: Sets,
    pub(super) no_new_privileges: bool,
    limits: Vec<Limit>,
    scheduling: Scheduling,
    pub(super) label: Option<Label>,
    pub(super) seccomp: Option<Program>,
    streams: Streams,
}

/// A process that only has to exec.
pub(super) struct Ready {
    pub(super) home: Option<CString>,
    /// What is in force after the exec, when something more was kept for the seccomp filter.
    pub(super) capabilities: Sets,
}

/// The kernel's own bound on one argument (execve(2)) and ours on all of them, so that nothing absurd is copied
/// into a child.
const ARGUMENT: usize = 128 << 10;
const ARGUMENTS: usize = 6 << 20;

impl Process {
    /// Checks everything that the kernel would refuse later, or that would mean something else to it. Warnings say what
    /// was left out.
    pub(crate) fn new(
        process: &spec::Process,
        personality: Option<&spec::Personality>,
        seccomp: Option<Program>,
        streams: Streams,
        warnings: &mut Vec<String>,
    ) -> Result<Process, Error> {
        let args: Vec<CString> =
            process.args.iter().map(|arg| text(arg.as_bytes(), "argument")).collect::<Result<_, _>>()?;
        if args.first().is_none_or(|program| program.is_empty()) {
            return Err(Error::Invalid("process.args is empty".into()));
        }
        let env: Vec<CString> =
            process.environment().map(|entry| text(entry, "environment entry")).collect::<Result<_, _>>()?;
        if env.iter().any(|entry| !entry.to_bytes().iter().skip(1).any(|byte| *byte == b'=')) {
            return Err(Error::Invalid("an environment entry is not of the form NAME=value".into()));
        }
        if args.iter().chain(&env).map(|text| text.count_bytes() + 1).sum::<usize>() > ARGUMENTS {
            return Err(Error::Invalid(format!("arguments and environment exceed {ARGUMENTS} bytes")));
        }
        if !process.cwd.starts_with('/') || process.cwd.contains('\0') || process.cwd.len() >= 4096 {
            return Err(Error::Invalid("process.cwd is not an absolute path".into()));
        }
        let (capabilities, unknown) = match &process.capabilities {
            Some(wanted) => Sets::new(wanted, capability::last()),
            None => (Sets::default(), Vec::new()),
        };
        warnings.extend(unknown.iter().map(|name| format!("this kernel has no {name}")));
        // CVE-2022-36109: without the primary group among them, a rule that denies the group can be dodged.
        let gid = Gid::from_raw(process.user.gid);
        let mut groups = vec![gid];
        for &group in &process.user.additional_gids {
            if !groups.contains(&Gid::from_raw(group)) {
                groups.push(Gid::from_raw(group));
            }
        }
        // -1 means "leave as it is" to setresuid(2).
        if groups.iter().any(|group| group.as_raw() == u32::MAX) || process.user.uid == u32::MAX {
            return Err(Error::Invalid("4294967295 is no id".into()));
        }
        Ok(Process {
            args,
            env,
            cwd: process.cwd.clone().into(),
            uid: Uid::from_raw(process.user.uid),
            gid,
            groups,
            umask: Mode::from_raw_mode(process.user.umask.unwrap_or(0o022) & 0o777),
            capabilities,
            no_new_privileges: process.no_new_privileges,
            limits: Limit::all(&process.rlimits)?,
            scheduling: Scheduling::new(process, personality)?,
            label: Label::new(process)?,
            seccomp,
            streams,
        })
    }

    pub(super) fn descriptors(&self, keep: &mut Vec<RawFd>) {
        if let Streams::Fds(fds) = &self.streams {
            keep.extend(fds.iter().map(AsRawFd::as_raw_fd));
        }
    }

    /// `args[0]`, for messages.
    pub(super) fn name(&self) -> String {
        self.args.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    pub(super) fn set_limits(&self, channel: &Channel) -> Result<(), Failure> {
        for limit in &self.limits {
            if let Some(warning) = limit.set()? {
                let _ = channel.send(&Report::Warning(warning));
            }
        }
        Ok(())
    }

    pub(super) fn set_scheduling(&self) -> Result<(), Failure> {
        self.scheduling.set()
    }

    pub(super) fn set_affinity(&self) -> Result<(), Failure> {
        self.scheduling.set_affinity()
    }

    /// A session of its own, and a session keyring that is not the parent's, whose keys would be ours to read.
    pub(super) fn new_session(&self) -> Result<(), Failure> {
        rustix::process::setsid().at(Step::Session, "container process")?;
        match kernel::new_keyring() {
            // A kernel without keyrings has none to share.
            Err(Errno::NOSYS) => Ok(()),
            other => other.at(Step::Session, "keyring of container process"),
        }
    }

    /// The pty of the container's own devpts, also mounted at `/dev/console`.
    pub(super) fn open_console(&self, channel: &Channel, built: &Built) -> Result<Option<OwnedFd>, Failure> {
        let Streams::Terminal { width, height } = self.streams else { return Ok(None) };
        let devpts = built.devpts.as_ref().ok_or(Errno::NODEV).at(Step::Terminal, "without a devpts")?;
        let pty = terminal::open(devpts.as_fd(), width, height, self.uid)?;
        terminal::mount_console(&built.root, pty.slave.as_fd())?;
        let _ = channel.send(&Report::Terminal(pty.master));
        Ok(Some(pty.slave))
    }

    /// The pty of an exec.
    pub(super) fn open_terminal(&self, channel: &Channel) -> Result<Option<OwnedFd>, Failure> {
        let Streams::Terminal { width, height } = self.streams else { return Ok(None) };
        let devpts = terminal::find_devpts()?;
        let pty = terminal::open(devpts.as_fd(), width, height, self.uid)?;
        let _ = channel.send(&Report::Terminal(pty.master));
        Ok(Some(pty.slave))
    }

    pub(super) fn set_streams(&self, console: Option<OwnedFd>) -> Result<(), Failure> {
        let fds = match (&self.streams, &console) {
            (Streams::Fds([stdin, stdout, stderr]), _) => [stdin, stdout, stderr],
            (Streams::Terminal { .. }, Some(slave)) => {
                rustix::process::ioctl_tiocsctty(slave).at(Step::Terminal, "/dev/console")?;
                [slave, slave, slave]
            }
            (Streams::Terminal { .. }, None) => return Err(Errno::NOTTY).at(Step::Terminal, "/dev/console"),
        };
        let [stdin, stdout, stderr] = fds;
        rustix::stdio::dup2_stdin(stdin).at(Step::Stdio, "stdin")?;
        rustix::stdio::dup2_stdout(stdout).at(Step::Stdio, "stdout")?;
        rustix::stdio::dup2_stderr(stderr).at(Step::Stdio, "stderr")
    }

    /// `HOME=…` when the environment has none.
    pub(super) fn find_home(&self) -> Option<CString> {
        let given = self.env.iter().any(|entry| entry.to_bytes().starts_with(b"HOME="));
        if given { None } else { Some(home::find(self.uid.as_raw())) }
    }

    /// Enters the working directory and looks where that is: a directory outside of the root has no path
    /// (CVE-2024-21626).
    pub(super) fn enter_cwd(&self) -> Result<(), Failure> {
        let enter = || {
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = kernel::open_path(Path::new("/"))?;
            let path = self.cwd.strip_prefix("/").ok().filter(|path| !path.as_os_str().is_empty());
            let directory = openat2(root, path.unwrap_or(Path::new(".")), flags, Mode::empty(), resolve)?;
            rustix::process::fchdir(directory)?;
            match rustix::process::getcwd(Vec::new())?.to_bytes().first() {
                Some(b'/') => Ok(()),
                _ => Err(Errno::NOENT),
            }
        };
        enter().at(Step::Cwd, self.cwd.display())
    }

    /// Groups, user, capabilities. Returns the sets for after the filter.
    pub(super) fn become_user(&self, channel: &Channel) -> Result<Sets, Failure> {
        let object = "container process";
        let mut sets = self.capabilities;
        let ours = capability::permitted().at(Step::Capabilities, object)?;
        if sets.permitted & !ours != 0 {
            let text = format!("capabilities {:#x} are not ours to give", sets.permitted & !ours);
            let _ = channel.send(&Report::Warning(text));
            sets.permitted &= ours;
            sets.effective &= ours;
            sets.inheritable &= ours;
            sets.ambient &= ours;
        }
        capability::limit_bounding(sets.bounding, capability::last()).at(Step::Capabilities, object)?;
        capability::keep_over_setuid().at(Step::Capabilities, object)?;
        rustix::process::umask(self.umask);
        user::become_user(self.uid, self.gid, &self.groups)?;
        let mut now = sets;
        if self.keeps_admin() {
            now.permitted |= capability::SYS_ADMIN & ours;
            now.effective |= capability::SYS_ADMIN & ours;
        }
        capability::apply(&now).at(Step::Capabilities, object)?;
        capability::raise_ambient(sets.ambient).at(Step::Capabilities, object)?;
        // A change of user resets it to what fs.suid_dumpable says.
        kernel::prctl(libc::PR_SET_DUMPABLE, 0, 0).at(Step::User, self.uid.as_raw())?;
        Ok(sets)
    }

    /// A filter without no_new_privs takes CAP_SYS_ADMIN (seccomp(2)), which is then given up after it.
    pub(super) fn keeps_admin(&self) -> bool {
        let has = self.capabilities.effective & capability::SYS_ADMIN != 0;
        self.seccomp.is_some() && !self.no_new_privileges && !has
    }

    pub(super) fn find_program(&self) -> Result<CString, Failure> {
        let name = self.args.first().map(|name| name.as_bytes()).unwrap_or_default();
        let path = self.env.iter().rev().find_map(|entry| entry.to_bytes().strip_prefix(b"PATH="));
        program::find(name, path).at(Step::Exec, self.name())
    }

    pub(super) fn execute(&self, program: &CStr, home: Option<CString>) -> Errno {
        let mut args: Vec<_> = self.args.iter().map(|arg| arg.as_ptr()).collect();
        args.push(std::ptr::null());
        let mut env: Vec<_> = self.env.iter().chain(&home).map(|entry| entry.as_ptr()).collect();
        env.push(std::ptr::null());
        kernel::execve(program, &args, &env)
    }
}

fn text(bytes: &[u8], what: &str) -> Result<CString, Error> {
    if bytes.len() >= ARGUMENT {
        return Err(Error::Invalid(format!("{what} of {} bytes", bytes.len())));
    }
    CString::new(bytes).map_err(|_| Error::Invalid(format!("{what} contains a zero byte")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut spec::Process)) -> Result<Process, Error> {
        let mut process =
            spec::Process { args: vec!["true".into()], cwd: "/".into(), ..spec::Process::default() };
        change(&mut process);
        let streams = Streams::Terminal { width: 0, height: 0 };
        Process::new(&process, None, None, streams, &mut Vec::new())
    }

    #[test]
    fn s18_what_no_kernel_takes_is_refused_before_the_clone() {
        assert!(check(|_| {}).is_ok());
        type Change = fn(&mut spec::Process);
        let refused: [(&str, Change); 10] = [
            ("no arguments", |process| process.args.clear()),
            ("an empty program", |process| process.args = vec![String::new()]),
            ("a zero byte", |process| process.args.push("a\0b".into())),
            ("a cwd of 1 MiB", |process| process.cwd = "/x".repeat(1 << 19)),
            ("a relative cwd", |process| process.cwd = "x".into()),
            ("an environment of 10 MiB", |process| {
                process.env = vec![format!("A={}", "x".repeat(100 << 10)); 103]
            }),
            ("an argument of 1 MiB", |process| process.args.push("x".repeat(1 << 20))),
            ("an entry without a name", |process| process.env.push("=x".into())),
            ("an entry without a value", |process| process.env.push("x".into())),
            ("the id that means no change", |process| process.user.uid = u32::MAX),
        ];
        for (what, change) in refused {
            assert!(matches!(check(change), Err(Error::Invalid(_))), "{what}");
        }
    }

    #[test]
    fn s13_the_primary_group_is_among_the_supplementary_ones() {
        let process = check(|process| {
            process.user.gid = 7;
            process.user.additional_gids = vec![8, 7, 8];
        });
        assert_eq!(process.unwrap().groups, [Gid::from_raw(7), Gid::from_raw(8)]);
    }
}

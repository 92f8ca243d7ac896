//! What can go wrong, by step. The child reports its failures as `Failure`s; here they become [`Error`]s.

use std::fmt;

pub use rustix::io::Errno;

use crate::{cgroup, seccomp};

/// Why a container, an exec or a namespace could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The specification asks for something that no kernel could give; nothing was begun.
    #[error("invalid specification: {0}")]
    Invalid(String),
    /// One step failed, on our side of the clone or in the child.
    #[error("{step} {object}: {}", describe(*.errno))]
    Failed {
        /// What was being done.
        step: Step,
        /// To what.
        object: String,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The program of the container cannot be executed.
    #[error("exec {program:?}: {}", describe(*.errno))]
    Exec {
        /// `args[0]`, as given.
        program: String,
        /// The kind of failure.
        reason: Reason,
        /// The kernel's answer.
        errno: Errno,
    },
    /// A hook ended with something other than success.
    #[error("{kind} hook {path}: {why}")]
    Hook {
        /// Which list of the specification it stands in.
        kind: &'static str,
        /// The program.
        path: String,
        /// What happened.
        why: String,
    },
    /// The same, of a hook that runs in the container; the text says all three.
    #[error("{0}")]
    HookInside(String),
    /// The child did not come this far in time; it was killed.
    #[error("container did not become {waiting_for} in time")]
    Deadline {
        /// `ready` or `started`.
        waiting_for: &'static str,
    },
    /// The child ended without a word: killed from outside, most often by the OOM killer.
    #[error("container process was killed before it was {waiting_for}")]
    Died {
        /// `ready` or `started`.
        waiting_for: &'static str,
    },
    /// The cgroup could not be had.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// The seccomp profile cannot be compiled.
    #[error(transparent)]
    Seccomp(#[from] seccomp::Error),
}

/// Why an exec failed, for callers that answer differently to each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Neither at the path nor in `PATH`, or its interpreter is missing.
    NotFound,
    /// Not executable for the user, or on a file system mounted `noexec`.
    Permission,
    /// Not a format this kernel runs.
    Format,
    /// Anything else.
    Other,
}

impl Error {
    /// True when asking again with the same specification can never succeed, whatever the host's state.
    pub fn is_invalid(&self) -> bool {
        matches!(self, Error::Invalid(_) | Error::Seccomp(_))
    }
}

impl From<Errno> for Reason {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT | Errno::NOTDIR => Reason::NotFound,
            Errno::ACCESS | Errno::PERM | Errno::ISDIR => Reason::Permission,
            Errno::NOEXEC => Reason::Format,
            _ => Reason::Other,
        }
    }
}

macro_rules! steps {
    ($($name:ident $text:literal,)*) => {
        /// One act on the way to a running process, in no particular order.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        #[allow(missing_docs)]
        pub enum Step { $($name,)* }

        impl Step {
            const ALL: &'static [Step] = &[$(Step::$name,)*];
        }

        impl fmt::Display for Step {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Step::$name => $text,)* })
            }
        }
    };
}

steps! {
    Channel "open channel to",
    Clone "clone",
    Cgroup "enter cgroup",
    Wait "wait for",
    Descriptors "close inherited descriptors of",
    Namespace "enter namespace",
    IdMap "map ids of",
    Source "open mount source",
    Rootfs "mount rootfs",
    MountPoint "make mount point",
    Mount "mount",
    MountAttributes "set mount attributes of",
    IdMapMount "id-map mount",
    Device "make device",
    Mask "mask",
    ReadOnly "make read-only",
    Pivot "pivot into",
    Sysctl "set sysctl",
    Hostname "set host name",
    Loopback "bring up interface",
    Session "begin session of",
    Terminal "open terminal",
    Stdio "set up standard stream",
    Cwd "change directory to",
    Rlimit "set limit",
    OomScore "set OOM score adjustment",
    Scheduler "set scheduling of",
    Personality "set personality",
    Label "set security label",
    User "become user",
    Groups "set groups",
    Capabilities "set capabilities",
    NoNewPrivileges "set no_new_privs of",
    Seccomp "install seccomp filter of",
    Exec "exec",
    Hook "run hook",
    Procfs "open private procfs for",
}

/// A step that failed in the child, before it is told to the parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) step: Step,
    pub(crate) errno: Errno,
    pub(crate) object: String,
}

/// Longest object that is reported; the rest of it is cut.
const OBJECT: usize = 2048;

impl Failure {
    /// The failure as bytes of one packet.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.step as u8];
        bytes.extend(self.errno.raw_os_error().to_le_bytes());
        bytes.extend(self.object.bytes().take(OBJECT));
        bytes
    }

    /// None when the bytes are not those of a failure.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Failure> {
        let (step, rest) = bytes.split_first()?;
        let (errno, object) = rest.split_first_chunk::<4>()?;
        Some(Failure {
            step: *Step::ALL.get(usize::from(*step))?,
            errno: Errno::from_raw_os_error(i32::from_le_bytes(*errno)),
            object: String::from_utf8_lossy(object).into_owned(),
        })
    }
}

impl From<Failure> for Error {
    fn from(Failure { step, errno, object }: Failure) -> Self {
        match step {
            Step::Exec => Error::Exec { program: object, reason: errno.into(), errno },
            _ => Error::Failed { step, object, errno },
        }
    }
}

/// Names the step and the object of a kernel's answer.
pub(crate) trait At<T> {
    fn at(self, step: Step, object: impl fmt::Display) -> Result<T, Failure>;
}

impl<T> At<T> for Result<T, Errno> {
    fn at(self, step: Step, object: impl fmt::Display) -> Result<T, Failure> {
        self.map_err(|errno| Failure { step, errno, object: object.to_string() })
    }
}

/// `no such file or directory`, as the rest of a sentence.
pub(crate) fn describe(errno: Errno) -> String {
    let text = nix::errno::Errno::from_raw(errno.raw_os_error()).desc();
    let mut chars = text.chars();
    match (chars.next(), chars.clone().next()) {
        // `RFS specific error` and its kind keep their capitals.
        (Some(first), Some(second)) if !second.is_uppercase() => first.to_lowercase().chain(chars).collect(),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_survives_the_way_home() {
        for &step in Step::ALL {
            let failure = Failure { step, errno: Errno::LOOP, object: "/proc".into() };
            assert_eq!(Failure::decode(&failure.encode()), Some(failure));
        }
    }

    #[test]
    fn bytes_that_are_no_failure_are_told_apart() {
        for bytes in [b"".as_slice(), b"\x00", b"\x00\x01\x02\x03", b"\xff\x01\x00\x00\x00x"] {
            assert_eq!(Failure::decode(bytes), None);
        }
    }

    #[test]
    fn errors_read_as_sentences() {
        let failure = Failure { step: Step::Mount, errno: Errno::INVAL, object: "tmpfs on /dev".into() };
        assert_eq!(Error::from(failure).to_string(), "mount tmpfs on /dev: invalid argument");
        let failure = Failure { step: Step::Exec, errno: Errno::NOENT, object: "/nope".into() };
        assert_eq!(Error::from(failure).to_string(), "exec \"/nope\": no such file or directory");
    }
}

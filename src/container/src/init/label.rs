//! The security label that the exec takes on: AppArmor's or SELinux's. Written to the attributes of this thread,
//! found through a procfs of our own, so that no mount can lead the label into an ordinary file and leave the
//! container unconfined (CVE-2019-16884, CVE-2025-52881).

use std::os::fd::BorrowedFd;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use crate::error::{At, Error, Failure, Step};
use crate::spec;

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Label {
    /// Tried in turn; the first is where a kernel with several security modules keeps it.
    files: &'static [&'static str],
    value: String,
}

impl Label {
    pub(crate) fn new(process: &spec::Process) -> Result<Option<Label>, Error> {
        let label = match (process.apparmor_profile.as_str(), process.selinux_label.as_str()) {
            ("", "") => return Ok(None),
            (profile, "") => Label {
                files: &["thread-self/attr/apparmor/exec", "thread-self/attr/exec"],
                value: format!("exec {profile}"),
            },
            ("", label) => Label { files: &["thread-self/attr/exec"], value: label.to_owned() },
            _ => return Err(Error::Invalid("both an AppArmor profile and a SELinux label".into())),
        };
        if label.value.contains(['\0', '\n']) {
            return Err(Error::Invalid(format!("security label {:?} is not one line", label.value)));
        }
        Ok(Some(label))
    }

    pub(crate) fn set(&self, procfs: BorrowedFd<'_>) -> Result<(), Failure> {
        let mut answer = Errno::NOENT;
        for file in self.files {
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
            let written = openat2(procfs, *file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty(), resolve)
                .and_then(|file| rustix::io::write(&file, self.value.as_bytes()));
            match written {
                Ok(_) => return Ok(()),
                Err(Errno::NOENT) => {}
                Err(errno) => {
                    answer = errno;
                    break;
                }
            }
        }
        Err(answer).at(Step::Label, &self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_one_line_of_one_module() {
        let process = |profile: &str, label: &str| spec::Process {
            apparmor_profile: profile.into(),
            selinux_label: label.into(),
            ..spec::Process::default()
        };
        assert_eq!(Label::new(&process("", "")).unwrap(), None);
        assert_eq!(Label::new(&process("p", "")).unwrap().unwrap().value, "exec p");
        assert_eq!(Label::new(&process("", "u:r:t:s0")).unwrap().unwrap().value, "u:r:t:s0");
        assert!(Label::new(&process("p", "l")).is_err());
        assert!(Label::new(&process("p\nchangehat x", "")).is_err());
    }
}

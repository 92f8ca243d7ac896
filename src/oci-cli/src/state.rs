//! What is remembered of a container between two calls: one directory each, with the record and the specification it
//! was made from. Status is never remembered but read from the kernel.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use container::Spec;
use container::cgroup::{Cgroup, Host};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

/// Of a container, as in the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Creating,
    Created,
    Running,
    Stopped,
}

impl Status {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Stopped => "stopped",
        }
    }
}

/// The record of a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) pid: u32,
    /// With the pid it names one process for good: see proc_pid_stat(5), starttime.
    pub(crate) begun: u64,
    pub(crate) created: String,
    pub(crate) started: bool,
}

impl Record {
    pub(crate) fn status(&self) -> Status {
        match begun(self.pid) {
            Some(begun) if begun == self.begun && self.started => Status::Running,
            Some(begun) if begun == self.begun => Status::Created,
            _ => Status::Stopped,
        }
    }

    /// The first process, when it is still that one.
    pub(crate) fn process(&self) -> Result<OwnedFd> {
        let pid = Pid::from_raw(self.pid.cast_signed()).context("no process")?;
        let fd =
            pidfd_open(pid, PidfdFlags::empty()).with_context(|| format!("open process {}", self.pid))?;
        // The number cannot pass to another process from here on, so this says whose it is.
        if begun(self.pid) != Some(self.begun) {
            bail!("container {} is not running", self.id);
        }
        Ok(fd)
    }
}

/// The directory of one container.
#[derive(Debug)]
pub(crate) struct Home {
    pub(crate) id: String,
    pub(crate) path: PathBuf,
}

impl Home {
    /// Checks the id and makes the directory, which is what reserves it.
    pub(crate) fn make(root: &Path, id: &str) -> Result<Home> {
        let home = Home::named(root, id)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(root).context("make the state directory")?;
        match fs::DirBuilder::new().mode(0o700).create(&home.path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => bail!("container {id} exists already"),
            other => other.with_context(|| format!("make {}", home.path.display()))?,
        }
        Ok(home)
    }

    /// The directory of a container that is there.
    pub(crate) fn open(root: &Path, id: &str) -> Result<Home> {
        let home = Home::named(root, id)?;
        if !home.path.is_dir() {
            bail!("container {id} does not exist");
        }
        Ok(home)
    }

    fn named(root: &Path, id: &str) -> Result<Home> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '+');
        if id.is_empty() || id.len() > 255 || !id.chars().all(plain) || id.starts_with('.') {
            bail!("{id:?} is not a container id");
        }
        Ok(Home { id: id.to_owned(), path: root.join(id) })
    }

    /// None while it is being created.
    pub(crate) fn record(&self) -> Result<Option<Record>> {
        match fs::read(self.path.join("state.json")) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text).context("read the record")?)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read the record of container {}", self.id)),
        }
    }

    pub(crate) fn created(&self) -> Result<Record> {
        self.record()?.with_context(|| format!("container {} is still being created", self.id))
    }

    pub(crate) fn write(&self, record: &Record) -> Result<()> {
        replace(&self.path.join("state.json"), &serde_json::to_vec(record)?).context("write the record")
    }

    /// Keeps the specification: the bundle may change.
    pub(crate) fn keep_spec(&self, text: &[u8]) -> Result<()> {
        replace(&self.path.join("config.json"), text).context("keep the specification")
    }

    pub(crate) fn spec(&self) -> Result<Spec> {
        let text = fs::read(self.path.join("config.json")).context("read the specification")?;
        Spec::from_json(&text).context("read the specification")
    }

    pub(crate) fn cgroup(&self, spec: &Spec) -> Result<Cgroup> {
        let path = match spec.linux.cgroups_path.as_str() {
            "" => &self.id,
            path => path,
        };
        Ok(Cgroup::open(&Host::detect()?, path)?)
    }

    pub(crate) fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }

    /// A short name for a file here, since the address of a unix socket holds no more than 107 bytes. Good while the
    /// descriptor is open.
    pub(crate) fn short(&self, file: &str) -> Result<(OwnedFd, PathBuf)> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir =
            rustix::fs::openat(CWD, &self.path, flags, Mode::empty()).context("open the state directory")?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{file}", dir.as_raw_fd()));
        Ok((dir, path))
    }
}

/// Writes a file such that a reader sees the old content or the new.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let mut name = path.file_name().context("a path without a name")?.to_owned();
    name.push(format!(".{}", std::process::id()));
    let new = path.with_file_name(name);
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&new)?;
    file.write_all(content)?;
    Ok(fs::rename(&new, path)?)
}

/// When a process began, in ticks since boot. None when there is none, or only its exit status is left.
pub(crate) fn begun(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may contain some itself.
    let (_, rest) = text.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    if matches!(fields.next()?, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The time in RFC 3339, UTC.
pub(crate) fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (seconds, nanoseconds) = (since.as_secs(), since.subsec_nanos());
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (year, month, day) = date(seconds / 86400);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanoseconds:09}Z")
}

/// The civil date of a day counted from 1970, in the Gregorian calendar, reckoned from 1 March 0000 so that leap days
/// fall at the end of a year.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days() {
        assert_eq!(date(0), (1970, 1, 1));
        assert_eq!(date(11_016), (2000, 2, 29));
        assert_eq!(date(11_017), (2000, 3, 1));
        assert_eq!(date(20_780), (2026, 11, 23));
    }

    #[test]
    fn ids_are_names_of_directories_here() {
        for bad in ["", ".", "..", "a/b", "../x", "a b", ".hidden"] {
            assert!(Home::named(Path::new("/r"), bad).is_err(), "{bad:?}");
        }
        assert_eq!(Home::named(Path::new("/r"), "a.b_c-1").unwrap().path, Path::new("/r/a.b_c-1"));
    }

    #[test]
    fn a_process_is_known_by_its_beginning() {
        let begun = begun(std::process::id()).unwrap();
        let mut record = Record {
            id: "x".into(),
            bundle: "/".into(),
            pid: std::process::id(),
            begun,
            created: now(),
            started: true,
        };
        assert_eq!(record.status(), Status::Running);
        record.begun += 1;
        assert_eq!(record.status(), Status::Stopped);
        assert!(record.process().is_err());
    }

    #[test]
    fn an_id_is_taken_once() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::make(root.path(), "one").unwrap();
        assert!(Home::make(root.path(), "one").is_err());
        assert!(home.record().unwrap().is_none());
        home.remove().unwrap();
        home.remove().unwrap();
        assert!(Home::open(root.path(), "one").is_err());
    }
}

//! What to write where: the common language of the v1 and v2 decisions, which are pure, and the one place that acts on them.

use std::borrow::Cow;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use super::{Cgroup, Error, dir};

/// One value for one file of a controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Write {
    pub(super) controller: Cow<'static, str>,
    pub(super) file: Cow<'static, str>,
    pub(super) value: String,
    /// Set for files with a line for each device: what starts our line, and what stands for no line at all.
    pub(super) line: Option<(String, Cow<'static, str>)>,
    /// Without it the container is as was asked for; that the kernel lacks it is worth a warning only.
    pub(super) soft: bool,
    /// What to write when the kernel does not have the file.
    pub(super) or: Option<Box<Write>>,
}

impl Write {
    pub(super) fn new(
        controller: &'static str,
        file: impl Into<Cow<'static, str>>,
        value: impl ToString,
    ) -> Write {
        Write {
            controller: Cow::Borrowed(controller),
            file: file.into(),
            value: value.to_string(),
            line: None,
            soft: false,
            or: None,
        }
    }

    /// A line `<device> <value>` in a file that holds one for each device.
    pub(super) fn line(
        controller: &'static str,
        file: impl Into<Cow<'static, str>>,
        device: &str,
        value: impl ToString,
        neutral: &'static str,
    ) -> Write {
        let mut write = Write::new(controller, file, format!("{device} {}", value.to_string()));
        write.line = Some((device.to_owned(), Cow::Borrowed(neutral)));
        write
    }

    pub(super) fn soft(mut self, soft: bool) -> Write {
        self.soft = soft;
        self
    }

    pub(super) fn or(mut self, other: Write) -> Write {
        self.or = Some(Box::new(other));
        self
    }
}

/// Whether a cgroup is new, with the kernel's defaults in it, or holds a running container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    New,
    Running,
}

/// What a file of a controller holds now, for the few decisions that depend on it.
pub(super) type Now<'a> = &'a dyn Fn(&str, &str) -> Option<String>;

/// Writes that were made, with what was there before.
#[derive(Default)]
pub(super) struct Undo(Vec<(OwnedFd, String, String)>);

impl Undo {
    /// Puts everything back, the last change first. A value that cannot be restored leaves the others restored.
    pub(super) fn run(self) {
        for (dir, file, value) in self.0.into_iter().rev() {
            let _ = dir::write_at(dir.as_fd(), &file, &value);
        }
    }
}

/// Carries out `writes` in order. With `undo`, remembers what was there.
///
/// Some pairs of values bind each other (memory and memory+swap, quota and period and burst, the two realtime ones),
/// and which must come first depends on what is set now. The kernel answers EINVAL to the wrong order, so such a
/// write goes to the end and is tried once more.
pub(super) fn act(
    cgroup: &Cgroup,
    writes: Vec<Write>,
    mut undo: Option<&mut Undo>,
    warnings: &mut Vec<String>,
) -> Result<(), Error> {
    let mut late = Vec::new();
    for write in writes {
        match put(cgroup, &write, &mut undo, warnings) {
            Err(Error::Write { cause: Errno::INVAL, .. }) => late.push(write),
            other => other?,
        }
    }
    for write in late {
        put(cgroup, &write, &mut undo, warnings)?;
    }
    Ok(())
}

fn put(
    cgroup: &Cgroup,
    write: &Write,
    undo: &mut Option<&mut Undo>,
    warnings: &mut Vec<String>,
) -> Result<(), Error> {
    let Some(dir) = cgroup.dir(&write.controller) else {
        if write.soft {
            let warning = format!("cgroup controller {} is not available", write.controller);
            if !warnings.contains(&warning) {
                warnings.push(warning);
            }
            return Ok(());
        }
        return Err(Error::Absent { controller: write.controller.to_string(), file: write.file.to_string() });
    };
    let before = undo.is_some().then(|| dir::read_at(dir, &write.file).ok()).flatten();
    match dir::write_at(dir, &write.file, &write.value) {
        Ok(()) => {}
        Err(Errno::NOENT) if write.or.is_some() => {
            return write.or.as_deref().map_or(Ok(()), |other| put(cgroup, other, undo, warnings));
        }
        Err(Errno::NOENT) if write.soft => {
            warnings.push(format!("the kernel has no {}; {} was not set", write.file, write.value));
            return Ok(());
        }
        Err(cause) => {
            return Err(Error::Write {
                file: write.file.to_string(),
                value: write.value.clone(),
                path: cgroup.path().to_owned(),
                hint: hint(cgroup, write, cause),
                cause,
            });
        }
    }
    if let (Some(undo), Some(before)) = (undo, before) {
        let old = match &write.line {
            None => first_value(&before),
            Some((device, neutral)) => before
                .lines()
                .find(|l| l.split_whitespace().next() == Some(device))
                .map_or_else(|| format!("{device} {neutral}"), str::to_owned),
        };
        if let Ok(dir) = rustix::io::fcntl_dupfd_cloexec(dir, 3) {
            undo.0.push((dir, write.file.to_string(), old));
        }
    }
    Ok(())
}

/// What to write to get `content` back. `memory.oom_control` and its like show several lines, the first being ours.
fn first_value(content: &str) -> String {
    let first = content.lines().next().unwrap_or("").trim();
    first.strip_prefix("oom_kill_disable ").or(first.strip_prefix("default ")).unwrap_or(first).to_owned()
}

/// The kernel says only EBUSY when a memory limit is below what is in use; people need the numbers.
fn hint(cgroup: &Cgroup, write: &Write, cause: Errno) -> String {
    if cause != Errno::BUSY || write.controller != "memory" {
        return String::new();
    }
    let number = |files: [&str; 2]| {
        let dir = cgroup.dir("memory")?;
        files.iter().find_map(|file| dir::read_at(dir, file).ok()).map(|text| text.trim().to_owned())
    };
    match (
        number(["memory.current", "memory.usage_in_bytes"]),
        number(["memory.peak", "memory.max_usage_in_bytes"]),
    ) {
        (Some(now), Some(peak)) => format!(" (in use: {now} bytes, at most so far: {peak})"),
        _ => String::new(),
    }
}

/// Files that exist for every device line: `8:0`.
pub(super) fn device(major: i64, minor: i64) -> String {
    format!("{major}:{minor}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_show_more_than_they_take_are_restored_by_their_first_value() {
        assert_eq!(first_value("oom_kill_disable 1\nunder_oom 0\noom_kill 0\n"), "1");
        assert_eq!(first_value("default 100\n8:0 50\n"), "100");
        assert_eq!(first_value("max 100000\n"), "max 100000");
        assert_eq!(first_value("\n"), "");
    }
}

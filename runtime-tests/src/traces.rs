//! What a runtime has on this machine at one moment, as lines of text: processes, mounts, cgroups, network
//! namespaces, links, packet filter tables, files. Two such lists compared tell what was leaked.
//!
//! Only what belongs to one instance is looked at, known by its directory, its bridge and the ids of its pods and
//! containers, because other things happen on the machine at the same time.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::run;

/// How an instance's things are recognised.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    /// Its private directory: mounts, working directories and files below it are its own.
    pub dir: PathBuf,
    /// Parts of names that nobody else uses: ids of pods and containers, the bridge, cgroup parents.
    pub names: BTreeSet<String>,
}

impl Marks {
    /// Takes note of an id. Cgroups and links bear its first twelve characters at least.
    pub fn note(&mut self, id: &str) {
        self.names.insert(id.chars().take(12).collect());
    }

    fn hit(&self, text: &str) -> bool {
        self.names.iter().any(|name| text.contains(name.as_str()))
    }

    /// Everything there is of the instance but files, and but the processes given.
    pub fn traces(&self, except: &[u32]) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for pid in self.processes() {
            if !except.contains(&pid) {
                found.insert(format!("process {pid}: {}", command_line(pid)));
            }
        }
        found.extend(self.mounts().iter().map(|path| format!("mount {}", path.display())));
        found.extend(self.cgroups().iter().map(|path| format!("cgroup {}", path.display())));
        found.extend(self.links().into_iter().map(|link| format!("link {link}")));
        found.extend(self.filters().into_iter().map(|rule| format!("packet filter {rule}")));
        found
    }

    /// Processes by working directory, arguments or cgroup. Zombies count.
    pub fn processes(&self) -> Vec<u32> {
        let own = std::process::id();
        all_processes()
            .filter(|pid| *pid != own)
            .filter(|pid| {
                let proc = PathBuf::from(format!("/proc/{pid}"));
                std::fs::read_link(proc.join("cwd")).is_ok_and(|cwd| cwd.starts_with(&self.dir))
                    || std::fs::read_to_string(proc.join("cgroup")).is_ok_and(|text| self.hit(&text))
                    || self.hit(&command_line(*pid))
            })
            .collect()
    }

    /// Mount points below the directory, the deepest last.
    pub fn mounts(&self) -> Vec<PathBuf> {
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = text.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
        points.filter(|path| path.starts_with(&self.dir)).collect()
    }

    /// Cgroup directories of every hierarchy, parents before children.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for root in hierarchies() {
            self.walk(&root, 0, false, &mut found);
        }
        found
    }

    fn walk(&self, dir: &Path, depth: usize, inside: bool, found: &mut Vec<PathBuf>) {
        let Ok(entries) = std::fs::read_dir(dir) else { return };
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir())) {
            let path = entry.path();
            let ours = inside || self.hit(&entry.file_name().to_string_lossy());
            if ours {
                found.push(path.clone());
            }
            if depth < 12 {
                self.walk(&path, depth + 1, ours, found);
            }
        }
    }

    /// Network links whose description names the instance: its bridge, and what is plugged into it.
    pub fn links(&self) -> Vec<String> {
        let text =
            run::stdout(Command::new("ip").args(["-o", "link"]), Duration::from_secs(10)).unwrap_or_default();
        let named = |line: &&str| self.hit(line);
        let name = |line: &str| {
            line.split(": ").nth(1).unwrap_or_default().split('@').next().unwrap_or_default().to_owned()
        };
        text.lines().filter(named).map(name).collect()
    }

    /// Lines of the packet filters that name the instance.
    pub fn filters(&self) -> Vec<String> {
        let text = run::stdout(Command::new("nft").args(["list", "ruleset"]), Duration::from_secs(10))
            .unwrap_or_default();
        text.lines().filter(|line| self.hit(line)).map(|line| line.trim().to_owned()).collect()
    }

    /// Ends and removes whatever is still there. For the end of a test, whatever became of it.
    pub fn wipe(&self) {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let left = self.processes();
            if left.is_empty() || Instant::now() > end {
                break;
            }
            for pid in left {
                kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).ok();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for path in self.mounts().iter().rev() {
            rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH).ok();
        }
        // A cgroup whose last process has just died may still be busy.
        for _ in 0..50 {
            let groups = self.cgroups();
            if groups.is_empty() {
                break;
            }
            for path in groups.iter().rev() {
                std::fs::remove_dir(path).ok();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for link in self.links() {
            run::output(Command::new("ip").args(["link", "del", &link]), Duration::from_secs(5)).ok();
        }
        let tables = run::stdout(Command::new("nft").args(["list", "tables"]), Duration::from_secs(5))
            .unwrap_or_default();
        for table in tables.lines().filter(|line| self.hit(line)) {
            let mut nft = Command::new("nft");
            nft.arg("delete").args(table.split_whitespace());
            run::output(&mut nft, Duration::from_secs(5)).ok();
        }
    }
}

/// Fails with a readable list when `after` has something that `before` had not.
pub fn nothing_new(before: &BTreeSet<String>, after: &BTreeSet<String>) -> Result<()> {
    // A process may have executed another program since; it is the same process.
    let known: BTreeSet<&str> = before.iter().map(|line| identity(line)).collect();
    let new: Vec<&String> = after.iter().filter(|line| !known.contains(identity(line))).collect();
    if !new.is_empty() {
        bail!("left behind: {new:#?}");
    }
    Ok(())
}

fn identity(line: &str) -> &str {
    if line.starts_with("process ") { line.split(':').next().unwrap_or(line) } else { line }
}

/// Every file below a directory, relative, without following links.
pub fn files(dir: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![dir.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(path.clone());
            }
            found.insert(format!("file {}", path.strip_prefix(dir).unwrap_or(&path).display()));
        }
    }
    found
}

/// How many file descriptors a process holds.
pub fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Children of a process that ended and were not waited for.
pub fn zombies_of(parent: u32) -> Vec<u32> {
    all_processes()
        .filter(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // The name in parentheses may hold anything; state and parent follow the last one.
            let rest = stat.rsplit_once(") ").map(|(_, rest)| rest).unwrap_or_default();
            let mut fields = rest.split(' ');
            fields.next() == Some("Z") && fields.next() == Some(parent.to_string().as_str())
        })
        .collect()
}

/// The roots of all cgroup hierarchies that are mounted.
pub fn hierarchies() -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let cgroup = |line: &&str| {
        let kind = line.split(" - ").nth(1).unwrap_or_default();
        kind.starts_with("cgroup ") || kind.starts_with("cgroup2 ")
    };
    text.lines().filter(cgroup).filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from).collect()
}

/// The directory of a container's cgroup, in the hierarchy where it has a file.
pub fn cgroup_with(id: &str, file: &str) -> Option<PathBuf> {
    let mut found = hierarchies().into_iter().filter_map(|root| below(&root, id, 0));
    found.find(|dir| dir.join(file).exists())
}

/// A file of a container's cgroup under the name that it has in either version, without the last line end.
pub fn cgroup_file(id: &str, names: &[&str]) -> Result<String> {
    let found = names.iter().find_map(|name| Some(cgroup_with(id, name)?.join(name)));
    let path = found.with_context(|| format!("no cgroup of {id} has any of {names:?}"))?;
    Ok(std::fs::read_to_string(path)?.trim().to_owned())
}

fn below(dir: &Path, part: &str, depth: usize) -> Option<PathBuf> {
    for entry in std::fs::read_dir(dir).ok()?.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        if entry.file_name().to_string_lossy().contains(part) {
            return Some(entry.path());
        }
        if depth < 8
            && let Some(found) = below(&entry.path(), part, depth + 1)
        {
            return Some(found);
        }
    }
    None
}

/// Arguments of a process, joined by blanks.
pub fn command_line(pid: u32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ").trim().to_owned()
}

/// Every process id of the machine.
pub fn all_processes() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok()))
}

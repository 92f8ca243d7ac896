//! The cgroup of one container: made, limited, filled, watched, emptied and removed, on v1, v2 and hybrid hosts.
//!
//! Every file is reached from a held directory descriptor. Limits are decided by pure functions (`v1`, `v2`,
//! `device`) and written by one (`plan`). This is the cgroupfs driver; which path a container gets is the business
//! of whoever makes its specification.
//!
//! On v1 and hybrid hosts a container has a directory in every hierarchy, also in those that it has no limits in:
//! what it left to its parent it would share with the host, in its cgroup namespace and in a writable mount too.

mod host;

mod error;

mod bpf;
mod control;
mod device;
mod dir;
mod oom;
mod plan;
mod stats;
mod v1;
mod v2;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::AtFlags;
use rustix::io::Errno;

pub use self::error::Error;
pub use self::host::{Host, Layout, Tree};
pub use self::oom::OomWatch;
use self::plan::{State, Undo};
pub use self::stats::{Cpu, Huge, Io, Memory, Pids, Pressure, Stall, Stats};
pub use self::v2::weight;
use crate::error::{At, Failure, Step};
use crate::spec;

/// The directories of one container, one in each hierarchy.
#[derive(Debug)]
pub struct Cgroup {
    host: Host,
    path: String,
    /// In the order of `host.trees()`; none where the directory does not exist.
    dirs: Vec<Option<OwnedFd>>,
    /// Controllers that the v2 directory has.
    enabled: Vec<String>,
    /// The directories are new: the kernel's defaults are in force.
    new: bool,
}

impl Cgroup {
    /// Makes the cgroup `path` (as in `linux.cgroupsPath`, from the root of each hierarchy) with its parents, and on v2
    /// enables the controllers on the way. An empty one that is there already is taken; one with processes is refused.
    pub fn create(host: &Host, path: &str) -> Result<Cgroup, Error> {
        let path = check(path)?;
        let mut cgroup =
            Cgroup { host: host.clone(), path, dirs: Vec::new(), enabled: Vec::new(), new: true };
        let mut made = Vec::new();
        for tree in host.trees() {
            if let Err(error) = cgroup.create_in(tree, &mut made) {
                for tree in made.into_iter().rev() {
                    let tree: &Tree = tree;
                    let _ = rustix::fs::unlinkat(tree.root(), &cgroup.path, AtFlags::REMOVEDIR);
                }
                return Err(error);
            }
        }
        Ok(cgroup)
    }

    /// The cgroup as it is. Where it does not exist, in part or at all, acts on it do nothing and succeed.
    pub fn open(host: &Host, path: &str) -> Result<Cgroup, Error> {
        let path = check(path)?;
        let mut cgroup =
            Cgroup { host: host.clone(), path, dirs: Vec::new(), enabled: Vec::new(), new: false };
        for tree in host.trees() {
            let dir = match dir::open(tree.root(), &cgroup.path) {
                Ok(dir) => Some(dir),
                Err(Errno::NOENT | Errno::NODEV) => None,
                Err(cause) => {
                    return Err(Error::Open { tree: tree.name.clone(), path: cgroup.path, cause });
                }
            };
            if let Some(dir) = dir.as_ref().filter(|_| tree.unified) {
                cgroup.enabled = words(dir.as_fd(), "cgroup.controllers");
            }
            cgroup.dirs.push(dir);
        }
        Ok(cgroup)
    }

    /// The path from the root of a hierarchy, without a leading slash.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The hierarchies of the host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Whether any directory of it was there when it was opened.
    pub fn exists(&self) -> bool {
        self.dirs.iter().any(Option::is_some)
    }

    /// The directory of the controller (`memory`, or `name=systemd`) that this cgroup is limited by, an `O_PATH`
    /// descriptor.
    pub fn dir(&self, controller: &str) -> Option<BorrowedFd<'_>> {
        let trees = self.host.trees().iter().zip(&self.dirs);
        let mut able = trees.filter(|(tree, _)| {
            if tree.unified {
                controller == "cgroup" || self.enabled.iter().any(|c| c == controller)
            } else {
                tree.has(controller)
            }
        });
        able.find_map(|(_, dir)| dir.as_ref()).map(OwnedFd::as_fd)
    }

    /// The directory in the v2 tree, when there is one.
    pub fn unified(&self) -> Option<BorrowedFd<'_>> {
        let mut trees = self.host.trees().iter().zip(&self.dirs);
        trees.find(|(tree, _)| tree.unified).and_then(|(_, dir)| dir.as_ref()).map(OwnedFd::as_fd)
    }

    /// What to give clone3 with CLONE_INTO_CGROUP. The child is then born in the v2 tree, which costs nothing, where
    /// moving it there costs 100 µs. On v2 that is all; on a hybrid host it enters the v1 trees by `enter_cloned`.
    pub fn clone_into_fd(&self) -> Option<BorrowedFd<'_>> {
        self.unified()
    }

    /// Sets limits and the device rules on a cgroup that `create` made. Returns what could not be honoured but
    /// leaves the container no freer than was asked.
    pub fn apply(&self, asked: &spec::LinuxResources) -> Result<Vec<String>, Error> {
        let mut warnings = Vec::new();
        let state = if self.new { State::New } else { State::Running };
        self.set(asked, state, None, &mut warnings)?;
        self.set_devices(&asked.devices, None, &mut warnings)?;
        Ok(warnings)
    }

    /// Changes limits of a running container: all that are asked for, or none. An empty device list leaves the
    /// devices as they are.
    pub fn update(&self, asked: &spec::LinuxResources) -> Result<Vec<String>, Error> {
        let mut warnings = Vec::new();
        let mut undo = Undo::default();
        let mut done = self.set(asked, State::Running, Some(&mut undo), &mut warnings);
        if done.is_ok() && !asked.devices.is_empty() {
            done = self.set_devices(&asked.devices, Some(&mut undo), &mut warnings);
        }
        if let Err(error) = done {
            undo.run();
            return Err(error);
        }
        Ok(warnings)
    }

    /// Puts a process into every hierarchy.
    pub fn add(&self, pid: u32) -> Result<(), Error> {
        let text = pid.to_string();
        for (tree, dir) in self.found() {
            dir::write_at(dir, "cgroup.procs", &text).map_err(|cause| Error::Add {
                pid,
                tree: tree.name.clone(),
                path: self.path.clone(),
                cause,
            })?;
        }
        Ok(())
    }

    /// Puts the caller, which has one thread, into every hierarchy. Into those of v1 much faster than `add` does: to
    /// move a process the kernel takes `cgroup_threadgroup_rwsem` for writing, which waits for an RCU grace period
    /// when it was quiet before, 8 to 20 ms; to a thread that moves itself it need not (Linux 5.5).
    pub fn enter(&self) -> Result<(), crate::Error> {
        Ok(self.enter_trees(true)?)
    }

    /// The same for a child that was cloned into `clone_into_fd` and is in the v2 tree already.
    pub(crate) fn enter_cloned(&self) -> Result<(), Failure> {
        self.enter_trees(self.unified().is_none())
    }

    /// All processes here and below, as our pid namespace numbers them.
    pub fn pids(&self) -> Result<Vec<u32>, Error> {
        let any = || ["pids", "memory"].iter().find_map(|c| self.dir(c));
        let dir =
            self.unified().or_else(any).or_else(|| self.dirs.iter().flatten().next().map(OwnedFd::as_fd));
        let Some(dir) = dir else { return Ok(Vec::new()) };
        dir::pids(dir).map_err(|cause| Error::List { path: self.path.clone(), cause })
    }

    /// What has been used.
    pub fn stats(&self) -> Stats {
        stats::read(self)
    }

    /// Removes the cgroup and what its processes nested in it. A process that is still on its way out makes that
    /// fail for a moment, so it is tried again until `within` has passed. Succeeds when there is nothing left.
    pub fn remove(&self, within: Duration) -> Result<(), Error> {
        let until = Instant::now() + within;
        // The v2 tree first: it is the one whose emptiness is known soonest.
        for tree in self.host.trees().iter().rev() {
            let mut wait = Duration::from_micros(100);
            loop {
                let failed = match rustix::fs::unlinkat(tree.root(), &self.path, AtFlags::REMOVEDIR) {
                    Ok(()) | Err(Errno::NOENT | Errno::NODEV) => break,
                    Err(Errno::BUSY) => Errno::BUSY,
                    Err(cause) => return Err(self.cannot_remove(tree, cause)),
                };
                match dir::open(tree.root(), &self.path).and_then(|d| dir::clear(d.as_fd())) {
                    Ok(()) | Err(Errno::NOENT | Errno::NODEV | Errno::BUSY) => {}
                    Err(cause) => return Err(self.cannot_remove(tree, cause)),
                }
                if Instant::now() >= until {
                    match rustix::fs::unlinkat(tree.root(), &self.path, AtFlags::REMOVEDIR) {
                        Ok(()) | Err(Errno::NOENT | Errno::NODEV) => break,
                        Err(_) => return Err(self.cannot_remove(tree, failed)),
                    }
                }
                std::thread::sleep(wait);
                wait = (wait * 2).min(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    fn cannot_remove(&self, tree: &Tree, cause: Errno) -> Error {
        Error::Remove { tree: tree.name.clone(), path: self.path.clone(), cause }
    }

    fn create_in<'a>(&mut self, tree: &'a Tree, made: &mut Vec<&'a Tree>) -> Result<(), Error> {
        let failed = |cause| Error::Make { tree: tree.name.clone(), path: self.path.clone(), cause };
        let new = dir::make(tree.root(), &self.path).map_err(failed)?;
        if new {
            made.push(tree);
        }
        let dir = dir::open(tree.root(), &self.path).map_err(failed)?;
        if !new {
            self.new = false;
            let count = dir::pids(dir.as_fd()).map_err(failed)?.len();
            if count > 0 {
                return Err(Error::Occupied { tree: tree.name.clone(), path: self.path.clone(), count });
            }
        }
        if tree.has("cpuset") && !tree.unified {
            inherit_cpuset(tree.root(), &self.path, dir.as_fd())
                .map_err(|cause| Error::Inherit { path: self.path.clone(), cause })?;
        }
        if tree.unified && self.host.layout() == Layout::Unified {
            self.enabled = words(dir.as_fd(), "cgroup.controllers");
            if tree.controllers.iter().any(|c| !self.enabled.contains(c)) {
                enable(tree.root(), &self.path, &tree.controllers)
                    .map_err(|cause| Error::Enable { path: self.path.clone(), cause })?;
                self.enabled = words(dir.as_fd(), "cgroup.controllers");
            }
        }
        self.dirs.push(Some(dir));
        Ok(())
    }

    fn set(
        &self,
        asked: &spec::LinuxResources,
        state: State,
        undo: Option<&mut Undo>,
        warnings: &mut Vec<String>,
    ) -> Result<(), Error> {
        let now = |controller: &str, file: &str| dir::read_at(self.dir(controller)?, file).ok();
        let writes = match self.host.layout() {
            Layout::Unified => v2::decide(asked, state, &now)?,
            Layout::Legacy | Layout::Hybrid => v1::decide(asked, state, &now)?,
        };
        plan::act(self, writes, undo, warnings)
    }

    fn set_devices(
        &self,
        asked: &[spec::DeviceRule],
        undo: Option<&mut Undo>,
        warnings: &mut Vec<String>,
    ) -> Result<(), Error> {
        let policy = device::Policy::new(asked)?;
        if self.host.layout() == Layout::Unified {
            if policy.allow && policy.rules.is_empty() && self.new {
                return Ok(());
            }
            let Some(dir) = self.unified() else { return Ok(()) };
            return bpf::attach(dir, &policy.program());
        }
        let Some(dir) = self.dir("devices") else {
            if policy.allow && policy.rules.is_empty() {
                return Ok(());
            }
            return Err(Error::Absent { controller: "devices".into(), file: "devices.deny".into() });
        };
        if let Some(line) = policy.beyond_v1() {
            warnings.push(format!("cgroup v1 cannot deny {line:?} within a wider rule that allows it"));
        }
        let inherited = dir::read_at(dir, "devices.list").map_err(|cause| Error::Read {
            file: "devices.list",
            path: self.path.clone(),
            cause,
        })?;
        let writes = policy.v1(&inherited);
        let done = write_devices(dir, &self.path, &writes);
        if done.is_err() && undo.is_some() {
            // Back to the list that was in force, from wherever this stopped.
            restore_devices(dir, &inherited);
        }
        done
    }

    fn enter_trees(&self, unified: bool) -> Result<(), Failure> {
        for (tree, dir) in self.found().filter(|(tree, _)| unified || !tree.unified) {
            let file = if tree.unified { "cgroup.procs" } else { "tasks" };
            dir::write_at(dir, file, "0").at(Step::Cgroup, format_args!("{} in {}", self.path, tree.name))?;
        }
        Ok(())
    }

    /// The hierarchies in which the cgroup exists.
    fn found(&self) -> impl Iterator<Item = (&Tree, BorrowedFd<'_>)> {
        let trees = self.host.trees().iter().zip(&self.dirs);
        trees.filter_map(|(tree, dir)| Some((tree, dir.as_ref()?.as_fd())))
    }
}

fn write_devices(dir: BorrowedFd, path: &str, writes: &[(&'static str, String)]) -> Result<(), Error> {
    use rustix::fs::{Mode, OFlags};
    let failed = |file: &str, value: &str, cause| Error::Write {
        file: file.to_owned(),
        value: value.to_owned(),
        path: path.to_owned(),
        hint: String::new(),
        cause,
    };
    // A dozen lines go to the same file, which is opened once.
    let mut open: Option<(&str, OwnedFd)> = None;
    for (file, value) in writes {
        if open.as_ref().is_none_or(|(name, _)| name != file) {
            let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(dir, *file, flags, Mode::empty());
            open = Some((file, fd.map_err(|cause| failed(file, value, cause))?));
        }
        if let Some((_, fd)) = &open {
            dir::write(fd.as_fd(), value).map_err(|cause| failed(file, value, cause))?;
        }
    }
    Ok(())
}

fn restore_devices(dir: BorrowedFd, list: &str) {
    let all = list.trim_start().starts_with('a');
    let _ = dir::write_at(dir, if all { "devices.allow" } else { "devices.deny" }, "a");
    for line in list.lines().filter(|l| !l.starts_with('a')) {
        let _ = dir::write_at(dir, "devices.allow", line);
    }
}

/// Checks a path from a specification and takes its slashes off. It names a place below the root of each hierarchy,
/// never the root itself and never a place above.
fn check(path: &str) -> Result<String, Error> {
    let refuse = |why| Err(Error::Path { path: path.to_owned(), why });
    if !path.contains('/') && path.matches(':').count() == 2 {
        return refuse("is for the systemd driver");
    }
    let mut clean = String::with_capacity(path.len());
    for part in path.split('/').filter(|p| !p.is_empty() && *p != ".") {
        if part == ".." {
            return refuse("climbs up");
        }
        if part.len() > 255 || part.contains(['\0', '\n']) {
            return refuse("has a component that is no file name");
        }
        if !clean.is_empty() {
            clean.push('/');
        }
        clean.push_str(part);
    }
    if clean.is_empty() {
        return refuse("is the root, which no container may live in");
    }
    if clean.len() > 2048 {
        return refuse("is too long");
    }
    Ok(clean)
}

fn words(dir: BorrowedFd, file: &str) -> Vec<String> {
    dir::read_at(dir, file).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

/// v2: a controller reaches a cgroup only when every directory above hands it on. One that a parent cannot hand on
/// (it holds processes itself, say) stays absent, which matters only when a limit needs it.
fn enable(root: BorrowedFd, path: &str, wanted: &[String]) -> Result<(), Errno> {
    let parents = std::iter::once(".").chain(path.match_indices('/').map(|(at, _)| &path[..at]));
    for parent in parents {
        let dir = dir::open(root, parent)?;
        let on = words(dir.as_fd(), "cgroup.subtree_control");
        let missing: Vec<String> =
            wanted.iter().filter(|c| !on.contains(c)).map(|c| format!("+{c}")).collect();
        if missing.is_empty()
            || dir::write_at(dir.as_fd(), "cgroup.subtree_control", &missing.join(" ")).is_ok()
        {
            continue;
        }
        for one in missing {
            let _ = dir::write_at(dir.as_fd(), "cgroup.subtree_control", &one);
        }
    }
    Ok(())
}

/// v1: a new cpuset is empty and takes no process. Fills it from its parent, which may be empty too.
fn inherit_cpuset(root: BorrowedFd, path: &str, dir: BorrowedFd) -> Result<(), Errno> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        // With cgroup.clone_children the kernel has done it.
        if !dir::read_at(dir, file)?.trim().is_empty() {
            continue;
        }
        let value = filled(root, path.rfind('/').map_or("", |at| &path[..at]), file)?;
        dir::write_at(dir, file, value.trim())?;
    }
    Ok(())
}

/// The value of `file` in the directory `path`, written there first when it was empty.
fn filled(root: BorrowedFd, path: &str, file: &str) -> Result<String, Errno> {
    let dir = dir::open(root, if path.is_empty() { "." } else { path })?;
    let value = dir::read_at(dir.as_fd(), file)?;
    if !value.trim().is_empty() || path.is_empty() {
        return Ok(value);
    }
    let value = filled(root, path.rfind('/').map_or("", |at| &path[..at]), file)?;
    dir::write_at(dir.as_fd(), file, value.trim())?;
    Ok(value)
}

#[cfg(test)]
mod tests;

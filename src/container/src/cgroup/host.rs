//! Finds the cgroup file systems of this machine, once. What is done inside them is the business of the rest of the module.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags};

use super::Error;

/// Controllers that can appear as mount options of a v1 hierarchy. Other words there are flags of the mount.
const CONTROLLERS: [&str; 15] = [
    "cpu",
    "cpuacct",
    "cpuset",
    "memory",
    "devices",
    "freezer",
    "blkio",
    "pids",
    "hugetlb",
    "net_cls",
    "net_prio",
    "perf_event",
    "rdma",
    "misc",
    "debug",
];

/// How this machine lays out its cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One tree for all controllers: cgroup v2.
    Unified,
    /// Controllers in v1 trees, and a v2 tree beside them that offers `cgroup.kill`, `cgroup.freeze` and pressure.
    Hybrid,
    /// v1 trees only.
    Legacy,
}

/// One mounted cgroup hierarchy.
#[derive(Debug)]
pub struct Tree {
    /// The last component of the mount point: `memory`, `cpu,cpuacct`, `systemd`, `unified`.
    pub name: String,
    /// Where it is mounted.
    pub mount: PathBuf,
    /// Controllers of a v1 tree, among them `name=systemd`; for the v2 tree what its root offers.
    pub controllers: Vec<String>,
    /// Whether this is the v2 tree.
    pub unified: bool,
    pub(super) root: OwnedFd,
}

impl Tree {
    /// The root of the hierarchy, an `O_PATH` descriptor.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    pub(super) fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|c| c == controller)
    }
}

/// The cgroup hierarchies of this machine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    layout: Layout,
    trees: Vec<Tree>,
    page_sizes: Vec<String>,
}

impl Host {
    /// Reads `/proc/self/mountinfo` and opens the root of every hierarchy.
    pub fn detect() -> Result<Host, Error> {
        let table = fs::read_to_string("/proc/self/mountinfo").map_err(|cause| Error::Mounts { cause })?;
        let mut trees = Vec::new();
        for found in parse(&table) {
            let root = rustix::fs::openat(
                CWD,
                &found.mount,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .map_err(|cause| Error::Root { mount: found.mount.clone(), cause })?;
            let mut controllers = found.controllers;
            if found.unified {
                let offered = super::dir::read_at(root.as_fd(), "cgroup.controllers").unwrap_or_default();
                controllers = offered.split_whitespace().map(str::to_owned).collect();
            }
            let name = found
                .mount
                .file_name()
                .map_or_else(|| "cgroup".to_owned(), |name| name.to_string_lossy().into_owned());
            trees.push(Tree { name, mount: found.mount, controllers, unified: found.unified, root });
        }
        Host::new(trees)
    }

    /// A v2 host whose only hierarchy is the directory `root`: a delegated subtree, or a directory that plays one in a test.
    pub fn unified_at(root: &Path) -> Result<Host, Error> {
        let fd =
            rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(|cause| Error::Root { mount: root.to_owned(), cause })?;
        let offered = super::dir::read_at(fd.as_fd(), "cgroup.controllers").unwrap_or_default();
        Host::new(vec![Tree {
            name: "unified".to_owned(),
            mount: root.to_owned(),
            controllers: offered.split_whitespace().map(str::to_owned).collect(),
            unified: true,
            root: fd,
        }])
    }

    /// How this machine lays out its cgroups.
    pub fn layout(&self) -> Layout {
        self.0.layout
    }

    /// Every hierarchy: the v1 trees in the order they are mounted, then the v2 tree.
    pub fn trees(&self) -> &[Tree] {
        &self.0.trees
    }

    /// Sizes of huge pages in the kernel's spelling for cgroup files: `2MB`, `1GB`.
    pub fn page_sizes(&self) -> &[String] {
        &self.0.page_sizes
    }

    fn new(mut trees: Vec<Tree>) -> Result<Host, Error> {
        trees.sort_by_key(|tree| tree.unified);
        let legacy =
            trees.iter().any(|tree| !tree.unified && tree.controllers.iter().any(|c| !c.contains('=')));
        let layout = match (legacy, trees.last().is_some_and(|tree| tree.unified)) {
            (false, true) => Layout::Unified,
            (true, true) => Layout::Hybrid,
            (true, false) => Layout::Legacy,
            (false, false) => return Err(Error::NoCgroups),
        };
        if layout == Layout::Unified {
            // A lone name=systemd hierarchy beside a full v2 tree carries no limits and is systemd's own.
            trees.retain(|tree| tree.unified);
        }
        let page_sizes = if trees.iter().any(|tree| tree.has("hugetlb")) { page_sizes() } else { Vec::new() };
        Ok(Host(Arc::new(Inner { layout, trees, page_sizes })))
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Found {
    mount: PathBuf,
    controllers: Vec<String>,
    unified: bool,
}

/// Picks the cgroup mounts out of a mountinfo table, one for each hierarchy: see proc_pid_mountinfo(5).
fn parse(table: &str) -> Vec<Found> {
    let mut found: Vec<(Found, usize)> = Vec::new();
    for line in table.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let mut before = before.split(' ');
        let (Some(root), Some(mount)) = (before.nth(3), before.next()) else { continue };
        let mut after = after.split(' ');
        let (kind, options) = (after.next().unwrap_or(""), after.nth(1).unwrap_or(""));
        let unified = match kind {
            "cgroup2" => true,
            "cgroup" => false,
            _ => continue,
        };
        let controllers: Vec<String> = if unified {
            Vec::new()
        } else {
            options
                .split(',')
                .filter(|o| CONTROLLERS.contains(o) || o.starts_with("name="))
                .map(str::to_owned)
                .collect()
        };
        if !unified && controllers.is_empty() {
            continue;
        }
        let candidate = Found { mount: PathBuf::from(unescape(mount)), controllers, unified };
        // The same hierarchy may be mounted many times; the one that shows most of it is the one to use.
        let same = found
            .iter_mut()
            .find(|(f, _)| f.unified == candidate.unified && f.controllers == candidate.controllers);
        match same {
            Some(place) if root.len() < place.1 => *place = (candidate, root.len()),
            Some(_) => {}
            None => found.push((candidate, root.len())),
        }
    }
    found.into_iter().map(|(f, _)| f).collect()
}

/// Undoes the octal escapes (`\040`) of mountinfo.
fn unescape(field: &str) -> String {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let code = bytes.get(i + 1..i + 4).and_then(|d| std::str::from_utf8(d).ok());
        match code.filter(|_| bytes[i] == b'\\').and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                i += 4;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn page_sizes() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/kernel/mm/hugepages") else { return Vec::new() };
    let mut sizes: Vec<u64> = entries
        .filter_map(|e| {
            e.ok()?.file_name().to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
        })
        .collect();
    sizes.sort_unstable();
    sizes.into_iter().map(page_size).collect()
}

/// Spells a size given in KiB the way the hugetlb controller names its files.
fn page_size(kib: u64) -> String {
    match kib {
        k if k >= 1 << 20 => format!("{}GB", k >> 20),
        k if k >= 1 << 10 => format!("{}MB", k >> 10),
        k => format!("{k}KB"),
    }
}

#[cfg(test)]
impl Host {
    /// This machine as it would be without its v2 tree.
    pub(super) fn legacy() -> Host {
        let whole = Host::detect().unwrap();
        let trees = whole.trees().iter().filter(|tree| !tree.unified);
        let copy = |tree: &Tree| Tree {
            name: tree.name.clone(),
            mount: tree.mount.clone(),
            controllers: tree.controllers.clone(),
            unified: false,
            root: tree.root.try_clone().unwrap(),
        };
        Host::new(trees.map(copy).collect()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn co_mounted_controllers_are_one_tree_and_the_widest_mount_wins() {
        let table = "\
30 25 0:26 /docker/x /mnt/cg rw - cgroup cgroup rw,cpu,cpuacct
31 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:11 - cgroup cgroup rw,cpu,cpuacct
32 25 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
33 25 0:28 / /sys/fs/cgroup/un\\040ified rw - cgroup2 cgroup2 rw,nsdelegate
34 25 0:29 / /proc rw - proc proc rw
garbage
";
        let found = parse(table);
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].mount, PathBuf::from("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(found[0].controllers, ["cpu", "cpuacct"]);
        assert_eq!(found[1].controllers, ["name=systemd"]);
        assert!(found[2].unified);
        assert_eq!(found[2].mount, PathBuf::from("/sys/fs/cgroup/un ified"));
    }

    #[test]
    fn page_sizes_are_spelled_as_the_kernel_does() {
        assert_eq!([64, 2048, 1 << 20].map(page_size), ["64KB", "2MB", "1GB"]);
    }

    #[test]
    fn this_machine_has_cgroups() {
        let host = Host::detect().unwrap();
        assert!(!host.trees().is_empty());
    }
}

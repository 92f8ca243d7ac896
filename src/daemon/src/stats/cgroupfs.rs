//! Reads what a cgroup used, from the control groups' files alone: v2, v1, or v1 with pressure from a v2 tree
//! beside it. Knows no pods; a file that is not there is a figure that the kernel does not give.
//! Sources: kernel documentation, admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Where the hierarchies are mounted. Found once: they do not move while a node is up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hierarchies {
    /// The v2 tree, with or without controllers.
    unified: Option<PathBuf>,
    /// Mount point of each v1 controller.
    v1: BTreeMap<String, PathBuf>,
}

/// What a cgroup and everything below it used, as far as each answer needs it: each file that is read counts, times
/// the containers of a node. Bytes and nanoseconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// CPU time.
    pub cpu: u64,
    pub memory: Memory,
    /// Absent when the kernel gives no pressure figures.
    pub pressure: Pressure,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    pub usage: u64,
    /// None when there is no limit.
    pub limit: Option<u64>,
    /// Pages that could be dropped at once; usage less these is the working set.
    pub inactive_file: u64,
    pub rss: u64,
    pub cache: u64,
    pub mapped_file: u64,
    pub page_faults: u64,
    pub major_page_faults: u64,
    pub swap: u64,
    pub swap_limit: Option<u64>,
}

/// The three pressure files.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    pub cpu: Option<Stall>,
    pub memory: Option<Stall>,
    pub io: Option<Stall>,
}

/// One pressure file: `some` (a task waited) and `full` (all did).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stall {
    pub some: Share,
    pub full: Share,
}

/// Averages in percent, total in microseconds as the kernel writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Share {
    pub avg10: f64,
    pub avg60: f64,
    pub avg300: f64,
    pub total: u64,
}

/// Reads and writes of one block device.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Device {
    /// `major:minor`.
    pub number: String,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

/// Huge pages of one size.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Huge {
    /// As the kernel names it, `2MB`.
    pub size: String,
    pub usage: u64,
    /// v1 alone keeps it.
    pub max_usage: Option<u64>,
}

/// Figures that only the metrics want.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Extra {
    pub cpu: Cpu,
    pub kernel_memory: u64,
    pub max_memory: u64,
    /// How often the memory limit was hit.
    pub memory_failures: u64,
    pub oom_kills: u64,
    pub devices: Vec<Device>,
    pub huge: Vec<Huge>,
    pub processes: u64,
    pub threads_max: Option<u64>,
}

/// How the CPU time was used, and how often it was not to be had.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cpu {
    pub user: u64,
    pub system: u64,
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled: u64,
}

/// The kernel writes "no limit" on v1 as the largest page multiple; anything near it means the same.
const V1_UNLIMITED: u64 = 1 << 62;

/// A cgroup with more processes than this is counted, but not looked into.
pub const MOST_PROCESSES: usize = 4096;

impl Hierarchies {
    /// From the mount table of this process.
    pub fn detect() -> Hierarchies {
        Hierarchies::parse(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    /// proc(5), /proc/pid/mountinfo: field 5 is the mount point; behind the dash: type, source, super options.
    fn parse(mountinfo: &str) -> Hierarchies {
        let mut found = Hierarchies::default();
        for line in mountinfo.lines() {
            let Some((mount, file_system)) = line.split_once(" - ") else { continue };
            let Some(point) = mount.split(' ').nth(4).map(PathBuf::from) else { continue };
            let mut fields = file_system.split(' ');
            match (fields.next(), fields.nth(1)) {
                (Some("cgroup2"), _) if found.unified.is_none() => found.unified = Some(point),
                (Some("cgroup"), Some(options)) => {
                    for controller in options.split(',').filter(|o| !matches!(*o, "rw" | "ro")) {
                        found.v1.entry(controller.into()).or_insert_with(|| point.clone());
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// Controllers are on the v2 tree.
    pub fn v2(&self) -> bool {
        !self.v1.contains_key("memory") && self.unified.is_some()
    }

    /// Usage of the cgroup at `path`, relative to the roots. A cgroup that is gone used nothing.
    pub fn usage(&self, path: &str) -> Usage {
        match self.v2() {
            true => self.unified.as_ref().map(|root| usage_v2(&below(root, path))).unwrap_or_default(),
            false => self.usage_v1(path),
        }
    }

    /// The figures that only metrics want.
    pub fn extra(&self, path: &str) -> Extra {
        if self.v2() {
            let at = self.unified.as_ref().map(|root| below(root, path)).unwrap_or_default();
            return Extra { processes: self.pids(path).len() as u64, ..extra_v2(&at) };
        }
        let blkio = self.at("blkio", path);
        let file = |name: &str| blkio.as_ref().map(|at| text(at, name)).unwrap_or_default();
        let memory = self.at("memory", path).unwrap_or_default();
        Extra {
            cpu: self.cpu_v1(path),
            kernel_memory: number(&memory, "memory.kmem.usage_in_bytes"),
            max_memory: number(&memory, "memory.max_usage_in_bytes"),
            memory_failures: number(&memory, "memory.failcnt"),
            oom_kills: figure(&text(&memory, "memory.oom_control"), "oom_kill"),
            devices: blkio_v1(&file("blkio.throttle.io_service_bytes"), &file("blkio.throttle.io_serviced")),
            huge: self.at("hugetlb", path).map(|at| huge_v1(&at)).unwrap_or_default(),
            processes: self.pids(path).len() as u64,
            threads_max: self.at("pids", path).and_then(|at| limit(&at, "pids.max")),
        }
    }

    /// Processes of the cgroup itself and those one level below, at most [`MOST_PROCESSES`].
    pub fn pids(&self, path: &str) -> Vec<u32> {
        let at = match self.v2() {
            true => self.unified.as_ref().map(|root| below(root, path)),
            false => {
                self.at("pids", path).or_else(|| self.at("memory", path)).or_else(|| self.at("cpu", path))
            }
        };
        let Some(at) = at else { return Vec::new() };
        let children = fs::read_dir(&at).into_iter().flatten().flatten();
        let children = children.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path());
        let mut pids = Vec::new();
        for directory in std::iter::once(at.clone()).chain(children.take(MOST_PROCESSES)) {
            pids.extend(text(&directory, "cgroup.procs").lines().filter_map(|pid| pid.parse::<u32>().ok()));
            if pids.len() >= MOST_PROCESSES {
                break;
            }
        }
        pids.truncate(MOST_PROCESSES);
        pids
    }

    fn at(&self, controller: &str, path: &str) -> Option<PathBuf> {
        self.v1.get(controller).map(|root| below(root, path))
    }

    fn usage_v1(&self, path: &str) -> Usage {
        let mut usage = Usage::default();
        if let Some(at) = self.at("cpuacct", path) {
            usage.cpu = number(&at, "cpuacct.usage");
        }
        if let Some(at) = self.at("memory", path) {
            usage.memory = memory_v1(&at);
        }
        if let Some(root) = &self.unified {
            usage.pressure = pressure(&below(root, path));
        }
        usage
    }

    fn cpu_v1(&self, path: &str) -> Cpu {
        let accounts = self.at("cpuacct", path).unwrap_or_default();
        let stat = self.at("cpu", path).map(|at| text(&at, "cpu.stat")).unwrap_or_default();
        Cpu {
            user: number(&accounts, "cpuacct.usage_user"),
            system: number(&accounts, "cpuacct.usage_sys"),
            periods: figure(&stat, "nr_periods"),
            throttled_periods: figure(&stat, "nr_throttled"),
            throttled: figure(&stat, "throttled_time"),
        }
    }
}

fn memory_v1(at: &Path) -> Memory {
    let mut memory = Memory { usage: number(at, "memory.usage_in_bytes"), ..Memory::default() };
    for (name, value) in figures(&text(at, "memory.stat")) {
        match name {
            "hierarchical_memory_limit" => {
                memory.limit = Some(value).filter(|limit| (1..V1_UNLIMITED).contains(limit));
            }
            "total_inactive_file" => memory.inactive_file = value,
            "total_rss" => memory.rss = value,
            "total_cache" => memory.cache = value,
            "total_mapped_file" => memory.mapped_file = value,
            "total_pgfault" => memory.page_faults = value,
            "total_pgmajfault" => memory.major_page_faults = value,
            "total_swap" => memory.swap = value,
            _ => {}
        }
    }
    // v1 limits memory and swap together.
    memory.swap_limit = memory.limit.and_then(|memory| {
        let both = limit(at, "memory.memsw.limit_in_bytes").filter(|limit| *limit < V1_UNLIMITED)?;
        Some(both.saturating_sub(memory))
    });
    memory
}

fn usage_v2(at: &Path) -> Usage {
    let mut memory = Memory {
        usage: number(at, "memory.current"),
        limit: limit(at, "memory.max"),
        swap: number(at, "memory.swap.current"),
        swap_limit: limit(at, "memory.swap.max"),
        ..Memory::default()
    };
    for (name, value) in figures(&text(at, "memory.stat")) {
        match name {
            "inactive_file" => memory.inactive_file = value,
            "anon" => memory.rss = value,
            "file" => memory.cache = value,
            "file_mapped" => memory.mapped_file = value,
            "pgfault" => memory.page_faults = value,
            "pgmajfault" => memory.major_page_faults = value,
            _ => {}
        }
    }
    let cpu = figure(&text(at, "cpu.stat"), "usage_usec").saturating_mul(1000);
    Usage { cpu, memory, pressure: pressure(at) }
}

fn extra_v2(at: &Path) -> Extra {
    let cpu = text(at, "cpu.stat");
    let events = text(at, "memory.events");
    let nanoseconds = |name: &str| figure(&cpu, name).saturating_mul(1000);
    Extra {
        cpu: Cpu {
            user: nanoseconds("user_usec"),
            system: nanoseconds("system_usec"),
            periods: figure(&cpu, "nr_periods"),
            throttled_periods: figure(&cpu, "nr_throttled"),
            throttled: nanoseconds("throttled_usec"),
        },
        kernel_memory: figure(&text(at, "memory.stat"), "kernel"),
        max_memory: number(at, "memory.peak"),
        memory_failures: figure(&events, "max"),
        oom_kills: figure(&events, "oom_kill"),
        devices: io_stat(&text(at, "io.stat")),
        huge: huge_v2(at),
        processes: 0,
        threads_max: limit(at, "pids.max"),
    }
}

fn pressure(at: &Path) -> Pressure {
    let read = |name| fs::read_to_string(at.join(name)).ok().map(|text| stall(&text));
    Pressure { cpu: read("cpu.pressure"), memory: read("memory.pressure"), io: read("io.pressure") }
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same for `full`.
fn stall(text: &str) -> Stall {
    let mut stall = Stall::default();
    for line in text.lines() {
        let mut words = line.split(' ');
        let share = match words.next() {
            Some("some") => &mut stall.some,
            Some("full") => &mut stall.full,
            _ => continue,
        };
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            match name {
                "avg10" => share.avg10 = value.parse().unwrap_or_default(),
                "avg60" => share.avg60 = value.parse().unwrap_or_default(),
                "avg300" => share.avg300 = value.parse().unwrap_or_default(),
                "total" => share.total = value.parse().unwrap_or_default(),
                _ => {}
            }
        }
    }
    stall
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`
fn io_stat(text: &str) -> Vec<Device> {
    let device = |line: &str| {
        let mut words = line.split(' ');
        let mut device = Device { number: words.next()?.into(), ..Device::default() };
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            let value = value.parse().unwrap_or_default();
            match name {
                "rbytes" => device.read_bytes = value,
                "wbytes" => device.write_bytes = value,
                "rios" => device.reads = value,
                "wios" => device.writes = value,
                _ => {}
            }
        }
        Some(device)
    };
    text.lines().filter_map(device).collect()
}

/// Two files of lines like `8:0 Read 4096`.
fn blkio_v1(bytes: &str, operations: &str) -> Vec<Device> {
    let mut devices: BTreeMap<&str, Device> = BTreeMap::new();
    let lines = bytes.lines().map(|line| (true, line)).chain(operations.lines().map(|line| (false, line)));
    for (is_bytes, line) in lines {
        let mut words = line.split(' ');
        let (Some(number), Some(kind), Some(value)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let value = value.parse().unwrap_or_default();
        let device =
            devices.entry(number).or_insert_with(|| Device { number: number.into(), ..Device::default() });
        match (is_bytes, kind) {
            (true, "Read") => device.read_bytes = value,
            (true, "Write") => device.write_bytes = value,
            (false, "Read") => device.reads = value,
            (false, "Write") => device.writes = value,
            _ => {}
        }
    }
    devices.into_values().collect()
}

fn huge_v2(at: &Path) -> Vec<Huge> {
    let huge =
        |size: String| Huge { usage: number(at, &format!("hugetlb.{size}.current")), max_usage: None, size };
    sizes(at, ".current").map(huge).collect()
}

fn huge_v1(at: &Path) -> Vec<Huge> {
    let huge = |size: String| Huge {
        usage: number(at, &format!("hugetlb.{size}.usage_in_bytes")),
        max_usage: Some(number(at, &format!("hugetlb.{size}.max_usage_in_bytes"))),
        size,
    };
    sizes(at, ".usage_in_bytes").map(huge).collect()
}

/// Page sizes for which there are files `hugetlb.<size><suffix>`.
fn sizes(at: &Path, suffix: &str) -> impl Iterator<Item = String> {
    let names =
        fs::read_dir(at).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    names.filter_map(move |name| {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(suffix)?;
        (!size.contains('.')).then(|| size.to_owned())
    })
}

/// `path` below a hierarchy's root; a leading slash does not leave it.
fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn text(at: &Path, name: &str) -> String {
    fs::read_to_string(at.join(name)).unwrap_or_default()
}

fn number(at: &Path, name: &str) -> u64 {
    text(at, name).trim().parse().unwrap_or_default()
}

/// A limit; `max` and an absent file are none.
fn limit(at: &Path, name: &str) -> Option<u64> {
    text(at, name).trim().parse().ok()
}

/// Lines of a name and a number.
fn figures(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, value)| Some((name, value.trim().parse().ok()?)))
}

/// One of them; 0 when it is not there.
fn figure(text: &str, name: &str) -> u64 {
    figures(text).find(|(found, _)| *found == name).map(|(_, value)| value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 25 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory
35 30 0:31 / /sys/fs/cgroup/systemd rw,nosuid - cgroup cgroup rw,xattr,name=systemd";

    #[test]
    fn controllers_that_share_a_mount_are_found() {
        let found = Hierarchies::parse(HYBRID);
        assert!(!found.v2());
        assert_eq!(found.at("cpuacct", "/a"), Some("/sys/fs/cgroup/cpu,cpuacct/a".into()));
        assert_eq!(found.at("cpu", "a/b"), Some("/sys/fs/cgroup/cpu,cpuacct/a/b".into()));
        assert_eq!(found.at("pids", "a"), None);
        assert_eq!(found.unified, Some("/sys/fs/cgroup/unified".into()));
    }

    #[test]
    fn a_lone_v2_tree_holds_the_controllers() {
        assert!(Hierarchies::parse("30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate").v2());
        assert!(!Hierarchies::parse("garbage\n\n1 2 - x").v2());
    }

    #[test]
    fn pressure_is_read_line_by_line() {
        let text = "some avg10=1.50 avg60=0.10 avg300=0.00 total=123\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=45\n";
        let got = stall(text);
        assert_eq!((got.some.avg10, got.some.total, got.full.avg10, got.full.total), (1.5, 123, 0.25, 45));
        assert_eq!(stall("rubbish"), Stall::default());
    }

    #[test]
    fn devices_of_both_versions_read_alike() {
        let want = Device { number: "8:0".into(), read_bytes: 1, write_bytes: 2, reads: 3, writes: 4 };
        assert_eq!(
            io_stat("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n"),
            std::slice::from_ref(&want)
        );
        let bytes = "8:0 Read 1\n8:0 Write 2\n8:0 Total 3\nTotal 3\n";
        assert_eq!(blkio_v1(bytes, "8:0 Read 3\n8:0 Write 4\n"), [want]);
    }

    #[test]
    fn a_v2_group_is_read_from_its_files() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("cpu.stat", "usage_usec 7\nuser_usec 5\nsystem_usec 2\nnr_periods 1\n"),
            ("memory.current", "1000\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 10\nfile 20\ninactive_file 300\npgfault 4\n"),
            ("memory.events", "max 3\noom_kill 1\n"),
            ("memory.swap.max", "500\n"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let (usage, extra) = (usage_v2(dir.path()), extra_v2(dir.path()));
        assert_eq!((usage.cpu, extra.cpu.user, extra.cpu.periods), (7000, 5000, 1));
        assert_eq!((usage.memory.usage, usage.memory.limit, usage.memory.inactive_file), (1000, None, 300));
        assert_eq!((usage.memory.rss, usage.memory.cache, usage.memory.page_faults), (10, 20, 4));
        assert_eq!((usage.memory.swap_limit, extra.memory_failures, extra.oom_kills), (Some(500), 3, 1));
        assert_eq!(usage.pressure, Pressure::default());
    }

    #[test]
    fn swap_of_a_v1_group_is_what_both_may_have_less_what_memory_may() {
        let dir = tempfile::tempdir().unwrap();
        let memory = |limit: &str| {
            fs::write(
                dir.path().join("memory.stat"),
                format!(
                    "cache 1\nhierarchical_memory_limit {limit}\ntotal_cache 20\ntotal_rss 10\ntotal_swap 3\n"
                ),
            )
            .unwrap();
            memory_v1(dir.path())
        };
        fs::write(dir.path().join("memory.memsw.limit_in_bytes"), "1500\n").unwrap();
        fs::write(dir.path().join("memory.usage_in_bytes"), "700\n").unwrap();
        let limited = memory("1000");
        assert_eq!((limited.usage, limited.cache, limited.rss, limited.swap), (700, 20, 10, 3));
        assert_eq!((limited.limit, limited.swap_limit), (Some(1000), Some(500)));
        let free = memory("9223372036854771712");
        assert_eq!((free.limit, free.swap_limit), (None, None));
    }

    #[test]
    fn a_group_that_is_gone_used_nothing() {
        let nowhere = Hierarchies::detect().usage("/no-such-group-of-ours");
        assert_eq!((nowhere.cpu, nowhere.memory), (0, Memory::default()));
    }
}

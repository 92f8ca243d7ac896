//! Reads what a cgroup has used, v1 and v2 in one shape. Parses; judges nothing.

use std::os::fd::BorrowedFd;

use super::dir::read_at;
use super::{Cgroup, Layout};

/// What a cgroup has used. A part is absent when its controller is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    /// Processor time.
    pub cpu: Option<Cpu>,
    /// Memory.
    pub memory: Option<Memory>,
    /// Number of tasks.
    pub pids: Option<Pids>,
    /// Transfers of each block device.
    pub io: Option<Vec<Io>>,
    /// Huge pages of each size.
    pub hugetlb: Vec<Huge>,
    /// Time lost waiting for a processor.
    pub cpu_pressure: Option<Pressure>,
    /// Time lost waiting for memory.
    pub memory_pressure: Option<Pressure>,
    /// Time lost waiting for a disk.
    pub io_pressure: Option<Pressure>,
}

/// Processor time in nanoseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpu {
    /// All of it.
    pub usage: u64,
    /// In user mode.
    pub user: u64,
    /// In the kernel.
    pub system: u64,
    /// Periods in which a quota was in force.
    pub periods: u64,
    /// Those in which it ran out.
    pub throttled_periods: u64,
    /// Time spent waiting for the next period.
    pub throttled: u64,
}

/// Memory in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Memory {
    /// In use, page cache included.
    pub usage: u64,
    /// The most that was in use; 0 where the kernel does not say.
    pub peak: u64,
    /// None: no limit.
    pub limit: Option<u64>,
    /// Times the limit was hit.
    pub failures: u64,
    /// Swap in use, memory not counted. None: swap is not accounted.
    pub swap: Option<u64>,
    /// Swap that may be used, memory not counted. None: no limit.
    pub swap_limit: Option<u64>,
    /// Processes that the OOM killer ended.
    pub oom_kills: u64,
    /// `memory.stat`, in the kernel's order.
    pub stat: Vec<(String, u64)>,
}

impl Memory {
    /// One line of `memory.stat`; on v1 the total of the group and what is below it.
    pub fn stat(&self, name: &str) -> Option<u64> {
        self.stat.iter().find(|(key, _)| key == name).map(|&(_, value)| value)
    }

    /// What the kubelet calls the working set: usage without the page cache that nobody has touched for a while.
    pub fn working_set(&self) -> u64 {
        let inactive = self.stat("total_inactive_file").or_else(|| self.stat("inactive_file")).unwrap_or(0);
        self.usage.saturating_sub(inactive)
    }

    /// Anonymous memory in use.
    pub fn anonymous(&self) -> u64 {
        self.stat("total_rss").or_else(|| self.stat("anon")).unwrap_or(0)
    }

    /// Page faults and those of them that went to disk.
    pub fn faults(&self) -> (u64, u64) {
        let get = |total, plain| self.stat(total).or_else(|| self.stat(plain)).unwrap_or(0);
        (get("total_pgfault", "pgfault"), get("total_pgmajfault", "pgmajfault"))
    }
}

/// Number of tasks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pids {
    /// Now.
    pub current: u64,
    /// None: no limit.
    pub limit: Option<u64>,
}

/// Transfers of one block device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Io {
    /// Device number.
    pub major: u32,
    /// Device number.
    pub minor: u32,
    /// Bytes.
    pub read_bytes: u64,
    /// Bytes.
    pub written_bytes: u64,
    /// Operations.
    pub reads: u64,
    /// Operations.
    pub writes: u64,
}

/// Huge pages of one size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Huge {
    /// `2MB`, `1GB`.
    pub page_size: String,
    /// Bytes.
    pub usage: u64,
    /// Bytes; None: no limit.
    pub limit: Option<u64>,
    /// Times the limit was hit.
    pub failures: u64,
}

/// Pressure stall information, see the kernel's Documentation/accounting/psi.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pressure {
    /// At least one task waited.
    pub some: Stall,
    /// All tasks waited.
    pub full: Stall,
}

/// Shares of time in percent, and the sum in microseconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stall {
    /// Of the last 10 seconds.
    pub avg10: f64,
    /// Of the last minute.
    pub avg60: f64,
    /// Of the last five minutes.
    pub avg300: f64,
    /// Microseconds since the start.
    pub total: u64,
}

pub(super) fn read(cgroup: &Cgroup) -> Stats {
    let v2 = cgroup.host.layout() == Layout::Unified;
    let dir = |controller| cgroup.dir(controller);
    let mut stats = Stats::default();
    if v2 {
        stats.cpu = cgroup.unified().and_then(cpu_v2);
        stats.memory = dir("memory").and_then(memory_v2);
        stats.io = dir("io").and_then(|d| Some(io_v2(&read_at(d, "io.stat").ok()?)));
    } else {
        stats.cpu = dir("cpuacct").and_then(|d| cpu_v1(d, dir("cpu")));
        stats.memory = dir("memory").and_then(memory_v1);
        stats.io = dir("blkio").map(io_v1);
    }
    stats.pids = dir("pids")
        .and_then(|d| Some(Pids { current: number(d, "pids.current")?, limit: number(d, "pids.max") }));
    for size in cgroup.host.page_sizes() {
        if let Some(dir) = dir("hugetlb") {
            stats.hugetlb.extend(huge(dir, size));
        }
    }
    if let Some(dir) = cgroup.unified() {
        let pressure = |file| pressure(&read_at(dir, file).ok()?);
        stats.cpu_pressure = pressure("cpu.pressure");
        stats.memory_pressure = pressure("memory.pressure");
        stats.io_pressure = pressure("io.pressure");
    }
    stats
}

fn cpu_v1(accounting: BorrowedFd, scheduling: Option<BorrowedFd>) -> Option<Cpu> {
    // cpuacct.stat counts ticks of 10 ms whatever the kernel's own tick is (USER_HZ).
    const TICK: u64 = 10_000_000;
    let usage = number(accounting, "cpuacct.usage")?;
    let ticks = pairs(&read_at(accounting, "cpuacct.stat").unwrap_or_default());
    let quota = scheduling.map(|d| pairs(&read_at(d, "cpu.stat").unwrap_or_default())).unwrap_or_default();
    Some(Cpu {
        usage,
        user: get(&ticks, "user").saturating_mul(TICK),
        system: get(&ticks, "system").saturating_mul(TICK),
        periods: get(&quota, "nr_periods"),
        throttled_periods: get(&quota, "nr_throttled"),
        throttled: get(&quota, "throttled_time"),
    })
}

fn cpu_v2(dir: BorrowedFd) -> Option<Cpu> {
    let stat = pairs(&read_at(dir, "cpu.stat").ok()?);
    let nanoseconds = |name| get(&stat, name).saturating_mul(1000);
    Some(Cpu {
        usage: nanoseconds("usage_usec"),
        user: nanoseconds("user_usec"),
        system: nanoseconds("system_usec"),
        periods: get(&stat, "nr_periods"),
        throttled_periods: get(&stat, "nr_throttled"),
        throttled: nanoseconds("throttled_usec"),
    })
}

fn memory_v1(dir: BorrowedFd) -> Option<Memory> {
    let usage = number(dir, "memory.usage_in_bytes")?;
    let limit = limit_v1(number(dir, "memory.limit_in_bytes"));
    let both = number(dir, "memory.memsw.usage_in_bytes");
    let both_limit = limit_v1(number(dir, "memory.memsw.limit_in_bytes"));
    let oom = pairs(&read_at(dir, "memory.oom_control").unwrap_or_default());
    Some(Memory {
        usage,
        peak: number(dir, "memory.max_usage_in_bytes").unwrap_or(0),
        limit,
        // With no swap allowed both limits are equal, and the kernel counts at most the one it looks at first.
        failures: number(dir, "memory.failcnt").unwrap_or(0)
            + number(dir, "memory.memsw.failcnt").unwrap_or(0),
        // Read after `usage`, so it can be below it for a moment.
        swap: both.map(|both| both.saturating_sub(usage)),
        swap_limit: both_limit.and_then(|both| Some(both.saturating_sub(limit?))),
        oom_kills: get(&oom, "oom_kill"),
        stat: pairs(&read_at(dir, "memory.stat").unwrap_or_default()),
    })
}

/// v1 has no word for "no limit": it shows the largest multiple of the page size that fits.
fn limit_v1(limit: Option<u64>) -> Option<u64> {
    limit.filter(|&l| l < 0x7fff_ffff_f000_0000)
}

fn memory_v2(dir: BorrowedFd) -> Option<Memory> {
    let events = pairs(&read_at(dir, "memory.events").unwrap_or_default());
    Some(Memory {
        usage: number(dir, "memory.current")?,
        peak: number(dir, "memory.peak").unwrap_or(0),
        limit: number(dir, "memory.max"),
        failures: get(&events, "max"),
        swap: number(dir, "memory.swap.current"),
        swap_limit: number(dir, "memory.swap.max"),
        oom_kills: get(&events, "oom_kill"),
        stat: pairs(&read_at(dir, "memory.stat").unwrap_or_default()),
    })
}

fn io_v1(dir: BorrowedFd) -> Vec<Io> {
    let mut found = Vec::new();
    // Older kernels have only the plain files, which leave out what nested cgroups did.
    for (file, plain, bytes) in [
        ("blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_service_bytes", true),
        ("blkio.throttle.io_serviced_recursive", "blkio.throttle.io_serviced", false),
    ] {
        let text = read_at(dir, file).or_else(|_| read_at(dir, plain)).unwrap_or_default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(device), Some(what), Some(Ok(value))) =
                (words.next().and_then(device), words.next(), words.next().map(str::parse))
            else {
                continue;
            };
            let io = entry(&mut found, device);
            match (what, bytes) {
                ("Read", true) => io.read_bytes = value,
                ("Write", true) => io.written_bytes = value,
                ("Read", false) => io.reads = value,
                ("Write", false) => io.writes = value,
                _ => {}
            }
        }
    }
    found
}

fn io_v2(text: &str) -> Vec<Io> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(device) = words.next().and_then(device) else { continue };
        let io = entry(&mut found, device);
        for (key, value) in words.filter_map(|w| w.split_once('=')) {
            let Ok(value) = value.parse() else { continue };
            match key {
                "rbytes" => io.read_bytes = value,
                "wbytes" => io.written_bytes = value,
                "rios" => io.reads = value,
                "wios" => io.writes = value,
                _ => {}
            }
        }
    }
    found
}

fn device(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn entry(found: &mut Vec<Io>, (major, minor): (u32, u32)) -> &mut Io {
    let at = found.iter().position(|io| (io.major, io.minor) == (major, minor)).unwrap_or_else(|| {
        found.push(Io { major, minor, ..Io::default() });
        found.len() - 1
    });
    &mut found[at]
}

fn huge(dir: BorrowedFd, size: &str) -> Option<Huge> {
    let file = |name: &str| format!("hugetlb.{size}.{name}");
    if let Some(usage) = number(dir, &file("current")) {
        let events = pairs(&read_at(dir, &file("events")).unwrap_or_default());
        let (limit, failures) = (number(dir, &file("max")), get(&events, "max"));
        return Some(Huge { page_size: size.to_owned(), usage, limit, failures });
    }
    Some(Huge {
        page_size: size.to_owned(),
        usage: number(dir, &file("usage_in_bytes"))?,
        limit: limit_v1(number(dir, &file("limit_in_bytes"))),
        failures: number(dir, &file("failcnt")).unwrap_or(0),
    })
}

fn pressure(text: &str) -> Option<Pressure> {
    let mut pressure = Pressure::default();
    let mut any = false;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let stall = match words.next()? {
            "some" => &mut pressure.some,
            "full" => &mut pressure.full,
            _ => continue,
        };
        any = true;
        for (key, value) in words.filter_map(|w| w.split_once('=')) {
            match key {
                "avg10" => stall.avg10 = value.parse().ok()?,
                "avg60" => stall.avg60 = value.parse().ok()?,
                "avg300" => stall.avg300 = value.parse().ok()?,
                "total" => stall.total = value.parse().ok()?,
                _ => {}
            }
        }
    }
    any.then_some(pressure)
}

/// A file with one number. `max` and what is not there are none.
pub(super) fn number(dir: BorrowedFd, file: &str) -> Option<u64> {
    read_at(dir, file).ok()?.trim().parse().ok()
}

/// A file of `name value` lines.
pub(super) fn pairs(text: &str) -> Vec<(String, u64)> {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

pub(super) fn get(pairs: &[(String, u64)], name: &str) -> u64 {
    pairs.iter().find(|(key, _)| key == name).map_or(0, |&(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_read() {
        let text = "some avg10=1.50 avg60=0.00 avg300=0.25 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n";
        let read = pressure(text).unwrap();
        assert_eq!((read.some.avg10, read.some.total, read.full.total), (1.5, 77, 5));
        assert_eq!(pressure(""), None);
    }

    #[test]
    fn io_lines_become_devices() {
        let io = io_v2("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\ngarbage\n9:1\n");
        assert_eq!(io[0], Io { major: 8, minor: 0, read_bytes: 1, written_bytes: 2, reads: 3, writes: 4 });
        assert_eq!(io.len(), 2);
    }

    #[test]
    fn no_limit_is_none() {
        assert_eq!(limit_v1(Some(9_223_372_036_854_771_712)), None);
        assert_eq!(limit_v1(Some(9_223_372_036_854_710_272)), None, "with 64 KiB pages");
        assert_eq!(limit_v1(Some(4096)), Some(4096));
    }

    #[test]
    fn the_working_set_never_goes_below_nothing() {
        let stat = vec![("inactive_file".to_owned(), 50)];
        assert_eq!(Memory { usage: 40, stat: stat.clone(), ..Memory::default() }.working_set(), 0);
        assert_eq!(Memory { usage: 60, stat, ..Memory::default() }.working_set(), 10);
    }
}

//! How a process is scheduled: policy and nice value, I/O priority, the CPUs of an exec, the personality.

use rustix::io::Errno;

use crate::error::{At, Error, Failure, Step};
use crate::kernel::{self, Result, check};
use crate::spec;

#[derive(Debug, Default, PartialEq)]
pub(crate) struct Scheduling {
    policy: Option<SchedAttr>,
    io: Option<u32>,
    cpus: Option<Vec<usize>>,
    personality: Option<u64>,
}

/// `struct sched_attr`, version 0 (sched_setattr(2)).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}
const _: () = assert!(size_of::<SchedAttr>() == 48);

impl Scheduling {
    pub(crate) fn new(
        process: &spec::Process,
        personality: Option<&spec::Personality>,
    ) -> std::result::Result<Scheduling, Error> {
        let cpus = process.exec_cpu_affinity.as_ref().map(|wanted| {
            let list = if wanted.last.is_empty() { &wanted.initial } else { &wanted.last };
            cpus(list).ok_or_else(|| Error::Invalid(format!("CPU list {list:?}")))
        });
        Ok(Scheduling {
            policy: process.scheduler.as_ref().map(policy).transpose()?,
            io: process.io_priority.as_ref().map(io_priority).transpose()?,
            cpus: cpus.transpose()?,
            personality: personality.map(persona).transpose()?,
        })
    }

    pub(crate) fn set(&self) -> std::result::Result<(), Failure> {
        if let Some(attr) = &self.policy {
            // SAFETY: the structure carries its size and is live; 0 is this process.
            check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const *attr, 0) })
                .at(Step::Scheduler, "container process")?;
        }
        if let Some(priority) = self.io {
            const WHO_PROCESS: i32 = 1;
            // SAFETY: ioprio_set(2) takes integers.
            check(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, priority) })
                .at(Step::Scheduler, "I/O of container process")?;
        }
        if let Some(persona) = self.personality {
            kernel::set_personality(persona).at(Step::Personality, "container process")?;
        }
        Ok(())
    }

    /// The CPUs of an exec (`execCPUAffinity`).
    pub(crate) fn set_affinity(&self) -> std::result::Result<(), Failure> {
        let Some(cpus) = &self.cpus else { return Ok(()) };
        let set = || -> Result<()> {
            let mut set = rustix::thread::CpuSet::new();
            for &cpu in cpus {
                if cpu >= rustix::thread::CpuSet::MAX_CPU {
                    return Err(Errno::INVAL);
                }
                set.set(cpu);
            }
            rustix::thread::sched_setaffinity(None, &set)
        };
        set().at(Step::Scheduler, "CPUs of exec")
    }
}

fn policy(wanted: &spec::Scheduler) -> std::result::Result<SchedAttr, Error> {
    let policy = match wanted.policy.as_str() {
        "SCHED_OTHER" => 0,
        "SCHED_FIFO" => 1,
        "SCHED_RR" => 2,
        "SCHED_BATCH" => 3,
        "SCHED_ISO" => 4,
        "SCHED_IDLE" => 5,
        "SCHED_DEADLINE" => 6,
        other => return Err(Error::Invalid(format!("scheduler policy {other:?}"))),
    };
    let mut flags = 0;
    for flag in &wanted.flags {
        flags |= match flag.as_str() {
            "SCHED_FLAG_RESET_ON_FORK" => 0x01,
            "SCHED_FLAG_RECLAIM" => 0x02,
            "SCHED_FLAG_DL_OVERRUN" => 0x04,
            "SCHED_FLAG_KEEP_POLICY" => 0x08,
            "SCHED_FLAG_KEEP_PARAMS" => 0x10,
            "SCHED_FLAG_UTIL_CLAMP_MIN" => 0x20,
            "SCHED_FLAG_UTIL_CLAMP_MAX" => 0x40,
            other => return Err(Error::Invalid(format!("scheduler flag {other:?}"))),
        };
    }
    let priority = u32::try_from(wanted.priority)
        .map_err(|_| Error::Invalid(format!("scheduler priority {}", wanted.priority)))?;
    Ok(SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy,
        flags,
        nice: wanted.nice,
        priority,
        runtime: wanted.runtime,
        deadline: wanted.deadline,
        period: wanted.period,
    })
}

/// The specification knows two domains and no flags.
fn persona(wanted: &spec::Personality) -> std::result::Result<u64, Error> {
    match (wanted.domain.as_str(), wanted.flags.as_slice()) {
        ("LINUX", []) => Ok(0),
        ("LINUX32", []) => Ok(8),
        _ => Err(Error::Invalid(format!("personality {:?} {:?}", wanted.domain, wanted.flags))),
    }
}

/// Class in the upper bits, level in the lower (ioprio_set(2)).
fn io_priority(wanted: &spec::IoPriority) -> std::result::Result<u32, Error> {
    let class = match wanted.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        other => return Err(Error::Invalid(format!("I/O priority class {other:?}"))),
    };
    match u32::try_from(wanted.priority) {
        Ok(level @ 0..=7) => Ok(class << 13 | level),
        _ => Err(Error::Invalid(format!("I/O priority {}", wanted.priority))),
    }
}

/// `0-3,7`.
fn cpus(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= 8192 {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read() {
        assert_eq!(cpus("0-2,7"), Some(vec![0, 1, 2, 7]));
        for list in ["", "2-1", "x", "0-99999999999", "1,,2"] {
            assert_eq!(cpus(list), None, "{list}");
        }
    }

    #[test]
    fn io_priorities_are_class_and_level() {
        let wanted = |class: &str, priority| spec::IoPriority { class: class.into(), priority };
        assert_eq!(io_priority(&wanted("IOPRIO_CLASS_BE", 4)).unwrap(), 2 << 13 | 4);
        assert!(io_priority(&wanted("IOPRIO_CLASS_BE", 8)).is_err());
        assert!(io_priority(&wanted("BE", 1)).is_err());
    }
}

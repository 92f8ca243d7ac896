//! Capabilities: names to bits, and the five sets put in force.

use std::os::raw::c_int;
use std::str::FromStr;

use rustix::io::Errno;

use crate::kernel::{Result, check, prctl};
use crate::spec;

/// CAP_SYS_ADMIN.
pub(crate) const SYS_ADMIN: u64 = 1 << 21;

/// The five sets of capabilities(7), one bit per capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sets {
    pub(crate) bounding: u64,
    pub(crate) effective: u64,
    pub(crate) inheritable: u64,
    pub(crate) permitted: u64,
    pub(crate) ambient: u64,
}

impl Sets {
    /// Names that this kernel does not have are left out and handed back: a specification may be newer than the
    /// kernel, and a capability that does not exist cannot be given.
    pub(crate) fn new(wanted: &spec::Capabilities, last: u32) -> (Sets, Vec<String>) {
        let mut unknown = Vec::new();
        let mut bits = |names: &[String]| {
            let mut set = 0;
            for name in names {
                match number(name).filter(|number| *number <= last) {
                    Some(number) => set |= 1 << number,
                    None if !unknown.contains(name) => unknown.push(name.clone()),
                    None => {}
                }
            }
            set
        };
        let sets = Sets {
            bounding: bits(&wanted.bounding),
            effective: bits(&wanted.effective),
            inheritable: bits(&wanted.inheritable),
            permitted: bits(&wanted.permitted),
            ambient: bits(&wanted.ambient),
        };
        (sets.consistent(), unknown)
    }

    /// What the kernel would refuse or what would hand out more than was meant: effective stays within
    /// permitted, and inheritable holds only what ambient needs. A container whose inheritable set is not empty
    /// gives file capabilities a power that nobody asked for (CVE-2022-29162, CVE-2022-24769).
    fn consistent(self) -> Sets {
        let ambient = self.ambient & self.permitted & self.inheritable;
        Sets { effective: self.effective & self.permitted, inheritable: ambient, ambient, ..self }
    }
}

fn number(name: &str) -> Option<u32> {
    caps::Capability::from_str(name).ok().map(|capability| u32::from(capability.index()))
}

/// The highest capability this kernel knows, from `/proc/sys/kernel/cap_last_cap`.
pub(crate) fn last() -> u32 {
    static LAST: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *LAST.get_or_init(|| {
        // PR_CAPBSET_READ answers EINVAL beyond the last one.
        (0..64).rfind(|number| prctl(libc::PR_CAPBSET_READ, *number, 0).is_ok()).unwrap_or(40) as u32
    })
}

/// Takes everything from the bounding set that is not in `keep`. Needs CAP_SETPCAP.
pub(crate) fn limit_bounding(keep: u64, last: u32) -> Result<()> {
    for number in (0..=u64::from(last)).filter(|number| keep & (1 << number) == 0) {
        prctl(libc::PR_CAPBSET_DROP, number, 0)?;
    }
    Ok(())
}

/// Keeps permitted capabilities over the change of user that follows.
pub(crate) fn keep_over_setuid() -> Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, 1, 0).map(drop)
}

/// Puts effective, permitted and inheritable in force.
pub(crate) fn apply(sets: &Sets) -> Result<()> {
    let header = Header { version: VERSION_3, pid: 0 };
    let half = |shift: u32| Data {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 takes two data structures; both pointers are live.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

/// What this process may do now.
pub(crate) fn permitted() -> Result<u64> {
    let header = Header { version: VERSION_3, pid: 0 };
    let mut data = [Data::default(), Data::default()];
    // SAFETY: version 3 fills two data structures; both pointers are live.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) })?;
    Ok(u64::from(data[0].permitted) | u64::from(data[1].permitted) << 32)
}

/// Raises the ambient set, which starts out empty: a change of user or an exec empties it.
pub(crate) fn raise_ambient(ambient: u64) -> Result<()> {
    const CLEAR_ALL: u64 = 4;
    const RAISE: u64 = 2;
    prctl(libc::PR_CAP_AMBIENT, CLEAR_ALL, 0)?;
    for number in (0..64).filter(|number| ambient & (1 << number) != 0) {
        match prctl(libc::PR_CAP_AMBIENT, RAISE, number) {
            // Not permitted to us either; the other sets lack it as well.
            Err(Errno::PERM) => {}
            other => drop(other?),
        }
    }
    Ok(())
}

const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: c_int,
}
const _: () = assert!(size_of::<Header>() == 8);

#[repr(C)]
#[derive(Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}
const _: () = assert!(size_of::<Data>() == 12);

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn inheritable_is_empty_unless_ambient_needs_it() {
        let wanted = spec::Capabilities {
            permitted: names(&["CAP_KILL", "CAP_CHOWN"]),
            inheritable: names(&["CAP_KILL", "CAP_CHOWN"]),
            effective: names(&["CAP_KILL", "CAP_SYS_ADMIN"]),
            ambient: names(&["CAP_KILL"]),
            bounding: names(&["CAP_KILL"]),
        };
        let (sets, unknown) = Sets::new(&wanted, 40);
        let kill = 1 << 5;
        assert_eq!(unknown, names(&[]));
        assert_eq!((sets.inheritable, sets.ambient, sets.effective), (kill, kill, kill));
        assert_eq!(sets.permitted, kill | 1);
    }

    #[test]
    fn names_the_kernel_lacks_are_left_out_and_named_once() {
        let wanted = spec::Capabilities {
            permitted: names(&["CAP_NEVER", "CAP_CHECKPOINT_RESTORE", "CAP_CHOWN"]),
            bounding: names(&["CAP_NEVER"]),
            ..spec::Capabilities::default()
        };
        let (sets, unknown) = Sets::new(&wanted, 39);
        assert_eq!(sets.permitted, 1);
        assert_eq!(unknown, names(&["CAP_NEVER", "CAP_CHECKPOINT_RESTORE"]));
    }
}

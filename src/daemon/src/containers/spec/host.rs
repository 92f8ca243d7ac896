//! What this host can do, asked once: capabilities, security modules, cgroup versions, kernel features.
//! Decides nothing.

use std::{fs, path::Path, sync::OnceLock};

use super::capability;

/// Answers of this kernel and of the limits that the daemon itself was started with.
#[derive(Clone, Debug)]
pub struct Host {
    /// Capabilities that can be given to a container: those of the daemon's own bounding set.
    pub capabilities: u64,
    pub apparmor: bool,
    pub selinux: bool,
    /// Cgroup v2 holds the controllers.
    pub unified: bool,
    pub hugetlb: bool,
    /// Swap is accounted for.
    pub swap: bool,
    /// No process of ours can go below this oom_score_adj.
    pub oom_floor: i32,
    /// Version of the kernel.
    pub release: (u32, u32),
    /// User namespaces may be made.
    pub user_namespaces: bool,
    pub hostname: String,
}

/// The host, asked at the first call.
pub fn get() -> &'static Host {
    static HOST: OnceLock<Host> = OnceLock::new();
    HOST.get_or_init(ask)
}

fn ask() -> Host {
    let status = text("/proc/self/status");
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let effective = mask(&status, "CapEff:");
    Host {
        capabilities: mask(&status, "CapBnd:"),
        apparmor: text("/sys/module/apparmor/parameters/enabled").starts_with('Y'),
        selinux: Path::new("/sys/fs/selinux/enforce").exists(),
        unified,
        hugetlb: match unified {
            true => text("/sys/fs/cgroup/cgroup.controllers")
                .split_ascii_whitespace()
                .any(|name| name == "hugetlb"),
            false => Path::new("/sys/fs/cgroup/hugetlb").is_dir(),
        },
        swap: swap(unified),
        oom_floor: match effective >> CAP_SYS_RESOURCE & 1 {
            1 => -1000,
            _ => text("/proc/self/oom_score_adj").trim().parse().unwrap_or(0),
        },
        release: release(&text("/proc/sys/kernel/osrelease")),
        user_namespaces: text("/proc/sys/user/max_user_namespaces")
            .trim()
            .parse::<u64>()
            .is_ok_and(|max| max > 0),
        hostname: text("/proc/sys/kernel/hostname").trim().to_owned(),
    }
}

const CAP_SYS_RESOURCE: u32 = 24;

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn mask(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

/// With v2 the root group has no such file, so one of our own place in the tree is looked at.
fn swap(unified: bool) -> bool {
    if !unified {
        return Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists();
    }
    let own = text("/proc/self/cgroup");
    let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let own = Path::new("/sys/fs/cgroup").join(own.trim_start_matches('/'));
    own.join("memory.swap.max").exists()
        || fs::read_dir("/sys/fs/cgroup").is_ok_and(|groups| {
            groups.flatten().take(64).any(|group| group.path().join("memory.swap.max").exists())
        })
}

/// `6.18.5-custom`: major and minor.
fn release(text: &str) -> (u32, u32) {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// File systems whose mounts can be given other ids, and the kernel that began it (mount_setattr(2)).
fn maps_ids(magic: u64, release: (u32, u32)) -> bool {
    const EXT4: u64 = 0xef53;
    const XFS: u64 = 0x5846_5342;
    const BTRFS: u64 = 0x9123_683e;
    const F2FS: u64 = 0xf2f5_2010;
    const TMPFS: u64 = 0x0102_1994;
    match magic {
        EXT4 => release >= (5, 12),
        XFS | BTRFS => release >= (5, 15),
        F2FS => release >= (5, 18),
        TMPFS => release >= (6, 3),
        _ => false,
    }
}

impl Host {
    /// mount_setattr(2) with AT_RECURSIVE.
    pub fn recursive_read_only(&self) -> bool {
        self.release >= (5, 12)
    }

    /// Whether a pod whose images lie in this directory can have a user namespace: the kernel makes them, overlayfs
    /// takes layers with mapped ids (5.19) and so does the file system below.
    pub fn user_namespaces_at(&self, images: &Path) -> bool {
        let magic = rustix::fs::statfs(images).map(|stat| stat.f_type as u64).unwrap_or(0);
        self.user_namespaces && self.release >= (5, 19) && maps_ids(magic & 0xffff_ffff, self.release)
    }

    /// The names of the capabilities that can be given.
    pub fn capability_names(&self) -> std::collections::BTreeSet<&'static str> {
        capability::in_mask(self.capabilities)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_read_from_status() {
        let status = "Name:\tx\nCapEff:\t0000000000000003\nCapBnd:\t000001ffffffffff\n";
        assert_eq!(mask(status, "CapEff:"), 3);
        assert_eq!(mask(status, "CapBnd:"), (1 << 41) - 1);
        assert_eq!(mask(status, "CapAmb:"), 0);
    }

    #[test]
    fn releases_are_compared_as_numbers() {
        for (text, expected) in [("6.18.5-x", (6, 18)), ("5.4", (5, 4)), ("10.0.1", (10, 0)), ("", (0, 0))] {
            assert_eq!(release(text), expected);
        }
        assert!(release("6.2.0") < (6, 12));
    }

    #[test]
    fn ids_are_mapped_where_the_kernel_learnt_it() {
        for (magic, release, expected) in [
            (0xef53, (5, 15), true),
            (0xef53, (5, 4), false),
            (0x0102_1994, (6, 2), false),
            (0x0102_1994, (6, 3), true),
            (0x6969, (6, 18), false),
        ] {
            assert_eq!(maps_ids(magic, release), expected, "{magic:x} {release:?}");
        }
    }

    #[test]
    fn this_host_answers() {
        let host = get();
        assert_ne!(host.capabilities, 0);
        assert!(host.recursive_read_only(), "{:?}", host.release);
        assert!(!host.hostname.is_empty());
        assert!((-1000..=1000).contains(&host.oom_floor));
    }
}

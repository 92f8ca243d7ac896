//! Kernel parameters of the container's namespaces. They are checked by name, because a value that lands in a
//! namespace of the host changes the host (CVE-2022-0811), and written below a procfs that nobody else has
//! mounted anything on (CVE-2025-52881).

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::error::{At, Error, Failure, Step};
use crate::rootfs::mount::{self};
use crate::rootfs::options::Options;

/// Which namespaces are not the host's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Has {
    pub(crate) ipc: bool,
    pub(crate) uts: bool,
    pub(crate) net: bool,
}

/// A parameter that passed the check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sysctl {
    /// Below procfs.
    path: String,
    value: String,
}

impl Sysctl {
    pub(crate) fn is_net(&self) -> bool {
        self.path.starts_with("sys/net/")
    }
}

/// Parameters of the ipc namespace (ipc_namespaces(7)), besides `fs.mqueue.*`.
const IPC: [&str; 11] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
    "kernel.msg_next_id",
    "kernel.sem_next_id",
    "kernel.shm_next_id",
];

/// Refuses names that are not of a namespace, or of one that the container shares with the host.
pub(crate) fn check(wanted: Option<&BTreeMap<String, String>>, has: Has) -> Result<Vec<Sysctl>, Error> {
    wanted.into_iter().flatten().map(|(name, value)| one(name, value, has)).collect()
}

fn one(name: &str, value: &str, has: Has) -> Result<Sysctl, Error> {
    let invalid = |why: &str| Err(Error::Invalid(format!("sysctl {name:?}: {why}")));
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if !name.bytes().all(plain) || name.split('.').any(str::is_empty) {
        return invalid("not a name of the form a.b.c");
    }
    if value.contains(['\0', '\n']) {
        return invalid("its value is not one line");
    }
    let ours = if IPC.contains(&name) || name.starts_with("fs.mqueue.") {
        has.ipc
    } else if name.starts_with("net.") {
        has.net
    } else if name == "kernel.domainname" || name == "kernel.hostname" {
        has.uts
    } else {
        return invalid("not a parameter of a namespace");
    };
    if !ours {
        return invalid("its namespace is the host's");
    }
    Ok(Sysctl { path: format!("sys/{}", name.replace('.', "/")), value: value.to_owned() })
}

/// A procfs of our own, mounted nowhere. Made with the host's rights; below `sys` it shows the namespaces of
/// whoever looks, so the child can use it.
pub(crate) fn procfs() -> Result<OwnedFd, Failure> {
    let options = Options::parse(["nosuid", "nodev", "noexec"]);
    mount::new("proc", "proc", &options).map_err(|refused| refused.errno).at(Step::Procfs, "ourselves")
}

/// Writes them all.
pub(crate) fn apply(procfs: BorrowedFd<'_>, sysctls: &[Sysctl]) -> Result<(), Failure> {
    for Sysctl { path, value } in sysctls {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        openat2(procfs, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty(), resolve)
            .and_then(|file| rustix::io::write(&file, value.as_bytes()))
            .at(Step::Sysctl, format_args!("{path} = {value:?}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Has = Has { ipc: true, uts: true, net: true };

    #[test]
    fn parameters_of_the_containers_namespaces_are_allowed() {
        for name in
            ["net.ipv4.ip_forward", "kernel.shm_rmid_forced", "fs.mqueue.msg_max", "kernel.domainname"]
        {
            assert!(one(name, "1", ALL).is_ok(), "{name}");
        }
        assert_eq!(one("net.core.somaxconn", "1", ALL).unwrap().path, "sys/net/core/somaxconn");
    }

    #[test]
    fn s15_everything_else_is_refused() {
        for name in [
            "kernel.core_pattern",
            "kernel.shm_rmid_forced/../core_pattern",
            "net.ipv4/../../kernel/core_pattern",
            "net/ipv4/ip_forward",
            "net..ipv4",
            "net.",
            "",
            "net.ipv4.\0",
            "vm.overcommit_memory",
            "fs.mqueue",
            "kernel.sem+kernel.core_pattern",
        ] {
            assert!(matches!(one(name, "1", ALL), Err(Error::Invalid(_))), "{name:?}");
        }
        assert!(one("net.ipv4.ip_forward", "1\n2", ALL).is_err());
    }

    #[test]
    fn s15_parameters_of_a_namespace_of_the_host_are_refused() {
        for name in ["net.ipv4.ip_forward", "kernel.shmmax", "fs.mqueue.msg_max", "kernel.hostname"] {
            assert!(matches!(one(name, "1", Has::default()), Err(Error::Invalid(_))), "{name}");
        }
    }
}

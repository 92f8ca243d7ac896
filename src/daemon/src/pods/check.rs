//! Refuses pods whose config contradicts itself, before anything of them is made. Pure.

use cri_api::v1::{self, NamespaceMode};

use crate::containers::spec::mounts::mappings_are_sane;

/// Why a pod cannot be made as it is written.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("metadata with name, namespace and uid is needed")]
    Metadata,
    #[error("run_as_group needs run_as_user")]
    GroupWithoutUser,
    #[error("{0} is not a user or group id: ids are from 0 to 2147483647")]
    IdRange(i64),
    #[error("namespaces: {0}")]
    Namespaces(&'static str),
    #[error("user namespace: {0}")]
    UserNamespace(&'static str),
    #[error("sysctl {0:?}: {1}")]
    Sysctl(String, &'static str),
    #[error("hostname {0:?} is not one")]
    Hostname(String),
    #[error("cgroup_parent {0:?} is not an absolute path without \"..\"")]
    CgroupParent(String),
    #[error("log_directory {0:?} is not an absolute path without \"..\"")]
    LogDirectory(String),
    #[error("port mapping: {0} is not a port")]
    Port(i32),
    #[error("port mapping: {0:?} is not an address")]
    HostIp(String),
}

/// Checks a pod's config.
pub fn check(config: &v1::PodSandboxConfig) -> Result<(), Error> {
    let metadata = config.metadata.as_ref().ok_or(Error::Metadata)?;
    if metadata.name.is_empty() || metadata.namespace.is_empty() || metadata.uid.is_empty() {
        return Err(Error::Metadata);
    }
    let linux = config.linux.clone().unwrap_or_default();
    let security = linux.security_context.clone().unwrap_or_default();
    if security.run_as_group.is_some() && security.run_as_user.is_none() {
        return Err(Error::GroupWithoutUser);
    }
    let ids = [security.run_as_user, security.run_as_group].into_iter().flatten().map(|id| id.value);
    if let Some(id) = ids
        .chain(security.supplemental_groups.iter().copied())
        .find(|id| !(0..=i64::from(i32::MAX)).contains(id))
    {
        return Err(Error::IdRange(id));
    }
    let options = security.namespace_options.clone().unwrap_or_default();
    namespaces(&options)?;
    hostname(&config.hostname)?;
    if !linux.cgroup_parent.is_empty() && !plain_path(&linux.cgroup_parent) {
        return Err(Error::CgroupParent(short(&linux.cgroup_parent)));
    }
    if !config.log_directory.is_empty() && !plain_path(&config.log_directory) {
        return Err(Error::LogDirectory(short(&config.log_directory)));
    }
    for mapping in &config.port_mappings {
        // 0 on the host means that none is wanted; the container's port is then only a note.
        if !(0..=65535).contains(&mapping.host_port) {
            return Err(Error::Port(mapping.host_port));
        }
        if !(0..=65535).contains(&mapping.container_port)
            || (mapping.host_port > 0 && mapping.container_port == 0)
        {
            return Err(Error::Port(mapping.container_port));
        }
        if !mapping.host_ip.is_empty() && mapping.host_ip.parse::<std::net::IpAddr>().is_err() {
            return Err(Error::HostIp(short(&mapping.host_ip)));
        }
    }
    linux.sysctls.iter().try_for_each(|(key, value)| sysctl(key, value, &options))
}

fn namespaces(options: &v1::NamespaceOption) -> Result<(), Error> {
    let mode = |mode: i32| NamespaceMode::try_from(mode).map_err(|_| Error::Namespaces("a mode is unknown"));
    for (wanted, why) in
        [(options.network, "the network is of mode POD or NODE"), (options.ipc, "ipc is of mode POD or NODE")]
    {
        if !matches!(mode(wanted)?, NamespaceMode::Pod | NamespaceMode::Node) {
            return Err(Error::Namespaces(why));
        }
    }
    mode(options.pid)?;
    let Some(user) = &options.userns_options else { return Ok(()) };
    match mode(user.mode)? {
        NamespaceMode::Node if user.uids.is_empty() && user.gids.is_empty() => Ok(()),
        NamespaceMode::Node => Err(Error::UserNamespace("mode NODE takes no mappings")),
        NamespaceMode::Pod => {
            if user.uids.len() != 1 || user.gids.len() != 1 {
                return Err(Error::UserNamespace("exactly one mapping of uids and one of gids is needed"));
            }
            if !mappings_are_sane(&user.uids) || !mappings_are_sane(&user.gids) {
                return Err(Error::UserNamespace("a mapping is empty or out of range"));
            }
            // Programs start as root inside unless told otherwise, and the root file system belongs to it.
            match user.uids.iter().chain(&user.gids).all(|map| map.container_id == 0) {
                true => Ok(()),
                false => Err(Error::UserNamespace("id 0 is not mapped")),
            }
        }
        NamespaceMode::Container | NamespaceMode::Target => {
            Err(Error::UserNamespace("modes are POD and NODE"))
        }
    }
}

/// Only what belongs to a namespace that the pod has of its own: all else is the host's (CVE-2022-0811).
pub fn sysctl(key: &str, value: &str, options: &v1::NamespaceOption) -> Result<(), Error> {
    const IPC: [&str; 11] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.msg_next_id",
        "kernel.sem",
        "kernel.sem_next_id",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_next_id",
        "kernel.shm_rmid_forced",
    ];
    let bad = |why| Err(Error::Sysctl(short(key), why));
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-:@".contains(&b);
    if key.is_empty() || key.len() > 256 || !key.bytes().all(plain) || key.split('.').any(str::is_empty) {
        return bad("the key is malformed");
    }
    if value.len() > 4096
        || value.bytes().any(|b| b.is_ascii_control() && b != b'\t' || b == b'+' || b == b'=')
    {
        return bad("the value is malformed");
    }
    let own = |mode: NamespaceMode| mode != NamespaceMode::Node;
    let (allowed, why) = if key.starts_with("net.") {
        (own(options.network()), "the network namespace is the host's")
    } else if key.starts_with("fs.mqueue.") || IPC.contains(&key) {
        (own(options.ipc()), "the ipc namespace is the host's")
    } else if key == "kernel.domainname" {
        (own(options.network()), "the uts namespace is the host's")
    } else if key.starts_with("user.") {
        let user = options.userns_options.as_ref();
        (user.is_some_and(|user| user.mode() == NamespaceMode::Pod), "the pod has no user namespace")
    } else {
        (false, "it belongs to no namespace")
    };
    match allowed {
        true => Ok(()),
        false => bad(why),
    }
}

/// A name as hostname(7) and the kernel have it; empty means the host's.
fn hostname(name: &str) -> Result<(), Error> {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    match name.is_empty() || name.len() <= 64 && name.split('.').all(label) {
        true => Ok(()),
        false => Err(Error::Hostname(short(name))),
    }
}

fn plain_path(path: &str) -> bool {
    path.starts_with('/')
        && path.len() < 4096
        && !path.bytes().any(|b| b.is_ascii_control())
        && !path.split('/').any(|part| part == "..")
}

fn short(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn pod() -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: "p".into(),
                uid: "u".into(),
                namespace: "n".into(),
                attempt: 0,
            }),
            ..Default::default()
        }
    }

    fn with(change: impl FnOnce(&mut v1::LinuxPodSandboxConfig)) -> v1::PodSandboxConfig {
        let mut linux = v1::LinuxPodSandboxConfig::default();
        change(&mut linux);
        v1::PodSandboxConfig { linux: Some(linux), ..pod() }
    }

    fn secure(change: impl FnOnce(&mut v1::LinuxSandboxSecurityContext)) -> v1::PodSandboxConfig {
        with(|linux| change(linux.security_context.insert(Default::default())))
    }

    fn user(mode: NamespaceMode, uids: &[(u32, u32, u32)]) -> v1::PodSandboxConfig {
        let maps: Vec<v1::IdMapping> = uids
            .iter()
            .map(|(container_id, host_id, length)| v1::IdMapping {
                container_id: *container_id,
                host_id: *host_id,
                length: *length,
            })
            .collect();
        secure(|security| {
            let options = security.namespace_options.insert(Default::default());
            options.userns_options =
                Some(v1::UserNamespace { mode: mode.into(), uids: maps.clone(), gids: maps });
        })
    }

    #[test]
    fn a_plain_pod_is_fine_and_one_without_a_name_is_not() {
        assert_eq!(check(&pod()), Ok(()));
        assert_eq!(check(&v1::PodSandboxConfig { metadata: None, ..pod() }), Err(Error::Metadata));
        let mut unnamed = pod();
        unnamed.metadata.as_mut().unwrap().uid.clear();
        assert_eq!(check(&unnamed), Err(Error::Metadata));
    }

    #[test]
    fn ids_are_in_range_and_a_group_needs_a_user() {
        let id = |value| Some(v1::Int64Value { value });
        assert_eq!(check(&secure(|s| s.run_as_group = id(1))), Err(Error::GroupWithoutUser));
        for bad in [-1, 1 << 31, i64::MAX] {
            assert_eq!(check(&secure(|s| s.run_as_user = id(bad))), Err(Error::IdRange(bad)));
            assert_eq!(check(&secure(|s| s.supplemental_groups = vec![bad])), Err(Error::IdRange(bad)));
        }
        assert_eq!(check(&secure(|s| (s.run_as_user, s.run_as_group) = (id(1), id(2)))), Ok(()));
    }

    #[test]
    fn a_user_namespace_has_one_mapping_with_root_in_it() {
        use NamespaceMode::{Container, Node, Pod, Target};
        let table: [(NamespaceMode, &[(u32, u32, u32)], bool); 10] = [
            (Pod, &[(0, 1000, 100_000)], true),
            (Pod, &[(0, 65536, 65536)], true),
            (Pod, &[], false),
            (Pod, &[(0, 1000, 10), (10, 2000, 10)], false),
            (Pod, &[(1, 1000, 100_000)], false),
            (Pod, &[(0, 1000, 0)], false),
            (Pod, &[(0, u32::MAX, 2)], false),
            (Node, &[], true),
            (Container, &[(0, 1000, 100_000)], false),
            (Target, &[(0, 1000, 100_000)], false),
        ];
        for (mode, maps, good) in table {
            assert_eq!(check(&user(mode, maps)).is_ok(), good, "{mode:?} {maps:?}");
        }
    }

    #[test]
    fn sysctls_belong_to_a_namespace_of_the_pod() {
        let own = v1::NamespaceOption::default();
        let host = v1::NamespaceOption { network: 2, ipc: 2, ..Default::default() };
        for (key, value, own_ok) in [
            ("net.ipv4.ip_forward", "1", true),
            ("net.ipv4.ping_group_range", "0 2147483647", true),
            ("net.ipv4.conf.eth0-1.forwarding", "1", true),
            ("kernel.shm_rmid_forced", "1", true),
            ("fs.mqueue.msg_max", "100", true),
            ("kernel.domainname", "x.org", true),
            ("kernel.core_pattern", "|/x", false),
            ("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/x", false),
            ("kernel.shmmax", "1\n2", false),
            ("net.ipv4.ip_forward+kernel.core_pattern", "1", false),
            ("net..core", "1", false),
            ("net/../../etc", "1", false),
            ("net.ipv4.\0", "1", false),
            ("", "1", false),
            (".net", "1", false),
            ("vm.swappiness", "1", false),
            ("user.max_user_namespaces", "1", false),
            ("network.x", "1", false),
        ] {
            assert_eq!(sysctl(key, value, &own).is_ok(), own_ok, "{key}");
            assert!(sysctl(key, value, &host).is_err(), "{key} of the host");
        }
        let config = with(|linux| linux.sysctls = HashMap::from([("vm.swappiness".into(), "1".into())]));
        assert!(matches!(check(&config), Err(Error::Sysctl(..))));
    }

    #[test]
    fn names_paths_and_ports_are_such() {
        let host = |name: &str| v1::PodSandboxConfig { hostname: name.into(), ..pod() };
        for (name, good) in [
            ("web-0", true),
            ("a.b.c", true),
            ("", true),
            ("a b", false),
            ("a\nb", false),
            ("a..b", false),
            ("../x", false),
        ] {
            assert_eq!(check(&host(name)).is_ok(), good, "{name:?}");
        }
        assert!(check(&host(&"x".repeat(65))).is_err());
        for (parent, good) in
            [("/kubepods/pod1", true), ("kubepods", false), ("/a/../..", false), ("/a\n", false)]
        {
            assert_eq!(check(&with(|linux| linux.cgroup_parent = parent.into())).is_ok(), good, "{parent:?}");
        }
        let port = |host_port, container_port, host_ip: &str| v1::PodSandboxConfig {
            port_mappings: vec![v1::PortMapping {
                host_port,
                container_port,
                host_ip: host_ip.into(),
                protocol: 0,
            }],
            ..pod()
        };
        for (config, good) in [
            (port(0, 80, ""), true),
            (port(0, 0, ""), true),
            (port(12000, 80, "127.0.0.1"), true),
            (port(12000, 80, "::1"), true),
            (port(12000, 0, ""), false),
            (port(-1, 80, ""), false),
            (port(70000, 80, ""), false),
            (port(1, 80, "localhost"), false),
        ] {
            assert_eq!(check(&config).is_ok(), good, "{:?}", config.port_mappings);
        }
        assert!(check(&v1::PodSandboxConfig { log_directory: "var/log".into(), ..pod() }).is_err());
    }
}

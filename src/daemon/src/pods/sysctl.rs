//! Which kernel settings a pod may have: only such that one of its own namespaces holds. Decides; the shim writes.

use std::collections::{BTreeMap, HashMap};

use crate::config::Config;

/// Which namespaces of its own a pod has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Own {
    pub network: bool,
    pub ipc: bool,
    pub uts: bool,
    pub user: bool,
}

/// The settings of a pod: those it asks for and, where they fit, the defaults.
pub fn settings(
    config: &Config,
    asked: &HashMap<String, String>,
    own: Own,
) -> Result<HashMap<String, String>, String> {
    for (key, value) in asked {
        check(key, value, own)?;
    }
    let defaults = defaults(config, own).into_iter().filter(|(key, value)| check(key, value, own).is_ok());
    Ok(defaults.chain(asked.clone()).collect())
}

fn defaults(config: &Config, own: Own) -> BTreeMap<String, String> {
    let mut settings = BTreeMap::new();
    // In a user namespace neither is wanted: root there may bind low ports, and group ids up to 2147483647 are
    // not mapped, which makes the kernel refuse the range.
    if own.network && !own.user {
        if config.security.enable_unprivileged_ports {
            settings.insert("net.ipv4.ip_unprivileged_port_start".into(), "0".into());
        }
        if config.security.enable_unprivileged_icmp {
            settings.insert("net.ipv4.ping_group_range".into(), "0 2147483647".into());
        }
    }
    settings.extend(config.defaults.default_sysctls.clone());
    settings
}

/// A value is written as it is to one file, so what matters is that the key names exactly one file that belongs to a
/// namespace of the pod (CVE-2022-0811: a value with `+` was read as more settings; CVE-2022-0532: the host's).
fn check(key: &str, value: &str, own: Own) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
    if !key.split('.').all(|part| !part.is_empty() && part.chars().all(plain)) {
        return Err(format!("sysctl {key:?} is not a name in dot form"));
    }
    if value.contains(['\0', '\n', '\r']) || value.len() > 4096 {
        return Err(format!("sysctl {key}: the value is not one short line"));
    }
    let (namespace, held) = if key.starts_with("net.") {
        ("network", own.network)
    } else if ipc(key) {
        ("ipc", own.ipc)
    } else if key == "kernel.domainname" {
        ("uts", own.uts)
    } else {
        return Err(format!("sysctl {key} belongs to no namespace"));
    };
    match held {
        true => Ok(()),
        false => Err(format!("sysctl {key} is refused: the pod has no {namespace} namespace of its own")),
    }
}

/// Settings that an ipc namespace holds (ipc_namespaces(7)). The shim's list is the same; here they are refused as the
/// client's mistake.
fn ipc(key: &str) -> bool {
    const KEYS: [&str; 11] = [
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
    KEYS.contains(&key) || key.starts_with("fs.mqueue.")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: Own = Own { network: true, ipc: true, uts: true, user: true };
    const NONE: Own = Own { network: false, ipc: false, uts: false, user: false };

    #[test]
    fn a_setting_is_taken_only_with_the_namespace_that_holds_it() {
        for (key, own) in [
            ("net.core.somaxconn", Own { network: true, ..NONE }),
            ("kernel.shm_rmid_forced", Own { ipc: true, ..NONE }),
            ("kernel.sem", Own { ipc: true, ..NONE }),
            ("fs.mqueue.msg_max", Own { ipc: true, ..NONE }),
            ("kernel.domainname", Own { uts: true, ..NONE }),
        ] {
            assert!(check(key, "1", own).is_ok(), "{key}");
            assert!(check(key, "1", NONE).is_err(), "{key}");
        }
    }

    #[test]
    fn s15_a_key_cannot_name_another_file_than_one_of_its_namespace() {
        for key in [
            "kernel.core_pattern",
            "kernel.hostname",
            "user.max_user_namespaces",
            "kernel.shm_rmid_forced/../core_pattern",
            "net/../kernel/core_pattern",
            "net..kernel.core_pattern",
            "net.",
            ".net.core",
            "net.core.\0",
            "net.core=1\nkernel.core_pattern",
            "vm.swappiness",
            "fs.mqueue.",
            "",
        ] {
            assert!(check(key, "1", ALL).is_err(), "{key:?}");
        }
    }

    #[test]
    fn s15_a_value_is_one_line() {
        for value in ["1\n2", "1\0", "1\r"] {
            assert!(check("kernel.shm_rmid_forced", value, ALL).is_err(), "{value:?}");
        }
        // Written as it is: `+` and `=` mean nothing to the kernel but a value it refuses.
        assert!(check("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/x", ALL).is_ok());
    }

    #[test]
    fn defaults_are_for_pods_with_a_network_and_without_user_namespace() {
        let config = Config::default();
        let keys = |own| settings(&config, &HashMap::new(), own).unwrap().len();
        assert_eq!(keys(Own { network: true, ..NONE }), 2);
        assert_eq!(keys(Own { network: true, user: true, ..NONE }), 0);
        assert_eq!(keys(NONE), 0);
    }

    #[test]
    fn what_the_pod_asks_for_wins_over_defaults() {
        let asked = HashMap::from([("net.ipv4.ip_unprivileged_port_start".into(), "1024".into())]);
        let got = settings(&Config::default(), &asked, Own { network: true, ..NONE }).unwrap();
        assert_eq!(got["net.ipv4.ip_unprivileged_port_start"], "1024");
    }

    proptest! {
        #[test]
        fn s15_a_key_that_is_taken_is_a_path_of_a_namespace(
            key in "(net|kernel|fs|user)([.]|[.][.]|/|)(core|sem|mqueue|domainname|[.]|/|\u{0}|)([.]|/|)(a|[.]|)",
        ) {
            if check(&key, "1", ALL).is_ok() {
                let path = key.replace('.', "/");
                prop_assert!(!path.split('/').any(|part| part.is_empty() || part == ".."), "{}", path);
                prop_assert!(["net/", "kernel/", "fs/mqueue/"].iter().any(|top| path.starts_with(top)), "{}", path);
            }
        }
    }
}

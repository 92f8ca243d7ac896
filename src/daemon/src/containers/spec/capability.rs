//! Which capabilities a process gets. Knows names and sets; the kernel's side is the business of the container room.

use std::collections::BTreeSet;

use cri_api::v1;

use super::Error;

/// Every capability by number (capabilities(7)), without the `CAP_`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What a container has that says nothing: the list that images have come to expect of every runtime.
pub const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// The sets of one process, as names with `CAP_`. Permitted and effective equal the bounding set. Inheritable is no
/// more than ambient needs: a full one let programs with file capabilities regain dropped ones (CVE-2022-24769).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    pub bounding: Vec<String>,
    pub ambient: Vec<String>,
}

impl Sets {
    /// True when the process may have the capability of this name (without `CAP_`).
    pub fn has(&self, name: &str) -> bool {
        self.bounding.iter().any(|held| held.strip_prefix("CAP_") == Some(name))
    }
}

/// The names in a mask as `/proc/<pid>/status` shows it.
pub fn in_mask(mask: u64) -> BTreeSet<&'static str> {
    NAMES.iter().zip(0..).filter(|(_, bit)| mask >> bit & 1 == 1).map(|(name, _)| *name).collect()
}

/// Decides the sets. `default` is what the configuration gives to those who ask for nothing. `known` is what this kernel
/// and the daemon's own bounding set have at all: more asked for by name is an error, as part of ALL it is left out.
pub fn decide(
    wish: Option<&v1::Capability>,
    privileged: bool,
    default: &[String],
    known: &BTreeSet<&str>,
) -> Result<Sets, Error> {
    let empty = v1::Capability::default();
    let wish = wish.unwrap_or(&empty);
    let (add, add_all) = names(&wish.add_capabilities)?;
    let (drop, drop_all) = names(&wish.drop_capabilities)?;
    let (ambient, _) = names(&wish.add_ambient_capabilities)?;

    if let (false, Some(name)) = (privileged, add.iter().chain(&ambient).find(|name| !known.contains(*name)))
    {
        return Err(Error::CapabilityMissing((*name).to_owned()));
    }
    let mut set = BTreeSet::new();
    if privileged || add_all {
        set.extend(known.iter().copied());
    } else if !drop_all {
        for name in default {
            set.insert(name_of(name)?);
        }
    }
    set.extend(add.iter().chain(&ambient).copied());
    // A name on both lists stays out; "drop ALL, add NET_ADMIN" gives one. Privileged means all of them, whatever is
    // dropped: that is what pods have come to rely on.
    if !privileged {
        set.retain(|name| !drop.contains(name));
    }
    let bounding = set.intersection(known).map(|name| format!("CAP_{name}")).collect();
    let ambient = ambient.iter().filter(|name| set.contains(*name) && known.contains(*name));
    let ambient = ambient.map(|name| format!("CAP_{name}")).collect();
    Ok(Sets { bounding, ambient })
}

/// Names of a list and whether it holds ALL.
fn names(list: &[String]) -> Result<(BTreeSet<&'static str>, bool), Error> {
    let mut found = BTreeSet::new();
    let mut all = false;
    for text in list {
        if text.eq_ignore_ascii_case("ALL") || text.eq_ignore_ascii_case("CAP_ALL") {
            all = true;
        } else {
            found.insert(name_of(text)?);
        }
    }
    Ok((found, all))
}

fn name_of(text: &str) -> Result<&'static str, Error> {
    let upper = text.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES
        .iter()
        .find(|name| **name == bare)
        .copied()
        .ok_or_else(|| Error::UnknownCapability(text.escape_debug().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn decided(add: &[&str], drop: &[&str], ambient: &[&str], privileged: bool) -> Result<Sets, Error> {
        let wish = v1::Capability {
            add_capabilities: list(add),
            drop_capabilities: list(drop),
            add_ambient_capabilities: list(ambient),
        };
        let known = in_mask((1 << 41) - 1);
        decide(Some(&wish), privileged, &list(&DEFAULT), &known)
    }

    fn count(sets: &Sets) -> usize {
        sets.bounding.len()
    }

    #[test]
    fn nothing_asked_gives_the_defaults() {
        let sets = decide(None, false, &list(&DEFAULT), &in_mask(u64::MAX)).unwrap();
        assert_eq!(count(&sets), 14);
        assert!(sets.has("CHOWN") && !sets.has("SYS_ADMIN") && sets.ambient.is_empty());
    }

    #[test]
    fn added_and_dropped_ones_are_told_apart() {
        type Names<'a> = &'a [&'a str];
        let table: [(Names<'_>, Names<'_>, bool, usize, Names<'_>, Names<'_>); 10] = [
            (&["NET_ADMIN"], &[], false, 15, &["NET_ADMIN", "CHOWN"], &[]),
            (&["cap_net_admin"], &[], false, 15, &["NET_ADMIN"], &[]),
            (&[], &["CAP_CHOWN"], false, 13, &["KILL"], &["CHOWN"]),
            (&[], &["ALL"], false, 0, &[], &["CHOWN"]),
            (&["NET_BIND_SERVICE"], &["ALL"], false, 1, &["NET_BIND_SERVICE"], &["CHOWN"]),
            (&["ALL"], &[], false, 41, &["SYS_ADMIN"], &[]),
            (&["ALL"], &["SYS_ADMIN"], false, 40, &["BPF"], &["SYS_ADMIN"]),
            (&[], &[], true, 41, &["SYS_ADMIN", "BPF"], &[]),
            (&[], &["NET_RAW"], true, 41, &["SYS_ADMIN", "NET_RAW"], &[]),
            (&["NET_RAW"], &["NET_RAW"], false, 13, &[], &["NET_RAW"]),
        ];
        for (add, drop, privileged, number, has, has_not) in table {
            let sets = decided(add, drop, &[], privileged).unwrap();
            assert_eq!(count(&sets), number, "{add:?} {drop:?}");
            assert!(has.iter().all(|name| sets.has(name)), "{sets:?}");
            assert!(!has_not.iter().any(|name| sets.has(name)), "{sets:?}");
        }
    }

    #[test]
    fn ambient_ones_are_in_every_set_and_come_only_when_asked_for() {
        let sets = decided(&[], &["ALL"], &["NET_RAW"], false).unwrap();
        assert_eq!(sets.bounding, ["CAP_NET_RAW"]);
        assert_eq!(sets.ambient, ["CAP_NET_RAW"]);
        assert!(decided(&["NET_RAW"], &[], &[], true).unwrap().ambient.is_empty());
    }

    #[test]
    fn unknown_names_are_errors() {
        for name in ["CAP_NONSENSE", "", "SYS ADMIN", "CAP_CAP_CHOWN"] {
            assert!(matches!(decided(&[name], &[], &[], false), Err(Error::UnknownCapability(_))), "{name}");
            assert!(matches!(decided(&[], &[name], &[], true), Err(Error::UnknownCapability(_))), "{name}");
        }
    }

    #[test]
    fn what_the_host_lacks_is_left_out_of_all_and_refused_by_name() {
        let known = in_mask(0b11);
        let all = v1::Capability { add_capabilities: list(&["ALL"]), ..Default::default() };
        assert_eq!(count(&decide(Some(&all), false, &[], &known).unwrap()), 2);
        let named = v1::Capability { add_capabilities: list(&["BPF"]), ..Default::default() };
        assert!(matches!(decide(Some(&named), false, &[], &known), Err(Error::CapabilityMissing(_))));
        assert_eq!(count(&decide(None, true, &[], &known).unwrap()), 2);
    }
}

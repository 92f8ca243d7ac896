//! Reads the options of one mount of the specification (OCI runtime specification, "Linux mount options").
//! Pure: what the words mean to the kernel, not how it is told.

use crate::kernel::{
    MOUNT_ATTR_ATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY, MOUNT_ATTR_STRICTATIME, MountAttr,
};

/// What the options of one mount ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// A bind mount, with what is mounted below the source when `recursive`.
    pub(crate) bind: Option<Bind>,
    /// Attributes of this one mount.
    pub(crate) attr: MountAttr,
    /// Attributes of this mount and all below it.
    pub(crate) below: MountAttr,
    /// Propagation of this one mount, then of the whole tree, in the order that they stand in.
    pub(crate) propagation: Vec<Propagation>,
    /// Parameters of the file system, in order.
    pub(crate) data: Vec<(String, Option<String>)>,
    /// The mount's ids are shifted; with what is mounted below it when `recursive`.
    pub(crate) idmap: Option<Idmap>,
    /// A tmpfs starts with a copy of what it hides.
    pub(crate) copy_up: bool,
    /// Change what is mounted there, in place of mounting something.
    pub(crate) remount: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bind {
    pub(crate) recursive: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Idmap {
    pub(crate) recursive: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Propagation {
    pub(crate) recursive: bool,
    pub(crate) kind: libc::c_ulong,
}

impl Options {
    pub(crate) fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> Options {
        let mut options = Options::default();
        for word in words {
            options.take(word);
        }
        options
    }

    fn take(&mut self, word: &str) {
        match word {
            "bind" => self.bind = self.bind.or(Some(Bind { recursive: false })),
            "rbind" => self.bind = Some(Bind { recursive: true }),
            "remount" => self.remount = true,
            "tmpcopyup" => self.copy_up = true,
            "idmap" => self.idmap = Some(Idmap { recursive: false }),
            "ridmap" => self.idmap = Some(Idmap { recursive: true }),
            "defaults" | "" => {}
            _ => {
                if let Some(propagation) = propagation(word) {
                    self.propagation.push(propagation);
                } else if let Some((set, clear)) = attribute(word) {
                    change(&mut self.attr, set, clear);
                } else if let Some((set, clear)) = word.strip_prefix('r').and_then(attribute) {
                    change(&mut self.below, set, clear);
                } else if let Some((key, value)) = word.split_once('=') {
                    self.data.push((key.to_owned(), Some(value.to_owned())));
                } else {
                    self.data.push((word.to_owned(), None));
                }
            }
        }
    }
}

/// The last word on an attribute wins.
fn change(attr: &mut MountAttr, set: u64, clear: u64) {
    attr.set = attr.set & !clear & !if set & MOUNT_ATTR_ATIME != 0 { MOUNT_ATTR_ATIME } else { 0 } | set;
    attr.clear = attr.clear & !set | clear;
    // mount_setattr(2): the access time settings are one value, to be cleared as a whole when one is set.
    if set & MOUNT_ATTR_ATIME != 0 {
        attr.clear |= MOUNT_ATTR_ATIME;
    }
}

/// Bits to set and bits to clear.
fn attribute(word: &str) -> Option<(u64, u64)> {
    Some(match word {
        "ro" => (MOUNT_ATTR_RDONLY, 0),
        "rw" => (0, MOUNT_ATTR_RDONLY),
        "nosuid" => (MOUNT_ATTR_NOSUID, 0),
        "suid" => (0, MOUNT_ATTR_NOSUID),
        "nodev" => (MOUNT_ATTR_NODEV, 0),
        "dev" => (0, MOUNT_ATTR_NODEV),
        "noexec" => (MOUNT_ATTR_NOEXEC, 0),
        "exec" => (0, MOUNT_ATTR_NOEXEC),
        "nodiratime" => (MOUNT_ATTR_NODIRATIME, 0),
        "diratime" => (0, MOUNT_ATTR_NODIRATIME),
        "nosymfollow" => (MOUNT_ATTR_NOSYMFOLLOW, 0),
        "symfollow" => (0, MOUNT_ATTR_NOSYMFOLLOW),
        "noatime" => (MOUNT_ATTR_NOATIME, 0),
        "strictatime" => (MOUNT_ATTR_STRICTATIME, 0),
        // relatime is the value 0 of the field.
        "relatime" | "atime" | "norelatime" | "nostrictatime" => (0, MOUNT_ATTR_ATIME),
        _ => return None,
    })
}

fn propagation(word: &str) -> Option<Propagation> {
    let (recursive, name) = match word.strip_prefix('r') {
        Some(name) => (true, name),
        None => (false, word),
    };
    let kind = match name {
        "private" => libc::MS_PRIVATE,
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some(Propagation { recursive, kind })
}

/// `linux.rootfsPropagation`, which says `rprivate` and means the root with all below it.
pub(crate) fn root_propagation(word: &str) -> Option<libc::c_ulong> {
    propagation(word).map(|propagation| propagation.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Options {
        Options::parse(words.iter().copied())
    }

    #[test]
    fn attributes_and_parameters_are_told_apart() {
        let options = parse(&["nosuid", "noexec", "mode=755", "size=64k", "newinstance"]);
        assert_eq!(options.attr.set, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
        let data: Vec<_> = options.data.iter().map(|(key, value)| (key.as_str(), value.as_deref())).collect();
        assert_eq!(data, [("mode", Some("755")), ("size", Some("64k")), ("newinstance", None)]);
    }

    #[test]
    fn the_last_word_wins() {
        let options = parse(&["ro", "rw"]);
        assert_eq!((options.attr.set, options.attr.clear), (0, MOUNT_ATTR_RDONLY));
        let options = parse(&["rw", "ro"]);
        assert_eq!((options.attr.set, options.attr.clear), (MOUNT_ATTR_RDONLY, 0));
    }

    #[test]
    fn access_time_is_one_value() {
        let options = parse(&["strictatime", "noatime"]);
        assert_eq!((options.attr.set, options.attr.clear), (MOUNT_ATTR_NOATIME, MOUNT_ATTR_ATIME));
        let options = parse(&["noatime", "relatime"]);
        assert_eq!((options.attr.set, options.attr.clear), (0, MOUNT_ATTR_ATIME));
    }

    #[test]
    fn an_r_in_front_reaches_the_mounts_below() {
        let options = parse(&["rbind", "rro", "nosuid"]);
        assert_eq!(options.bind, Some(Bind { recursive: true }));
        assert_eq!((options.attr.set, options.below.set), (MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY));
    }

    #[test]
    fn words_that_begin_with_r_by_nature_keep_it() {
        let options = parse(&["relatime", "rslave", "rw", "ro"]);
        assert_eq!(options.below, MountAttr::default());
        assert_eq!(options.propagation, [Propagation { recursive: true, kind: libc::MS_SLAVE }]);
        assert_eq!(options.data, []);
    }
}

//! What is mounted in a container, where and how. Checks the client's mounts, finds their sources on the host, and
//! puts all in order; mounting is left to the container room, which opens each source once and mounts it by that.

use std::{
    ffi::OsString,
    fs,
    os::unix::{ffi::OsStringExt, fs::PermissionsExt},
    path::{Component, Path, PathBuf},
};

use cri_api::v1::{self, MountPropagation};
use serde_json::{Value, json};

use super::{Error, Host};

/// The kernel takes that many lines of one id map (user_namespaces(7)).
const MAPPINGS: usize = 340;

/// Where a client's mount comes from, once it was looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A path of the host without links in it.
    Host(PathBuf),
    /// Directories of an image's layers, topmost first; mounted over each other, read-only.
    Layers(Vec<PathBuf>),
    /// One file of an image's layer.
    File(PathBuf),
    /// A volume that an image declares: its own directory, over what the image has at that place.
    Volume { upper: PathBuf, work: PathBuf, lower: Vec<PathBuf> },
}

/// Checks one mount as the client wrote it, before anything is looked up, and gives its destination.
pub fn check(mount: &v1::Mount, host: &Host) -> Result<String, Error> {
    let bad = |why| Error::Mount { path: mount.container_path.escape_debug().take(200).collect(), why };
    let destination = clean(&mount.container_path).ok_or(bad("container_path is not an absolute path"))?;
    if destination == "/" {
        return Err(bad("container_path is the root"));
    }
    let propagation = MountPropagation::try_from(mount.propagation)
        .map_err(|_| bad("propagation is not one of the three"))?;
    let private = propagation == MountPropagation::PropagationPrivate;
    match (&mount.image, mount.host_path.as_str()) {
        (Some(_), path) if !path.is_empty() => return Err(bad("host_path and image exclude each other")),
        (None, path) if !path.starts_with('/') || path.contains('\0') => {
            return Err(bad("host_path is not an absolute path"));
        }
        (Some(image), _) if image.image.is_empty() => return Err(bad("image is not named")),
        (Some(_), _) if !mount.readonly => return Err(bad("an image can only be mounted with readonly")),
        (Some(_), _) if !private => return Err(bad("an image has private propagation only")),
        (Some(_), _) if !mount.mount_options.is_empty() => {
            return Err(bad("mount_options are not for images"));
        }
        (Some(_), _) if sub_path(&mount.image_sub_path).is_none() => {
            return Err(bad("image_sub_path is not a relative path without \"..\""));
        }
        (None, _) if !mount.image_sub_path.is_empty() => return Err(bad("image_sub_path without image")),
        _ => (),
    }
    if mount.recursive_read_only {
        if !mount.readonly {
            return Err(bad("recursive_read_only needs readonly"));
        }
        if !private {
            return Err(bad("recursive_read_only needs private propagation"));
        }
        if !host.recursive_read_only() {
            return Err(bad("this kernel cannot make mounts read-only recursively"));
        }
    }
    if mount.mount_options.iter().any(|option| !matches!(option.as_str(), "noexec" | "nodev" | "nosuid")) {
        return Err(bad("mount_options are some of noexec, nodev, nosuid"));
    }
    for list in [&mount.uid_mappings, &mount.gid_mappings] {
        if list.len() > MAPPINGS || !mappings_are_sane(list) {
            return Err(bad("id mappings are empty, too many, out of range or overlap"));
        }
    }
    if mount.uid_mappings.is_empty() != mount.gid_mappings.is_empty() {
        return Err(bad("uid and gid mappings come together"));
    }
    Ok(destination)
}

/// Ranges that stay within 32 bits and do not overlap, neither inside nor outside: the kernel takes no others.
pub fn mappings_are_sane(list: &[v1::IdMapping]) -> bool {
    let apart = |from: fn(&v1::IdMapping) -> u32| {
        let mut ranges: Vec<_> = list.iter().map(|map| (from(map), map.length)).collect();
        ranges.sort_unstable();
        let ends = ranges.iter().map(|(first, length)| first.checked_add(*length).filter(|_| *length > 0));
        let next = ranges.iter().skip(1).map(|(first, _)| *first).chain([u32::MAX]);
        ends.zip(next).all(|(end, next)| end.is_some_and(|end| end <= next))
    };
    apart(|map| map.container_id) && apart(|map| map.host_id)
}

/// A path below an image's root; empty means the root.
pub fn sub_path(text: &str) -> Option<PathBuf> {
    let path = Path::new(text);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    (plain && !text.contains('\0') && text.len() < 4096)
        .then(|| path.components().filter(|part| *part != Component::CurDir).collect())
}

/// An absolute path without `.`, `..` and empty parts, as the kubelet writes them.
pub fn clean(path: &str) -> Option<String> {
    if !path.starts_with('/') || path.contains('\0') || path.len() >= 4096 {
        return None;
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => (),
            ".." => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    Some(format!("/{}", parts.join("/")))
}

/// Finds a mount's source. A directory that is not there is made, as volumes of type hostPath without a type want it,
/// unless the operator forbade it below that path: an absent mount of a disk must not be papered over.
pub fn look(path: &str, reject: &[PathBuf]) -> Result<PathBuf, Error> {
    let failed = |source| Error::Look { what: "mount source", path: path.into(), source };
    match fs::canonicalize(path) {
        Ok(found) => return Ok(found),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => (),
        Err(e) => return Err(failed(e)),
    }
    let wanted = clean(path).map(PathBuf::from).unwrap_or_default();
    if reject.iter().any(|root| wanted.starts_with(root)) {
        return Err(Error::AbsentSource(wanted));
    }
    make(&wanted).map_err(failed)?;
    fs::canonicalize(path).map_err(failed)
}

/// Makes a directory and those above it, each 0755 whatever the umask is.
fn make(path: &Path) -> std::io::Result<()> {
    let missing: Vec<&Path> =
        path.ancestors().take_while(|part| fs::symlink_metadata(part).is_err()).collect();
    for part in missing.into_iter().rev() {
        match fs::create_dir(part) {
            Ok(()) => fs::set_permissions(part, fs::Permissions::from_mode(0o755))?,
            // Another container's creation was faster.
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => (),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// How the mount point that holds a path travels, from the text of mountinfo (proc(5)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peers {
    pub shared: bool,
    pub slave: bool,
}

pub fn peers(mountinfo: &str, path: &Path) -> Peers {
    let mut best = (0, Peers::default());
    for line in mountinfo.lines() {
        let mut fields = line.split(' ');
        let Some(point) = fields.nth(4).map(unescape) else { continue };
        if !path.starts_with(&point) {
            continue;
        }
        // A later mount on the same point lies over the earlier one.
        let length = point.components().count();
        if length >= best.0 {
            let optional: Vec<&str> = fields.skip(1).take_while(|field| *field != "-").collect();
            let has = |name: &str| optional.iter().any(|field| field.starts_with(name));
            best = (length, Peers { shared: has("shared:"), slave: has("master:") });
        }
    }
    best.1
}

/// Blanks and backslashes are written in octal.
fn unescape(field: &str) -> PathBuf {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let octal = bytes.get(at + 1..at + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(meant) if *byte == b'\\' => {
                out.push(meant);
                at += 4;
            }
            _ => {
                out.push(*byte);
                at += 1;
            }
        }
    }
    OsString::from_vec(out).into()
}

/// Refuses a propagation that the host's mount cannot have: events would silently not arrive.
pub fn check_peers(mount: &v1::Mount, source: &Path, mountinfo: &str) -> Result<(), Error> {
    let peers = peers(mountinfo, source);
    let wrong = |kind| Err(Error::NotShared(source.to_owned(), kind));
    match MountPropagation::try_from(mount.propagation) {
        Ok(MountPropagation::PropagationBidirectional) if !peers.shared => wrong("shared"),
        Ok(MountPropagation::PropagationHostToContainer) if !(peers.shared || peers.slave) => {
            wrong("shared or slave")
        }
        _ => Ok(()),
    }
}

/// Namespaces and settings that change the default mounts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setting {
    pub privileged: bool,
    pub cgroup_writable: bool,
    pub host_pid: bool,
    pub host_ipc: bool,
    pub host_network: bool,
    /// The host has POSIX message queues mounted.
    pub host_mqueue: bool,
    /// The pod has a user namespace; with so many gids.
    pub user_namespace: Option<u32>,
}

/// What every container has.
pub fn defaults(setting: Setting) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    let bind = |path: &str, options: &[&str]| json!({"destination": path, "type": "bind", "source": path, "options": options});
    let foreign = setting.user_namespace.is_some();
    let mode = if setting.privileged { "rw" } else { "ro" };
    // A user namespace may mount proc, sysfs and mqueue only for namespaces that it owns; of the host's ones it gets
    // the host's mount.
    let proc = match foreign && setting.host_pid {
        true => bind("/proc", &["rbind", "nosuid", "noexec", "nodev"]),
        false => mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
    };
    let pts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"];
    // Group tty must exist inside.
    let pts = if setting.user_namespace.is_some_and(|gids| gids < 6) { &pts[..5] } else { &pts[..] };
    let shm = match setting.host_ipc {
        true => bind("/dev/shm", &["rbind", "nosuid", "noexec", "nodev"]),
        false => {
            json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]})
        }
    };
    let mqueue = match foreign && setting.host_ipc {
        true => setting.host_mqueue.then(|| bind("/dev/mqueue", &["rbind", "nosuid", "noexec", "nodev"])),
        false => Some(mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"])),
    };
    let sys = match foreign && setting.host_network {
        true => bind("/sys", &["rbind", "nosuid", "noexec", "nodev", "rro"]),
        false => mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", mode]),
    };
    let cgroup = if setting.privileged || setting.cgroup_writable { "rw" } else { "ro" };
    let before = [
        proc,
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", pts),
        shm,
    ];
    let after = [sys, mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", cgroup])];
    before.into_iter().chain(mqueue).chain(after).collect()
}

/// One mount of the client or of the image, ready for the spec.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    pub destination: String,
    pub mount: &'a v1::Mount,
    pub source: &'a Source,
    /// What comes from an image has the ids of the image, which a user namespace sees through its mapping.
    pub map: Option<(v1::IdMapping, v1::IdMapping)>,
}

/// Entry of `mounts`.
fn entry(wanted: &Wanted<'_>, empty: &Path) -> Value {
    let mount = wanted.mount;
    let (kind, source, mut options) = match wanted.source {
        Source::Host(path) => ("bind", path.as_path(), vec!["rbind".to_owned()]),
        Source::File(path) => {
            let directory = path.parent().unwrap_or(path).to_owned();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // A word of the container room's. Bound from the layer, the file could be made writable by the container.
            let options =
                vec![format!("lowerdir={}", joined(&[directory], empty)), format!("crisp.file={name}")];
            ("overlay", Path::new("overlay"), options)
        }
        Source::Layers(layers) => {
            ("overlay", Path::new("overlay"), vec![format!("lowerdir={}", joined(layers, empty))])
        }
        Source::Volume { upper, lower, .. } if lower.is_empty() => {
            ("bind", upper.as_path(), vec!["rbind".to_owned()])
        }
        Source::Volume { upper, work, lower } => {
            let options = vec![
                format!("lowerdir={}", joined(lower, empty)),
                format!("upperdir={}", escaped(upper)),
                format!("workdir={}", escaped(work)),
            ];
            ("overlay", Path::new("overlay"), options)
        }
    };
    if kind == "bind" {
        options.push(
            match MountPropagation::try_from(mount.propagation) {
                Ok(MountPropagation::PropagationHostToContainer) => "rslave",
                Ok(MountPropagation::PropagationBidirectional) => "rshared",
                _ => "rprivate",
            }
            .to_owned(),
        );
    }
    options.push(
        match (mount.readonly, mount.recursive_read_only) {
            (true, true) => "rro",
            (true, false) => "ro",
            _ => "rw",
        }
        .to_owned(),
    );
    options.extend(mount.mount_options.iter().cloned());
    // An overlay is not mapped itself: its layers are, by the container's own mapping, for which this word stands.
    if kind == "overlay" && wanted.map.is_some() {
        options.push("idmap".to_owned());
    }
    let mut entry =
        json!({"destination": wanted.destination, "type": kind, "source": source, "options": options});
    let (uids, gids) = match &wanted.map {
        Some((uids, gids)) => (std::slice::from_ref(uids), std::slice::from_ref(gids)),
        None => (mount.uid_mappings.as_slice(), mount.gid_mappings.as_slice()),
    };
    if kind == "bind" && !uids.is_empty() {
        entry["uidMappings"] = mappings(uids);
        entry["gidMappings"] = mappings(gids);
    }
    entry
}

/// Id mappings as OCI writes them.
pub fn mappings(list: &[v1::IdMapping]) -> Value {
    list.iter()
        .map(|map| json!({"containerID": map.container_id, "hostID": map.host_id, "size": map.length}))
        .collect()
}

/// overlayfs without an upper directory wants two lower ones: an empty directory is the second of a single one.
fn joined(layers: &[PathBuf], empty: &Path) -> String {
    let mut parts: Vec<String> = layers.iter().map(|layer| escaped(layer)).collect();
    if parts.len() < 2 {
        parts.push(escaped(empty));
    }
    parts.join(":")
}

/// A colon separates directories, so one within a name is escaped (overlayfs.rst).
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace('\\', "\\\\").replace(':', "\\:")
}

/// All mounts in the order in which they are made, and the propagation that the root needs for them. What the client
/// mounts somewhere replaces the default there, with all below when it is /dev itself.
pub fn order(
    defaults: Vec<Value>,
    files: Vec<Value>,
    wanted: &[Wanted<'_>],
    empty: &Path,
) -> (Vec<Value>, Option<&'static str>) {
    let at = |value: &Value| value["destination"].as_str().unwrap_or_default().to_owned();
    let taken = |place: &str| wanted.iter().any(|wanted| wanted.destination == place);
    let mut all: Vec<Value> = defaults
        .into_iter()
        .filter(|mount| {
            let place = at(mount);
            !(taken(&place) || taken("/dev") && place.starts_with("/dev/"))
        })
        .collect();
    let mut rest: Vec<Value> = files.into_iter().filter(|mount| !taken(&at(mount))).collect();
    rest.extend(wanted.iter().map(|wanted| entry(wanted, empty)));
    // A parent before its children; otherwise as they came.
    rest.sort_by_key(|mount| at(mount).split('/').count());
    all.extend(rest);
    let asks = |kind: MountPropagation| wanted.iter().any(|wanted| wanted.mount.propagation == kind as i32);
    let root = match asks(MountPropagation::PropagationBidirectional) {
        true => Some("rshared"),
        false => asks(MountPropagation::PropagationHostToContainer).then_some("rslave"),
    };
    (all, root)
}

/// A file of the pod's run directory, such as resolv.conf.
pub fn file(destination: &str, source: &Path, readonly: bool) -> Value {
    let mode = if readonly { "ro" } else { "rw" };
    json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", "rprivate", mode]})
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::containers::spec::tests::host;

    fn mount(inside: &str, outside: &str) -> v1::Mount {
        v1::Mount { container_path: inside.into(), host_path: outside.into(), ..Default::default() }
    }

    fn image(inside: &str) -> v1::Mount {
        let image = v1::ImageSpec { image: "sha256:1".into(), ..Default::default() };
        v1::Mount { container_path: inside.into(), image: Some(image), readonly: true, ..Default::default() }
    }

    fn id(container_id: u32, host_id: u32, length: u32) -> v1::IdMapping {
        v1::IdMapping { host_id, container_id, length }
    }

    #[test]
    fn contradictions_are_refused() {
        let plain = || mount("/in", "/out");
        for (mount, good) in [
            (plain(), true),
            (mount("in", "/out"), false),
            (mount("", "/out"), false),
            (mount("/", "/out"), false),
            (mount("/a/..", "/out"), false),
            (mount("/in", ""), false),
            (mount("/in", "out"), false),
            (mount("/in", "/o\0"), false),
            (image("/in"), true),
            (v1::Mount { host_path: "/out".into(), ..image("/in") }, false),
            (v1::Mount { readonly: false, ..image("/in") }, false),
            (v1::Mount { propagation: 1, ..image("/in") }, false),
            (v1::Mount { mount_options: vec!["noexec".into()], ..image("/in") }, false),
            (v1::Mount { image_sub_path: "a/b".into(), ..image("/in") }, true),
            (v1::Mount { image_sub_path: "/a".into(), ..image("/in") }, false),
            (v1::Mount { image_sub_path: "a/../b".into(), ..image("/in") }, false),
            (v1::Mount { image: Some(v1::ImageSpec::default()), ..image("/in") }, false),
            (v1::Mount { image_sub_path: "a".into(), ..plain() }, false),
            (v1::Mount { recursive_read_only: true, ..plain() }, false),
            (v1::Mount { recursive_read_only: true, readonly: true, ..plain() }, true),
            (v1::Mount { recursive_read_only: true, readonly: true, propagation: 1, ..plain() }, false),
            (v1::Mount { propagation: 3, ..plain() }, false),
            (
                v1::Mount {
                    mount_options: vec!["noexec".into(), "nodev".into(), "nosuid".into()],
                    ..plain()
                },
                true,
            ),
            (v1::Mount { mount_options: vec!["suid".into()], ..plain() }, false),
            (v1::Mount { uid_mappings: vec![id(0, 1000, 10)], ..plain() }, false),
            (
                v1::Mount { uid_mappings: vec![id(0, 1000, 10)], gid_mappings: vec![id(0, 1, 1)], ..plain() },
                true,
            ),
            (
                v1::Mount { uid_mappings: vec![id(0, 1000, 0)], gid_mappings: vec![id(0, 1, 1)], ..plain() },
                false,
            ),
            (
                v1::Mount {
                    uid_mappings: vec![id(0, u32::MAX, 2)],
                    gid_mappings: vec![id(0, 1, 1)],
                    ..plain()
                },
                false,
            ),
            (
                v1::Mount {
                    uid_mappings: vec![id(10, 2000, 10), id(0, 1000, 10)],
                    gid_mappings: vec![id(0, 1, 1)],
                    ..plain()
                },
                true,
            ),
            (
                v1::Mount {
                    uid_mappings: vec![id(9, 2000, 10), id(0, 1000, 10)],
                    gid_mappings: vec![id(0, 1, 1)],
                    ..plain()
                },
                false,
            ),
            (
                v1::Mount {
                    uid_mappings: vec![id(0, 1000, 10), id(10, 1009, 10)],
                    gid_mappings: vec![id(0, 1, 1)],
                    ..plain()
                },
                false,
            ),
            (
                v1::Mount {
                    uid_mappings: vec![id(0, 1, 1); 1_000_000],
                    gid_mappings: vec![id(0, 1, 1)],
                    ..plain()
                },
                false,
            ),
        ] {
            assert_eq!(
                check(&mount, &host()).is_ok(),
                good,
                "{:?} {:?}",
                mount.container_path,
                mount.image_sub_path
            );
        }
    }

    #[test]
    fn destinations_are_cleaned() {
        for (path, expected) in [("/a//b/./c/", "/a/b/c"), ("/a/../b", "/b"), ("/../..", "/"), ("/", "/")] {
            assert_eq!(clean(path).as_deref(), Some(expected));
        }
        assert_eq!(clean("a"), None);
    }

    #[test]
    fn an_absent_source_is_made_unless_it_is_refused() {
        let here = tempfile::tempdir().unwrap();
        let root = here.path().canonicalize().unwrap();
        let path = root.join("a/b");
        assert_eq!(look(path.to_str().unwrap(), &[]).unwrap(), path);
        assert_eq!(fs::metadata(root.join("a")).unwrap().permissions().mode() & 0o7777, 0o755);
        let refused = root.join("disk/x");
        assert!(matches!(look(refused.to_str().unwrap(), &[root.join("disk")]), Err(Error::AbsentSource(_))));
        assert!(!refused.exists());
        assert_eq!(look(path.to_str().unwrap(), std::slice::from_ref(&root)).unwrap(), path);
    }

    #[test]
    fn a_link_as_source_is_followed() {
        let here = tempfile::tempdir().unwrap();
        let root = here.path().canonicalize().unwrap();
        fs::create_dir(root.join("real")).unwrap();
        symlink("real", root.join("link")).unwrap();
        assert_eq!(look(root.join("link").to_str().unwrap(), &[]).unwrap(), root.join("real"));
        symlink(root.join("nowhere"), root.join("dangling")).unwrap();
        assert!(look(root.join("dangling").to_str().unwrap(), &[]).is_err());
    }

    const MOUNTINFO: &str = "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        22 21 0:5 / /proc rw,nosuid - proc proc rw\n\
        23 21 0:6 / /data rw master:7 - ext4 /dev/sdb rw\n\
        24 23 0:7 / /data/with\\040blank rw shared:9 master:7 - ext4 /dev/sdc rw\n\
        25 21 0:8 / /over rw shared:3 - tmpfs t rw\n\
        26 21 0:9 / /over rw - tmpfs t rw\n";

    #[test]
    fn the_innermost_and_last_mount_decides_on_propagation() {
        for (path, shared, slave) in [
            ("/", true, false),
            ("/etc/x", true, false),
            ("/proc/1", false, false),
            ("/data/x", false, true),
            ("/database", true, false),
            ("/data/with blank/x", true, true),
            ("/over/x", false, false),
        ] {
            assert_eq!(peers(MOUNTINFO, Path::new(path)), Peers { shared, slave }, "{path}");
        }
    }

    #[test]
    fn a_propagation_that_the_host_cannot_give_is_refused() {
        for (path, propagation, good) in [
            ("/proc/1", 0, true),
            ("/proc/1", 1, false),
            ("/proc/1", 2, false),
            ("/data/x", 1, true),
            ("/data/x", 2, false),
            ("/etc", 2, true),
        ] {
            let mount = v1::Mount { propagation, ..mount("/in", path) };
            assert_eq!(check_peers(&mount, Path::new(path), MOUNTINFO).is_ok(), good, "{path} {propagation}");
        }
    }

    fn places(mounts: &[Value]) -> Vec<&str> {
        mounts.iter().map(|mount| mount["destination"].as_str().unwrap()).collect()
    }

    fn ordered(mounts: &[v1::Mount]) -> (Vec<Value>, Option<&'static str>) {
        let source = Source::Host("/src".into());
        let wanted: Vec<_> = mounts
            .iter()
            .map(|mount| Wanted {
                destination: clean(&mount.container_path).unwrap(),
                mount,
                source: &source,
                map: None,
            })
            .collect();
        let files = vec![file("/etc/hosts", Path::new("/p/hosts"), false)];
        order(defaults(Setting::default()), files, &wanted, Path::new("/empty"))
    }

    #[test]
    fn parents_come_before_children_and_the_clients_mounts_replace_ours() {
        let (all, root) = ordered(&[mount("/a/b/c", "/x"), mount("/a", "/x"), mount("/etc/hosts", "/h")]);
        assert_eq!(
            places(&all),
            [
                "/proc",
                "/dev",
                "/dev/pts",
                "/dev/shm",
                "/dev/mqueue",
                "/sys",
                "/sys/fs/cgroup",
                "/a",
                "/etc/hosts",
                "/a/b/c"
            ]
        );
        assert_eq!(root, None);
        let (all, _) = ordered(&[mount("/dev", "/dev"), mount("/sys/", "/sys")]);
        assert_eq!(places(&all), ["/proc", "/sys/fs/cgroup", "/dev", "/sys", "/etc/hosts"]);
    }

    #[test]
    fn propagation_and_modes_become_options() {
        let rw = mount("/a", "/x");
        for (mount, options) in [
            (rw.clone(), vec!["rbind", "rprivate", "rw"]),
            (v1::Mount { readonly: true, ..rw.clone() }, vec!["rbind", "rprivate", "ro"]),
            (
                v1::Mount { readonly: true, recursive_read_only: true, ..rw.clone() },
                vec!["rbind", "rprivate", "rro"],
            ),
            (v1::Mount { propagation: 1, ..rw.clone() }, vec!["rbind", "rslave", "rw"]),
            (v1::Mount { propagation: 2, ..rw.clone() }, vec!["rbind", "rshared", "rw"]),
            (
                v1::Mount { mount_options: vec!["noexec".into()], ..rw.clone() },
                vec!["rbind", "rprivate", "rw", "noexec"],
            ),
        ] {
            let (all, _) = ordered(std::slice::from_ref(&mount));
            let entry = all.iter().find(|entry| entry["destination"] == "/a").unwrap();
            assert_eq!(entry["options"], json!(options));
        }
        assert_eq!(ordered(&[v1::Mount { propagation: 1, ..rw.clone() }]).1, Some("rslave"));
        assert_eq!(
            ordered(&[v1::Mount { propagation: 1, ..rw.clone() }, v1::Mount { propagation: 2, ..rw }]).1,
            Some("rshared")
        );
    }

    #[test]
    fn images_and_volumes_are_overlays() {
        let mount = image("/img");
        let text = |source: Source| {
            let wanted = Wanted { destination: "/img".into(), mount: &mount, source: &source, map: None };
            let entry = entry(&wanted, Path::new("/empty"));
            (entry["type"].as_str().unwrap().to_owned(), entry["options"].clone())
        };
        assert_eq!(
            text(Source::Layers(vec!["/l/2".into(), "/l/1:x".into()])),
            ("overlay".into(), json!(["lowerdir=/l/2:/l/1\\:x", "ro"]))
        );
        assert_eq!(text(Source::Layers(vec!["/l/1".into()])).1, json!(["lowerdir=/l/1:/empty", "ro"]));
        assert_eq!(
            text(Source::File("/l/1/d/f".into())),
            ("overlay".into(), json!(["lowerdir=/l/1/d:/empty", "crisp.file=f", "ro"]))
        );
        let volume = |lower| Source::Volume { upper: "/v/fs".into(), work: "/v/work".into(), lower };
        assert_eq!(text(volume(vec![])).0, "bind");
        assert_eq!(
            text(volume(vec!["/l/1".into()])).1,
            json!(["lowerdir=/l/1:/empty", "upperdir=/v/fs", "workdir=/v/work", "ro"])
        );
    }

    #[test]
    fn what_an_image_brings_is_mapped_for_a_user_namespace() {
        let mount = image("/img");
        let map = Some((id(0, 1000, 10), id(0, 2000, 10)));
        let shown = |source: Source, map| {
            entry(
                &Wanted { destination: "/img".into(), mount: &mount, source: &source, map },
                Path::new("/empty"),
            )
        };
        let layers = shown(Source::Layers(vec!["/l/1".into()]), map);
        assert_eq!(layers["options"], json!(["lowerdir=/l/1:/empty", "ro", "idmap"]));
        assert!(layers["uidMappings"].is_null());
        let file = shown(Source::File("/l/1/f".into()), map);
        assert_eq!(file["options"], json!(["lowerdir=/l/1:/empty", "crisp.file=f", "ro", "idmap"]));
        let volume =
            |map| shown(Source::Volume { upper: "/v".into(), work: "/w".into(), lower: vec![] }, map);
        assert_eq!(volume(map)["gidMappings"], json!([{"containerID": 0, "hostID": 2000, "size": 10}]));
        assert!(volume(None)["uidMappings"].is_null());
    }

    #[test]
    fn privileged_ones_write_sysfs_and_cgroups_and_others_do_not() {
        let mode = |setting: Setting, place: &str| {
            let all = defaults(setting);
            let entry = all.iter().find(|entry| entry["destination"] == place).unwrap().clone();
            entry["options"].as_array().unwrap().last().unwrap().as_str().unwrap().to_owned()
        };
        let privileged = Setting { privileged: true, ..Setting::default() };
        let writable = Setting { cgroup_writable: true, ..Setting::default() };
        for place in ["/sys", "/sys/fs/cgroup"] {
            assert_eq!(mode(Setting::default(), place), "ro");
            assert_eq!(mode(privileged, place), "rw");
        }
        assert_eq!(
            (mode(writable, "/sys").as_str(), mode(writable, "/sys/fs/cgroup").as_str()),
            ("ro", "rw")
        );
    }

    #[test]
    fn a_user_namespace_gets_the_hosts_mounts_of_the_hosts_namespaces() {
        let kind = |setting: Setting, place: &str| {
            defaults(setting).iter().find(|entry| entry["destination"] == place).unwrap()["type"].clone()
        };
        let all = Setting {
            host_pid: true,
            host_ipc: true,
            host_network: true,
            host_mqueue: true,
            ..Setting::default()
        };
        let user = Setting { user_namespace: Some(65536), ..all };
        for (place, plain, foreign) in [
            ("/proc", "proc", "bind"),
            ("/sys", "sysfs", "bind"),
            ("/dev/mqueue", "mqueue", "bind"),
            ("/dev/shm", "bind", "bind"),
        ] {
            assert_eq!(kind(all, place), plain, "{place}");
            assert_eq!(kind(user, place), foreign, "{place}");
        }
        assert_eq!(kind(Setting::default(), "/dev/shm"), "tmpfs");
        let without = defaults(Setting { host_mqueue: false, ..user });
        assert!(without.iter().all(|entry| entry["destination"] != "/dev/mqueue"));
    }
}

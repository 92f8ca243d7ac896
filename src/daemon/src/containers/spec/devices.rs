//! Which devices a container sees and may use. Looks devices up on the host; making the nodes and the device cgroup
//! is left to the container room.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use cri_api::v1;
use serde_json::{Value, json};

use super::Error;

/// Bounds of a directory of devices.
const DEPTH: usize = 8;
const COUNT: usize = 8192;

/// A device of the host as a container shall see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Path inside.
    pub path: String,
    /// `c` or `b`.
    pub kind: &'static str,
    pub major: u32,
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Some of `rwm`.
    pub access: String,
}

impl Device {
    /// Entry of `linux.devices`.
    pub fn node(&self) -> Value {
        json!({"path": self.path, "type": self.kind, "major": self.major, "minor": self.minor,
            "fileMode": self.mode, "uid": self.uid, "gid": self.gid})
    }

    /// Entry of `linux.resources.devices`.
    pub fn rule(&self) -> Value {
        json!({"allow": true, "type": self.kind, "major": self.major, "minor": self.minor, "access": self.access})
    }
}

/// What every container may use: null, zero, full, random, urandom, tty, console, ptmx and its terminals. An empty
/// list would mean every device (GHSA-g54h-m393-cpwq), so all else is denied by a rule, making nodes included.
pub fn default_rules() -> Vec<Value> {
    let mut rules = vec![json!({"allow": false, "access": "rwm"})];
    for (major, minor) in [
        (1, Some(3)),
        (1, Some(5)),
        (1, Some(7)),
        (1, Some(8)),
        (1, Some(9)),
        (5, Some(0)),
        (5, Some(1)),
        (5, Some(2)),
        (136, None),
    ] {
        rules.push(match minor {
            Some(minor) => {
                json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"})
            }
            None => json!({"allow": true, "type": "c", "major": major, "access": "rwm"}),
        });
    }
    rules
}

/// What a privileged container may use.
pub fn open_rules() -> Vec<Value> {
    vec![json!({"allow": true, "access": "rwm"})]
}

/// Checks what a client wrote, before anything is looked up.
pub fn check(wanted: &v1::Device) -> Result<(), Error> {
    let absolute = |path: &str| {
        path.starts_with('/') && !path.contains('\0') && !path.split('/').any(|part| part == "..")
    };
    // Nodes are made on our own /dev and nowhere else: a path of the image's could lead anywhere.
    let inside = wanted.container_path.strip_prefix("/dev/").is_some_and(|name| !name.is_empty());
    if !absolute(&wanted.host_path) || !absolute(&wanted.container_path) || !inside {
        return Err(Error::DevicePath(wanted.host_path.clone(), wanted.container_path.clone()));
    }
    let access = &wanted.permissions;
    match access.len() <= 3 && access.bytes().all(|b| b"rwm".contains(&b)) {
        true => Ok(()),
        false => Err(Error::DeviceAccess(access.escape_debug().take(20).collect())),
    }
}

/// The devices that a client's entry means: one, or all below a directory.
pub fn look(wanted: &v1::Device) -> Result<Vec<Device>, Error> {
    let failed = |source| Error::Look { what: "device", path: (&wanted.host_path).into(), source };
    let access = if wanted.permissions.is_empty() { "rwm" } else { &wanted.permissions };
    let path = fs::canonicalize(&wanted.host_path).map_err(failed)?;
    let meta = fs::symlink_metadata(&path).map_err(failed)?;
    if let Some(device) = device(&meta, wanted.container_path.clone(), access) {
        return Ok(vec![device]);
    }
    if !meta.is_dir() {
        return Err(Error::NotADevice(path));
    }
    let mut found = Vec::new();
    walk(&path, &wanted.container_path, access, 0, &mut found).map_err(failed)?;
    match found.is_empty() {
        true => Err(Error::NotADevice(path)),
        false => Ok(found),
    }
}

/// Every device below the host's /dev but those that a container has of its own.
pub fn all() -> io::Result<Vec<Device>> {
    let mut found = Vec::new();
    walk(Path::new("/dev"), "/dev", "rwm", 0, &mut found)?;
    let own = [
        "/dev/console",
        "/dev/ptmx",
        "/dev/tty",
        "/dev/null",
        "/dev/zero",
        "/dev/full",
        "/dev/random",
        "/dev/urandom",
    ];
    found.retain(|device| !own.contains(&device.path.as_str()));
    Ok(found)
}

fn walk(
    directory: &Path,
    inside: &str,
    access: &str,
    depth: usize,
    found: &mut Vec<Device>,
) -> io::Result<()> {
    const OTHERS: [&str; 7] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];
    let mut entries: Vec<PathBuf> = fs::read_dir(directory)?.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    for path in entries {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        // Links are not followed: they may lead out of the directory. What vanishes meanwhile is passed over.
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        let inside = format!("{}/{name}", inside.trim_end_matches('/'));
        if meta.is_dir() && depth < DEPTH && !OTHERS.contains(&name) {
            // Another device file system's directory that cannot be read concerns only itself.
            let _ = walk(&path, &inside, access, depth + 1, found);
        } else if let Some(device) = device(&meta, inside, access) {
            found.push(device);
        }
        if found.len() > COUNT {
            return Err(io::Error::other(format!("more than {COUNT} devices")));
        }
    }
    Ok(())
}

fn device(meta: &fs::Metadata, path: String, access: &str) -> Option<Device> {
    let kind = match meta.file_type() {
        kind if kind.is_char_device() => "c",
        kind if kind.is_block_device() => "b",
        _ => return None,
    };
    Some(Device {
        path,
        kind,
        major: libc::major(meta.rdev()),
        minor: libc::minor(meta.rdev()),
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        access: access.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(host: &str, inside: &str, access: &str) -> v1::Device {
        v1::Device { host_path: host.into(), container_path: inside.into(), permissions: access.into() }
    }

    #[test]
    fn permissions_are_some_of_rwm_and_paths_absolute() {
        for (device, good) in [
            (wanted("/dev/null", "/dev/x", "rwm"), true),
            (wanted("/dev/null", "/dev/x", "r"), true),
            (wanted("/dev/null", "/dev/x", ""), true),
            (wanted("/dev/null", "/dev/x", "rx"), false),
            (wanted("/dev/null", "/dev/x", "rrrr"), false),
            (wanted("dev/null", "/dev/x", "r"), false),
            (wanted("/dev/null", "x", "r"), false),
            (wanted("/dev/null", "/tmp/x", "r"), false),
            (wanted("/dev/null", "/dev/", "r"), false),
            (wanted("/dev/../etc", "/x", "r"), false),
            (wanted("/dev/null", "/dev/../etc/x", "r"), false),
        ] {
            assert_eq!(check(&device).is_ok(), good, "{device:?}");
        }
    }

    #[test]
    fn a_device_is_found_under_its_new_name() {
        let found = look(&wanted("/dev/null", "/dev/nothing", "rw")).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].path.as_str(), found[0].kind, found[0].major, found[0].minor),
            ("/dev/nothing", "c", 1, 3)
        );
        assert_eq!(found[0].rule()["access"], "rw");
    }

    #[test]
    fn what_is_no_device_is_an_error() {
        let empty = tempfile::tempdir().unwrap();
        fs::write(empty.path().join("file"), "x").unwrap();
        let path = empty.path().to_str().unwrap();
        assert!(matches!(look(&wanted(path, "/dev/x", "r")), Err(Error::NotADevice(_))));
        assert!(look(&wanted(&format!("{path}/file"), "/dev/x", "r")).is_err());
        assert!(look(&wanted(&format!("{path}/none"), "/dev/x", "r")).is_err());
    }

    #[test]
    fn a_directory_means_all_devices_below_it() {
        let here = tempfile::tempdir().unwrap();
        fs::create_dir(here.path().join("sub")).unwrap();
        for name in ["a", "sub/b"] {
            let mode = rustix::fs::Mode::from_raw_mode(0o600);
            let null = rustix::fs::makedev(1, 3);
            let path = here.path().join(name);
            rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::CharacterDevice, mode, null)
                .unwrap();
        }
        std::os::unix::fs::symlink("/dev/zero", here.path().join("link")).unwrap();
        let found = look(&wanted(here.path().to_str().unwrap(), "/dev/in", "rwm")).unwrap();
        let paths: Vec<_> = found.iter().map(|device| device.path.as_str()).collect();
        assert_eq!(paths, ["/dev/in/a", "/dev/in/sub/b"]);
    }

    #[test]
    fn the_first_default_rule_denies_everything_and_none_allows_all() {
        let rules = default_rules();
        assert_eq!(rules[0], json!({"allow": false, "access": "rwm"}));
        assert!(rules[1..].iter().all(|rule| rule["type"] == "c" && rule["major"].is_number()));
    }
}

//! `/dev`: a fresh tmpfs with the nodes that every container has (OCI runtime specification, "Default Devices")
//! and those that were asked for. Nothing of the image's `/dev` is ever used, because whoever controls a node
//! there would control what we mount from it (CVE-2025-31133).
//!
//! The tmpfs is made with the host's rights, so that its nodes work inside a user namespace too; what is in it
//! belongs to the container's root.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Gid, Mode, Uid, chownat, makedev, mknodat, symlinkat};
use rustix::io::Errno;

use super::mount;
use super::options::Options;
use super::root::{Kind, Root};
use crate::error::{At, Error, Failure, Step};
use crate::kernel;
use crate::namespace::IdMaps;
use crate::spec;

#[derive(Debug)]
pub(crate) struct Plan {
    nodes: Vec<Node>,
    /// Host ids of the container's root.
    owner: (u32, u32),
    console: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    /// Below `/dev`.
    path: PathBuf,
    kind: FileType,
    number: (u32, u32),
    mode: u32,
    /// On the host.
    owner: (u32, u32),
}

const DEFAULT: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: [(&str, &str); 6] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
];

impl Plan {
    pub(crate) fn new(devices: &[spec::Device], maps: Option<&IdMaps>, console: bool) -> Result<Plan, Error> {
        let owner = match maps {
            Some(maps) => (maps.host_uid(0)?, maps.host_gid(0)?),
            None => (0, 0),
        };
        let mut nodes: Vec<Node> = Vec::with_capacity(DEFAULT.len() + devices.len());
        for device in devices {
            let node = node(device, maps)?;
            // Ours to make: the link to the container's own ptmx, the console of its terminal.
            let ours = node.path == Path::new("ptmx") || node.path == Path::new("console");
            if !ours && !nodes.iter().any(|other| other.path == node.path) {
                nodes.push(node);
            }
        }
        for (name, major, minor) in DEFAULT {
            if !nodes.iter().any(|node| node.path == Path::new(name)) {
                let (path, kind) = (name.into(), FileType::CharacterDevice);
                nodes.push(Node { path, kind, number: (major, minor), mode: 0o666, owner });
            }
        }
        Ok(Plan { nodes, owner, console })
    }

    /// The filled tmpfs, detached. Wants an umask of 0.
    pub(crate) fn make(&self, options: &Options) -> Result<OwnedFd, Failure> {
        let tmpfs = mount::new("tmpfs", "tmpfs", options)
            .map_err(|refused| refused.failure("tmpfs", Path::new("/dev")))?;
        let root = Root::new(mount::own(&tmpfs).at(Step::Device, "/dev")?);
        let shifted = self.owner != (0, 0);
        if shifted {
            chown(tmpfs.as_fd(), Path::new(""), self.owner).at(Step::Device, "/dev")?;
        }
        for node in &self.nodes {
            self.make_node(&root, tmpfs.as_fd(), node)
                .at(Step::Device, format_args!("/dev/{}", node.path.display()))?;
        }
        for (name, target) in LINKS {
            match symlinkat(target, &tmpfs, name) {
                Ok(()) if shifted => chown(tmpfs.as_fd(), Path::new(name), self.owner),
                // A device that was asked for has the name.
                Err(Errno::EXIST) => Ok(()),
                other => other,
            }
            .at(Step::Device, format_args!("/dev/{name}"))?;
        }
        if self.console {
            let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
            rustix::fs::openat(&tmpfs, "console", flags, Mode::from_raw_mode(0o600))
                .and_then(|_| {
                    if shifted { chown(tmpfs.as_fd(), Path::new("console"), self.owner) } else { Ok(()) }
                })
                .at(Step::Device, "/dev/console")?;
        }
        Ok(tmpfs)
    }

    fn make_node(&self, root: &Root, tmpfs: impl AsFd, node: &Node) -> kernel::Result<()> {
        let parent = node.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let (directory, name) = match (parent, node.path.file_name()) {
            (Some(parent), Some(name)) => (root.find_or_make(parent, Kind::Directory)?, Path::new(name)),
            _ => (rustix::io::dup(tmpfs)?, node.path.as_path()),
        };
        let mode = Mode::from_raw_mode(node.mode);
        mknodat(&directory, name, node.kind, mode, makedev(node.number.0, node.number.1))?;
        if node.owner != (0, 0) { chown(directory, name, node.owner) } else { Ok(()) }
    }
}

fn node(device: &spec::Device, maps: Option<&IdMaps>) -> Result<Node, Error> {
    let invalid = |why: &str| Error::Invalid(format!("device {:?}: {why}", device.path));
    let path = super::clean(Path::new(&device.path));
    let path = path.strip_prefix("/dev").map_err(|_| invalid("not below /dev"))?.to_owned();
    if path.as_os_str().is_empty() || device.path.contains('\0') {
        return Err(invalid("not below /dev"));
    }
    let kind = match device.kind.as_str() {
        "c" | "u" => FileType::CharacterDevice,
        "b" => FileType::BlockDevice,
        "p" => FileType::Fifo,
        _ => return Err(invalid("its type is none of b, c, u, p")),
    };
    let number = |number: i64| u32::try_from(number).map_err(|_| invalid("its number is out of range"));
    let number = match kind {
        FileType::Fifo => (0, 0),
        _ => (number(device.major)?, number(device.minor)?),
    };
    let (uid, gid) = (device.uid.unwrap_or(0), device.gid.unwrap_or(0));
    let owner = match maps {
        Some(maps) => (maps.host_uid(uid)?, maps.host_gid(gid)?),
        None => (uid, gid),
    };
    Ok(Node { path, kind, number, mode: device.file_mode.unwrap_or(0o666) & 0o7777, owner })
}

fn chown(directory: impl AsFd, name: &Path, (uid, gid): (u32, u32)) -> kernel::Result<()> {
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW | rustix::fs::AtFlags::EMPTY_PATH;
    chownat(directory, name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(path: &str, kind: &str) -> spec::Device {
        spec::Device {
            path: path.into(),
            kind: kind.into(),
            major: 10,
            minor: 229,
            ..spec::Device::default()
        }
    }

    #[test]
    fn a_device_that_was_asked_for_replaces_the_default_one() {
        let mut null = device("/dev/null", "c");
        null.file_mode = Some(0o600);
        let plan = Plan::new(&[null.clone(), null], None, false).unwrap();
        let nulls: Vec<_> = plan.nodes.iter().filter(|node| node.path == Path::new("null")).collect();
        assert_eq!((nulls.len(), nulls[0].mode, nulls[0].number), (1, 0o600, (10, 229)));
        assert_eq!(plan.nodes.len(), DEFAULT.len());
    }

    #[test]
    fn devices_elsewhere_or_of_no_kind_are_refused() {
        for (path, kind) in [("/etc/x", "c"), ("/dev/../etc/x", "c"), ("/dev", "c"), ("/dev/x", "s")] {
            assert!(Plan::new(&[device(path, kind)], None, false).is_err(), "{path} {kind}");
        }
        let mut far = device("/dev/x", "b");
        far.major = -1;
        assert!(Plan::new(&[far], None, false).is_err());
    }
}

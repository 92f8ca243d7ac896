//! Finds a path in the layers of an image as overlayfs would show it, without mounting anything: for image volumes,
//! which are a part of an image, and for the volumes that an image declares. Layers do not change once they are
//! unpacked; what is in them is hostile all the same, so links are followed here, step by step, and never left to the kernel.

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs, io,
    os::{fd::OwnedFd, unix::ffi::OsStringExt},
    path::{Component, Path, PathBuf},
};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};

/// Bounds of a look-up: links followed (path_resolution(7)) and parts gone through.
const LINKS: usize = 40;
const PARTS: usize = 4096;

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Nothing,
    /// The directories that make it up, topmost first, and the owner and mode that it shows.
    Directory {
        parts: Vec<PathBuf>,
        uid: u32,
        gid: u32,
        mode: u32,
    },
    File(PathBuf),
    /// A device, a socket or a FIFO.
    Other,
}

/// Looks for a path in layers, topmost first.
pub fn find(layers: &[PathBuf], path: &Path) -> io::Result<Found> {
    let roots = layers
        .iter()
        .map(|layer| {
            Ok(rustix::fs::open(layer, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
        })
        .collect::<io::Result<Vec<OwnedFd>>>()?;
    let mut walk = Walk {
        layers,
        roots,
        at: vec![Step { name: OsString::new(), held_by: (0..layers.len()).collect() }],
    };
    let mut todo: VecDeque<OsString> = names(path);
    let (mut links, mut parts) = (0, 0);
    while let Some(name) = todo.pop_front() {
        parts += 1;
        if parts > PARTS {
            return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        }
        if name == ".." {
            if walk.at.len() > 1 {
                walk.at.pop();
            }
            continue;
        }
        match walk.enter(&name)? {
            Entry::Nothing => return Ok(Found::Nothing),
            Entry::Directory => (),
            Entry::Link(target) => {
                links += 1;
                if links > LINKS {
                    return Err(io::Error::from_raw_os_error(libc::ELOOP));
                }
                if target.is_absolute() {
                    walk.at.truncate(1);
                }
                for name in names(&target).into_iter().rev() {
                    todo.push_front(name);
                }
            }
            Entry::File(_) if !todo.is_empty() => return Ok(Found::Nothing),
            Entry::File(path) => return Ok(Found::File(path)),
            Entry::Other => return Ok(if todo.is_empty() { Found::Other } else { Found::Nothing }),
        }
    }
    walk.here()
}

/// True when no part of a directory holds anything. Whiteouts count: they hide what is below.
pub fn is_empty(parts: &[PathBuf]) -> io::Result<bool> {
    for part in parts {
        if fs::read_dir(part)?.next().is_some() {
            return Ok(false);
        }
    }
    Ok(true)
}

struct Walk<'a> {
    layers: &'a [PathBuf],
    roots: Vec<OwnedFd>,
    at: Vec<Step>,
}

/// A directory on the way, and the layers that have a part in it, topmost first.
struct Step {
    name: OsString,
    held_by: Vec<usize>,
}

enum Entry {
    Nothing,
    Directory,
    Link(PathBuf),
    File(PathBuf),
    Other,
}

impl Walk<'_> {
    fn path(&self) -> PathBuf {
        self.at.iter().skip(1).map(|step| &step.name).collect()
    }

    fn enter(&mut self, name: &OsString) -> io::Result<Entry> {
        let path = self.path().join(name);
        let above = self.at.last().map(|step| step.held_by.clone()).unwrap_or_default();
        let mut held_by = Vec::new();
        for layer in above {
            let (Some(root), Some(directory)) = (self.roots.get(layer), self.layers.get(layer)) else {
                continue;
            };
            let stat = match rustix::fs::statat(root, &path, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(rustix::io::Errno::NOENT) => continue,
                Err(e) => return Err(e.into()),
            };
            let kind = FileType::from_raw_mode(stat.st_mode);
            if is_whiteout(&stat) {
                break;
            }
            if kind == FileType::Directory {
                held_by.push(layer);
                if is_opaque(root, &path)? {
                    break;
                }
                continue;
            }
            // A file ends the search; below a directory of a higher layer it is hidden by it.
            if !held_by.is_empty() {
                break;
            }
            return Ok(match kind {
                FileType::Symlink => {
                    let target = rustix::fs::readlinkat(root, &path, Vec::new())?;
                    Entry::Link(OsString::from_vec(target.into_bytes()).into())
                }
                FileType::RegularFile => Entry::File(directory.join(&path)),
                _ => Entry::Other,
            });
        }
        if held_by.is_empty() {
            return Ok(Entry::Nothing);
        }
        self.at.push(Step { name: name.clone(), held_by });
        Ok(Entry::Directory)
    }

    fn here(&self) -> io::Result<Found> {
        let path = self.path();
        let held_by = self.at.last().map(|step| step.held_by.as_slice()).unwrap_or_default();
        let parts = held_by.iter().filter_map(|layer| self.layers.get(*layer)).map(|layer| {
            match path.as_os_str().is_empty() {
                true => layer.clone(),
                false => layer.join(&path),
            }
        });
        let Some(top) = held_by.first().and_then(|layer| self.roots.get(*layer)) else {
            return Ok(Found::Nothing);
        };
        let stat = match path.as_os_str().is_empty() {
            true => rustix::fs::fstat(top)?,
            false => rustix::fs::statat(top, &path, AtFlags::SYMLINK_NOFOLLOW)?,
        };
        Ok(Found::Directory {
            parts: parts.collect(),
            uid: stat.st_uid,
            gid: stat.st_gid,
            mode: stat.st_mode & 0o7777,
        })
    }
}

/// The parts of a path; what leads up stays, what means nothing goes.
fn names(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

/// A character device 0:0 hides the name in the layers below (overlayfs.rst).
fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// A directory with this attribute hides those of its name below.
fn is_opaque(root: &OwnedFd, path: &Path) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(root, path, flags, Mode::empty())?;
    for name in ["trusted.overlay.opaque", "user.overlay.opaque"] {
        let mut value = [0u8; 4];
        match rustix::fs::fgetxattr(&directory, name, &mut value) {
            Ok(1) if value[0] == b'y' => return Ok(true),
            Ok(_)
            | Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::RANGE) => (),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    struct Image {
        root: tempfile::TempDir,
        layers: Vec<PathBuf>,
    }

    /// Layers, topmost first, from lists of entries: `d:` directory, `f:` file, `w:` whiteout, `o:` opaque directory,
    /// `l:name=target` link.
    fn image(layers: &[&[&str]]) -> Image {
        let root = tempfile::tempdir().unwrap();
        let layers = layers.iter().zip(0..).map(|(entries, number)| {
            let layer = root.path().join(format!("layer{number}"));
            fs::create_dir(&layer).unwrap();
            for entry in *entries {
                let (kind, name) = entry.split_once(':').unwrap();
                let path = layer.join(name);
                match kind {
                    "d" => fs::create_dir_all(path).unwrap(),
                    "f" => {
                        fs::create_dir_all(path.parent().unwrap()).unwrap();
                        fs::write(path, number.to_string()).unwrap();
                    }
                    "w" => {
                        fs::create_dir_all(path.parent().unwrap()).unwrap();
                        let mode = Mode::from_raw_mode(0);
                        rustix::fs::mknodat(rustix::fs::CWD, path, FileType::CharacterDevice, mode, 0)
                            .unwrap();
                    }
                    "o" => {
                        fs::create_dir_all(&path).unwrap();
                        let flags = rustix::fs::XattrFlags::empty();
                        // tmpfs of old kernels has no user attributes, overlayfs no trusted ones: one will do.
                        rustix::fs::setxattr(&path, "trusted.overlay.opaque", b"y", flags)
                            .or_else(|_| rustix::fs::setxattr(&path, "user.overlay.opaque", b"y", flags))
                            .unwrap();
                    }
                    "l" => {
                        let (name, target) = name.split_once('=').unwrap();
                        symlink(target, layer.join(name)).unwrap();
                    }
                    _ => panic!("{entry}"),
                }
            }
            layer
        });
        let layers = layers.collect();
        Image { root, layers }
    }

    impl Image {
        fn show(&self, path: &str) -> String {
            let short = |path: &PathBuf| path.strip_prefix(self.root.path()).unwrap().display().to_string();
            match find(&self.layers, Path::new(path)) {
                Ok(Found::Nothing) => "nothing".into(),
                Ok(Found::Directory { parts, .. }) => parts.iter().map(short).collect::<Vec<_>>().join(" "),
                Ok(Found::File(path)) => format!("file {}", short(&path)),
                Ok(Found::Other) => "other".into(),
                Err(e) => format!("error {}", e.raw_os_error().unwrap_or(0)),
            }
        }
    }

    #[test]
    fn a_path_is_found_as_overlayfs_shows_it() {
        let image = image(&[
            &["f:a/top", "w:gone", "o:opaque", "f:file-over-dir", "d:dir-over-file", "w:b/c"],
            &["f:a/mid", "d:gone/x", "d:opaque/y", "d:file-over-dir/x", "f:dir-over-file", "d:b/c/d"],
            &["f:a/low", "d:a/deep", "d:dir-over-file/x", "f:only"],
        ]);
        for (path, expected) in [
            ("a", "layer0/a layer1/a layer2/a"),
            ("/a/", "layer0/a layer1/a layer2/a"),
            ("a/top", "file layer0/a/top"),
            ("a/low", "file layer2/a/low"),
            ("a/deep", "layer2/a/deep"),
            ("gone", "nothing"),
            ("gone/x", "nothing"),
            ("opaque", "layer0/opaque"),
            ("opaque/y", "nothing"),
            ("file-over-dir", "file layer0/file-over-dir"),
            ("file-over-dir/x", "nothing"),
            ("dir-over-file", "layer0/dir-over-file"),
            ("dir-over-file/x", "nothing"),
            ("b/c", "nothing"),
            ("only", "file layer2/only"),
            ("none", "nothing"),
            ("", "layer0 layer1 layer2"),
        ] {
            assert_eq!(image.show(path), expected, "{path}");
        }
    }

    #[test]
    fn links_and_dots_stay_inside() {
        let image = image(&[
            &["l:abs=/a/dir", "l:up=../../../../a", "l:out=/etc/passwd", "l:loop=loop", "l:chain=abs"],
            &["d:a/dir", "f:a/dir/f", "f:etc/passwd"],
        ]);
        for (path, expected) in [
            ("abs", "layer1/a/dir"),
            ("abs/f", "file layer1/a/dir/f"),
            ("up/dir", "layer1/a/dir"),
            ("out", "file layer1/etc/passwd"),
            ("chain/f", "file layer1/a/dir/f"),
            ("../../a/dir", "layer1/a/dir"),
            ("a/../../../etc/passwd", "file layer1/etc/passwd"),
            ("loop", "error 40"),
        ] {
            assert_eq!(image.show(path), expected, "{path}");
        }
    }

    #[test]
    fn owner_and_mode_are_those_of_the_topmost_part() {
        let image = image(&[&["d:v"], &["d:v"]]);
        fs::set_permissions(image.layers[0].join("v"), fs::Permissions::from_mode(0o1777)).unwrap();
        rustix::fs::chown(image.layers[0].join("v"), Some(rustix::fs::Uid::from_raw(999)), None).unwrap();
        let Found::Directory { uid, mode, .. } = find(&image.layers, Path::new("v")).unwrap() else {
            panic!()
        };
        assert_eq!((uid, mode), (999, 0o1777));
    }

    #[test]
    fn a_directory_is_empty_when_all_its_parts_are() {
        let image = image(&[&["d:v"], &["f:v/x"]]);
        let all: Vec<PathBuf> = image.layers.iter().map(|layer| layer.join("v")).collect();
        assert!(is_empty(&all[..1]).unwrap());
        assert!(!is_empty(&all).unwrap());
    }
}

//! Directories of the volumes that images declare. Each container gets its own, laid over what the image has at that
//! place: nothing is copied, and what the program writes there goes with the container.
//!
//! ```text
//! <root>/volumes/empty            lower directory for overlays of one layer
//! <root>/volumes/<container>/0/fs, 0/work, 1/fs, …
//! ```

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt, chown},
    path::{Path, PathBuf},
};

use cri_api::v1;

use super::{
    Error, Request,
    layers::{self, Found},
    mounts::{self, Source},
};
use crate::config::Config;

/// More volumes than any image of good will declares.
const COUNT: usize = 128;

/// One volume of an image.
pub struct Volume {
    pub destination: String,
    pub source: Source,
}

impl Volume {
    /// The mount that a client would have written for it.
    pub fn mount(&self) -> v1::Mount {
        v1::Mount { container_path: self.destination.clone(), ..Default::default() }
    }
}

/// The empty directory.
pub fn empty(settings: &Config) -> PathBuf {
    settings.root.join("volumes/empty")
}

/// Makes the directories of all volumes that no mount of the client covers, unless the operator wants none.
pub fn make(request: &Request<'_>, taken: &[String]) -> Result<Vec<Volume>, Error> {
    let own = directory(&request.settings.root, request.id);
    let failed = |source| Error::Look { what: "volume directory", path: own.clone(), source };
    let declared: &[String] = match request.settings.security.ignore_image_defined_volumes {
        true => &[],
        false => &request.image.volumes,
    };
    if !declared.is_empty() || request.config.mounts.iter().any(|mount| mount.image.is_some()) {
        private(&empty(request.settings)).map_err(failed)?;
    }
    let mut volumes: Vec<Volume> = Vec::new();
    for path in declared.iter().take(COUNT) {
        // A declaration that leads nowhere is the image's fault, and no reason to refuse the pod.
        let Some(destination) = mounts::clean(&format!("/{path}")).filter(|path| path != "/") else {
            continue;
        };
        if taken.contains(&destination) || volumes.iter().any(|volume| volume.destination == destination) {
            continue;
        }
        let place = own.join(volumes.len().to_string());
        let source = one(&request.image.layers, &destination, &place).map_err(failed)?;
        volumes.push(Volume { destination, source });
    }
    Ok(volumes)
}

/// Links in the image are followed within the image only (CVE-2022-23648).
fn one(layers: &[PathBuf], destination: &str, place: &Path) -> io::Result<Source> {
    let (upper, work) = (place.join("fs"), place.join("work"));
    private(&upper)?;
    private(&work)?;
    let found = match layers::find(layers, Path::new(destination)) {
        Err(e) if e.raw_os_error() == Some(libc::ELOOP) => Found::Nothing,
        found => found?,
    };
    let Found::Directory { parts, uid, gid, mode } = found else {
        fs::set_permissions(&upper, fs::Permissions::from_mode(0o755))?;
        return Ok(Source::Volume { upper, work, lower: Vec::new() });
    };
    chown(&upper, Some(uid), Some(gid))?;
    fs::set_permissions(&upper, fs::Permissions::from_mode(mode))?;
    // An empty place gets the bare directory: programs that bring their own overlays could not work on ours.
    let lower = if layers::is_empty(&parts)? { Vec::new() } else { parts };
    Ok(Source::Volume { upper, work, lower })
}

/// Where a container's volumes are.
pub fn directory(root: &Path, id: &str) -> PathBuf {
    root.join("volumes").join(id)
}

/// Removes the volumes of a container; succeeds when there are none.
pub fn remove(root: &Path, id: &str) -> io::Result<()> {
    match remove_tree(&directory(root, id)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Without recursion, for a container can make directories deeper than a stack: the deepest ones first go up.
/// Directories are entered by descriptor and without following links, so nothing outside can be reached.
fn remove_tree(path: &Path) -> io::Result<()> {
    use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, openat, renameat, unlinkat};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = openat(CWD, path, flags, Mode::empty())?;
    let mut moved = 0u64;
    loop {
        let mut left = false;
        for entry in Dir::read_from(&top)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            left = true;
            match unlinkat(&top, name, AtFlags::empty()) {
                Ok(()) => continue,
                Err(rustix::io::Errno::ISDIR) => (),
                Err(e) => return Err(e.into()),
            }
            match unlinkat(&top, name, AtFlags::REMOVEDIR) {
                Ok(()) => continue,
                Err(rustix::io::Errno::NOTEMPTY | rustix::io::Errno::EXIST) => (),
                Err(e) => return Err(e.into()),
            }
            // What is inside comes up to the top under new names; files in it are removed at once.
            let inner = openat(&top, name, flags, Mode::empty())?;
            for below in Dir::read_from(&inner)? {
                let below = below?;
                let name = below.file_name();
                if name == c"." || name == c".." || unlinkat(&inner, name, AtFlags::empty()).is_ok() {
                    continue;
                }
                moved += 1;
                renameat(&inner, name, &top, format!(".removed-{moved}"))?;
            }
        }
        if !left {
            break;
        }
    }
    fs::remove_dir(path)
}

fn private(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deep_tree_is_removed_without_recursion() {
        let here = tempfile::tempdir().unwrap();
        let root = here.path();
        // Deeper than a path may be long: made from within.
        let own = directory(root, "c");
        private(&own).unwrap();
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY;
        let mut at = rustix::fs::open(&own, flags, rustix::fs::Mode::empty()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "dddd", rustix::fs::Mode::from_raw_mode(0o700)).unwrap();
            at = rustix::fs::openat(&at, "dddd", flags, rustix::fs::Mode::empty()).unwrap();
        }
        fs::write(own.join("f"), "x").unwrap();
        std::os::unix::fs::symlink("/etc", own.join("link")).unwrap();
        remove(root, "c").unwrap();
        assert!(!own.exists());
        assert!(Path::new("/etc/passwd").exists());
        remove(root, "c").unwrap();
    }

    #[test]
    fn a_volume_has_the_owner_of_the_images_directory_and_lies_over_its_content() {
        let here = tempfile::tempdir().unwrap();
        let layer = here.path().join("layer");
        fs::create_dir_all(layer.join("data")).unwrap();
        fs::create_dir_all(layer.join("void")).unwrap();
        fs::write(layer.join("data/file"), "x").unwrap();
        chown(layer.join("data"), Some(999), Some(998)).unwrap();
        let layers = [layer.clone()];
        let place = |name: &str| here.path().join(name);
        let Source::Volume { upper, lower, .. } = one(&layers, "/data", &place("0")).unwrap() else {
            panic!()
        };
        assert_eq!(lower, [layer.join("data")]);
        let meta = fs::metadata(upper).unwrap();
        assert_eq!(
            (std::os::unix::fs::MetadataExt::uid(&meta), std::os::unix::fs::MetadataExt::gid(&meta)),
            (999, 998)
        );
        for path in ["/void", "/none"] {
            let Source::Volume { lower, .. } =
                one(&layers, path, &place(path.trim_start_matches('/'))).unwrap()
            else {
                panic!()
            };
            assert!(lower.is_empty(), "{path}");
        }
    }

    #[test]
    fn a_volume_that_climbs_out_stays_inside() {
        let here = tempfile::tempdir().unwrap();
        let layer = here.path().join("layer");
        fs::create_dir_all(&layer).unwrap();
        fs::write(here.path().join("canary"), "secret").unwrap();
        std::os::unix::fs::symlink("/", layer.join("abs")).unwrap();
        std::os::unix::fs::symlink("../..", layer.join("up")).unwrap();
        for (number, path) in ["/../../etc", "/abs/etc", "/up/canary", "/abs"].iter().enumerate() {
            let place = here.path().join(number.to_string());
            let Source::Volume { lower, .. } = one(std::slice::from_ref(&layer), path, &place).unwrap()
            else {
                panic!()
            };
            assert!(lower.iter().all(|part| part.starts_with(&layer)), "{path}: {lower:?}");
        }
    }
}

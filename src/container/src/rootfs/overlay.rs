//! An overlay of image layers as a detached mount. Where its layers are, the caller says in overlayfs's own
//! option words; that they exist is the business of the image room.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

use super::mount::{self, Context};
use super::options::Options;
use crate::error::{At, Error, Failure, Step};
use crate::kernel::{self, CLONE_NEWNS, MOUNT_ATTR_RDONLY, MountAttr, mount_setattr};

#[derive(Debug)]
pub(crate) struct Plan {
    /// Topmost first.
    lower: Vec<String>,
    upper: Option<(String, String)>,
    options: Options,
    /// Layers are shifted by the container's user namespace.
    pub(crate) idmap: bool,
    /// Only this file of it is wanted.
    pub(crate) file: Option<String>,
}

/// Names a file of the overlay that is to be mounted in place of the whole. What is bound from a layer itself can be
/// made writable by whoever may mount; what is in an overlay without an upper directory cannot.
const FILE: &str = "crisp.file";

impl Plan {
    pub(crate) fn new(words: &[String]) -> Result<Plan, Error> {
        let mut options = Options::parse(words.iter().map(String::as_str).filter(|word| !is_idmap(word)));
        let mut take = |wanted: &str| {
            let index = options.data.iter().position(|(key, _)| key == wanted)?;
            options.data.remove(index).1
        };
        let lower = take("lowerdir").map(|list| split(&list)).unwrap_or_default();
        let upper = match (take("upperdir"), take("workdir")) {
            (Some(upper), Some(work)) => Some((upper, work)),
            (None, None) => None,
            _ => return Err(Error::Invalid("an overlay takes both upperdir and workdir, or neither".into())),
        };
        let file = take(FILE);
        let plain =
            |name: &String| !name.is_empty() && !name.contains(['/', '\0']) && name != "." && name != "..";
        if file.as_ref().is_some_and(|name| !plain(name)) {
            return Err(Error::Invalid(format!("{FILE} {file:?} is not the name of a file")));
        }
        if lower.is_empty() || lower.iter().any(String::is_empty) {
            return Err(Error::Invalid("an overlay needs lowerdir".into()));
        }
        Ok(Plan { lower, upper, options, idmap: wants_idmap(words), file })
    }

    /// Whether it takes places of the host that are covered, and so a mount namespace apart.
    pub(crate) fn covers(&self) -> bool {
        self.idmap || self.file.is_some()
    }

    /// The one file that is wanted, as a detached mount, or the whole as it is. The overlay is attached for that where
    /// its topmost layer is: before Linux 6.15 no copy of what is nowhere attached can be made.
    pub(crate) fn narrow(&self, whole: OwnedFd) -> Result<OwnedFd, Failure> {
        let (Some(file), Some(layer)) = (&self.file, self.lower.first()) else { return Ok(whole) };
        let shown = || format!("{layer}/{file}");
        let place = kernel::open_path(Path::new(layer)).at(Step::Source, layer)?;
        mount::attach(whole.as_fd(), place.as_fd()).at(Step::Mount, layer)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&whole, file.as_str(), flags, Mode::empty()).at(Step::Source, shown())?;
        mount::clone_fd(file.as_fd(), false).at(Step::Source, shown())
    }

    /// The detached overlay. Layers that are to be shifted were, by [`shift`].
    pub(crate) fn mount(&self) -> Result<OwnedFd, Failure> {
        if let ([layer], None) = (self.lower.as_slice(), &self.upper) {
            return self.alone(Path::new(layer)).at(Step::Mount, layer);
        }
        let owner = if self.idmap { self.owner()? } else { None };
        let _acting = owner.map(kernel::act_as).transpose().at(Step::IdMapMount, "rootfs")?;
        self.configure().map_err(|refused| refused.failure("overlay", Path::new("rootfs")))
    }

    /// overlayfs refuses to show a single layer that nothing is written to. That is a read-only bind.
    fn alone(&self, layer: &Path) -> Result<OwnedFd, Errno> {
        let tree = mount::clone(layer, false)?;
        mount_setattr(tree.as_fd(), false, MountAttr::propagation(libc::MS_PRIVATE))?;
        mount_setattr(tree.as_fd(), false, MountAttr::set(self.options.attr.set | MOUNT_ATTR_RDONLY))?;
        Ok(tree)
    }

    /// The container's root, as it owns the work directory seen through the mapping. overlayfs makes directories
    /// there as whoever mounts it, and through an id-mapped mount only mapped ids can.
    fn owner(&self) -> Result<Option<(u32, u32)>, Failure> {
        let Some((_, work)) = &self.upper else { return Ok(None) };
        let stat = rustix::fs::stat(work).at(Step::Source, work)?;
        Ok(Some((stat.st_uid, stat.st_gid)))
    }

    fn configure(&self) -> Result<OwnedFd, mount::Refused> {
        let context = Context::open("overlay")?;
        context.string("source", "overlay")?;
        self.lower(&context)?;
        if let Some((upper, work)) = &self.upper {
            context.string("upperdir", upper)?;
            context.string("workdir", work)?;
        }
        for (key, value) in &self.options.data {
            match value {
                Some(value) => context.string(key, value)?,
                None => context.flag(key)?,
            }
        }
        context.mount(self.options.attr.set)
    }

    /// One call per layer where the kernel can (6.8); a list, which fits 255 bytes, where it cannot.
    fn lower(&self, context: &Context) -> Result<(), mount::Refused> {
        for (index, layer) in self.lower.iter().enumerate() {
            match context.string("lowerdir+", layer) {
                Err(refused) if index == 0 && refused.errno == Errno::INVAL => {
                    return context.string("lowerdir", &join(&self.lower));
                }
                other => other?,
            }
        }
        Ok(())
    }

    fn shifted(&self) -> Result<BTreeSet<PathBuf>, Failure> {
        let mut directories: BTreeSet<PathBuf> = self.lower.iter().map(PathBuf::from).collect();
        if let Some((upper, work)) = &self.upper {
            match (Path::new(upper).parent(), Path::new(work).parent()) {
                (Some(one), Some(other)) if one == other => directories.insert(one.to_owned()),
                _ => {
                    return Err(Errno::XDEV)
                        .at(Step::IdMapMount, format_args!("{upper} and {work}: not in one directory"));
                }
            };
        }
        Ok(directories)
    }
}

/// A mount namespace in which places of the host can be covered: only this process and its children see it.
pub(crate) fn apart() -> Result<(), Failure> {
    kernel::unshare(CLONE_NEWNS).at(Step::Namespace, "mount")?;
    let host = kernel::open_path(Path::new("/")).at(Step::Rootfs, "/")?;
    mount_setattr(host.as_fd(), true, MountAttr::propagation(libc::MS_SLAVE))
        .at(Step::MountAttributes, "the host's mounts")
}

/// Covers each layer with an id-mapped copy of itself, at its own path, so that overlayfs finds shifted files there.
/// Upper and work directory must be one mount, so their parent is covered.
pub(crate) fn shift<'a>(
    overlays: impl Iterator<Item = &'a Plan>,
    user: BorrowedFd<'_>,
) -> Result<(), Failure> {
    let mut directories = BTreeSet::new();
    for overlay in overlays {
        directories.append(&mut overlay.shifted()?);
    }
    // All copies first: a part of a layer, as volumes are, may lie below one that is covered, and a copy of what is
    // mapped cannot be mapped again. Then a directory before what is below it.
    let mut trees = Vec::with_capacity(directories.len());
    for directory in directories {
        let tree = mount::clone(&directory, false).at(Step::Source, directory.display())?;
        mount_setattr(tree.as_fd(), false, MountAttr::idmap(user))
            .at(Step::IdMapMount, directory.display())?;
        trees.push((directory, tree));
    }
    for (directory, tree) in trees {
        let target = kernel::open_path(&directory).at(Step::Source, directory.display())?;
        mount::attach(tree.as_fd(), target.as_fd()).at(Step::Mount, directory.display())?;
    }
    Ok(())
}

/// `idmap` is ours; `uidmap=0:100000:65536` is how containerd says it, about the same mapping that the
/// container has.
pub(crate) fn wants_idmap(words: &[String]) -> bool {
    words.iter().any(|word| is_idmap(word))
}

fn is_idmap(word: &str) -> bool {
    word == "idmap" || word.starts_with("uidmap=") || word.starts_with("gidmap=")
}

/// Colons separate, backslashes protect (Documentation/filesystems/overlayfs.rst).
fn split(list: &str) -> Vec<String> {
    let mut layers = vec![String::new()];
    let mut chars = list.chars();
    while let Some(char) = chars.next() {
        match (char, layers.last_mut()) {
            (':', _) => layers.push(String::new()),
            ('\\', Some(layer)) => layer.extend(chars.next()),
            (char, Some(layer)) => layer.push(char),
            (_, None) => {}
        }
    }
    layers
}

fn join(layers: &[String]) -> String {
    let protected: Vec<String> =
        layers.iter().map(|layer| layer.replace('\\', "\\\\").replace(':', "\\:")).collect();
    protected.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn layers_are_split_at_colons_that_are_not_protected() {
        assert_eq!(split(r"/a:/b\:c:/d\\e"), ["/a", "/b:c", r"/d\e"]);
        assert_eq!(join(&split(r"/a:/b\:c:/d\\e")), r"/a:/b\:c:/d\\e");
    }

    #[test]
    fn half_an_upper_layer_is_refused() {
        assert!(Plan::new(&words(&["lowerdir=/a", "upperdir=/u"])).is_err());
        assert!(Plan::new(&words(&["lowerdir=/a", "upperdir=/u", "workdir=/w"])).is_ok());
        assert!(Plan::new(&words(&["upperdir=/u", "workdir=/w"])).is_err());
        assert!(Plan::new(&words(&["lowerdir=/a::/b"])).is_err());
    }

    #[test]
    fn words_about_id_mapping_do_not_reach_overlayfs() {
        let plan = Plan::new(&words(&["lowerdir=/a", "uidmap=0:1:2", "gidmap=0:1:2", "index=off"])).unwrap();
        assert!(plan.idmap);
        assert_eq!(plan.options.data, [("index".to_owned(), Some("off".to_owned()))]);
    }

    #[test]
    fn the_file_that_is_wanted_has_a_plain_name() {
        let plan = |name: &str| Plan::new(&words(&["lowerdir=/a:/b", &format!("crisp.file={name}")]));
        assert_eq!(plan("f=g,h").unwrap().file.as_deref(), Some("f=g,h"));
        assert!(plan("f").unwrap().covers());
        for bad in ["", ".", "..", "a/b", "/etc/passwd", "a\0b"] {
            assert!(plan(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn upper_and_work_directory_are_shifted_together() {
        let plan = Plan::new(&words(&["lowerdir=/a", "upperdir=/s/fs", "workdir=/s/work"])).unwrap();
        assert_eq!(
            plan.shifted().unwrap().into_iter().collect::<Vec<_>>(),
            [Path::new("/a"), Path::new("/s")]
        );
        let plan = Plan::new(&words(&["lowerdir=/a", "upperdir=/s/fs", "workdir=/t/work"])).unwrap();
        assert!(plan.shifted().is_err());
    }
}

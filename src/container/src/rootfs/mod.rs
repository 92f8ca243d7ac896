//! The file system that a container sees: its root, what is mounted in it, what is hidden, and the way in.
//! Runs in the child, in two parts: `Plan::open` gathers everything that takes the host's rights or the
//! host's paths, as detached mounts; `Plan::build` puts them together in the container's own mount namespace
//! and user namespace. Which processes these are is the business of `init`.

mod cgroups;
mod dev;
mod mask;
pub(crate) mod mount;
pub(crate) mod options;
mod overlay;
pub(crate) mod pivot;
pub(crate) mod root;
mod shm;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::fs::fstatfs;
use rustix::io::Errno;

pub(crate) use mask::is_null;
pub use shm::{Shm, shm};

use crate::error::{At, Error, Failure, Step};
use crate::kernel::{self, MOUNT_ATTR_RDONLY, MountAttr, mount_setattr};
use crate::namespace::IdMaps;
use crate::spec::{self, Spec};
use options::Options;
use root::{Kind, Root};

/// One mount that makes up the root, in the words of containerd's `types.Mount`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// `overlay`, or `bind`.
    pub kind: String,
    /// The directory to bind; without meaning for an overlay.
    pub source: String,
    /// As in `mount -o`. With `idmap`, or `uidmap=` and `gidmap=` as containerd writes them, the layers are
    /// id-mapped by the container's user namespace.
    pub options: Vec<String>,
}

/// Everything about the container's file system, checked and ready before the clone.
#[derive(Debug)]
pub(crate) struct Plan {
    base: Base,
    read_only: bool,
    propagation: Option<libc::c_ulong>,
    entries: Vec<Entry>,
    dev: Option<dev::Plan>,
    masked: Vec<PathBuf>,
    read_only_paths: Vec<PathBuf>,
    cwd: PathBuf,
    terminal: bool,
    cgroups: cgroups::Plan,
    user: Option<OwnedFd>,
}

/// What the root is made of.
#[derive(Debug)]
enum Base {
    Bind { source: PathBuf, options: Options, idmap: bool },
    Overlay(overlay::Plan),
}

/// One mount of the specification.
#[derive(Debug)]
struct Entry {
    destination: PathBuf,
    what: What,
    options: Options,
    /// Whose mapping shifts the ids of this mount.
    idmap: Option<OwnedFd>,
}

#[derive(Debug)]
enum What {
    /// A path of the host.
    Bind(PathBuf),
    /// Directories of the host over each other, such as the layers of an image.
    Overlay(overlay::Plan),
    /// A tree that the caller holds.
    Tree(OwnedFd),
    /// Our own `/dev`.
    Dev,
    /// The container's own cgroups.
    Cgroups,
    /// A new instance of a file system.
    New { kind: String, source: String },
    /// Other attributes for what is there already.
    Remount,
}

/// Detached mounts that took the host's rights to open.
#[derive(Debug)]
pub(crate) struct Sources {
    root: OwnedFd,
    /// In the order of the plan's entries; None where the container itself mounts.
    trees: Vec<Option<OwnedFd>>,
    cgroups: Vec<OwnedFd>,
    null: Option<OwnedFd>,
}

/// What was built.
pub(crate) struct Built {
    pub(crate) root: Root,
    /// The container's devpts.
    pub(crate) devpts: Option<OwnedFd>,
}

/// The parts of a plan that the specification does not say.
pub(crate) struct Given<'a> {
    pub(crate) bundle: &'a Path,
    pub(crate) rootfs: Option<Vec<Mount>>,
    pub(crate) trees: Vec<(PathBuf, OwnedFd)>,
    /// SELinux: `linux.mountLabel`.
    pub(crate) mount_label: &'a str,
    pub(crate) maps: Option<&'a IdMaps>,
    pub(crate) user: Option<BorrowedFd<'a>>,
    pub(crate) cgroup: &'a crate::cgroup::Cgroup,
    pub(crate) cgroup_namespace: bool,
}

impl Plan {
    /// Checks what can be checked without touching anything.
    pub(crate) fn new(spec: &Spec, mut given: Given<'_>) -> Result<Plan, Error> {
        let read_only = spec.root.as_ref().is_some_and(|root| root.readonly);
        let base = base(spec, given.bundle, given.rootfs.take())?;
        let mut entries = Vec::with_capacity(spec.mounts.len() + 1);
        for mount in &spec.mounts {
            entries.push(entry(mount, &mut given)?);
        }
        for (destination, tree) in given.trees {
            let options = Options::default();
            entries.push(Entry { destination, what: What::Tree(tree), options, idmap: None });
        }
        if !entries.iter().any(|entry| entry.destination == Path::new("/dev")) {
            let options = Options::parse(["nosuid", "strictatime", "mode=755", "size=65536k"]);
            let destination = PathBuf::from("/dev");
            entries.insert(0, Entry { destination, what: What::Dev, options, idmap: None });
        }
        let terminal = spec.process.as_ref().is_some_and(|process| process.terminal);
        let dev = match entries.iter().find(|entry| matches!(entry.what, What::Dev)) {
            Some(_) => Some(dev::Plan::new(&spec.linux.devices, given.maps, terminal)?),
            None => None,
        };
        let propagation = match spec.linux.rootfs_propagation.as_str() {
            "" => None,
            word => Some(options::root_propagation(word).ok_or_else(|| {
                Error::Invalid(format!("rootfsPropagation {word:?} is not one of the four kinds"))
            })?),
        };
        let wants_cgroups = entries.iter().any(|entry| matches!(entry.what, What::Cgroups));
        let cgroups = cgroups::Plan::new(given.cgroup, given.cgroup_namespace, wants_cgroups);
        let user = match given.user {
            Some(fd) => Some(duplicate(fd)?),
            None => None,
        };
        Ok(Plan {
            base,
            read_only,
            propagation,
            entries,
            dev,
            masked: absolute(&spec.linux.masked_paths, "maskedPaths")?,
            read_only_paths: absolute(&spec.linux.readonly_paths, "readonlyPaths")?,
            cwd: clean(Path::new(spec.process.as_ref().map_or("/", |process| &process.cwd))),
            terminal,
            cgroups,
            user,
        })
    }

    /// Descriptors that the child needs.
    pub(crate) fn descriptors(&self, keep: &mut Vec<RawFd>) {
        keep.extend(self.user.as_ref().map(AsRawFd::as_raw_fd));
        for entry in &self.entries {
            keep.extend(entry.idmap.as_ref().map(AsRawFd::as_raw_fd));
            if let What::Tree(tree) = &entry.what {
                keep.push(tree.as_raw_fd());
            }
        }
    }

    /// With the host's rights: opens every source as a detached mount. Nothing is attached anywhere that the
    /// host could see.
    pub(crate) fn open(&self) -> Result<Sources, Failure> {
        let mut trees = Vec::with_capacity(self.entries.len());
        for entry in &self.entries {
            trees.push(self.open_entry(entry)?);
        }
        let cgroups = self.cgroups.open()?;
        let null = if self.masked.is_empty() { None } else { Some(mask::null()?) };
        let mut root = self.open_base()?;

        // What covers places of the host comes last: first those of shifted layers, which overlays are made of, then
        // those where overlays are attached for a file of them.
        let base = if let Base::Overlay(overlay) = &self.base { Some((overlay, &mut root)) } else { None };
        let volumes = self.entries.iter().zip(&mut trees).filter_map(|(entry, tree)| match &entry.what {
            What::Overlay(overlay) => Some((overlay, tree)),
            _ => None,
        });
        let covering: Vec<_> = volumes.chain(base).filter(|(overlay, _)| overlay.covers()).collect();
        if !covering.is_empty() {
            overlay::apart()?;
        }
        let shifted = || covering.iter().map(|(overlay, _)| *overlay).filter(|overlay| overlay.idmap);
        if shifted().next().is_some() {
            let user = self.user.as_ref().ok_or(Errno::INVAL);
            let user = user.at(Step::IdMapMount, "layers: the container has no user namespace")?;
            overlay::shift(shifted(), user.as_fd())?;
        }
        let wholes: Result<Vec<_>, Failure> = covering.iter().map(|(overlay, _)| overlay.mount()).collect();
        for ((overlay, tree), whole) in covering.into_iter().zip(wholes?) {
            *tree = Some(overlay.narrow(whole)?);
        }
        let root = root.ok_or(Errno::NOENT).at(Step::Rootfs, "of the container")?;
        Ok(Sources { root, trees, cgroups, null })
    }

    fn open_base(&self) -> Result<Option<OwnedFd>, Failure> {
        match &self.base {
            Base::Overlay(overlay) if overlay.covers() => Ok(None),
            Base::Overlay(overlay) => overlay.mount().map(Some),
            Base::Bind { source, options, idmap } => {
                let tree = mount::clone(source, true).at(Step::Rootfs, source.display())?;
                if let (true, Some(user)) = (*idmap, &self.user) {
                    mount_setattr(tree.as_fd(), false, MountAttr::idmap(user.as_fd()))
                        .at(Step::IdMapMount, source.display())?;
                }
                if options.attr != MountAttr::default() {
                    mount_setattr(tree.as_fd(), false, options.attr)
                        .at(Step::MountAttributes, source.display())?;
                }
                Ok(Some(tree))
            }
        }
    }

    fn open_entry(&self, entry: &Entry) -> Result<Option<OwnedFd>, Failure> {
        let tree = match &entry.what {
            What::Bind(source) => {
                let recursive = entry.options.bind.is_none_or(|bind| bind.recursive);
                mount::clone(source, recursive).at(Step::Source, source.display())?
            }
            What::Dev => match &self.dev {
                Some(dev) => return dev.make(&entry.options).map(Some),
                None => return Ok(None),
            },
            // Its layers lie where the container cannot look.
            What::Overlay(overlay) if !overlay.covers() => return overlay.mount().map(Some),
            _ => return Ok(None),
        };
        if let Some(user) = &entry.idmap {
            let recursive = entry.options.idmap.is_some_and(|idmap| idmap.recursive);
            mount_setattr(tree.as_fd(), recursive, MountAttr::idmap(user.as_fd()))
                .at(Step::IdMapMount, entry.destination.display())?;
        }
        mount::set_attributes(tree.as_fd(), &entry.options)
            .at(Step::MountAttributes, entry.destination.display())?;
        Ok(Some(tree))
    }

    /// In the container's mount namespace, which still shows the host: puts the container's tree together on
    /// top of the host's root, by descriptor.
    pub(crate) fn build(&self, sources: Sources) -> Result<Built, Failure> {
        // What we mount must not spread to the host; what the host mounts later may still arrive in volumes.
        let host = kernel::open_path(Path::new("/")).at(Step::Rootfs, "/")?;
        mount_setattr(host.as_fd(), true, MountAttr::propagation(libc::MS_SLAVE))
            .at(Step::MountAttributes, "the host's mounts")?;
        // A root that is bound from a shared mount is its peer: mounts in it would appear on the host.
        let first = match self.propagation {
            Some(libc::MS_SLAVE) => libc::MS_SLAVE,
            _ => libc::MS_PRIVATE,
        };
        mount_setattr(sources.root.as_fd(), true, MountAttr::propagation(first))
            .at(Step::MountAttributes, "rootfs")?;
        mount::attach(sources.root.as_fd(), host.as_fd()).at(Step::Rootfs, "/")?;
        let root = Root::new(sources.root);
        let mut built = Built { root, devpts: None };
        let mut cgroups = Some(sources.cgroups);
        for (entry, tree) in self.entries.iter().zip(sources.trees) {
            let cgroups = if matches!(entry.what, What::Cgroups) { cgroups.take() } else { None };
            self.place(entry, tree, cgroups.unwrap_or_default(), &mut built)?;
        }
        self.verify(&built.root)?;
        Ok(built)
    }

    fn place(
        &self,
        entry: &Entry,
        tree: Option<OwnedFd>,
        cgroups: Vec<OwnedFd>,
        built: &mut Built,
    ) -> Result<(), Failure> {
        let destination = entry.destination.as_path();
        let tree = match (&entry.what, tree) {
            (What::Tree(tree), _) => mount::own(tree).at(Step::Mount, destination.display())?,
            (What::Remount, _) => {
                let there = built.root.find(destination).at(Step::MountPoint, destination.display())?;
                return mount::set_attributes(there.as_fd(), &entry.options)
                    .at(Step::MountAttributes, destination.display());
            }
            (What::Cgroups, _) => {
                let target = built
                    .root
                    .find_or_make(destination, Kind::Directory)
                    .at(Step::MountPoint, destination.display())?;
                return self.cgroups.mount(target.as_fd(), &entry.options, cgroups);
            }
            (What::New { kind, source }, _) => mount::new(kind, source, &entry.options)
                .or_else(|refused| self.instead(kind, &entry.options, refused))
                .map_err(|refused| refused.failure(kind, destination))?,
            (_, Some(tree)) => tree,
            (_, None) => return Ok(()),
        };
        let kind = root::kind(tree.as_fd()).at(Step::Source, destination.display())?;
        let system = mount::system(tree.as_fd()).at(Step::Source, destination.display())?;
        check_system(destination, system)?;
        let plain = system.is_some() || destination == Path::new("/dev");
        let target = if plain {
            built.root.find_or_make_plain(destination, kind)
        } else {
            built.root.find_or_make(destination, kind)
        };
        let target = match target {
            // S01, S07: what the label, the masks and the devices are written through must be where it seems.
            Err(Errno::LOOP | Errno::NOTDIR) if plain => Err(Errno::NOTDIR).at(
                Step::Mount,
                format_args!("{}: must be mounted on an ordinary directory", destination.display()),
            )?,
            other => other.at(Step::MountPoint, destination.display())?,
        };
        check_target(destination, target.as_fd())?;
        mount::attach(tree.as_fd(), target.as_fd()).at(Step::Mount, destination.display())?;
        if matches!(&entry.what, What::New { kind, .. } if kind == "devpts") {
            built.devpts = Some(tree);
        }
        Ok(())
    }

    /// In a user namespace that does not own the network namespace the kernel refuses sysfs; the host's own,
    /// read-only, is what runtimes show then.
    fn instead(
        &self,
        kind: &str,
        options: &Options,
        refused: mount::Refused,
    ) -> Result<OwnedFd, mount::Refused> {
        if kind != "sysfs" || refused.errno != Errno::PERM || self.user.is_none() {
            return Err(refused);
        }
        let tree = mount::clone(Path::new("/sys"), true)?;
        mount_setattr(tree.as_fd(), true, MountAttr::set(MOUNT_ATTR_RDONLY))?;
        mount_setattr(tree.as_fd(), true, MountAttr::propagation(libc::MS_PRIVATE))?;
        mount::set_attributes(tree.as_fd(), options)?;
        Ok(tree)
    }

    /// Looks again where procfs and sysfs ended up, for everything security writes later goes there.
    fn verify(&self, root: &Root) -> Result<(), Failure> {
        for entry in &self.entries {
            let What::New { kind, .. } = &entry.what else { continue };
            let Some(wanted) = mount::System::named(kind) else { continue };
            let path = entry.destination.as_path();
            let found = root.find_plain(path).and_then(|fd| mount::system(fd.as_fd()));
            if found.at(Step::Mount, format_args!("{kind} on {}", path.display()))? != Some(wanted) {
                return Err(Errno::BUSY)
                    .at(Step::Mount, format_args!("{kind} on {}: covered by another mount", path.display()));
            }
        }
        Ok(())
    }

    /// Hides and protects what the specification lists, then closes the root itself. Last, because mount points
    /// and the working directory are made in it.
    pub(crate) fn protect(&self, built: &Built, null: Option<OwnedFd>) -> Result<(), Failure> {
        mask::read_only(&built.root, &self.read_only_paths)?;
        if let Some(null) = null {
            mask::hide(&built.root, &self.masked, null)?;
        }
        if !self.cwd.as_os_str().is_empty() && self.cwd != Path::new("/") {
            // A missing working directory is made, as every runtime does; the user must still be able to enter.
            match built.root.find_or_make(&self.cwd, Kind::Directory) {
                Ok(_) | Err(Errno::ROFS) => {}
                Err(errno) => return Err(errno).at(Step::Cwd, self.cwd.display()),
            }
        }
        if self.read_only {
            mount_setattr(built.root.as_fd(), false, MountAttr::set(MOUNT_ATTR_RDONLY))
                .at(Step::ReadOnly, "/")?;
            mask::check_read_only(built.root.as_fd(), Path::new("/"))?;
        }
        Ok(())
    }

    /// The root's own propagation, once it is nobody's neighbour.
    pub(crate) fn finish(&self) -> Result<(), Failure> {
        match self.propagation {
            None | Some(libc::MS_PRIVATE | libc::MS_SLAVE) => Ok(()),
            Some(kind) => {
                let root = kernel::open_path(Path::new("/")).at(Step::MountAttributes, "/")?;
                mount_setattr(root.as_fd(), false, MountAttr::propagation(kind))
                    .at(Step::MountAttributes, "/")
            }
        }
    }

    /// True when a terminal needs a devpts that nothing in the specification mounts.
    pub(crate) fn lacks_devpts(&self) -> bool {
        self.terminal
            && !self
                .entries
                .iter()
                .any(|entry| matches!(&entry.what, What::New { kind, .. } if kind == "devpts"))
    }
}

impl Sources {
    /// Takes the null device that file masks are made of.
    pub(crate) fn take_null(&mut self) -> Option<OwnedFd> {
        self.null.take()
    }
}

fn base(spec: &Spec, bundle: &Path, rootfs: Option<Vec<Mount>>) -> Result<Base, Error> {
    let Some(mut mounts) = rootfs else {
        let path = spec.root.as_ref().map_or("", |root| root.path.as_str());
        if path.is_empty() {
            return Err(Error::Invalid("root.path is empty".into()));
        }
        return Ok(Base::Bind { source: bundle.join(path), options: Options::default(), idmap: false });
    };
    let (Some(mount), true) = (mounts.pop(), mounts.is_empty()) else {
        return Err(Error::Invalid("the rootfs must be exactly one mount".into()));
    };
    match mount.kind.as_str() {
        "overlay" => Ok(Base::Overlay(overlay::Plan::new(&mount.options)?)),
        "bind" | "rbind" | "" | "none" => {
            let options = Options::parse(mount.options.iter().map(String::as_str));
            let idmap = overlay::wants_idmap(&mount.options);
            Ok(Base::Bind { source: mount.source.into(), options, idmap })
        }
        other => Err(Error::Invalid(format!("rootfs of type {other:?}"))),
    }
}

fn entry(mount: &spec::Mount, given: &mut Given<'_>) -> Result<Entry, Error> {
    if !mount.destination.starts_with('/') || mount.destination.contains('\0') {
        return Err(Error::Invalid(format!("mount destination {:?} is not absolute", mount.destination)));
    }
    let destination = clean(Path::new(&mount.destination));
    if destination == Path::new("/") {
        return Err(Error::Invalid("a mount on the root itself".into()));
    }
    if let Some(index) = given.trees.iter().position(|(path, _)| clean(path) == destination) {
        let (_, tree) = given.trees.swap_remove(index);
        return Ok(Entry { destination, what: What::Tree(tree), options: Options::default(), idmap: None });
    }
    // S01: whatever is mounted on procfs, before or after it, can only be meant to deceive.
    if destination.starts_with("/proc") && destination != Path::new("/proc") && !is_replaceable(&destination)
    {
        return Err(Error::Invalid(format!("a mount on {destination:?}, inside procfs")));
    }
    let options = Options::parse(mount.options.iter().map(String::as_str));
    let what = match mount.kind.as_str() {
        _ if options.remount => What::Remount,
        kind if options.bind.is_some() || kind == "bind" || kind == "rbind" => {
            What::Bind(given.bundle.join(&mount.source))
        }
        "cgroup" | "cgroup2" => What::Cgroups,
        "overlay" => What::Overlay(overlay::Plan::new(&mount.options)?),
        // H37: never what the image has there. A devtmpfs would be the host's.
        "tmpfs" if destination == Path::new("/dev") => What::Dev,
        "" => return Err(Error::Invalid(format!("mount on {destination:?} has no type"))),
        kind => What::New { kind: kind.to_owned(), source: mount.source.clone() },
    };
    let mut options = options;
    if labelled(&what) && !given.mount_label.is_empty() {
        options.data.push(("context".into(), Some(given.mount_label.into())));
    }
    if mount.kind == "rbind" {
        options.bind = Some(options::Bind { recursive: true });
    } else if matches!(what, What::Bind(_)) && options.bind.is_none() {
        options.bind = Some(options::Bind { recursive: false });
    }
    let idmap = match (&what, mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty(), options.idmap) {
        (_, true, None) => None,
        (What::Bind(_), own, _) => Some(mapping(mount, own, given)?),
        // Of an overlay the layers are mapped, each by itself.
        (What::Overlay(_), true, _) => None,
        _ => return Err(Error::Invalid(format!("{destination:?} cannot be id-mapped"))),
    };
    if options.copy_up {
        return Err(Error::Invalid(format!("tmpcopyup on {destination:?} is not supported")));
    }
    Ok(Entry { destination, what, options, idmap })
}

/// File systems whose files carry a label for the whole mount (mount(8), `context=`). procfs, sysfs and their kin
/// have labels of their own.
fn labelled(what: &What) -> bool {
    match what {
        What::Dev => true,
        What::New { kind, .. } => matches!(kind.as_str(), "tmpfs" | "devpts" | "ramfs"),
        _ => false,
    }
}

/// The user namespace whose mapping an id-mapped mount uses: the container's, or one made for this mount.
fn mapping(mount: &spec::Mount, own: bool, given: &Given<'_>) -> Result<OwnedFd, Error> {
    let maps = IdMaps { uid: mount.uid_mappings.clone(), gid: mount.gid_mappings.clone() };
    match (given.user, given.maps) {
        (Some(user), Some(theirs)) if own || *theirs == maps => duplicate(user),
        (Some(user), None) if own => duplicate(user),
        (None, _) if own => Err(Error::Invalid(format!(
            "{:?} is to be id-mapped, but neither it nor the container has a mapping",
            mount.destination
        ))),
        _ => crate::namespace::mapped(&maps),
    }
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, Error> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3).at(Step::Source, "user namespace")?)
}

/// The one place that may have each of these file systems on it is its own (S01): a volume that covers `/proc`
/// would catch what is written there later.
fn check_system(destination: &Path, system: Option<mount::System>) -> Result<(), Failure> {
    let wanted = match destination.to_str() {
        Some("/proc") => mount::System::Proc,
        Some("/sys") => mount::System::Sysfs,
        _ => return Ok(()),
    };
    if system == Some(wanted) {
        return Ok(());
    }
    Err(Errno::PERM).at(
        Step::Mount,
        format_args!("a volume on {}: only its own file system may be there", destination.display()),
    )
}

/// Files of procfs that programs like lxcfs replace.
const REPLACEABLE: [&str; 10] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
    "/proc/net/dev",
];

fn is_replaceable(destination: &Path) -> bool {
    REPLACEABLE.iter().any(|path| Path::new(path) == destination)
}

/// Nothing else is mounted inside procfs, by whatever name one gets there.
fn check_target(destination: &Path, target: BorrowedFd<'_>) -> Result<(), Failure> {
    let object = || format!("{}: inside procfs", destination.display());
    let on_proc = fstatfs(target).at(Step::MountPoint, destination.display())?.f_type as u64
        == libc::PROC_SUPER_MAGIC as u64;
    let itself = destination == Path::new("/proc");
    if on_proc && !itself && !is_replaceable(destination) {
        return Err(Errno::PERM).at(Step::Mount, object());
    }
    Ok(())
}

fn absolute(paths: &[String], list: &str) -> Result<Vec<PathBuf>, Error> {
    let checked = paths.iter().map(|path| {
        if path.starts_with('/') && !path.contains('\0') {
            Ok(clean(Path::new(path)))
        } else {
            Err(Error::Invalid(format!("{list} entry {path:?} is not absolute")))
        }
    });
    checked.collect()
}

/// The path without `.`, `..` and doubled slashes, as a name; links are not looked at.
pub(crate) fn clean(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => drop(clean.pop()),
            _ => {}
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_as_names() {
        for (path, wanted) in
            [("/a/./b//c", "/a/b/c"), ("/a/../../b", "/b"), ("", "/"), ("/..", "/"), ("x", "/x")]
        {
            assert_eq!(clean(Path::new(path)), Path::new(wanted));
        }
    }
}

//! Layers on the disk, seen as the one tree that overlayfs will make of them: reading a file through them, and
//! mending directories that a layer implies without listing.
//!
//! A layer that holds `usr/bin/x` but no entry for `usr/` says nothing about `usr`: its owner and mode come from the
//! layers below. overlayfs takes them from the topmost layer that has the directory. Layer directories are shared
//! between images and never changed, so where the two disagree an image gets a *mend*: one more directory on top,
//! which holds nothing but the directories in question, with the right attributes.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::ffi::{CStr, CString};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, fchmod, fchown,
    fgetxattr, flistxattr, fsetxattr, fstat, futimens, mkdirat, openat, readlinkat, statat,
};
use rustix::io::Errno;

use crate::error::{Error, Result, sys};
use crate::tree::DIRECTORY;

/// The mark of a directory that hides what lies below it.
pub(crate) const OPAQUE: &CStr = c"trusted.overlay.opaque";
/// Links followed in one look-up, as in the kernel.
const MAX_LINKS: usize = 40;
/// Implied directories over all layers of one image.
const MAX_IMPLIED: usize = 100_000;

/// The layers of one image, topmost first.
pub(crate) struct Stack {
    layers: Vec<OwnedFd>,
}

/// A directory of the merged tree: the layers that have it, topmost first.
type Merged = Rc<Vec<(usize, OwnedFd)>>;

enum Found {
    Absent,
    Directory(Merged),
    /// Anything else: the layer's directory that it is in, and what it is.
    Other(OwnedFd, Stat),
}

impl Stack {
    /// Opens the named directories below `layers`, which are given topmost first.
    pub(crate) fn open(layers: BorrowedFd<'_>, names: &[String]) -> Result<Stack> {
        let open = |name: &String| {
            openat(layers, name.as_str(), DIRECTORY, Mode::empty()).map_err(sys(format!("open layer {name}")))
        };
        Ok(Stack { layers: names.iter().map(open).collect::<Result<_>>()? })
    }

    /// Reads a regular file of the merged tree. Links are followed inside the tree; `None` if there is no such file,
    /// or if it is not a regular one.
    pub(crate) fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let failed = |errno| sys(format!("read {path} of an image"))(errno);
        let mut ahead: VecDeque<CString> = parts(path.as_bytes()).map_err(failed)?;
        let mut behind: Vec<CString> = Vec::new();
        let mut at = self.top().map_err(failed)?;
        let mut links = 0;
        while let Some(name) = ahead.pop_front() {
            if name.as_bytes() == b".." {
                behind.pop();
                at = self.walk(&behind).map_err(failed)?.ok_or(Errno::STALE).map_err(failed)?;
                continue;
            }
            match look(&at, &name, &|_| false).map_err(failed)? {
                Found::Absent => return Ok(None),
                Found::Directory(next) => {
                    behind.push(name);
                    at = next;
                }
                Found::Other(directory, stat) => match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Symlink => {
                        links += 1;
                        if links > MAX_LINKS {
                            return Err(failed(Errno::LOOP));
                        }
                        let target = readlinkat(&directory, name.as_c_str(), Vec::new()).map_err(failed)?;
                        if target.as_bytes().starts_with(b"/") {
                            behind.clear();
                            at = self.top().map_err(failed)?;
                        }
                        for part in parts(target.as_bytes()).map_err(failed)?.into_iter().rev() {
                            ahead.push_front(part);
                        }
                    }
                    FileType::RegularFile if ahead.is_empty() => {
                        return regular(directory.as_fd(), &name, path, limit).map(Some);
                    }
                    _ => return Ok(None),
                },
            }
        }
        Ok(None)
    }

    /// Which implied directories of the merged tree show wrong attributes, and what they should be. Paths are
    /// relative and come parents first; every ancestor of a wrong one is among them. `implied` is by layer, in the
    /// order of the stack, `/` being the empty path.
    fn wrong(&self, implied: &[HashSet<&[u8]>], stop: &AtomicBool) -> Result<BTreeMap<Vec<u8>, Attributes>> {
        let failed = |errno| sys("compare the directories of an image")(errno);
        // The lowest layer has nothing below it to take attributes from.
        let upper = implied.split_last().map_or(&[][..], |(_, upper)| upper);
        let paths: BTreeSet<&[u8]> = upper.iter().flatten().copied().collect();
        let mut wrong: BTreeSet<Vec<u8>> = BTreeSet::new();
        let mut right: BTreeMap<Vec<u8>, Attributes> = BTreeMap::new();
        // Sorted order visits a directory right before what is in it, so a path's ancestors are looked up once.
        let mut trail: Vec<(CString, Merged)> = Vec::new();
        for path in paths {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            let parts = Vec::from(parts(path).map_err(failed)?);
            let common = trail.iter().zip(&parts).take_while(|((name, _), part)| name == *part).count();
            trail.truncate(common.min(parts.len().saturating_sub(1)));
            let mut here = Vec::new();
            let mut visible = true;
            for (depth, part) in parts.iter().enumerate() {
                here.extend_from_slice(if depth == 0 { b"" } else { b"/" });
                here.extend_from_slice(part.as_bytes());
                if depth < trail.len() {
                    continue;
                }
                let parent = match trail.last() {
                    Some((_, parent)) => parent.clone(),
                    None => self.top().map_err(failed)?,
                };
                // Attributes are looked for below an opaque mark as well, where the marked directory is implied.
                let through = |layer: usize| implied[layer].contains(here.as_slice());
                match look(&parent, part, &through).map_err(failed)? {
                    Found::Directory(all) => {
                        self.judge(&all, &here, implied, &mut right, &mut wrong).map_err(failed)?;
                        match look(&parent, part, &|_| false).map_err(failed)? {
                            Found::Directory(merged) => trail.push((part.clone(), merged)),
                            _ => visible = false,
                        }
                    }
                    _ => visible = false,
                }
                if !visible {
                    break;
                }
            }
            if parts.is_empty() {
                let top = self.top().map_err(failed)?;
                self.judge(&top, b"", implied, &mut right, &mut wrong).map_err(failed)?;
            }
        }
        if wrong.is_empty() {
            return Ok(BTreeMap::new());
        }
        // Ancestors of what is wrong come along, with their own right attributes.
        let mut needed: BTreeSet<Vec<u8>> = BTreeSet::from([Vec::new()]);
        for path in &wrong {
            let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(end, _)| end);
            needed.extend(ends.chain([path.len()]).map(|end| path[..end].to_vec()));
        }
        if !right.contains_key(&Vec::new()) {
            let top = self.top().map_err(failed)?;
            self.judge(&top, b"", implied, &mut right, &mut wrong).map_err(failed)?;
        }
        right.retain(|path, _| needed.contains(path));
        Ok(right)
    }

    /// Notes what a directory should look like, and whether it does.
    fn judge(
        &self,
        all: &Merged,
        path: &[u8],
        implied: &[HashSet<&[u8]>],
        right: &mut BTreeMap<Vec<u8>, Attributes>,
        wrong: &mut BTreeSet<Vec<u8>>,
    ) -> rustix::io::Result<()> {
        let Some((_, shown)) = all.first() else { return Ok(()) };
        let listed = all.iter().find(|(layer, _)| !implied[*layer].contains(path));
        let shown = Attributes::read(shown.as_fd())?;
        let source = match listed {
            Some((_, directory)) => Attributes::read(directory.as_fd())?,
            None => shown.clone(),
        };
        if !source.looks_like(&shown) {
            wrong.insert(path.to_vec());
        }
        right.insert(path.to_vec(), source);
        Ok(())
    }

    fn top(&self) -> rustix::io::Result<Merged> {
        let open = |(layer, directory): (usize, &OwnedFd)| {
            Ok((layer, openat(directory, c".", DIRECTORY, Mode::empty())?))
        };
        // An opaque root hides the layers below it.
        let mut merged = Vec::new();
        for (layer, directory) in self.layers.iter().enumerate() {
            merged.push(open((layer, directory))?);
            if is_opaque(directory.as_fd()) {
                break;
            }
        }
        Ok(Rc::new(merged))
    }

    fn walk(&self, names: &[CString]) -> rustix::io::Result<Option<Merged>> {
        let mut at = self.top()?;
        for name in names {
            match look(&at, name, &|_| false)? {
                Found::Directory(next) => at = next,
                _ => return Ok(None),
            }
        }
        Ok(Some(at))
    }
}

/// Builds the mend of an image in `into`, an empty directory, if it needs one. `implied` holds each layer's list,
/// topmost first, NUL between the paths; `/` is the empty path.
pub(crate) fn mend(
    stack: &Stack,
    implied: &[Vec<u8>],
    into: BorrowedFd<'_>,
    stop: &AtomicBool,
) -> Result<bool> {
    let sets: Vec<HashSet<&[u8]>> = implied.iter().map(|list| split_implied(list).collect()).collect();
    if sets.iter().map(HashSet::len).sum::<usize>() > MAX_IMPLIED {
        return Err(Error::TooLarge {
            what: "image".into(),
            why: format!("more than {MAX_IMPLIED} directories without an entry"),
        });
    }
    let right = stack.wrong(&sets, stop)?;
    if right.is_empty() {
        return Ok(false);
    }
    let failed = |errno| sys("mend implied directories")(errno);
    // Times last and deepest first: making a directory changes its parent's.
    for (path, attributes) in &right {
        if !path.is_empty() {
            mkdirat(into, path.as_slice(), Mode::from_raw_mode(0o700)).map_err(failed)?;
        }
        let directory = enter(into, path).map_err(failed)?;
        attributes.apply(directory.as_fd()).map_err(failed)?;
    }
    for (path, attributes) in right.iter().rev() {
        attributes.apply_times(enter(into, path).map_err(failed)?.as_fd()).map_err(failed)?;
    }
    Ok(true)
}

/// The paths of one layer's list. An absent list and the root alone differ: each path ends with NUL.
pub(crate) fn split_implied(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.strip_suffix(b"\0").map(|list| list.split(|byte| *byte == 0)).into_iter().flatten()
}

fn enter(top: BorrowedFd<'_>, path: &[u8]) -> rustix::io::Result<OwnedFd> {
    if path.is_empty() {
        return openat(top, c".", DIRECTORY, Mode::empty());
    }
    let resolve = rustix::fs::ResolveFlags::BENEATH | rustix::fs::ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(top, path, DIRECTORY, Mode::empty(), resolve)
}

/// What a directory looks like to a container.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Attributes {
    mode: Mode,
    uid: u32,
    gid: u32,
    modified: (i64, i64),
    xattrs: BTreeMap<CString, Vec<u8>>,
}

impl Attributes {
    pub(crate) fn read(directory: BorrowedFd<'_>) -> rustix::io::Result<Attributes> {
        let stat = fstat(directory)?;
        let mut xattrs = BTreeMap::new();
        for name in xattr_names(directory)? {
            if name.as_bytes().starts_with(b"trusted.overlay.") {
                continue;
            }
            let mut value = vec![0; 64 << 10];
            match fgetxattr(directory, name.as_c_str(), value.as_mut_slice()) {
                Ok(length) => {
                    value.truncate(length);
                    xattrs.insert(name, value);
                }
                Err(Errno::NODATA) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Attributes {
            mode: Mode::from_raw_mode(stat.st_mode),
            uid: stat.st_uid,
            gid: stat.st_gid,
            modified: (stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0)),
            xattrs,
        })
    }

    /// Gives these attributes to a fresh directory.
    pub(crate) fn apply(&self, directory: BorrowedFd<'_>) -> rustix::io::Result<()> {
        fchown(directory, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))?;
        fchmod(directory, self.mode)?;
        for (name, value) in &self.xattrs {
            fsetxattr(directory, name.as_c_str(), value, XattrFlags::empty())?;
        }
        Ok(())
    }

    pub(crate) fn apply_times(&self, directory: BorrowedFd<'_>) -> rustix::io::Result<()> {
        let time = Timespec { tv_sec: self.modified.0, tv_nsec: self.modified.1 };
        futimens(directory, &Timestamps { last_access: time, last_modification: time })
    }

    /// Equal but for the time, which is no reason for a mend.
    fn looks_like(&self, other: &Attributes) -> bool {
        let normal = |attributes: &Attributes| Attributes { modified: (0, 0), ..attributes.clone() };
        normal(self) == normal(other)
    }
}

fn xattr_names(file: BorrowedFd<'_>) -> rustix::io::Result<Vec<CString>> {
    let mut list = vec![0u8; 64 << 10];
    let length = match flistxattr(file, list.as_mut_slice()) {
        Err(Errno::NOTSUP) => 0,
        other => other?,
    };
    Ok(list[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .flat_map(CString::new)
        .collect())
}

/// Looks one name up in a merged directory. `through` tells for which layers an opaque mark does not end the search.
fn look(at: &Merged, name: &CStr, through: &dyn Fn(usize) -> bool) -> rustix::io::Result<Found> {
    let mut merged = Vec::new();
    for (layer, directory) in at.iter() {
        let stat = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error),
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let child = openat(directory, name, DIRECTORY, Mode::empty())?;
                let last = is_opaque(child.as_fd()) && !through(*layer);
                merged.push((*layer, child));
                if last {
                    break;
                }
            }
            // A whiteout, or something else, ends the directory above it; with nothing above it is the answer.
            FileType::CharacterDevice if stat.st_rdev == 0 => break,
            _ if merged.is_empty() => {
                return Ok(Found::Other(openat(directory, c".", DIRECTORY, Mode::empty())?, stat));
            }
            _ => break,
        }
    }
    Ok(if merged.is_empty() { Found::Absent } else { Found::Directory(Rc::new(merged)) })
}

fn is_opaque(directory: BorrowedFd<'_>) -> bool {
    let mut value = [0u8; 2];
    fgetxattr(directory, OPAQUE, value.as_mut_slice()) == Ok(1) && value[0] == b'y'
}

/// The components of a path, without empty ones and `.`; more than any real path has is an error.
fn parts(path: &[u8]) -> rustix::io::Result<VecDeque<CString>> {
    if path.len() > 4096 {
        return Err(Errno::NAMETOOLONG);
    }
    path.split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(|part| CString::new(part).map_err(|_| Errno::INVAL))
        .collect()
}

fn regular(directory: BorrowedFd<'_>, name: &CStr, path: &str, limit: u64) -> Result<Vec<u8>> {
    let act = || format!("read {path} of an image");
    // Opening must not block on what turned out to be a FIFO, nor follow what turned out to be a link.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat(directory, name, flags, Mode::empty()).map_err(sys(act()))?;
    let stat = fstat(&file).map_err(sys(act()))?;
    let size = stat.st_size.max(0).cast_unsigned();
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(sys(act())(Errno::INVAL));
    }
    let too_large = || Error::TooLarge { what: path.to_owned(), why: format!("more than {limit} bytes") };
    if size > limit {
        return Err(too_large());
    }
    let mut content = Vec::new();
    let mut file = std::fs::File::from(file).take(limit.saturating_add(1));
    file.read_to_end(&mut content).map_err(crate::error::io(act()))?;
    if content.len() as u64 > limit { Err(too_large()) } else { Ok(content) }
}

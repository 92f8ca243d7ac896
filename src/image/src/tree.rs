//! Directory trees by descriptor: removing and counting them. Both take trees of any depth and width with a handful
//! of open files and no recursion (S56), never follow a link, and never resolve a path of more than one component,
//! so a tree that changes under them cannot lead them elsewhere (S57).

use std::collections::{HashSet, VecDeque};
use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{
    AtFlags, FileType, IFlags, Mode, OFlags, RawDir, Stat, fstat, ioctl_getflags, ioctl_setflags, openat,
    renameat, statat, unlinkat,
};
use rustix::io::{Errno, Result};

/// Levels that a count keeps open; below that it climbs by `..` and compares what it finds.
const OPEN_LEVELS: usize = 32;

/// What files occupy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Occupied {
    /// Allocated blocks, in bytes.
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

impl Occupied {
    pub(crate) fn add(&mut self, other: Occupied) {
        self.bytes += other.bytes;
        self.inodes += other.inodes;
    }

    fn one(stat: &Stat) -> Occupied {
        Occupied { bytes: blocks(stat) * 512, inodes: 1 }
    }
}

/// Removes `name` below `trash`, whatever it is. Directories below it are first moved up into `trash` itself, so
/// that depth costs nothing; names in `trash` are ours alone.
pub(crate) fn remove(trash: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    let mut buffer = vec![MaybeUninit::uninit(); 32 << 10];
    let mut queue = VecDeque::from([name.to_owned()]);
    while let Some(name) = queue.pop_front() {
        match openat(trash, name.as_c_str(), DIRECTORY, Mode::empty()) {
            Ok(directory) => {
                // Files may appear while we look as long as someone still writes; that ends.
                for pass in 0.. {
                    empty(trash, directory.as_fd(), &mut buffer, &mut queue)?;
                    match unlinkat(trash, name.as_c_str(), AtFlags::REMOVEDIR) {
                        Err(Errno::NOTEMPTY) if pass < 100 => {}
                        Err(Errno::PERM) if pass < 100 => unlock(directory.as_fd())?,
                        other => {
                            other.or_else(gone)?;
                            break;
                        }
                    }
                }
            }
            Err(Errno::NOTDIR | Errno::LOOP) => unlink(trash, &name)?,
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Moves `name` from one directory into `trash` under a name of its own, and says which. `None` if it was not there.
pub(crate) fn throw(from: BorrowedFd<'_>, name: &CStr, trash: BorrowedFd<'_>) -> Result<Option<CString>> {
    let unique = unique();
    match renameat(from, name, trash, unique.as_c_str()) {
        Ok(()) => Ok(Some(unique)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Counts a directory and everything below it, hard links once.
pub(crate) fn count(directory: BorrowedFd<'_>) -> Result<Occupied> {
    let mut found = Occupied::default();
    for _ in 0..3 {
        match count_once(directory) {
            // The tree was turned over while we were deep in it.
            (counted, Err(Errno::STALE)) => found = counted,
            (counted, result) => return result.map(|()| counted),
        }
    }
    Ok(found)
}

/// The names in a directory, without `.` and `..`.
pub(crate) fn names(directory: BorrowedFd<'_>) -> Result<Vec<CString>> {
    let mut buffer = vec![MaybeUninit::uninit(); 16 << 10];
    let mut entries = RawDir::new(directory, &mut buffer);
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if !is_dots(entry.file_name()) {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

/// A name that no other of this process has, and hardly one of its predecessors.
pub(crate) fn unique() -> CString {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
    CString::new(format!("{}-{now:x}-{next:x}", std::process::id())).unwrap_or_default()
}

/// `O_NOFOLLOW` on everything that we enter.
pub(crate) const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn empty(
    trash: BorrowedFd<'_>,
    directory: BorrowedFd<'_>,
    buffer: &mut [MaybeUninit<u8>],
    queue: &mut VecDeque<CString>,
) -> Result<()> {
    rustix::fs::seek(directory, rustix::fs::SeekFrom::Start(0))?;
    let mut entries = RawDir::new(directory, buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if is_dots(name) {
            continue;
        }
        let known = entry.file_type();
        if known != FileType::Directory {
            match unlink(directory, name) {
                Err(Errno::ISDIR) => {}
                other => {
                    other?;
                    continue;
                }
            }
        }
        if unlinkat(directory, name, AtFlags::REMOVEDIR).is_ok() {
            continue;
        }
        let unique = unique();
        match renameat(directory, name, trash, unique.as_c_str()) {
            Ok(()) => queue.push_back(unique),
            Err(Errno::NOENT) => {}
            Err(Errno::PERM | Errno::ACCESS) => {
                unlock(directory)?;
                unlock(openat(directory, name, DIRECTORY, Mode::empty())?.as_fd())?;
                renameat(directory, name, trash, unique.as_c_str())?;
                queue.push_back(unique);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn unlink(directory: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    match unlinkat(directory, name, AtFlags::empty()) {
        Err(Errno::PERM) => {
            // Immutable, or in an append-only directory: a container with CAP_LINUX_IMMUTABLE can do that. Links and
            // special files are not opened; they cannot carry the flag everywhere, and opening them may block.
            unlock(directory)?;
            let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => return Err(Errno::ISDIR),
                FileType::RegularFile => {
                    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                    unlock(openat(directory, name, flags, Mode::empty())?.as_fd())?;
                }
                _ => {}
            }
            unlinkat(directory, name, AtFlags::empty()).or_else(gone)
        }
        other => other.or_else(gone),
    }
}

/// Takes the flags off that keep even root from removing.
fn unlock(file: BorrowedFd<'_>) -> Result<()> {
    match ioctl_getflags(file) {
        Ok(flags) if flags.intersects(IFlags::IMMUTABLE | IFlags::APPEND) => {
            ioctl_setflags(file, flags - IFlags::IMMUTABLE - IFlags::APPEND)
        }
        _ => Ok(()),
    }
}

fn gone(error: Errno) -> Result<()> {
    if error == Errno::NOENT { Ok(()) } else { Err(error) }
}

struct Level {
    identity: (u64, u64),
    /// Absent below [`OPEN_LEVELS`].
    open: Option<OwnedFd>,
    pending: Vec<CString>,
}

fn count_once(directory: BorrowedFd<'_>) -> (Occupied, Result<()>) {
    let mut counted = Occupied::default();
    let result = descend(directory, &mut counted);
    (counted, result)
}

fn descend(top: BorrowedFd<'_>, counted: &mut Occupied) -> Result<()> {
    let mut buffer = vec![MaybeUninit::uninit(); 32 << 10];
    let mut linked = HashSet::new();
    let mut current = openat(top, c".", DIRECTORY, Mode::empty())?;
    let stat = fstat(&current)?;
    let device = stat.st_dev;
    counted.add(Occupied::one(&stat));
    let mut levels: Vec<Level> = Vec::new();
    let mut pending = look(current.as_fd(), device, &mut buffer, &mut linked, counted)?;
    loop {
        while let Some(name) = pending.pop() {
            let child = match openat(&current, name.as_c_str(), DIRECTORY, Mode::empty()) {
                Ok(child) => child,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(error) => return Err(error),
            };
            let below = look(child.as_fd(), device, &mut buffer, &mut linked, counted)?;
            let parent = std::mem::replace(&mut current, child);
            levels.push(Level {
                identity: identity(&fstat(&parent)?),
                open: (levels.len() < OPEN_LEVELS).then_some(parent),
                pending: std::mem::replace(&mut pending, below),
            });
        }
        let Some(level) = levels.pop() else { return Ok(()) };
        current = match level.open {
            Some(open) => open,
            None => {
                let parent = openat(&current, c"..", DIRECTORY, Mode::empty())?;
                if identity(&fstat(&parent)?) != level.identity {
                    return Err(Errno::STALE);
                }
                parent
            }
        };
        pending = level.pending;
    }
}

/// Counts the entries of one directory and returns the directories among them.
fn look(
    directory: BorrowedFd<'_>,
    device: u64,
    buffer: &mut [MaybeUninit<u8>],
    linked: &mut HashSet<u64>,
    counted: &mut Occupied,
) -> Result<Vec<CString>> {
    let mut entries = RawDir::new(directory, buffer);
    let mut directories = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if is_dots(name) {
            continue;
        }
        let stat = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if stat.st_dev == device => stat,
            Ok(_) | Err(Errno::NOENT) => continue,
            Err(error) => return Err(error),
        };
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !is_directory && stat.st_nlink > 1 && !linked.insert(stat.st_ino) {
            continue;
        }
        counted.add(Occupied::one(&stat));
        if is_directory {
            directories.push(name.to_owned());
        }
    }
    Ok(directories)
}

fn is_dots(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn blocks(stat: &Stat) -> u64 {
    stat.st_blocks.max(0).cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{mkdirat, open};
    use std::os::unix::fs::{MetadataExt, symlink};

    fn directory(path: &std::path::Path) -> OwnedFd {
        open(path, DIRECTORY, Mode::empty()).unwrap()
    }

    /// A tree deeper than any path, built without paths.
    fn dig(top: BorrowedFd<'_>, depth: usize) {
        let mut current = openat(top, c".", DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..depth {
            mkdirat(&current, c"d", Mode::from_raw_mode(0o700)).unwrap();
            current = openat(&current, c"d", DIRECTORY, Mode::empty()).unwrap();
        }
    }

    #[test]
    fn s56_a_very_deep_tree_is_counted_and_removed() {
        // In memory: a disk takes minutes for so many directories.
        let temp = tempfile::tempdir_in("/dev/shm").unwrap();
        let trash = directory(temp.path());
        mkdirat(&trash, c"x", Mode::from_raw_mode(0o700)).unwrap();
        let top = openat(&trash, c"x", DIRECTORY, Mode::empty()).unwrap();
        dig(top.as_fd(), 100_000);
        assert_eq!(count(top.as_fd()).unwrap().inodes, 100_001);
        remove(trash.as_fd(), c"x").unwrap();
        assert!(names(trash.as_fd()).unwrap().is_empty());
    }

    #[test]
    fn s57_removing_does_not_follow_links() {
        let temp = tempfile::tempdir().unwrap();
        let canary = tempfile::tempdir().unwrap();
        std::fs::write(canary.path().join("file"), "x").unwrap();
        std::fs::create_dir(temp.path().join("x")).unwrap();
        symlink(canary.path(), temp.path().join("x/link")).unwrap();
        symlink(canary.path(), temp.path().join("top")).unwrap();
        let trash = directory(temp.path());
        remove(trash.as_fd(), c"x").unwrap();
        remove(trash.as_fd(), c"top").unwrap();
        remove(trash.as_fd(), c"absent").unwrap();
        assert!(canary.path().join("file").exists());
        assert!(names(trash.as_fd()).unwrap().is_empty());
    }

    #[test]
    fn s57_a_racer_cannot_lead_the_removal_out() {
        let temp = tempfile::tempdir().unwrap();
        let canary = tempfile::tempdir().unwrap();
        std::fs::write(canary.path().join("file"), "x").unwrap();
        std::fs::create_dir(canary.path().join("d")).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let trash = directory(temp.path());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let x = temp.path().join("x");
                while !stop.load(Ordering::Relaxed) {
                    let _ = rustix::fs::renameat_with(
                        rustix::fs::CWD,
                        x.join("a"),
                        rustix::fs::CWD,
                        x.join("b"),
                        rustix::fs::RenameFlags::EXCHANGE,
                    );
                }
            });
            for _ in 0..500 {
                std::fs::create_dir_all(temp.path().join("x/a/d")).unwrap();
                std::fs::write(temp.path().join("x/a/file"), "y").unwrap();
                symlink(canary.path(), temp.path().join("x/b")).unwrap_or_else(|_| {
                    let _ = symlink(canary.path(), temp.path().join("x/a"));
                });
                remove(trash.as_fd(), c"x").unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(canary.path().join("file").exists());
        assert!(canary.path().join("d").exists());
    }

    #[test]
    fn a_count_is_what_du_says() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(temp.path().join("a/b/c")).unwrap();
        std::fs::write(temp.path().join("a/big"), vec![7; 100_000]).unwrap();
        std::fs::hard_link(temp.path().join("a/big"), temp.path().join("a/b/again")).unwrap();
        symlink("nowhere", temp.path().join("link")).unwrap();
        let counted = count(directory(temp.path()).as_fd()).unwrap();
        let du = std::process::Command::new("du")
            .args(["-s", "--block-size=1"])
            .arg(temp.path())
            .output()
            .unwrap();
        let du: u64 =
            String::from_utf8(du.stdout).unwrap().split_whitespace().next().unwrap().parse().unwrap();
        assert_eq!(counted.bytes, du);
        assert_eq!(counted.inodes, 6);
        assert!(std::fs::metadata(temp.path().join("a/big")).unwrap().nlink() == 2);
    }
}

//! Turns an archive into a directory: entries, attributes, whiteouts. Works below one descriptor; every path is taken
//! apart first and resolved inside the root. Parsing of headers is tar-core's, which does no I/O.
//!
//! A whiteout (`.wh.name`, OCI image specification, "Layer Filesystem Changeset") becomes what overlayfs wants: a
//! character device 0:0, or the attribute `trusted.overlay.opaque` on a directory.

use std::{
    collections::HashSet,
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use rustix::{
    fs::{
        AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps, XattrFlags, fchmod, fchown,
        fsetxattr, fstat, ftruncate, futimens, linkat, lsetxattr, makedev, mkdirat, mknodat, openat2, statat,
        symlinkat, unlinkat, utimensat,
    },
    io::{Errno, pwrite},
    process::{Gid, Uid, fchdir},
};
use tar_core::{
    EntryType, HEADER_SIZE, PaxExtensions, SparseEntry,
    parse::{Limits, ParseError, ParseEvent, ParsedEntry, Parser},
};

use super::Unpacked;

/// Entries of one layer.
const MOST_ENTRIES: u64 = 20_000_000;
/// Implied directories that are remembered.
const MOST_IMPLIED: usize = 100_000;
/// Path and component lengths of Linux (path_resolution(7)).
const MOST_PATH: usize = 4096;
const MOST_NAME: usize = 255;
/// Headers, long names and extended attributes of one entry.
const MOST_METADATA: u32 = 1 << 20;
/// Pieces of a sparse file. More is an attack, not a file (CVE-2025-58183).
const MOST_PIECES: usize = 10_000;
/// Device numbers that Linux can hold.
const MOST_MAJOR: u32 = 1 << 12;
const MOST_MINOR: u32 = 1 << 20;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
const AUFS_METADATA: &[u8] = b".wh..wh.";
const OPAQUE: &str = "trusted.overlay.opaque";

/// Nothing in the way of a parent leads out of the root, whatever links say.
const INSIDE: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);
/// For a second visit to a path that was resolved before.
const NO_LINKS: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

/// Why extraction ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("read the archive: {0}")]
    Read(#[source] io::Error),
    #[error("archive: {0}")]
    Archive(String),
    #[error("entry {path:?}: {why}")]
    Entry { path: String, why: String },
    #[error("archive has more than {0} entries")]
    TooMany(u64),
    #[error("archive: {0}")]
    TooMuch(String),
    #[error("{act} {path:?}: {source}")]
    Host { act: &'static str, path: String, source: Errno },
}

type Result<T, E = Error> = std::result::Result<T, E>;

/// One entry, freed from the parser's buffer.
struct Entry {
    path: Vec<u8>,
    kind: Kind,
    owner: (Uid, Gid),
    mode: Mode,
    modified: Timespec,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of content that follow, without padding.
    size: u64,
}

enum Kind {
    File { sparse: Option<Sparse> },
    Directory,
    Symlink(Vec<u8>),
    Hardlink(Vec<u8>),
    Device { character: bool, major: u32, minor: u32 },
    Fifo,
}

struct Sparse {
    pieces: Vec<SparseEntry>,
    size: u64,
}

/// What the parser found next.
enum Next {
    Entry(Box<Entry>),
    Nothing,
    End,
}

/// A directory being filled.
pub(super) struct Extractor {
    root: OwnedFd,
    parser: Parser,
    buffer: Vec<u8>,
    /// Part of `buffer` that is not used yet.
    start: usize,
    end: usize,
    entries: u64,
    bytes: u64,
    inodes: u64,
    implied: HashSet<Vec<u8>>,
    /// Whether the root has an entry.
    rooted: bool,
    /// Modification times of directories, set last: filling a directory changes its own.
    times: Vec<(Vec<u8>, Timespec)>,
    /// The parent of the entry before; most have the same.
    parent: Option<(Vec<u8>, OwnedFd)>,
    content: Vec<u8>,
}

impl Extractor {
    pub(super) fn new(root: OwnedFd) -> Extractor {
        let limits = Limits {
            max_metadata_size: MOST_METADATA,
            max_path_len: Some(MOST_PATH as u32),
            max_sparse_entries: MOST_PIECES,
            ..Limits::default()
        };
        let mut parser = Parser::new(limits);
        // "./" names the root itself.
        parser.set_allow_empty_path(true);
        // It knows no time before 1970 and would refuse one; `checked_pax` is strict in its place.
        parser.set_ignore_pax_errors(true);
        Extractor {
            root,
            parser,
            buffer: vec![0; 64 << 10],
            start: 0,
            end: 0,
            entries: 0,
            bytes: 0,
            inodes: 0,
            implied: HashSet::new(),
            rooted: false,
            times: Vec::new(),
            parent: None,
            content: vec![0; 256 << 10],
        }
    }

    /// Extracts all of the archive.
    pub(super) fn run(&mut self, archive: &mut impl Read) -> Result<()> {
        // A root that the layer does not list is like every implied directory; the caller made it private.
        rustix::fs::chmodat(&self.root, ".", Mode::from_raw_mode(0o755), AtFlags::empty())
            .map_err(host("change mode of", b"/"))?;
        loop {
            match self.next(archive)? {
                Next::End => break,
                Next::Nothing => {}
                Next::Entry(entry) => {
                    self.entries += 1;
                    if self.entries > MOST_ENTRIES {
                        return Err(Error::TooMany(MOST_ENTRIES));
                    }
                    let size = entry.size;
                    let left = self.entry(&entry, archive)?;
                    self.skip(archive, left + padding(size))?;
                }
            }
        }
        self.set_times()
    }

    /// What was made of it.
    pub(super) fn unpacked(self, diff_id: String) -> Unpacked {
        let mut implied: Vec<Vec<u8>> = self.implied.into_iter().collect();
        implied.sort_unstable();
        // Names that are no UTF-8 cannot be told in JSON; their directories keep the attributes they have.
        let implied = implied.into_iter().filter_map(|path| String::from_utf8(path).ok());
        let implied = implied.map(PathBuf::from).collect();
        Unpacked { diff_id, root: self.rooted, bytes: self.bytes, inodes: self.inodes, implied }
    }

    fn next(&mut self, archive: &mut impl Read) -> Result<Next> {
        loop {
            let input = self.buffer.get(self.start..self.end).unwrap_or_default();
            let (consumed, next) = match self.parser.parse(input).map_err(unparsed)? {
                ParseEvent::NeedData { min_bytes } => {
                    if !self.fill(archive, min_bytes)? {
                        return Ok(Next::End);
                    }
                    continue;
                }
                ParseEvent::Entry { consumed, entry } => {
                    strict(input, consumed)?;
                    (consumed, owned(&entry, None)?)
                }
                ParseEvent::SparseEntry { consumed, entry, sparse_map, real_size } => {
                    strict(input, consumed)?;
                    (consumed, owned(&entry, Some(Sparse { pieces: sparse_map, size: real_size }))?)
                }
                ParseEvent::GlobalExtensions { consumed, pax_data } => {
                    global(input, pax_data)?;
                    (consumed, Next::Nothing)
                }
                ParseEvent::End { consumed } => (consumed, Next::End),
            };
            self.start += consumed;
            return Ok(next);
        }
    }

    /// Reads until there are `wanted` unused bytes. False at a clean end: archives may leave out their last blocks.
    fn fill(&mut self, archive: &mut impl Read, wanted: usize) -> Result<bool> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        // The parser asks for no more than the metadata that it was allowed, and its headers.
        let most = MOST_METADATA as usize * 2 + (MOST_PIECES / 21 + 64) * HEADER_SIZE;
        if wanted > most {
            return Err(Error::Archive("header is too large".into()));
        }
        if wanted > self.buffer.len() {
            self.buffer.resize(wanted.next_power_of_two(), 0);
        }
        while self.end < wanted {
            let room = self.buffer.get_mut(self.end..).unwrap_or_default();
            match archive.read(room) {
                Ok(0) if self.end == 0 => return Ok(false),
                Ok(0) => return Err(Error::Archive("archive ends within a header".into())),
                Ok(length) => self.end += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Read(error)),
            }
        }
        Ok(true)
    }

    /// The next bytes of content, at most `most`; from what was read ahead, or into the content buffer.
    fn content<'a>(&'a mut self, archive: &mut impl Read, most: u64) -> Result<&'a [u8]> {
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        if self.start < self.end {
            let length = most.min(self.end - self.start);
            let at = self.start;
            self.start += length;
            return Ok(self.buffer.get(at..at + length).unwrap_or_default());
        }
        loop {
            let room = self.content.len().min(most);
            match archive.read(self.content.get_mut(..room).unwrap_or_default()) {
                Ok(0) => return Err(Error::Archive("archive ends within a file".into())),
                Ok(length) => return Ok(self.content.get(..length).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Read(error)),
            }
        }
    }

    fn skip(&mut self, archive: &mut impl Read, mut left: u64) -> Result<()> {
        while left > 0 {
            left -= self.content(archive, left)?.len() as u64;
        }
        Ok(())
    }

    /// Makes one entry; says how much of its content is left to skip.
    fn entry(&mut self, entry: &Entry, archive: &mut impl Read) -> Result<u64> {
        let path = parts(&entry.path).map_err(|why| refused(&entry.path, why))?;
        let Some((name, parents)) = path.split_last() else {
            return self.root_attributes(entry).map(|()| entry.size);
        };
        let parent = self.parent(parents)?;
        let result = match name.strip_prefix(WHITEOUT) {
            _ if *name == OPAQUE_MARKER => opaque(&parent).map_err(host("mark opaque", &entry.path)),
            _ if name.starts_with(AUFS_METADATA) => Ok(()),
            Some(hidden) => self.whiteout(entry, &parent, hidden),
            None => return self.make(entry, parents, parent, name, archive),
        };
        self.parent = Some((joined(parents), parent));
        result.map(|()| entry.size)
    }

    fn make(
        &mut self,
        entry: &Entry,
        parents: &[&[u8]],
        parent: OwnedFd,
        name: &[u8],
        archive: &mut impl Read,
    ) -> Result<u64> {
        let path = joined_with(parents, name);
        let made = match &entry.kind {
            Kind::Directory => self.directory(entry, &parent, name, &path).map(|()| entry.size),
            Kind::File { sparse } => self.file(entry, &parent, name, sparse.as_ref(), archive).map(|()| 0),
            Kind::Hardlink(target) => self.hardlink(entry, &parent, name, target).map(|()| entry.size),
            Kind::Symlink(_) | Kind::Device { .. } | Kind::Fifo => {
                self.special(entry, &parent, name).map(|()| entry.size)
            }
        };
        self.parent = Some((joined(parents), parent));
        made
    }

    /// The directory that holds an entry, made as far as it is missing.
    fn parent(&mut self, parents: &[&[u8]]) -> Result<OwnedFd> {
        let path = joined(parents);
        if let Some((_, parent)) = self.parent.take_if(|(known, _)| *known == path) {
            return Ok(parent);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let whole = if path.is_empty() { b".".as_slice() } else { &path };
        match openat2(&self.root, whole, flags, Mode::empty(), INSIDE) {
            Ok(parent) => return Ok(parent),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(error) => return Err(host("open", &path)(error)),
        }
        for depth in 1..=parents.len() {
            let upper = joined(parents.get(..depth - 1).unwrap_or_default());
            let whole = joined(parents.get(..depth).unwrap_or_default());
            let name = parents.get(depth - 1).copied().unwrap_or_default();
            let upper = if upper.is_empty() { b".".to_vec() } else { upper };
            let upper = openat2(&self.root, upper.as_slice(), flags, Mode::empty(), INSIDE)
                .map_err(|error| through(&whole, error))?;
            match mkdirat(&upper, name, Mode::from_raw_mode(0o755)) {
                Ok(()) => self.imply(whole),
                Err(Errno::EXIST) => self.imply_over(&upper, name, &whole)?,
                Err(error) => return Err(host("make directory", &whole)(error)),
            }
        }
        openat2(&self.root, path.as_slice(), flags, Mode::empty(), INSIDE)
            .map_err(|error| through(&path, error))
    }

    fn imply(&mut self, path: Vec<u8>) {
        if self.implied.len() < MOST_IMPLIED {
            self.implied.insert(path);
        }
    }

    /// Something has the name that a directory is implied by: a directory or a link may stay, a whiteout makes way.
    fn imply_over(&mut self, upper: &OwnedFd, name: &[u8], whole: &[u8]) -> Result<()> {
        let there = statat(upper, name, AtFlags::SYMLINK_NOFOLLOW).map_err(host("look at", whole))?;
        match FileType::from_raw_mode(there.st_mode) {
            FileType::Directory | FileType::Symlink => Ok(()),
            FileType::CharacterDevice if there.st_rdev == 0 => {
                // What the layers below have there stays hidden, its attributes too: the directory is a new one.
                unlinkat(upper, name, AtFlags::empty()).map_err(host("replace", whole))?;
                mkdirat(upper, name, Mode::from_raw_mode(0o755)).map_err(host("make directory", whole))?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let directory =
                    openat2(upper, name, flags, Mode::empty(), NO_LINKS).map_err(host("open", whole))?;
                opaque(&directory).map_err(host("mark opaque", whole))
            }
            _ => Err(refused(whole, "is not a directory".into())),
        }
    }

    fn root_attributes(&mut self, entry: &Entry) -> Result<()> {
        if !matches!(entry.kind, Kind::Directory) {
            return Err(refused(&entry.path, "has no name".into()));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root =
            openat2(&self.root, ".", flags, Mode::empty(), INSIDE).map_err(host("open", &entry.path))?;
        self.rooted = true;
        self.times.push((b".".to_vec(), entry.modified));
        attributes(entry, &root)
    }

    fn directory(&mut self, entry: &Entry, parent: &OwnedFd, name: &[u8], path: &[u8]) -> Result<()> {
        let hidden_before = match mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => {
                self.count(parent, name)?;
                false
            }
            Err(Errno::EXIST) => {
                let there =
                    statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(host("look at", &entry.path))?;
                match FileType::from_raw_mode(there.st_mode) {
                    FileType::Directory => false,
                    kind => {
                        self.remove(entry, parent, name)?;
                        mkdirat(parent, name, Mode::from_raw_mode(0o700))
                            .map_err(host("make directory", &entry.path))?;
                        self.count(parent, name)?;
                        // A whiteout came first: what the layers below have there stays hidden.
                        kind == FileType::CharacterDevice && there.st_rdev == 0
                    }
                }
            }
            Err(error) => return Err(host("make directory", &entry.path)(error)),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory =
            openat2(parent, name, flags, Mode::empty(), NO_LINKS).map_err(host("open", &entry.path))?;
        if hidden_before {
            opaque(&directory).map_err(host("mark opaque", &entry.path))?;
        }
        self.implied.remove(path);
        self.times.push((path.to_vec(), entry.modified));
        attributes(entry, &directory)
    }

    fn file(
        &mut self,
        entry: &Entry,
        parent: &OwnedFd,
        name: &[u8],
        sparse: Option<&Sparse>,
        archive: &mut impl Read,
    ) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || openat2(parent, name, flags, Mode::from_raw_mode(0o600), NO_LINKS);
        let file = match open() {
            Err(Errno::EXIST) => {
                self.remove(entry, parent, name)?;
                open()
            }
            opened => opened,
        };
        let file = file.map_err(host("make file", &entry.path))?;
        match sparse {
            None => self.write(entry, &file, 0, entry.size, archive)?,
            Some(sparse) => self.write_sparse(entry, &file, sparse, archive)?,
        }
        attributes(entry, &file)?;
        futimens(&file, &times(entry.modified)).map_err(host("set times of", &entry.path))?;
        let made = fstat(&file).map_err(host("look at", &entry.path))?;
        self.add(made.st_blocks);
        Ok(())
    }

    fn write(
        &mut self,
        entry: &Entry,
        file: &OwnedFd,
        mut offset: u64,
        length: u64,
        archive: &mut impl Read,
    ) -> Result<()> {
        let mut left = length;
        while left > 0 {
            let mut piece = self.content(archive, left)?;
            left -= piece.len() as u64;
            while !piece.is_empty() {
                let written = match pwrite(file, piece, offset) {
                    Err(Errno::INTR) => 0,
                    written => written.map_err(host("write", &entry.path))?,
                };
                offset += written as u64;
                piece = piece.get(written..).unwrap_or_default();
            }
        }
        Ok(())
    }

    /// Pieces come in order and do not overlap; together they are all of the content.
    fn write_sparse(
        &mut self,
        entry: &Entry,
        file: &OwnedFd,
        sparse: &Sparse,
        archive: &mut impl Read,
    ) -> Result<()> {
        let mut behind = 0;
        let mut total = 0u64;
        for piece in &sparse.pieces {
            let end = piece.offset.checked_add(piece.length).filter(|end| *end <= sparse.size);
            let (Some(end), true) = (end, piece.offset >= behind) else {
                return Err(refused(&entry.path, "its sparse map is out of order or beyond its size".into()));
            };
            behind = end;
            total = total.saturating_add(piece.length);
        }
        if total != entry.size {
            return Err(refused(&entry.path, "its sparse map and its content differ in size".into()));
        }
        if sparse.size > super::MOST_FILE {
            return Err(Error::TooMuch(format!("a sparse file of {} bytes", sparse.size)));
        }
        ftruncate(file, sparse.size).map_err(host("size", &entry.path))?;
        for piece in &sparse.pieces {
            self.write(entry, file, piece.offset, piece.length, archive)?;
        }
        Ok(())
    }

    /// The target must be in this layer: nothing else is in reach.
    fn hardlink(&mut self, entry: &Entry, parent: &OwnedFd, name: &[u8], target: &[u8]) -> Result<()> {
        let target_parts =
            parts(target).map_err(|why| refused(&entry.path, format!("its link target {why}")))?;
        let Some((target_name, target_parents)) = target_parts.split_last() else {
            return Err(refused(&entry.path, "links to the root".into()));
        };
        let whole = joined(target_parents);
        let whole = if whole.is_empty() { b".".to_vec() } else { whole };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let absent = |error| match error {
            Errno::NOENT | Errno::NOTDIR => {
                refused(&entry.path, "links to what this layer does not have".into())
            }
            error => host("link", &entry.path)(error),
        };
        let target_parent =
            openat2(&self.root, whole.as_slice(), flags, Mode::empty(), INSIDE).map_err(absent)?;
        let there = statat(&target_parent, *target_name, AtFlags::SYMLINK_NOFOLLOW).map_err(absent)?;
        if FileType::from_raw_mode(there.st_mode) == FileType::Directory {
            return Err(refused(&entry.path, "links to a directory".into()));
        }
        let link = || linkat(&target_parent, *target_name, parent, name, AtFlags::empty());
        match link() {
            Err(Errno::EXIST) => {
                let here =
                    statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(host("look at", &entry.path))?;
                if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino) {
                    return Ok(());
                }
                self.remove(entry, parent, name)?;
                link().map_err(host("link", &entry.path))
            }
            linked => linked.map_err(host("link", &entry.path)),
        }
    }

    /// Links, devices and pipes: made without being opened, so attributes are set by name in the parent.
    fn special(&mut self, entry: &Entry, parent: &OwnedFd, name: &[u8]) -> Result<()> {
        let make = || match &entry.kind {
            Kind::Symlink(target) => symlinkat(target.as_slice(), parent, name),
            Kind::Device { character, major, minor } => {
                let kind = if *character { FileType::CharacterDevice } else { FileType::BlockDevice };
                mknodat(parent, name, kind, Mode::from_raw_mode(0o600), makedev(*major, *minor))
            }
            _ => mknodat(parent, name, FileType::Fifo, Mode::from_raw_mode(0o600), 0),
        };
        match make() {
            Err(Errno::EXIST) => {
                self.remove(entry, parent, name)?;
                make().map_err(host("make", &entry.path))?;
            }
            made => made.map_err(host("make", &entry.path))?,
        }
        self.count(parent, name)?;
        let no_follow = AtFlags::SYMLINK_NOFOLLOW;
        let (uid, gid) = entry.owner;
        rustix::fs::chownat(parent, name, Some(uid), Some(gid), no_follow)
            .map_err(host("change owner of", &entry.path))?;
        if !matches!(entry.kind, Kind::Symlink(_)) {
            // Not a link: it was made just now by us, and nobody else is here.
            rustix::fs::chmodat(parent, name, entry.mode, AtFlags::empty())
                .map_err(host("change mode of", &entry.path))?;
        }
        if !entry.xattrs.is_empty() {
            fchdir(parent).map_err(host("enter parent of", &entry.path))?;
            for (key, value) in &entry.xattrs {
                let set = lsetxattr(name, key.as_slice(), value, XattrFlags::empty());
                ignore_unsupported(set).map_err(host("set attribute of", &entry.path))?;
            }
        }
        utimensat(parent, name, &times(entry.modified), no_follow).map_err(host("set times of", &entry.path))
    }

    /// Hides what the layers below have at a name. What this very layer has there stays (OCI image specification:
    /// whiteouts apply to lower layers only).
    fn whiteout(&mut self, entry: &Entry, parent: &OwnedFd, hidden: &[u8]) -> Result<()> {
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(refused(&entry.path, "hides nothing that has a name".into()));
        }
        match mknodat(parent, hidden, FileType::CharacterDevice, Mode::empty(), 0) {
            Ok(()) => self.count(parent, hidden),
            Err(Errno::EXIST) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                match openat2(parent, hidden, flags, Mode::empty(), NO_LINKS) {
                    Ok(directory) => opaque(&directory).map_err(host("mark opaque", &entry.path)),
                    Err(Errno::NOTDIR | Errno::LOOP) => Ok(()),
                    Err(error) => Err(host("open", &entry.path)(error)),
                }
            }
            Err(error) => Err(host("make whiteout", &entry.path)(error)),
        }
    }

    /// Takes away what an entry replaces. A directory must be empty: no archiver replaces a full one.
    fn remove(&mut self, entry: &Entry, parent: &OwnedFd, name: &[u8]) -> Result<()> {
        let there = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(host("look at", &entry.path))?;
        let directory = FileType::from_raw_mode(there.st_mode) == FileType::Directory;
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        match unlinkat(parent, name, flags) {
            Err(Errno::NOTEMPTY) => {
                return Err(refused(&entry.path, "replaces a directory that is not empty".into()));
            }
            removed => removed.map_err(host("replace", &entry.path))?,
        }
        if there.st_nlink == 1 || directory {
            self.inodes = self.inodes.saturating_sub(1);
            self.bytes = self.bytes.saturating_sub(there.st_blocks.unsigned_abs().saturating_mul(512));
        }
        Ok(())
    }

    fn count(&mut self, parent: &OwnedFd, name: &[u8]) -> Result<()> {
        let made = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(host("look at", name))?;
        self.add(made.st_blocks);
        Ok(())
    }

    fn add(&mut self, blocks: i64) {
        self.inodes += 1;
        self.bytes = self.bytes.saturating_add(blocks.unsigned_abs().saturating_mul(512));
    }

    fn set_times(&mut self) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for (path, modified) in std::mem::take(&mut self.times) {
            match openat2(&self.root, path.as_slice(), flags, Mode::empty(), INSIDE) {
                Ok(directory) => {
                    futimens(&directory, &times(modified)).map_err(host("set times of", &path))?;
                }
                // Replaced by a later entry.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(host("open", &path)(error)),
            }
        }
        Ok(())
    }
}

/// Owner first: changing it takes setuid bits away (chown(2)), so the mode comes after.
fn attributes(entry: &Entry, file: &OwnedFd) -> Result<()> {
    let (uid, gid) = entry.owner;
    fchown(file, Some(uid), Some(gid)).map_err(host("change owner of", &entry.path))?;
    fchmod(file, entry.mode).map_err(host("change mode of", &entry.path))?;
    for (key, value) in &entry.xattrs {
        let set = fsetxattr(file, key.as_slice(), value, XattrFlags::empty());
        ignore_unsupported(set).map_err(host("set attribute of", &entry.path))?;
    }
    Ok(())
}

/// A file system without attributes, or a kind of file that may not have them (xattr(7)), loses them, as with any
/// archiver.
fn ignore_unsupported(set: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match set {
        Err(Errno::NOTSUP | Errno::PERM) => Ok(()),
        other => other,
    }
}

fn opaque(directory: impl AsFd) -> rustix::io::Result<()> {
    fsetxattr(directory, OPAQUE, b"y", XattrFlags::empty())
}

fn times(modified: Timespec) -> Timestamps {
    Timestamps { last_access: modified, last_modification: modified }
}

/// Names of a path. Leading, doubled and trailing slashes and dots mean nothing; two dots are refused.
fn parts(path: &[u8]) -> Result<Vec<&[u8]>, String> {
    if path.len() > MOST_PATH {
        return Err("is too long".into());
    }
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err("leads upwards".into()),
            part if part.len() > MOST_NAME => return Err("has a name that is too long".into()),
            part if part.contains(&0) => return Err("contains NUL".into()),
            part => parts.push(part),
        }
    }
    Ok(parts)
}

fn joined(parts: &[&[u8]]) -> Vec<u8> {
    parts.join(&b'/')
}

fn joined_with(parents: &[&[u8]], name: &[u8]) -> Vec<u8> {
    let mut path = joined(parents);
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

fn padding(size: u64) -> u64 {
    (HEADER_SIZE as u64 - size % HEADER_SIZE as u64) % HEADER_SIZE as u64
}

fn refused(path: &[u8], why: String) -> Error {
    Error::Entry { path: String::from_utf8_lossy(path).into_owned(), why }
}

/// A parent that cannot be entered leads through a link: to nothing, in a circle, or to what is no directory.
fn through(path: &[u8], error: Errno) -> Error {
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => {
            refused(path, "leads through a link to no directory".into())
        }
        error => host("open", path)(error),
    }
}

fn host(act: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> Error {
    let path = String::from_utf8_lossy(path).into_owned();
    move |source| Error::Host { act, path, source }
}

fn owned(entry: &ParsedEntry<'_>, sparse: Option<Sparse>) -> Result<Next> {
    let bad = |why: &str| refused(&entry.path, why.into());
    let Checked { modified, size: said } = checked_pax(entry)?;
    // A time before 1970 comes out of the header as its two's complement.
    let modified = modified.unwrap_or(Timespec { tv_sec: entry.mtime.cast_signed(), tv_nsec: 0 });
    let target = || entry.link_target.as_deref().map(<[u8]>::to_vec).filter(|target| !target.is_empty());
    let device = |character| {
        let (major, minor) = (entry.dev_major.unwrap_or(0), entry.dev_minor.unwrap_or(0));
        match major < MOST_MAJOR && minor < MOST_MINOR {
            true => Ok(Kind::Device { character, major, minor }),
            false => Err(bad("has a device number out of range")),
        }
    };
    let kind = match entry.entry_type {
        kind if kind.is_dir() => Kind::Directory,
        // The oldest format has no type for directories but a trailing slash.
        kind if kind.is_file() && sparse.is_none() && entry.path.ends_with(b"/") => Kind::Directory,
        kind if kind.is_file() || kind.is_contiguous() || sparse.is_some() => Kind::File { sparse },
        kind if kind.is_symlink() => Kind::Symlink(target().ok_or_else(|| bad("links to nothing"))?),
        kind if kind.is_hard_link() => Kind::Hardlink(target().ok_or_else(|| bad("links to nothing"))?),
        kind if kind.is_character_special() => device(true)?,
        kind if kind.is_block_special() => device(false)?,
        kind if kind.is_fifo() => Kind::Fifo,
        kind => return Err(bad(&unknown(kind))),
    };
    // Archivers of old write the size of the file that a hard link names; no content follows, as all readers agree.
    // For anything else without content they do not.
    let size = match &kind {
        Kind::File { .. } => entry.size,
        Kind::Hardlink(_) if !said => 0,
        _ if entry.size == 0 => 0,
        _ => return Err(bad("has content, which its kind does not")),
    };
    let id = |id: u64, what| u32::try_from(id).ok().filter(|id| *id != u32::MAX).ok_or_else(|| bad(what));
    let uid = id(entry.uid, "has an owner out of range")?;
    let gid = id(entry.gid, "has a group out of range")?;
    Ok(Next::Entry(Box::new(Entry {
        path: entry.path.to_vec(),
        kind,
        owner: (Uid::from_raw(uid), Gid::from_raw(gid)),
        mode: Mode::from_raw_mode(entry.mode & 0o7777),
        modified,
        xattrs: wanted_xattrs(entry)?,
        size,
    })))
}

/// Numbers that the parser cuts to 64 bits are refused, in extended headers as well as in the entry's own: readers
/// that cut them differently would find different entries (CVE-2025-62518 and its kin).
fn strict(input: &[u8], consumed: usize) -> Result<()> {
    let mut at = 0;
    while let Some(header) = input.get(at..at + HEADER_SIZE).filter(|_| at < consumed) {
        if header.iter().all(|byte| *byte == 0) {
            at += HEADER_SIZE;
            continue;
        }
        let field = |from: usize, length: usize| header.get(from..from + length).unwrap_or_default();
        for number in [field(100, 8), field(108, 8), field(116, 8), field(124, 12)] {
            if !is_small(number, false) {
                return Err(Error::Archive("a header has a number out of range".into()));
            }
        }
        if !is_small(field(136, 12), true) {
            return Err(Error::Archive("a header has a time out of range".into()));
        }
        let extension = matches!(field(156, 1), b"x" | b"L" | b"K");
        if !extension {
            break;
        }
        let size = tar_core::Header::from_bytes(header.try_into().unwrap_or(&[0; HEADER_SIZE]))
            .entry_size()
            .map_err(|error| Error::Archive(error.to_string()))?;
        let padded = size.saturating_add(padding(size));
        at = at.saturating_add(HEADER_SIZE).saturating_add(usize::try_from(padded).unwrap_or(usize::MAX));
    }
    Ok(())
}

/// Whether a number in base 256 (as GNU writes large ones) fits into 63 bits; octal ones always do.
fn is_small(field: &[u8], signed: bool) -> bool {
    let Some((first, rest)) = field.split_first() else { return true };
    let high = rest.len().saturating_sub(8);
    let (upper, lower) = rest.split_at(high);
    let top = lower.first().copied().unwrap_or(0);
    match first {
        0x80 => upper.iter().all(|byte| *byte == 0) && (lower.len() < 8 || top < 0x80),
        0xff => signed && upper.iter().all(|byte| *byte == 0xff) && (lower.len() < 8 || top >= 0x80),
        byte => byte & 0x80 == 0,
    }
}

/// A global header may comment; what it may not is change the entries behind it, which some readers let it do.
fn global(input: &[u8], records: &[u8]) -> Result<()> {
    // The parser forgets an extended header that stands before a global one.
    if input.get(156) != Some(&b'g') && input.iter().take(HEADER_SIZE).any(|byte| *byte != 0) {
        return Err(Error::Archive("a global header stands between an entry and its own header".into()));
    }
    for record in PaxExtensions::new(records) {
        let record = record.map_err(|error| Error::Archive(error.to_string()))?;
        let key = record.key_bytes();
        if matches!(key, b"path" | b"linkpath" | b"size") || key.starts_with(b"GNU.sparse.") {
            return Err(Error::Archive("a global header names or sizes entries".into()));
        }
    }
    Ok(())
}

fn unparsed(error: ParseError) -> Error {
    match error {
        ParseError::TooManySparseEntries { .. }
        | ParseError::MetadataTooLarge { .. }
        | ParseError::TooManyPendingEntries { .. } => Error::TooMuch(error.to_string()),
        error => Error::Archive(error.to_string()),
    }
}

fn unknown(kind: EntryType) -> String {
    format!("is of unknown type {:?}", char::from(kind.as_byte()))
}

/// What the extended header of an entry says, beyond what the parser makes of it.
#[derive(Default)]
struct Checked {
    modified: Option<Timespec>,
    /// Whether it gives a size.
    size: bool,
}

/// Refuses records that say one thing twice or say it so that readers understand it differently (CVE-2025-62518 and
/// its kin).
fn checked_pax(entry: &ParsedEntry<'_>) -> Result<Checked> {
    let mut checked = Checked::default();
    let Some(pax) = entry.pax else { return Ok(checked) };
    let bad = |why: &str| refused(&entry.path, why.into());
    let mut seen = HashSet::new();
    for record in PaxExtensions::new(pax) {
        let record = record.map_err(|_| bad("has a malformed extended header"))?;
        let key = record.key_bytes();
        let sparse_map = key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes";
        if !sparse_map && !seen.insert(key) {
            return Err(bad("has an extended header that says one thing twice"));
        }
        let value = record.value().ok();
        let number = matches!(key, b"size" | b"uid" | b"gid")
            || key.starts_with(b"GNU.sparse.") && !matches!(key, b"GNU.sparse.name" | b"GNU.sparse.map");
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if number && !value.is_some_and(|text| digits(text) && text.parse::<i64>().is_ok()) {
            return Err(bad("has an extended header with a number that is none"));
        }
        match key {
            b"size" => checked.size = true,
            b"mtime" => {
                let time = value.and_then(decimal).ok_or_else(|| bad("has a time that is none"))?;
                checked.modified = Some(time);
            }
            _ => {}
        }
    }
    Ok(checked)
}

/// `1700000000.123456789`, or with a sign; digits beyond nanoseconds are dropped.
fn decimal(text: &str) -> Option<Timespec> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let nanoseconds: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    if !nanoseconds.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let (tv_sec, tv_nsec) = (seconds.parse::<i64>().ok()?, nanoseconds.parse::<i64>().ok()?);
    // The kernel counts nanoseconds forward from the second: half a second before -5 is -6 and a half on.
    if seconds.starts_with('-') && tv_nsec > 0 {
        return Some(Timespec { tv_sec: tv_sec.checked_sub(1)?, tv_nsec: 1_000_000_000 - tv_nsec });
    }
    Some(Timespec { tv_sec, tv_nsec })
}

/// Attributes that a layer may set. overlayfs's own would let a layer redirect or hide at will, other `trusted.` ones
/// are the host's, and SELinux labels belong to the host's policy.
fn wanted_xattrs(entry: &ParsedEntry<'_>) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut wanted = Vec::new();
    for (name, value) in &entry.xattrs {
        let overlay = name.starts_with(b"user.overlay.");
        let may = name.starts_with(b"user.")
            || name.starts_with(b"system.posix_acl_")
            || matches!(&**name, b"security.capability" | b"security.ima" | b"security.evm");
        if name.len() <= b"user.".len() || name.len() > MOST_NAME || name.contains(&0) {
            return Err(refused(&entry.path, "has an attribute without a valid name".into()));
        }
        if may && !overlay {
            wanted.push((name.to_vec(), value.to_vec()));
        }
    }
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
        path::Path,
        process::Command,
    };

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    /// An archive made by hand, entry by entry.
    #[derive(Default)]
    struct Tar(Vec<u8>);

    impl Tar {
        fn entry(mut self, kind: u8, name: &[u8], mode: u32, link: &[u8], content: &[u8]) -> Tar {
            let mut header = [0u8; HEADER_SIZE];
            header[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
            let octal =
                |value: u64, width: usize| format!("{value:0width$o}\0", width = width - 1).into_bytes();
            header[100..108].copy_from_slice(&octal(mode.into(), 8));
            header[108..116].copy_from_slice(&octal(7, 8));
            header[116..124].copy_from_slice(&octal(8, 8));
            header[124..136].copy_from_slice(&octal(content.len() as u64, 12));
            header[136..148].copy_from_slice(&octal(1_600_000_000, 12));
            header[156] = kind;
            header[157..157 + link.len().min(100)].copy_from_slice(&link[..link.len().min(100)]);
            header[257..265].copy_from_slice(b"ustar\x0000");
            header[329..337].copy_from_slice(&octal(1, 8));
            header[337..345].copy_from_slice(&octal(3, 8));
            header[148..156].fill(b' ');
            let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            self.0.extend_from_slice(&header);
            self.0.extend_from_slice(content);
            self.0.resize(self.0.len().next_multiple_of(HEADER_SIZE), 0);
            self
        }

        fn file(self, name: &str, content: &[u8]) -> Tar {
            self.entry(b'0', name.as_bytes(), 0o644, b"", content)
        }

        fn directory(self, name: &str) -> Tar {
            self.entry(b'5', name.as_bytes(), 0o750, b"", b"")
        }

        fn symlink(self, name: &str, target: &str) -> Tar {
            self.entry(b'2', name.as_bytes(), 0o777, target.as_bytes(), b"")
        }

        fn hardlink(self, name: &str, target: &str) -> Tar {
            self.entry(b'1', name.as_bytes(), 0o644, target.as_bytes(), b"")
        }

        fn pax(self, records: &[(&str, &str)]) -> Tar {
            let mut body = Vec::new();
            for (key, value) in records {
                // The length counts its own digits.
                let rest = format!(" {key}={value}\n");
                let length =
                    (1..8).map(|d| d + rest.len()).find(|l| l.to_string().len() + rest.len() == *l).unwrap();
                body.extend_from_slice(format!("{length}{rest}").as_bytes());
            }
            self.entry(b'x', b"pax", 0o644, b"", &body)
        }

        fn end(mut self) -> Vec<u8> {
            self.0.extend_from_slice(&[0; 1024]);
            self.0
        }
    }

    fn extract_to(directory: &Path, archive: &[u8]) -> Result<Unpacked> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(directory, flags, Mode::empty()).unwrap();
        let mut extractor = Extractor::new(root);
        extractor.run(&mut &archive[..])?;
        Ok(extractor.unpacked(String::new()))
    }

    fn extract(archive: &[u8]) -> (TempDir, Result<Unpacked>) {
        let directory = tempfile::tempdir().unwrap();
        let result = extract_to(directory.path(), archive);
        (directory, result)
    }

    fn opaque_mark(directory: &Path) -> bool {
        let mut value = [0u8; 8];
        rustix::fs::lgetxattr(directory, OPAQUE, &mut value[..]).is_ok_and(|length| &value[..length] == b"y")
    }

    fn is_whiteout(path: &Path) -> bool {
        let there = fs::symlink_metadata(path).unwrap();
        there.file_type().is_char_device() && there.rdev() == 0
    }

    #[test]
    fn entries_get_their_attributes() {
        let (root, made) = extract(
            &Tar::default()
                .directory("./d/")
                .entry(b'0', b"d/su", 0o4755, b"", b"body")
                .symlink("d/link", "su")
                .hardlink("d/hard", "d/su")
                .entry(b'3', b"d/null", 0o666, b"", b"")
                .entry(b'6', b"d/pipe", 0o600, b"", b"")
                .end(),
        );
        let made = made.unwrap();
        let at = |name: &str| fs::symlink_metadata(root.path().join(name)).unwrap();
        assert_eq!((at("d/su").mode() & 0o7777, at("d/su").uid(), at("d/su").gid()), (0o4755, 7, 8));
        assert_eq!(
            (at("d/su").mtime(), at("d").mtime(), at("d").mode() & 0o777),
            (1_600_000_000, 1_600_000_000, 0o750)
        );
        assert_eq!(at("d/su").ino(), at("d/hard").ino());
        assert_eq!((at("d/null").rdev(), at("d/null").permissions().mode() & 0o777), (makedev(1, 3), 0o666));
        assert!(at("d/pipe").file_type().is_fifo());
        assert_eq!(fs::read_link(root.path().join("d/link")).unwrap(), Path::new("su"));
        assert_eq!(made.inodes, 5);
        assert!(made.implied.is_empty());
    }

    #[test]
    fn s32_no_path_leads_out_of_the_root() {
        let outside = tempfile::tempdir().unwrap();
        let canary = outside.path().join("canary");
        fs::write(&canary, "untouched").unwrap();
        let root = outside.path().join("root");
        let up = format!("{}/x", outside.path().display());
        let corpus = [
            Tar::default().file("../canary", b"gone").end(),
            Tar::default().file("a/../../canary", b"gone").end(),
            Tar::default().symlink("out", "..").file("out/canary", b"gone").end(),
            Tar::default()
                .symlink("out", &outside.path().display().to_string())
                .file("out/canary", b"gone")
                .end(),
            Tar::default().symlink("a", "b").symlink("b", "../..").file("a/canary", b"gone").end(),
            Tar::default().hardlink("h", "../canary").file("h", b"gone").end(),
            Tar::default().symlink("s", "../canary").hardlink("h", "s").file("h", b"gone").end(),
            Tar::default().symlink("canary", "../canary").file("canary", b"gone").end(),
            Tar::default().symlink("d", "..").directory("d").end(),
            Tar::default()
                .symlink("d", "..")
                .entry(b'5', b"d", 0o4777, b"", b"")
                .file("d/canary", b"x")
                .end(),
            Tar::default().symlink("d", "..").file("d/.wh.canary", b"").end(),
            Tar::default().symlink("d", "..").file("d/.wh..wh..opq", b"").end(),
            Tar::default().file(".wh...", b"").end(),
            Tar::default().file(".wh.", b"").end(),
            Tar::default().file(&up, b"x").end(),
        ];
        for (number, archive) in corpus.iter().enumerate() {
            fs::create_dir(&root).unwrap();
            let mode = fs::metadata(outside.path()).unwrap().mode();
            let _ = extract_to(&root, archive);
            fs::remove_dir_all(&root).unwrap();
            assert_eq!(fs::read(&canary).unwrap(), b"untouched", "archive {number}");
            assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1, "archive {number}");
            assert_eq!(fs::metadata(outside.path()).unwrap().mode(), mode, "archive {number}");
            assert!(!opaque_mark(outside.path()), "archive {number}");
        }
    }

    #[test]
    fn s32_two_dots_are_refused_wherever_they_stand() {
        for path in ["..", "../a", "a/..", "a/../b", "/../a", "./.."] {
            assert!(parts(path.as_bytes()).is_err(), "{path}");
        }
    }

    #[test]
    fn links_inside_the_root_are_followed() {
        let (root, made) = extract(
            &Tar::default().directory("usr/lib").symlink("lib", "/usr/lib").file("lib/x", b"1").end(),
        );
        assert_eq!(made.unwrap().implied, [Path::new("usr")]);
        assert_eq!(fs::read(root.path().join("usr/lib/x")).unwrap(), b"1");
    }

    #[test]
    fn a_root_without_an_entry_can_be_entered_by_everyone() {
        let (root, made) = extract(&Tar::default().file("f", b"").end());
        assert!(!made.unwrap().root);
        assert_eq!(fs::metadata(root.path()).unwrap().mode() & 0o777, 0o755);
        let (root, made) = extract(&Tar::default().directory("./").file("f", b"").end());
        assert!(made.unwrap().root);
        assert_eq!(fs::metadata(root.path()).unwrap().mode() & 0o777, 0o750);
    }

    #[test]
    fn a_parent_without_an_entry_is_made_and_told() {
        let (root, made) =
            extract(&Tar::default().file("a/b/f", b"").hardlink("c/h", "a/b/f").directory("a").end());
        assert_eq!(made.unwrap().implied, [Path::new("a/b"), Path::new("c")]);
        assert_eq!(fs::metadata(root.path().join("a/b")).unwrap().mode() & 0o777, 0o755);
        assert_eq!(fs::metadata(root.path().join("a")).unwrap().mode() & 0o777, 0o750);
    }

    #[test]
    fn whiteouts_hide_only_what_is_below_whatever_their_order() {
        let (root, made) = extract(
            &Tar::default()
                .file(".wh.gone", b"")
                .file("kept", b"1")
                .file(".wh.kept", b"")
                .file(".wh.dir", b"")
                .directory("dir")
                .directory("later")
                .file(".wh.later", b"")
                .directory("whole")
                .file("whole/.wh..wh..opq", b"")
                .file("whole/inside", b"")
                .file("x", b"")
                .hardlink(".wh.linked", "x")
                .file(".wh..wh.plnk", b"")
                .end(),
        );
        made.unwrap();
        let at = |name: &str| root.path().join(name);
        assert!(is_whiteout(&at("gone")) && is_whiteout(&at("linked")));
        assert_eq!(fs::read(at("kept")).unwrap(), b"1");
        assert!(opaque_mark(&at("dir")) && opaque_mark(&at("later")) && opaque_mark(&at("whole")));
        assert!(at("whole/inside").exists() && !at(".wh..wh.plnk").exists());
    }

    #[test]
    fn a_later_entry_of_the_same_name_wins() {
        let archive =
            Tar::default().file("f", b"one").file("f", b"two").symlink("f2", "f").file("f2", b"three");
        let (root, made) = extract(&archive.directory("e").file("e", b"four").end());
        made.unwrap();
        for (name, content) in [("f", "two"), ("f2", "three"), ("e", "four")] {
            assert_eq!(fs::read_to_string(root.path().join(name)).unwrap(), content);
        }
        let (_root, refused) = extract(&Tar::default().file("d/f", b"").file("d", b"").end());
        assert!(matches!(refused, Err(Error::Entry { .. })));
    }

    #[test]
    fn s33_names_that_cannot_be_are_refused() {
        let long = "n".repeat(256);
        let deep = "a/".repeat(2100);
        for archive in [
            Tar::default().pax(&[("path", &long)]).file("f", b"").end(),
            Tar::default().pax(&[("path", &deep)]).file("f", b"").end(),
            Tar::default().pax(&[("path", "a\0b")]).file("f", b"").end(),
            Tar::default().pax(&[("SCHILY.xattr.", "v")]).file("f", b"").end(),
            Tar::default().pax(&[("SCHILY.xattr.user.", "v")]).file("f", b"").end(),
            Tar::default().file("", b"").end(),
        ] {
            // By us: the kernel's refusal would be taken for a fault of the host.
            let refused = extract(&archive).1;
            assert!(matches!(refused, Err(Error::Entry { .. } | Error::Archive(_))), "{refused:?}");
        }
        let (root, made) = extract(&Tar::default().entry(b'0', b"\xff\xfe", 0o644, b"", b"x").end());
        made.unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "a name needs no encoding");
    }

    #[test]
    fn s34_an_extended_header_must_not_say_one_thing_twice() {
        for key in ["size", "path", "linkpath", "mtime"] {
            let archive = Tar::default().pax(&[(key, "1"), (key, "2")]).file("f", b"").end();
            assert!(extract(&archive).1.is_err(), "{key}");
        }
    }

    #[test]
    fn s34_a_size_in_the_extended_header_counts_everywhere() {
        // The header says 512, the record 0: what follows is the next header, not content.
        let hidden = Tar::default().file("smuggled", b"").0;
        let archive = Tar::default().pax(&[("size", "0")]).file("f", &hidden).end();
        let (root, made) = extract(&archive);
        made.unwrap();
        assert_eq!(fs::metadata(root.path().join("f")).unwrap().len(), 0);
        assert!(root.path().join("smuggled").exists());
    }

    #[test]
    fn device_numbers_out_of_range_are_refused() {
        let mut archive = Tar::default().entry(b'3', b"dev", 0o600, b"", b"").end();
        archive[329..337].copy_from_slice(b"0777777\0");
        archive[148..156].fill(b' ');
        let sum: u64 = archive[..512].iter().map(|b| u64::from(*b)).sum();
        archive[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert!(matches!(extract(&archive).1, Err(Error::Entry { .. })));
    }

    #[test]
    fn attributes_of_overlayfs_and_of_the_host_are_left_out() {
        let archive = Tar::default()
            .pax(&[
                ("SCHILY.xattr.trusted.overlay.redirect", "/etc"),
                ("SCHILY.xattr.trusted.overlay.opaque", "y"),
                ("SCHILY.xattr.user.overlay.opaque", "y"),
                ("SCHILY.xattr.security.selinux", "system_u:object_r:etc_t:s0"),
                ("SCHILY.xattr.user.mine", "kept"),
                ("SCHILY.xattr.user.empty", ""),
            ])
            .directory("d")
            .end();
        let (root, made) = extract(&archive);
        made.unwrap();
        let mut names = vec![0; 1024];
        let length = rustix::fs::listxattr(root.path().join("d"), &mut names[..]).unwrap();
        let mut names: Vec<_> = names[..length]
            .split(|b| *b == 0)
            .filter(|n| n.starts_with(b"user.") || n.starts_with(b"trusted."))
            .collect();
        names.sort();
        assert_eq!(names, [b"user.empty".as_slice(), b"user.mine"]);
    }

    #[test]
    fn times_have_nanoseconds() {
        for (text, seconds, nanoseconds) in
            [("5", 5, 0), ("5.25", 5, 250_000_000), ("5.1234567899", 5, 123_456_789)]
        {
            let time = decimal(text).unwrap();
            assert_eq!((time.tv_sec, time.tv_nsec), (seconds, nanoseconds), "{text}");
        }
        assert!(decimal("x").is_none() && decimal("1.x").is_none() && decimal("").is_none());
    }

    #[test]
    fn times_before_1970_are_kept() {
        let time = |text| decimal(text).map(|time| (time.tv_sec, time.tv_nsec));
        assert_eq!(time("-5"), Some((-5, 0)));
        assert_eq!(time("-5.25"), Some((-6, 750_000_000)));
        assert_eq!(time("-0.5"), Some((-1, 500_000_000)));
        let source = tempfile::tempdir().unwrap();
        fs::write(source.path().join("old"), "").unwrap();
        let old = Timespec { tv_sec: -315_619_200, tv_nsec: 0 };
        let file = rustix::fs::open(source.path().join("old"), OFlags::RDONLY, Mode::empty()).unwrap();
        futimens(&file, &times(old)).unwrap();
        for format in ["gnu", "posix"] {
            let mut tar = Command::new("tar");
            tar.args(["-c", &format!("--format={format}"), "-C"]).arg(source.path()).arg("old");
            let (root, made) = extract(&tar.output().unwrap().stdout);
            made.unwrap();
            assert_eq!(fs::metadata(root.path().join("old")).unwrap().mtime(), old.tv_sec, "{format}");
        }
    }

    #[test]
    fn s34_numbers_that_readers_cut_differently_are_refused() {
        // 2^64 + 512 in base 256, which the parser cuts to 512.
        let large = |from: usize, archive: &mut Vec<u8>| {
            archive[from..from + 12].copy_from_slice(&[0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0]);
            archive[148..156].fill(b' ');
            let sum: u64 = archive[..512].iter().map(|byte| u64::from(*byte)).sum();
            archive[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        };
        let mut own = Tar::default().file("f", &[0; 512]).end();
        large(124, &mut own);
        assert!(extract(&own).1.is_err());
        let mut extended = Tar::default().pax(&[("path", "g")]).file("f", b"").end();
        large(124, &mut extended);
        assert!(extract(&extended).1.is_err());
        for value in ["-1", "", "1 ", "0x1", "99999999999999999999"] {
            let archive = Tar::default().pax(&[("size", value)]).file("f", b"").end();
            assert!(extract(&archive).1.is_err(), "{value:?}");
        }
    }

    #[test]
    fn s34_what_has_no_content_must_not_claim_any() {
        for kind in [b'2', b'3', b'4', b'5', b'6'] {
            let archive = Tar::default().entry(kind, b"x", 0o644, b"y", &[0; 512]).end();
            assert!(extract(&archive).1.is_err(), "{}", char::from(kind));
        }
        // A hard link with the size of its target: what follows is the next entry.
        let mut link = Tar::default().entry(b'1', b"x", 0o644, b"f", b"").0;
        link[124..136].copy_from_slice(b"00000001000\0");
        link[148..156].fill(b' ');
        let sum: u64 = link[..512].iter().map(|byte| u64::from(*byte)).sum();
        link[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let whole = [Tar::default().file("f", b"1").0, link, Tar::default().file("next", b"").end()].concat();
        let (root, made) = extract(&whole);
        made.unwrap();
        assert!(root.path().join("next").exists() && root.path().join("x").exists());
    }

    #[test]
    fn s34_a_global_header_must_not_change_entries() {
        let global = |key: &str, value: &str| {
            let mut archive = Tar::default().pax(&[(key, value)]).0;
            archive[156] = b'g';
            archive[148..156].fill(b' ');
            let sum: u64 = archive[..512].iter().map(|byte| u64::from(*byte)).sum();
            archive[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            archive
        };
        let file = Tar::default().file("f", b"").end();
        assert!(extract(&[global("comment", "c"), file.clone()].concat()).1.is_ok());
        for key in ["path", "size", "linkpath", "GNU.sparse.major"] {
            assert!(extract(&[global(key, "1"), file.clone()].concat()).1.is_err(), "{key}");
        }
        let between = [Tar::default().pax(&[("path", "g")]).0, global("comment", "c"), file].concat();
        assert!(extract(&between).1.is_err());
    }

    #[test]
    fn s35_a_sparse_map_without_end_exhausts_nothing() {
        let map: String = (0..20_000).map(|n| format!("{},0,", n * 10)).collect();
        let archive = Tar::default()
            .pax(&[("GNU.sparse.size", "1000000"), ("GNU.sparse.map", map.trim_end_matches(','))])
            .file("f", b"")
            .end();
        assert!(matches!(extract(&archive).1, Err(Error::TooMuch(_))));
        let archive = Tar::default()
            .pax(&[("GNU.sparse.size", "9000000000000000000"), ("GNU.sparse.map", "0,1")])
            .file("f", b"x")
            .end();
        assert!(matches!(extract(&archive).1, Err(Error::TooMuch(_))));
    }

    #[test]
    fn a_directory_that_is_implied_over_a_whiteout_is_a_new_one() {
        let archive = Tar::default().file(".wh.d", b"").file("d/e/f", b"").end();
        let (root, made) = extract(&archive);
        assert_eq!(made.unwrap().implied, [PathBuf::from("d/e")]);
        let mut value = [0; 2];
        assert!(rustix::fs::getxattr(root.path().join("d"), OPAQUE, &mut value[..]).is_ok());
        let through = Tar::default().symlink("l", "nowhere").file("l/f", b"").end();
        assert!(matches!(extract(&through).1, Err(Error::Entry { .. })));
    }

    #[test]
    fn s40_opaque_markers_take_linear_time() {
        // A marker that looked at what it hides would look at two hundred million names.
        let files = (0..10_000).fold(Tar::default(), |tar, n| tar.file(&format!("d/f{n}"), b"")).0;
        let markers = Tar::default().file("d/.wh..wh..opq", b"").0.repeat(20_000);
        let begun = std::time::Instant::now();
        assert!(extract(&[files, markers].concat()).1.is_ok());
        assert!(begun.elapsed() < std::time::Duration::from_secs(20), "{:?}", begun.elapsed());
    }

    /// What GNU tar writes, we read: long names, sparse files, attributes, both formats.
    #[test]
    fn archives_of_gnu_tar_come_back() {
        let source = tempfile::tempdir().unwrap();
        let long = "l".repeat(120);
        fs::create_dir_all(source.path().join(&long).join(&long)).unwrap();
        fs::write(source.path().join(&long).join(&long).join("f"), "deep").unwrap();
        let sparse = fs::File::create(source.path().join("sparse")).unwrap();
        sparse.set_len(10 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"tail", (10 << 20) - 4).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 4 << 20).unwrap();
        rustix::fs::setxattr(source.path().join("sparse"), "user.a", b"b", XattrFlags::empty()).unwrap();
        for format in ["gnu", "posix"] {
            let mut tar = Command::new("tar");
            tar.args(["-c", "--sparse", &format!("--format={format}"), "-C"]).arg(source.path()).arg(".");
            if format == "posix" {
                tar.args(["--xattrs", "--xattrs-include=*"]);
            }
            let archive = tar.output().unwrap().stdout;
            assert!(archive.len() < 1 << 20, "the archive is sparse");
            let (root, made) = extract(&archive);
            let made = made.unwrap();
            assert_eq!(
                fs::read(root.path().join("sparse")).unwrap(),
                fs::read(source.path().join("sparse")).unwrap()
            );
            assert_eq!(fs::read(root.path().join(&long).join(&long).join("f")).unwrap(), b"deep");
            assert!(made.bytes < 1 << 20, "holes stay holes: {}", made.bytes);
            let mut value = [0; 8];
            let got = rustix::fs::getxattr(root.path().join("sparse"), "user.a", &mut value[..]);
            assert_eq!(got.is_ok(), format == "posix");
        }
    }

    #[test]
    fn an_archive_cut_anywhere_ends_in_an_answer() {
        let archive = Tar::default().directory("d").pax(&[("mtime", "1.5")]).file("d/f", &[7; 700]).end();
        for cut in (0..archive.len()).step_by(97) {
            let _ = extract(&archive[..cut]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_bytes_end_in_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
            let _ = extract(&bytes);
        }

        #[test]
        fn parts_never_lead_upwards(path in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(parts) = parts(&path) {
                for part in parts {
                    prop_assert!(!part.is_empty() && part != b"." && part != b".." && !part.contains(&b'/'));
                }
            }
        }
    }
}

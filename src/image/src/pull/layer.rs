//! One layer: download, verify, decompress, unpack, hash, all at once, into a directory of its own. The compressed
//! bytes are hashed here on their way into the confined child; the digest of the archive is computed there, where it
//! appears, and compared here.

use std::ffi::{CStr, CString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{Mode, OFlags, RenameFlags, mkdirat, openat, renameat, renameat_with};
use tokio::io::AsyncWriteExt as _;

use super::source::{Blob, Source};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result, io, sys};
use crate::images::{Directories, Images, blocking};
use crate::manifest::Descriptor;
use crate::settings::Live;
use crate::store::{self, LayerRow};
use crate::tree::{self, DIRECTORY};
use crate::unpack::{self, Compression, Unpacked, Unpacking};

/// How long the child may take for one chunk, and for what it has still in hand when the input ends.
const CHILD_TIMEOUT: Duration = Duration::from_secs(600);
/// What the pipe to the child holds; the default is a sixteenth of it.
const PIPE: usize = 1 << 20;
/// Servers that may send wrong bytes before we give up.
const MAX_WRONG: usize = 4;

/// A directory below staging, thrown away unless it was placed.
pub(super) struct Staged {
    directories: Arc<Directories>,
    name: CString,
    placed: AtomicBool,
}

impl Staged {
    pub(super) fn new(images: &Images) -> Result<Staged> {
        let staged = Staged {
            directories: images.directories.clone(),
            name: tree::unique(),
            placed: AtomicBool::new(false),
        };
        mkdirat(&staged.directories.staging, staged.name.as_c_str(), Mode::from_raw_mode(0o755))
            .map_err(sys("make a directory in staging"))?;
        Ok(staged)
    }

    pub(super) fn name(&self) -> &CStr {
        &self.name
    }

    /// It is not staging's any more.
    pub(super) fn placed(&self) {
        self.placed.store(true, Ordering::Relaxed);
    }

    fn path(&self) -> PathBuf {
        self.directories.path.join("staging").join(std::ffi::OsStr::from_bytes(self.name.as_bytes()))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if self.placed.load(Ordering::Relaxed) {
            return;
        }
        let (directories, name) = (self.directories.clone(), self.name.clone());
        // Removing takes its time; a task must not wait for it. The child that writes here was killed before.
        let work = move || match directories.throw(&directories.staging, &name) {
            Ok(Some(thrown)) => {
                if let Err(error) = tree::remove(directories.trash.as_fd(), &thrown) {
                    tracing::warn!(%error, "an unfinished layer stays in the trash");
                }
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "an unfinished layer stays in staging"),
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(work)),
            Err(_) => work(),
        }
    }
}

/// Whether a layer is here, row and directory. A row without its directory is forgotten, so that the layer is
/// fetched again (F22).
pub(super) async fn present(images: &Arc<Images>, diff_id: Digest) -> Result<bool> {
    let (index, directories) = (images.index.clone(), images.directories.clone());
    images
        .store
        .run(move |db| {
            if db.layer(&diff_id)?.is_none() {
                return Ok(false);
            }
            if openat(&directories.layers, diff_id.file_name(), DIRECTORY, Mode::empty()).is_ok() {
                return Ok(true);
            }
            tracing::warn!(layer = %diff_id, "a layer's directory is gone");
            db.quick(|transaction| {
                transaction.execute("DELETE FROM image_layer WHERE diff_id = ?1", [diff_id.to_string()])?;
                Ok(())
            })?;
            index.write().unwrap_or_else(std::sync::PoisonError::into_inner).reload(db)?;
            Ok(false)
        })
        .await
}

/// Fetches and unpacks a layer and puts it in its place.
pub(super) async fn unpack(
    images: Arc<Images>,
    live: Arc<Live>,
    source: Arc<Source>,
    blob: Descriptor,
    diff_id: Digest,
) -> Result<LayerRow> {
    let closed = |_| Error::Cancelled;
    let _download = live.downloads.clone().acquire_owned().await.map_err(closed)?;
    let _unpack = live.unpacks.clone().acquire_owned().await.map_err(closed)?;
    // A compressed layer that was kept is as good as a download, unless it was damaged since.
    if let Some(mut kept) = kept(&images, &blob)? {
        let staged = Staged::new(&images)?;
        match feed(&live, &staged, &mut kept, &blob, &diff_id, None).await {
            Ok(unpacked) => return place(&images, staged, unpacked, diff_id, None).await,
            Err(error) => {
                tracing::warn!(layer = %blob.digest, %error, "a kept layer is damaged, it is fetched again")
            }
        }
    }
    let mut stream = source.open(&blob)?;
    let mut wrong: Option<Error> = None;
    let mut servers = 0;
    let (staged, unpacked, copy) = loop {
        // Declared before the child, so dropped after it: nobody writes to what is being removed.
        let staged = Staged::new(&images)?;
        let mut copy =
            if live.config.discard_layers { None } else { Some(Copy::new(&images, &blob.digest).await?) };
        match feed(&live, &staged, &mut stream, &blob, &diff_id, copy.as_mut()).await {
            Ok(unpacked) => break (staged, unpacked, copy),
            Err(error @ Error::Digest { .. }) => {
                servers += 1;
                if servers >= MAX_WRONG || !stream.elsewhere() {
                    return Err(error);
                }
                tracing::warn!(layer = %blob.digest, %error, "a server sent wrong bytes, another is asked");
                wrong = Some(error);
            }
            // That the others have nothing is not the news.
            Err(error) => return Err(wrong.unwrap_or(error)),
        }
    };
    place(&images, staged, unpacked, diff_id, copy).await
}

/// The compressed layer beside the unpacked one, where the configuration wants it kept.
struct Copy {
    /// Holds the file below staging, as it holds a directory for others.
    staged: Staged,
    file: tokio::fs::File,
    name: CString,
}

impl Copy {
    async fn new(images: &Images, blob: &Digest) -> Result<Copy> {
        let staged = Staged {
            directories: images.directories.clone(),
            name: tree::unique(),
            placed: AtomicBool::new(false),
        };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat(&staged.directories.staging, staged.name(), flags, Mode::from_raw_mode(0o600));
        let file = std::fs::File::from(file.map_err(sys("keep a layer"))?);
        let name = CString::new(blob.file_name()).unwrap_or_default();
        Ok(Copy { staged, file: tokio::fs::File::from_std(file), name })
    }
}

/// The blob as an earlier pull has kept it.
fn kept(images: &Images, blob: &Descriptor) -> Result<Option<Blob<'static>>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(&images.directories.blobs, blob.digest.file_name(), flags, Mode::empty()) {
        Ok(file) => Ok(Some(Blob::Layout(tokio::fs::File::from_std(file.into())))),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(sys("open a kept layer")(error)),
    }
}

/// Streams one blob through the child.
async fn feed(
    live: &Live,
    staged: &Staged,
    stream: &mut Blob<'_>,
    blob: &Descriptor,
    diff_id: &Digest,
    mut copy: Option<&mut Copy>,
) -> Result<Unpacked> {
    let mut hasher = blob.digest.hasher();
    let mut received = 0u64;
    // The first bytes tell how it is compressed; media types have been known to be wrong.
    let mut ahead: Vec<Bytes> = Vec::new();
    while ahead.iter().map(Bytes::len).sum::<usize>() < 4 {
        match stream.next().await? {
            Some(chunk) => ahead.push(chunk),
            None => break,
        }
    }
    let magic: Vec<u8> = ahead.iter().flatten().take(4).copied().collect();
    let mut child = start(live, staged, &magic, diff_id, &blob.digest)?;
    let mut given_up = false;
    let mut ahead = ahead.into_iter();
    loop {
        let chunk = match ahead.next() {
            Some(chunk) => chunk,
            None => match stream.next().await? {
                Some(chunk) => chunk,
                None => break,
            },
        };
        received += chunk.len() as u64;
        if received > blob.size {
            return Err(wrong_size(blob, received));
        }
        hasher.update(&chunk);
        if let Some(copy) = copy.as_deref_mut() {
            copy.file.write_all(&chunk).await.map_err(io("keep a layer"))?;
        }
        let Some(stdin) = child.stdin() else { break };
        match tokio::time::timeout(CHILD_TIMEOUT, stdin.write_all(&chunk)).await {
            Ok(Ok(())) => {}
            // It says why when it is asked.
            Ok(Err(_)) => {
                given_up = true;
                break;
            }
            Err(_) => return Err(failed(unpack::Error::Deadline(CHILD_TIMEOUT), &blob.digest)),
        }
    }
    if given_up {
        // It says why. Bytes that make no sense may be wrong ones, which another server may have right: that is
        // known when all of them were seen.
        let error = match child.finish(CHILD_TIMEOUT).await {
            Ok(_) => unpack::Error::Died("it stopped reading".into()),
            Err(error) => error,
        };
        if matches!(error, unpack::Error::Malformed(_)) {
            while let Some(chunk) = stream.next().await? {
                received += chunk.len() as u64;
                if received > blob.size {
                    break;
                }
                hasher.update(&chunk);
            }
            check(blob, received, hasher)?;
        }
        return Err(failed(error, &blob.digest));
    }
    check(blob, received, hasher)?;
    if let Some(copy) = copy {
        copy.file.flush().await.map_err(io("keep a layer"))?;
    }
    let unpacked = child.finish(CHILD_TIMEOUT).await.map_err(|error| failed(error, &blob.digest))?;
    // Not a digest error in the sense of another server: the configuration promises something else than the manifest.
    if unpacked.diff_id != diff_id.to_string() {
        return Err(Error::Manifest {
            what: format!("layer {}", blob.digest),
            why: format!("unpacked it is {}, the configuration says {diff_id}", unpacked.diff_id),
        });
    }
    Ok(unpacked)
}

fn start(live: &Live, staged: &Staged, magic: &[u8], diff_id: &Digest, blob: &Digest) -> Result<Unpacking> {
    let compression = Compression::sniff(magic);
    let path = staged.path();
    let mut child = live
        .config
        .unpacker
        .start(&path, compression, diff_id.algorithm())
        .map_err(|error| failed(error, blob))?;
    if let Some(stdin) = child.stdin() {
        // Only faster: the bound per user may forbid it.
        let _ = rustix::pipe::fcntl_setpipe_size(stdin, PIPE);
    }
    Ok(child)
}

/// Moves a finished layer to its name and writes it down. If somebody was faster, theirs is as good.
async fn place(
    images: &Arc<Images>,
    staged: Staged,
    unpacked: Unpacked,
    diff_id: Digest,
    copy: Option<Copy>,
) -> Result<LayerRow> {
    let (staged, counted) = blocking(move || {
        let directory = openat(&staged.directories.staging, staged.name(), DIRECTORY, Mode::empty());
        let directory = directory.map_err(sys("open a layer"))?;
        let counted = tree::count(directory.as_fd()).map_err(sys("count a layer"))?;
        Ok((staged, counted))
    })
    .await?;
    let mut implied = Vec::new();
    if !unpacked.root {
        implied.push(0);
    }
    for path in &unpacked.implied {
        implied.extend_from_slice(path.as_os_str().as_bytes());
        implied.push(0);
    }
    let row = LayerRow { diff_id, bytes: counted.bytes, inodes: counted.inodes, implied, trusted: true };
    let index = images.index.clone();
    images
        .store
        .run(move |db| {
            if let Some(Copy { staged, name, .. }) = &copy {
                let directories = &staged.directories;
                renameat(&directories.staging, staged.name(), &directories.blobs, name.as_c_str())
                    .map_err(sys("keep a layer"))?;
                staged.placed();
            }
            if let Some(row) = db.layer(&diff_id)? {
                return Ok(row);
            }
            let directories = &staged.directories;
            let name = CString::new(diff_id.file_name()).unwrap_or_default();
            // A directory without a row is garbage.
            directories.throw(&directories.layers, &name)?;
            let (from, to) = (&directories.staging, &directories.layers);
            renameat_with(from, staged.name(), to, name.as_c_str(), RenameFlags::NOREPLACE)
                .map_err(sys("place a layer"))?;
            staged.placed();
            let boot = db.boot();
            db.quick(|transaction| store::put_layer(transaction, &row, &boot))?;
            index.write().unwrap_or_else(std::sync::PoisonError::into_inner).add_layer(row.clone());
            Ok(row)
        })
        .await
}

/// Whether these were the promised bytes.
fn check(blob: &Descriptor, received: u64, hasher: Hasher) -> Result<()> {
    if received != blob.size {
        return Err(wrong_size(blob, received));
    }
    let actual = hasher.finish();
    if actual == blob.digest {
        return Ok(());
    }
    Err(Error::Digest { what: "layer".into(), expected: blob.digest.to_string(), actual: actual.to_string() })
}

fn wrong_size(blob: &Descriptor, received: u64) -> Error {
    Error::Digest {
        what: "layer".into(),
        expected: format!("{} of {} bytes", blob.digest, blob.size),
        actual: format!("{received} bytes or more"),
    }
}

fn failed(error: unpack::Error, layer: &Digest) -> Error {
    match error {
        unpack::Error::NoSpace(why) => Error::Exhausted(format!("unpack layer {layer}: {why}")),
        unpack::Error::Exhausted(why) => Error::TooLarge { what: format!("layer {layer}"), why },
        other => Error::Unpack { layer: layer.to_string(), why: other.to_string() },
    }
}

//! From a reference to an image: resolve it, choose the platform, get each layer unpacked, stack them, sync, commit.
//! What a layer goes through is `layer`'s business, who answers is `registry`'s.

mod layer;
mod source;

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::try_join_all;
use rustix::fs::{Mode, openat, renameat};

use crate::auth::{self, Auth};
use crate::digest::Digest;
use crate::error::{Error, Result, sys};
use crate::images::{Image, Images, blocking};
use crate::layers::{self, Stack};
use crate::manifest::{self, Descriptor, Document, Manifest};
use crate::reference::Reference;
pub(crate) use crate::registry::Tls;
use crate::registry::{Pace, Session};
use crate::settings::Live;
use crate::store::{self, ImageRow, Mend};
use crate::tree::{self, DIRECTORY};
use layer::Staged;
use source::Source;

/// Documents that one pull reads while it looks for its platform.
const MAX_DOCUMENTS: usize = 64;
/// Layers that nobody came back for are kept for so long, so that a pull that is tried again finds them.
const GRACE: Duration = Duration::from_secs(600);

/// Pulls from a registry.
pub(crate) async fn registry(
    images: Arc<Images>,
    live: Arc<Live>,
    reference: Reference,
    auth: Option<Auth>,
) -> Result<Arc<Image>> {
    let session = {
        let (tls, live, reference) = (images.tls.clone(), live.clone(), reference.clone());
        blocking(move || {
            let auth = match (auth, &live.config.auth_file) {
                (None, Some(file)) => auth::from_file(file, &reference)?,
                (auth, _) => auth,
            };
            let pace = Pace { timeout: live.config.progress_timeout, floor: live.config.min_throughput };
            Session::open(&tls, &live.config.hosts_dirs, reference, auth, pace)
        })
        .await?
    };
    let source = Arc::new(Source::Registry(Box::new(session)));
    let selector = match reference.digest() {
        Some(digest) => digest.to_string(),
        None => reference.tag().unwrap_or("latest").to_owned(),
    };
    let top = source.manifest(&selector, reference.digest()).await?;
    let mut names = vec![reference.with_digest(&top.digest)];
    if reference.digest().is_none() {
        names.push(reference.to_string());
    }
    finish(images, live, source, reference.to_string(), top, names).await
}

/// Imports all images of a layout directory.
pub(crate) async fn layout(
    images: Arc<Images>,
    live: Arc<Live>,
    directory: PathBuf,
) -> Result<Vec<Arc<Image>>> {
    let (source, entries) = blocking(move || Source::layout(&directory)).await?;
    let source = Arc::new(source);
    let mut imported = Vec::new();
    for entry in entries {
        let names = names_of(&entry, live.config.default_registry.as_deref())?;
        let what = names.last().cloned().unwrap_or_else(|| entry.digest.to_string());
        let top = source.manifest(&entry.digest.to_string(), Some(entry.digest)).await?;
        imported.push(finish(images.clone(), live.clone(), source.clone(), what, top, names).await?);
    }
    Ok(imported)
}

/// The names that an entry of a layout asks for, if any.
fn names_of(entry: &Descriptor, default_registry: Option<&str>) -> Result<Vec<String>> {
    let annotation = |key: &str| entry.annotations.as_ref().and_then(|annotations| annotations.get(key));
    let full = annotation("io.containerd.image.name");
    // The OCI annotation is often a bare tag, which names nothing.
    let short = annotation("org.opencontainers.image.ref.name").filter(|name| name.contains('/'));
    let Some(name) = full.or(short) else { return Ok(Vec::new()) };
    let reference = Reference::parse(name, default_registry)?;
    let mut names = vec![reference.with_digest(&entry.digest)];
    if reference.digest().is_none() {
        names.push(reference.to_string());
    }
    Ok(names)
}

async fn finish(
    images: Arc<Images>,
    live: Arc<Live>,
    source: Arc<Source>,
    what: String,
    top: Top,
    names: Vec<String>,
) -> Result<Arc<Image>> {
    let chosen = choose(&images, &source, &what, top).await?;
    let pins = Pins::new(&images, chosen.stack.clone()).await?;
    let result = layers(&images, &live, &source, &chosen).await;
    if let Err(error) = result {
        collect_later(&images);
        return Err(error);
    }
    let image = commit(&images, chosen, names).await?;
    drop(pins);
    Ok(image)
}

/// A document as it came.
pub(crate) struct Top {
    pub(crate) body: Bytes,
    pub(crate) content_type: Option<String>,
    pub(crate) digest: Digest,
}

/// The image that suits this machine.
struct Chosen {
    id: Digest,
    manifest: Bytes,
    config: Bytes,
    /// The digests of the uncompressed layers, lowest first.
    stack: Vec<Digest>,
    blobs: Vec<Descriptor>,
}

/// Walks from what the reference stands for to a manifest for this platform. Each document is read once.
async fn choose(images: &Images, source: &Source, what: &str, top: Top) -> Result<Chosen> {
    let platform = || Error::Platform { reference: what.to_owned(), platform: images.host.name() };
    let mut seen = HashSet::from([top.digest]);
    let mut descriptors = 0;
    // Best last: the end of the list is tried next.
    let mut waiting: Vec<(usize, Descriptor)> = Vec::new();
    let mut at = Some((0, top));
    let mut last = None;
    loop {
        let Some((depth, document)) = at.take() else {
            let Some((depth, descriptor)) = waiting.pop() else { return Err(last.unwrap_or_else(platform)) };
            if !seen.insert(descriptor.digest) {
                continue;
            }
            if seen.len() > MAX_DOCUMENTS {
                let why = format!("more than {MAX_DOCUMENTS} documents lead to it");
                return Err(Error::TooLarge { what: what.to_owned(), why });
            }
            match source.manifest(&descriptor.digest.to_string(), Some(descriptor.digest)).await {
                Ok(mut document) => {
                    let declared = (!descriptor.media_type.is_empty()).then_some(descriptor.media_type);
                    document.content_type = document.content_type.or(declared);
                    at = Some((depth, document));
                }
                // A mirror may hold a part of an index only.
                Err(error @ Error::NotFound(_)) => last = Some(error),
                Err(error) => return Err(error),
            }
            continue;
        };
        match manifest::parse(what, &document.body, document.content_type.as_deref())? {
            Document::Manifest(manifest) => match usable(images, source, what, &document, *manifest).await? {
                Some(chosen) => return Ok(chosen),
                None => last = Some(platform()),
            },
            Document::Index(entries) => {
                descriptors += entries.len();
                if depth >= manifest::MAX_DEPTH || descriptors > manifest::MAX_DESCRIPTORS {
                    let why = "its indexes are nested too deep or list too much".to_owned();
                    return Err(Error::TooLarge { what: what.to_owned(), why });
                }
                let best = manifest::candidates(&entries, &images.host);
                waiting.extend(best.into_iter().rev().map(|entry| (depth + 1, entry.clone())));
            }
        }
    }
}

/// Reads a manifest's configuration; `None` if it is for another machine.
async fn usable(
    images: &Images,
    source: &Source,
    what: &str,
    document: &Top,
    manifest: Manifest,
) -> Result<Option<Chosen>> {
    let id = manifest.config.digest;
    let config = source.blob(id).await?;
    if config.len() as u64 != manifest.config.size {
        let why =
            format!("its configuration has {} bytes, {} are announced", config.len(), manifest.config.size);
        return Err(Error::Manifest { what: what.to_owned(), why });
    }
    let parsed = manifest::config(&id, &config, manifest.layers.len())?;
    if !images.host.runs(&parsed.os, &parsed.architecture) {
        return Ok(None);
    }
    Ok(Some(Chosen {
        id,
        manifest: document.body.clone(),
        config,
        stack: parsed.rootfs.diff_ids,
        blobs: manifest.layers,
    }))
}

/// Sees to it that every layer is here. All are worked on at once, within the bounds; the first error ends the rest.
async fn layers(images: &Arc<Images>, live: &Arc<Live>, source: &Arc<Source>, chosen: &Chosen) -> Result<()> {
    let mut wanted = HashSet::new();
    let layers = chosen.stack.iter().zip(&chosen.blobs).filter(|(diff_id, _)| wanted.insert(**diff_id));
    try_join_all(layers.map(|(diff_id, blob)| layer(images, live, source, *diff_id, blob))).await?;
    Ok(())
}

async fn layer(
    images: &Arc<Images>,
    live: &Arc<Live>,
    source: &Arc<Source>,
    diff_id: Digest,
    blob: &Descriptor,
) -> Result<()> {
    let mut again = true;
    loop {
        if layer::present(images, diff_id).await? {
            return Ok(());
        }
        let work = || {
            let (images, live, source, blob) = (images.clone(), live.clone(), source.clone(), blob.clone());
            async move { layer::unpack(images, live, source, blob, diff_id).await }
        };
        let landed = images.unpacked.join((blob.digest, diff_id), work).await;
        match landed.result {
            Ok(_) => return Ok(()),
            // Somebody else's server or credentials failed, which says nothing about ours.
            Err(_) if !landed.ours && again => again = false,
            Err(error) => return Err(error),
        }
    }
}

/// Makes the image's mend, syncs everything that it stands on, and writes it down.
async fn commit(images: &Arc<Images>, chosen: Chosen, names: Vec<String>) -> Result<Arc<Image>> {
    let stop = Arc::new(AtomicBool::new(false));
    let _stop = StopOnDrop(stop.clone());
    let stack = topmost_once(&chosen.stack);
    let (rows, mend_name) = {
        let index = images.index.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let rows: Vec<_> = stack.iter().filter_map(|diff_id| index.layer(diff_id).cloned()).collect();
        (rows, format!("mend-{}", chosen.id.file_name()))
    };
    if rows.len() != stack.len() {
        return Err(Error::NotFound(format!("a layer of {}", chosen.id)));
    }
    let size =
        rows.iter().map(|row| row.bytes).sum::<u64>() + (chosen.manifest.len() + chosen.config.len()) as u64;
    let mend = {
        let (directories, name) = (images.directories.clone(), mend_name.clone());
        let staged = Staged::new(images)?;
        blocking(move || {
            let names: Vec<String> = stack.iter().map(Digest::file_name).collect();
            let implied: Vec<Vec<u8>> = rows.into_iter().map(|row| row.implied).collect();
            let into = openat(&directories.staging, staged.name(), DIRECTORY, Mode::empty());
            let into = into.map_err(sys("open staging"))?;
            let stack = Stack::open(directories.layers.as_fd(), &names)?;
            let mut mend = None;
            if layers::mend(&stack, &implied, into.as_fd(), &stop)? {
                let counted = tree::count(into.as_fd()).map_err(sys("count a mend"))?;
                mend = Some(Mend { name: name.clone(), bytes: counted.bytes, inodes: counted.inodes });
            }
            // Everything that the rows will speak of is on the disk before they are (F20).
            rustix::fs::syncfs(&directories.root).map_err(sys("sync the image directory"))?;
            Ok((mend, staged))
        })
        .await?
    };
    let (mend, staged) = mend;
    let (index, directories) = (images.index.clone(), images.directories.clone());
    images
        .store
        .run(move |db| {
            if let Some(mend) = &mend {
                // An image pulled again has a mend already, of the same layers: the new one takes its place.
                let name = std::ffi::CString::new(mend.name.as_str()).unwrap_or_default();
                directories.throw(&directories.layers, &name)?;
                renameat(&directories.staging, staged.name(), &directories.layers, name.as_c_str())
                    .map_err(sys("place a mend"))?;
                rustix::fs::fsync(&directories.layers).map_err(sys("sync the layers"))?;
                staged.placed();
            }
            let row = ImageRow {
                id: chosen.id.to_string(),
                manifest: chosen.manifest.to_vec(),
                config: chosen.config.to_vec(),
                size,
                mend,
                hidden: false,
                names,
                stack: chosen.stack,
            };
            db.durable(|transaction| store::put_image(transaction, &row))?;
            let mut index = index.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            index.reload(db)?;
            index.get(&row.id).cloned().ok_or_else(|| Error::NotFound(format!("image {}", row.id)))
        })
        .await
}

/// The layers topmost first, each once: a lower copy of a layer adds nothing below its upper one, and overlayfs
/// refuses a directory that it is given twice.
pub(crate) fn topmost_once(stack: &[Digest]) -> Vec<Digest> {
    let mut seen = HashSet::new();
    stack.iter().rev().filter(|diff_id| seen.insert(**diff_id)).copied().collect()
}

/// Keeps layers from being collected while a pull counts on them.
struct Pins {
    images: Arc<Images>,
    diff_ids: Vec<Digest>,
}

impl Pins {
    async fn new(images: &Arc<Images>, diff_ids: Vec<Digest>) -> Result<Pins> {
        // The guard exists before the pins do: whichever way this ends, they are taken out again, in order.
        let pins = Pins { images: images.clone(), diff_ids };
        let diff_ids = pins.diff_ids.clone();
        images
            .store
            .run(move |db| {
                db.pin(&diff_ids);
                Ok(())
            })
            .await?;
        Ok(pins)
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let diff_ids = std::mem::take(&mut self.diff_ids);
        self.images.store.post(move |db| db.unpin(&diff_ids));
    }
}

struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Takes away what a failed pull has left, if nobody wants it after a while.
pub(crate) fn collect_later(images: &Arc<Images>) {
    let images = Arc::downgrade(images);
    drop(tokio::spawn(async move {
        tokio::time::sleep(GRACE).await;
        if let Some(images) = images.upgrade()
            && let Err(error) = images.collect().await
        {
            tracing::warn!(%error, "unused layers stay");
        }
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_that_comes_twice_counts_where_it_is_topmost() {
        let [a, b, c] = [b"a", b"b", b"c"].map(|bytes| Digest::sha256(bytes));
        assert_eq!(topmost_once(&[a, b, a, c, b]), [b, c, a]);
        assert!(topmost_once(&[]).is_empty());
    }

    #[test]
    fn names_of_a_layout_are_full_references_only() {
        let entry = |annotations: &str| -> Descriptor {
            let digest = Digest::sha256(b"");
            serde_json::from_str(&format!(r#"{{"digest":"{digest}","size":1,"annotations":{annotations}}}"#))
                .unwrap()
        };
        let names = |annotations: &str| names_of(&entry(annotations), Some("docker.io"));
        assert_eq!(
            names(r#"{"org.opencontainers.image.ref.name":"r.example/a:b"}"#).unwrap()[1],
            "r.example/a:b"
        );
        assert!(names(r#"{"org.opencontainers.image.ref.name":"latest"}"#).unwrap().is_empty());
        assert!(names("null").unwrap().is_empty());
        assert_eq!(names(r#"{"io.containerd.image.name":"a"}"#).unwrap()[1], "docker.io/library/a:latest");
        assert!(names(r#"{"io.containerd.image.name":"A b"}"#).is_err());
    }
}

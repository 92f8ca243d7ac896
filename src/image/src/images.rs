//! The images of this node: what the daemon asks for, answered from memory, changed on the store's thread only.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::fs::{Mode, mkdirat, openat};

use crate::auth::Auth;
use crate::config;
use crate::digest::Digest;
use crate::error::{Error, Result, io, sys};
use crate::flight::Flights;
use crate::layers::Stack;
use crate::manifest::{self, Document};
use crate::platform::Host;
use crate::pull;
use crate::reference::Reference;
use crate::settings::{Config, Live, fits};
use crate::snapshot::{self, Snapshot};
use crate::store::{Db, ImageRow, LayerRow, Store};
use crate::tree::{self, DIRECTORY, Occupied};

/// An image that is complete and verified.
#[derive(Debug, Clone)]
pub struct Image {
    /// The digest of the configuration, `sha256:…`: the same string everywhere.
    pub id: String,
    /// `registry/repository:tag`.
    pub tags: Vec<String>,
    /// `registry/repository@sha256:…`, of what the registry was asked for (an index where there is one).
    pub digests: Vec<String>,
    /// What its layers occupy on the disk, in bytes; layers may be shared with other images. Never 0.
    pub size: u64,
    /// What the image says about its process.
    pub config: config::Config,
    /// Whether a pattern of the configuration says that it is to be kept.
    pub pinned: bool,
    /// The configuration as the registry has it, for verbose answers.
    pub raw_config: Arc<[u8]>,
    /// The digests of the uncompressed layers, lowest first.
    pub diff_ids: Vec<Digest>,
    /// Names below the directory of layers, topmost first, the mend included.
    pub(crate) stack: Vec<String>,
}

/// What this library occupies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// Our root directory.
    pub mountpoint: PathBuf,
    /// Allocated blocks, in bytes.
    pub bytes: u64,
    /// Files, directories and the rest.
    pub inodes: u64,
}

/// All images, layers and snapshots below one directory.
pub struct Images {
    pub(crate) directories: Arc<Directories>,
    pub(crate) live: RwLock<Arc<Live>>,
    pub(crate) store: Store,
    pub(crate) index: Arc<RwLock<Index>>,
    pub(crate) host: Host,
    pub(crate) pulls: Flights<(Reference, Option<Auth>), Arc<Image>>,
    pub(crate) unpacked: Flights<(Digest, Digest), LayerRow>,
    pub(crate) tls: pull::Tls,
}

/// Our directories, open.
pub(crate) struct Directories {
    pub(crate) path: PathBuf,
    pub(crate) root: OwnedFd,
    pub(crate) layers: OwnedFd,
    pub(crate) snapshots: OwnedFd,
    pub(crate) staging: OwnedFd,
    pub(crate) blobs: OwnedFd,
    pub(crate) trash: OwnedFd,
}

/// What is known, in memory.
#[derive(Default)]
pub(crate) struct Index {
    images: BTreeMap<String, Arc<Image>>,
    names: HashMap<String, String>,
    /// Stacks of all images, hidden ones included: containers may still use them.
    stacks: HashMap<String, Vec<String>>,
    layers: HashMap<Digest, LayerRow>,
    snapshots: HashMap<String, String>,
    mends: Occupied,
    pinned: Vec<String>,
}

impl Images {
    /// Opens (or makes) the store, drops what was left half-done, and reads what is there. Damaged rows are reported
    /// and not listed; nothing complete is ever wiped.
    pub async fn open(config: Config) -> Result<Arc<Images>, Error> {
        let store = Store::open(&config.database).await?;
        let path = config.root.clone();
        let directories = Arc::new(blocking(move || Directories::open(&path)).await?);
        let index = Arc::new(RwLock::new(Index { pinned: config.pinned.clone(), ..Index::default() }));
        {
            let (directories, index) = (directories.clone(), index.clone());
            store
                .run(move |db| {
                    recover(db, &directories)?;
                    let mut index = index.write().unwrap_or_else(PoisonError::into_inner);
                    index.snapshots = db.snapshots()?.into_iter().collect();
                    index.reload(db)
                })
                .await?;
        }
        // What the last run threw away may be large; nobody waits for it.
        let swept = directories.clone();
        drop(tokio::task::spawn_blocking(move || swept.sweep()));
        let tls = pull::Tls::new(&config.proxy);
        let images = Arc::new(Images {
            directories,
            live: RwLock::new(Arc::new(Live::new(config))),
            store,
            index,
            host: Host::detect(),
            pulls: Flights::new(),
            unpacked: Flights::new(),
            tls,
        });
        // Layers of a pull that was cut off are kept for its next try.
        pull::collect_later(&images);
        Ok(images)
    }

    /// Takes over the live settings; pulls under way go on with those that they started with.
    pub fn reconfigure(&self, config: Config) {
        let pinned = config.pinned.clone();
        {
            let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
            let next = live.with(config);
            *live = Arc::new(next);
        }
        self.index.write().unwrap_or_else(PoisonError::into_inner).pin(pinned);
    }

    /// Pulls an image, or joins the pull of the same reference with the same credentials. Dropping the future ends
    /// the pull when nobody else waits for it.
    pub async fn pull(self: &Arc<Self>, reference: &str, auth: Option<Auth>) -> Result<Arc<Image>, Error> {
        let live = self.live();
        let reference = Reference::parse(reference, live.config.default_registry.as_deref())?;
        let images = self.clone();
        let key = (reference.clone(), auth.clone());
        self.pulls.join(key, move || pull::registry(images, live, reference, auth)).await.result
    }

    /// Takes in the images of an OCI image layout directory. Each manifest of its index that is annotated with a
    /// full reference (`org.opencontainers.image.ref.name`, or containerd's `io.containerd.image.name`) gets that name.
    pub async fn import(self: &Arc<Self>, layout: &Path) -> Result<Vec<Arc<Image>>, Error> {
        pull::layout(self.clone(), self.live(), layout.to_owned()).await
    }

    /// All images, by id.
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.read().images.values().cloned().collect()
    }

    /// Finds an image by name, by `name@digest`, by id with or without `sha256:`, or by an unambiguous start of the id.
    pub fn find(&self, name: &str) -> Option<Arc<Image>> {
        let live = self.live();
        self.read().find(name, live.config.default_registry.as_deref()).cloned()
    }

    /// Removes an image with all of its names, in every repository. What a snapshot still uses stays on the disk
    /// until that is released. False if there was no such image.
    pub async fn remove(&self, name: &str) -> Result<bool, Error> {
        let id = self.find(name).map(|image| image.id.clone());
        let name = match Reference::parse(name, self.live().config.default_registry.as_deref()) {
            Ok(reference) => reference.to_string(),
            Err(_) => name.to_owned(),
        };
        let (index, directories) = (self.index.clone(), self.directories.clone());
        let removed = self
            .store
            .run(move |db| {
                let removed = db.durable(|transaction| {
                    // An image that is not listed, because a layer of it is damaged, is found by its rows.
                    let id = match id {
                        Some(id) => id,
                        None => match by_row(transaction, &name)? {
                            Some(id) => id,
                            None => return Ok(false),
                        },
                    };
                    transaction.execute("DELETE FROM image_name WHERE image = ?1", [&id])?;
                    transaction.execute("UPDATE image_image SET hidden = 1 WHERE id = ?1", [&id])?;
                    Ok(true)
                })?;
                if removed {
                    directories.discard(db.collect()?)?;
                    directories.discard_blobs(db)?;
                    index.write().unwrap_or_else(PoisonError::into_inner).reload(db)?;
                }
                Ok(removed)
            })
            .await?;
        if removed {
            self.sweep().await;
        }
        Ok(removed)
    }

    /// What everything here occupies: layers as counted when they were unpacked, snapshots counted now.
    pub async fn usage(&self) -> Result<Usage, Error> {
        let mut total = {
            let index = self.read();
            let mut total = index.mends;
            for layer in index.layers.values() {
                total.add(Occupied { bytes: layer.bytes, inodes: layer.inodes });
            }
            total
        };
        let directories = self.directories.clone();
        total.add(blocking(move || directories.count()).await?);
        Ok(self.usage_of(total))
    }

    /// Makes the writable part of a container on an image. Asking again with the same key answers the same.
    pub async fn prepare(&self, image: &str, key: &str) -> Result<Snapshot, Error> {
        let name = snapshot::check_key(key)?;
        let image = self.find(image).ok_or_else(|| Error::NotFound(format!("image {image}")))?;
        let (id, key_text) = (image.id.clone(), key.to_owned());
        let (index, directories) = (self.index.clone(), self.directories.clone());
        self.store
            .run(move |db| {
                if let Some(known) =
                    index.read().unwrap_or_else(PoisonError::into_inner).snapshots.get(&key_text)
                {
                    return if *known == id {
                        Ok(())
                    } else {
                        Err(Error::InvalidArgument(format!("snapshot {key_text} is of another image")))
                    };
                }
                let topmost = {
                    let index = index.read().unwrap_or_else(PoisonError::into_inner);
                    // It may have been removed since it was found.
                    let image =
                        index.images.get(&id).ok_or_else(|| Error::NotFound(format!("image {id}")))?;
                    image.stack.first().cloned()
                };
                db.quick(|transaction| {
                    transaction.execute(
                        "INSERT INTO image_snapshot (key, image) VALUES (?1, ?2)",
                        [&key_text, &id],
                    )?;
                    snapshot::make(
                        directories.snapshots.as_fd(),
                        &name,
                        directories.layers.as_fd(),
                        topmost.as_deref(),
                    )
                    .inspect_err(|_| {
                        let _ = directories.throw(directories.snapshots.as_fd(), &name);
                    })
                })?;
                index.write().unwrap_or_else(PoisonError::into_inner).snapshots.insert(key_text, id);
                Ok(())
            })
            .await?;
        self.snapshot(key).ok_or_else(|| Error::NotFound(format!("snapshot {key}")))
    }

    /// The snapshot of a key.
    pub fn snapshot(&self, key: &str) -> Option<Snapshot> {
        let index = self.read();
        let stack = index.stacks.get(index.snapshots.get(key)?)?;
        let own = self.directories.path.join("snapshots").join(key);
        Some(Snapshot { lower: self.lower(stack), upper: own.join("fs"), work: own.join("work") })
    }

    /// The keys of all snapshots.
    pub fn snapshots(&self) -> Vec<String> {
        self.read().snapshots.keys().cloned().collect()
    }

    /// Removes a container's writable part, however deep it is, and then whatever only it has kept alive. Nothing
    /// left to remove is fine.
    pub async fn release(&self, key: &str) -> Result<(), Error> {
        let name = snapshot::check_key(key)?;
        let (index, directories) = (self.index.clone(), self.directories.clone());
        let key = key.to_owned();
        let thrown = self
            .store
            .run(move |db| {
                let mut thrown: Vec<_> =
                    directories.throw(directories.snapshots.as_fd(), &name)?.into_iter().collect();
                let Some(image) =
                    index.read().unwrap_or_else(PoisonError::into_inner).snapshots.get(&key).cloned()
                else {
                    return Ok(thrown);
                };
                let mut used = db.quick(|transaction| {
                    transaction.execute("DELETE FROM image_snapshot WHERE key = ?1", [&key])?;
                    let mut views =
                        transaction.prepare("DELETE FROM image_view WHERE key = ?1 RETURNING image")?;
                    Ok(views.query_map([&key], |row| row.get(0))?.collect::<Result<Vec<String>, _>>()?)
                })?;
                used.push(image);
                let mut index = index.write().unwrap_or_else(PoisonError::into_inner);
                index.snapshots.remove(&key);
                if used.iter().any(|image| !index.images.contains_key(image)) {
                    thrown.extend(directories.discard(db.collect()?)?);
                    thrown.extend(directories.discard_blobs(db)?);
                    index.reload(db)?;
                }
                Ok(thrown)
            })
            .await?;
        let directories = self.directories.clone();
        blocking(move || {
            for name in thrown {
                tree::remove(directories.trash.as_fd(), &name).map_err(sys("remove a snapshot"))?;
            }
            Ok(())
        })
        .await
    }

    /// What a container has written.
    pub async fn snapshot_usage(&self, key: &str) -> Result<Usage, Error> {
        let name = snapshot::check_key(key)?;
        let directories = self.directories.clone();
        let counted = blocking(move || {
            let act = || format!("count snapshot {}", name.to_string_lossy());
            match openat(&directories.snapshots, name.as_c_str(), DIRECTORY, Mode::empty()) {
                Ok(directory) => tree::count(directory.as_fd()).map_err(sys(act())),
                Err(rustix::io::Errno::NOENT) => {
                    Err(Error::NotFound(format!("snapshot {}", name.to_string_lossy())))
                }
                Err(error) => Err(sys(act())(error)),
            }
        })
        .await?;
        Ok(self.usage_of(counted))
    }

    /// Reads a regular file of an image, following links inside the image only. `None` if there is none; an error if
    /// it is longer than `limit`.
    pub async fn read_file(&self, image: &str, path: &str, limit: u64) -> Result<Option<Vec<u8>>, Error> {
        let stack = self.stack(image)?;
        let (directories, path) = (self.directories.clone(), path.to_owned());
        blocking(move || Stack::open(directories.layers.as_fd(), &stack)?.read(&path, limit)).await
    }

    /// The layers of an image, topmost first: what a read-only overlay of it is mounted from. They stay until the
    /// snapshot with this key is released.
    pub async fn view(&self, image: &str, key: &str) -> Result<Vec<PathBuf>, Error> {
        let (index, id, key) = (self.index.clone(), image.to_owned(), key.to_owned());
        let stack = self
            .store
            .run(move |db| {
                let found = index.read().unwrap_or_else(PoisonError::into_inner).images.get(&id).cloned();
                let image = found.ok_or_else(|| Error::NotFound(format!("image {id}")))?;
                db.quick(|transaction| {
                    transaction.execute(
                        "INSERT OR IGNORE INTO image_view (key, image) VALUES (?1, ?2)",
                        [&key, &id],
                    )?;
                    Ok(image.stack.clone())
                })
            })
            .await?;
        Ok(self.lower(&stack))
    }

    pub(crate) fn live(&self) -> Arc<Live> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Removes layers that no image and no pull uses.
    pub(crate) async fn collect(&self) -> Result<()> {
        let (index, directories) = (self.index.clone(), self.directories.clone());
        self.store
            .run(move |db| {
                directories.discard(db.collect()?)?;
                directories.discard_blobs(db)?;
                index.write().unwrap_or_else(PoisonError::into_inner).reload(db)
            })
            .await?;
        self.sweep().await;
        Ok(())
    }

    /// Empties the trash.
    pub(crate) async fn sweep(&self) {
        let directories = self.directories.clone();
        let _ = tokio::task::spawn_blocking(move || directories.sweep()).await;
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn stack(&self, image: &str) -> Result<Vec<String>> {
        let live = self.live();
        let index = self.read();
        if let Some(image) = index.find(image, live.config.default_registry.as_deref()) {
            return Ok(image.stack.clone());
        }
        // A container's image may have been removed since.
        index.stacks.get(image).cloned().ok_or_else(|| Error::NotFound(format!("image {image}")))
    }

    fn lower(&self, stack: &[String]) -> Vec<PathBuf> {
        let layers = self.directories.path.join("layers");
        stack.iter().map(|name| layers.join(name)).collect()
    }

    fn usage_of(&self, occupied: Occupied) -> Usage {
        Usage { mountpoint: self.directories.path.clone(), bytes: occupied.bytes, inodes: occupied.inodes }
    }
}

impl Index {
    /// Reads everything again, from the store. Called on the store's thread after each change of images or layers.
    pub(crate) fn reload(&mut self, db: &mut Db) -> Result<()> {
        self.layers = db.layers()?.into_iter().map(|layer| (layer.diff_id, layer)).collect();
        self.images.clear();
        self.names.clear();
        self.stacks.clear();
        self.mends = Occupied::default();
        for row in db.images()? {
            if let Some(mend) = &row.mend {
                self.mends.add(Occupied { bytes: mend.bytes, inodes: mend.inodes });
            }
            let mut stack: Vec<String> =
                pull::topmost_once(&row.stack).iter().map(Digest::file_name).collect();
            stack.splice(0..0, row.mend.as_ref().map(|mend| mend.name.clone()));
            self.stacks.insert(row.id.clone(), stack.clone());
            if row.hidden {
                continue;
            }
            if let Some(missing) = row.stack.iter().find(|diff_id| !self.layers.contains_key(diff_id)) {
                tracing::warn!(image = %row.id, layer = %missing, "a layer is missing, the image is not listed; pull it again");
                continue;
            }
            match image(&row, stack, &self.pinned) {
                Ok(image) => {
                    for name in image.tags.iter().chain(&image.digests) {
                        self.names.insert(name.clone(), image.id.clone());
                    }
                    self.images.insert(image.id.clone(), Arc::new(image));
                }
                Err(error) => {
                    tracing::error!(image = %row.id, %error, "an image's row is damaged, it is not listed; pull it again");
                }
            }
        }
        Ok(())
    }

    /// The layer, if it is here.
    pub(crate) fn layer(&self, diff_id: &Digest) -> Option<&LayerRow> {
        self.layers.get(diff_id)
    }

    /// A layer that was just unpacked.
    pub(crate) fn add_layer(&mut self, layer: LayerRow) {
        self.layers.insert(layer.diff_id, layer);
    }

    pub(crate) fn get(&self, id: &str) -> Option<&Arc<Image>> {
        self.images.get(id)
    }

    fn find(&self, name: &str, default_registry: Option<&str>) -> Option<&Arc<Image>> {
        if let Some(image) = self.images.get(name) {
            return Some(image);
        }
        let normal = Reference::parse(name, default_registry).ok().map(|reference| reference.to_string());
        if let Some(id) = normal.and_then(|normal| self.names.get(&normal)) {
            return self.images.get(id);
        }
        let digits = name.strip_prefix("sha256:").unwrap_or(name);
        if digits.is_empty() || !digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let start = format!("sha256:{digits}");
        let mut fitting = self.images.range(start.clone()..).take_while(|(id, _)| id.starts_with(&start));
        match (fitting.next(), fitting.next()) {
            (Some((_, image)), None) => Some(image),
            _ => None,
        }
    }

    fn pin(&mut self, pinned: Vec<String>) {
        self.pinned = pinned;
        for image in self.images.values_mut() {
            let pinned = is_pinned(&self.pinned, image);
            if image.pinned != pinned {
                *image = Arc::new(Image { pinned, ..Image::clone(image) });
            }
        }
    }
}

impl Directories {
    fn open(path: &Path) -> Result<Directories> {
        let act = || format!("open {}", path.display());
        std::fs::create_dir_all(path).map_err(io(act()))?;
        // Paths that we hand out are absolute and name no link.
        let path = path.canonicalize().map_err(io(act()))?;
        let root = rustix::fs::open(&path, DIRECTORY, Mode::empty()).map_err(sys(act()))?;
        let private = Mode::from_raw_mode(0o700);
        rustix::fs::fchmod(&root, private).map_err(sys(act()))?;
        let below = |name: &str| {
            match mkdirat(&root, name, private) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(sys(act())(error)),
            }
            let directory = openat(&root, name, DIRECTORY, Mode::empty()).map_err(sys(act()))?;
            // Layers hold setuid files: nobody else walks in here (S54).
            rustix::fs::fchmod(&directory, private).map_err(sys(act()))?;
            Ok(directory)
        };
        Ok(Directories {
            layers: below("layers")?,
            snapshots: spread(below("snapshots")?),
            staging: spread(below("staging")?),
            blobs: below("blobs")?,
            trash: below("trash")?,
            root,
            path,
        })
    }

    /// Moves something into the trash; says under which name.
    pub(crate) fn throw(&self, from: impl AsFd, name: &std::ffi::CStr) -> Result<Option<std::ffi::CString>> {
        tree::throw(from.as_fd(), name, self.trash.as_fd())
            .map_err(sys(format!("throw away {}", name.to_string_lossy())))
    }

    /// Moves layers that were forgotten into the trash.
    pub(crate) fn discard(&self, layers: Vec<String>) -> Result<Vec<std::ffi::CString>> {
        let mut thrown = Vec::new();
        for name in layers {
            let name = std::ffi::CString::new(name).unwrap_or_default();
            thrown.extend(self.throw(&self.layers, &name)?);
        }
        Ok(thrown)
    }

    /// Moves kept blobs that no image's manifest names into the trash.
    fn discard_blobs(&self, db: &mut Db) -> Result<Vec<std::ffi::CString>> {
        let present = names(&self.blobs)?;
        if present.is_empty() {
            return Ok(Vec::new());
        }
        let mut wanted = HashSet::new();
        for image in db.images()? {
            if let Ok(Document::Manifest(manifest)) = manifest::parse(&image.id, &image.manifest, None) {
                wanted.extend(manifest.layers.iter().map(|layer| layer.digest.file_name()));
            }
        }
        let mut thrown = Vec::new();
        for name in present.difference(&wanted) {
            let name = std::ffi::CString::new(name.as_str()).unwrap_or_default();
            thrown.extend(self.throw(&self.blobs, &name)?);
        }
        Ok(thrown)
    }

    /// Removes everything in the trash. Two sweeps at once are fine: what is gone is gone.
    pub(crate) fn sweep(&self) {
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let trash = match openat(&self.trash, c".", DIRECTORY, Mode::empty()) {
            Ok(trash) => trash,
            Err(error) => {
                tracing::error!(%error, "the trash cannot be opened");
                return;
            }
        };
        match tree::names(trash.as_fd()) {
            Ok(names) => {
                for name in names {
                    if let Err(error) = tree::remove(self.trash.as_fd(), &name) {
                        tracing::error!(%error, name = %name.to_string_lossy(), "garbage stays");
                    }
                }
            }
            Err(error) => tracing::error!(%error, "the trash cannot be read"),
        }
    }

    /// What is not counted elsewhere: our own directories, and the snapshots.
    fn count(&self) -> Result<Occupied> {
        let act = "count the image directory";
        let mut total = Occupied::default();
        for directory in [&self.root, &self.layers] {
            let stat = rustix::fs::fstat(directory).map_err(sys(act))?;
            total.add(Occupied { bytes: stat.st_blocks.max(0).cast_unsigned() * 512, inodes: 1 });
        }
        for directory in [&self.snapshots, &self.staging, &self.blobs, &self.trash] {
            total.add(tree::count(directory.as_fd()).map_err(sys(act))?);
        }
        Ok(total)
    }
}

/// Asks ext4 to lay apart what is made in here (chattr(1), attribute T). Layers are unpacked side by side, and in one
/// block group each file that is made searches past the inodes of all others, and past those that were freed lately. Other
/// file systems do not have it.
fn spread(directory: OwnedFd) -> OwnedFd {
    if let Ok(flags) = rustix::fs::ioctl_getflags(&directory) {
        let _ = rustix::fs::ioctl_setflags(&directory, flags | rustix::fs::IFlags::TOPDIR);
    }
    directory
}

/// Brings rows and directories together after whatever ended the last run. Rows whose directory is gone are dropped,
/// directories without a row are garbage; so is a layer that a power cut may have torn.
fn recover(db: &mut Db, directories: &Directories) -> Result<()> {
    for (from, names) in [(&directories.staging, tree::names(directories.staging.as_fd()))] {
        for name in names.map_err(sys("read staging"))? {
            directories.throw(from, &name)?;
        }
    }
    let present: HashSet<String> = names(&directories.layers)?;
    let rows = db.layers()?;
    let lost: Vec<&LayerRow> =
        rows.iter().filter(|row| !row.trusted || !present.contains(&row.diff_id.file_name())).collect();
    for row in &lost {
        tracing::warn!(layer = %row.diff_id, "a layer is gone or was never synced");
    }
    let images = db.images()?;
    let lost_mends: Vec<String> = images
        .iter()
        .filter(|image| image.mend.as_ref().is_some_and(|mend| !present.contains(&mend.name)))
        .map(|image| image.id.clone())
        .collect();
    if !lost.is_empty() || !lost_mends.is_empty() {
        db.durable(|transaction| {
            for row in &lost {
                transaction
                    .execute("DELETE FROM image_layer WHERE diff_id = ?1", [row.diff_id.to_string()])?;
            }
            // An image without its mend would show wrong owners: as good as a missing layer.
            for id in &lost_mends {
                transaction.execute(
                    "DELETE FROM image_layer WHERE diff_id IN
                         (SELECT diff_id FROM image_stack WHERE image = ?1 ORDER BY position DESC LIMIT 1)",
                    [id],
                )?;
                transaction.execute("UPDATE image_image SET mend = NULL WHERE id = ?1", [id])?;
            }
            Ok(())
        })?;
    }
    let mut wanted: HashSet<String> = db.layers()?.iter().map(|row| row.diff_id.file_name()).collect();
    wanted.extend(db.images()?.into_iter().filter_map(|image| image.mend).map(|mend| mend.name));
    for name in present.difference(&wanted) {
        directories.discard(vec![name.clone()])?;
    }
    directories.discard_blobs(db)?;
    let present: HashSet<String> = names(&directories.snapshots)?;
    let rows: HashSet<String> = db.snapshots()?.into_iter().map(|(key, _)| key).collect();
    for name in present.difference(&rows) {
        let name = std::ffi::CString::new(name.as_str()).unwrap_or_default();
        directories.throw(&directories.snapshots, &name)?;
    }
    db.quick(|transaction| {
        for key in rows.difference(&present) {
            transaction.execute("DELETE FROM image_snapshot WHERE key = ?1", [key])?;
        }
        transaction
            .execute("DELETE FROM image_view WHERE key NOT IN (SELECT key FROM image_snapshot)", [])?;
        Ok(())
    })
}

fn names(directory: &OwnedFd) -> Result<HashSet<String>> {
    let directory = openat(directory, c".", DIRECTORY, Mode::empty()).map_err(sys("read our directories"))?;
    let names = tree::names(directory.as_fd()).map_err(sys("read our directories"))?;
    Ok(names.into_iter().filter_map(|name| name.into_string().ok()).collect())
}

fn image(row: &ImageRow, stack: Vec<String>, pinned: &[String]) -> Result<Image> {
    let id: Digest = row.id.parse()?;
    id.check(&row.config).map_err(|actual| Error::Digest {
        what: "image configuration".into(),
        expected: row.id.clone(),
        actual: actual.to_string(),
    })?;
    let document = manifest::config(&id, &row.config, row.stack.len())?;
    let (digests, tags) = row.names.iter().cloned().partition(|name| name.contains('@'));
    let mut image = Image {
        id: row.id.clone(),
        tags,
        digests,
        size: row.size.max(1),
        config: document.config,
        pinned: false,
        raw_config: row.config.as_slice().into(),
        diff_ids: row.stack.clone(),
        stack,
    };
    image.pinned = is_pinned(pinned, &image);
    Ok(image)
}

fn is_pinned(patterns: &[String], image: &Image) -> bool {
    let mut names = image.tags.iter().chain(&image.digests).chain([&image.id]);
    names.any(|name| patterns.iter().any(|pattern| fits(pattern, name)))
}

fn by_row(transaction: &rusqlite::Transaction<'_>, name: &str) -> Result<Option<String>> {
    use rusqlite::OptionalExtension;
    let named = transaction
        .query_row("SELECT image FROM image_name WHERE name = ?1", [name], |row| row.get(0))
        .optional()?;
    Ok(match named {
        Some(id) => Some(id),
        None => transaction
            .query_row("SELECT id FROM image_image WHERE id = ?1 AND hidden = 0", [name], |row| row.get(0))
            .optional()?,
    })
}

/// Runs blocking work to its end, on a thread that may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(Error::Cancelled))
}

#[cfg(test)]
mod tests {
    use rustix::fs::{IFlags, fstatfs, ioctl_getflags};

    use super::*;

    #[test]
    fn what_is_unpacked_is_laid_apart_on_ext4() {
        const EXT4: i64 = 0xEF53;
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories::open(dir.path()).unwrap();
        for directory in [&directories.staging, &directories.snapshots] {
            if fstatfs(directory).unwrap().f_type == EXT4 {
                assert!(ioctl_getflags(directory).unwrap().contains(IFlags::TOPDIR));
            }
        }
        // Opened again, it is as it was.
        Directories::open(dir.path()).unwrap();
    }
}

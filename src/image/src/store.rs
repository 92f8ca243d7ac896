//! What is remembered: images, names, layers and snapshots, in tables that start with `image_` inside the shared
//! database. One connection, one thread; everything that must not interleave is one closure on it. Image and layer
//! rows are committed with `synchronous=FULL`, after their files were synced; snapshot rows need not outlive a power
//! cut, because no container does.

use std::collections::HashMap;
use std::path::Path;
use std::sync::mpsc;

use rusqlite::{Connection, OptionalExtension, Transaction, params};

use crate::digest::Digest;
use crate::error::{Error, Result, io};

/// The tables. `boot` is the boot in which a layer was unpacked while nothing has synced it yet; a synced layer has
/// none. `hidden` images were removed while a snapshot still uses them. A view is a further image that the owner of a
/// snapshot has mounted; it ends with the snapshot.
const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS image_image (
    id TEXT PRIMARY KEY, manifest BLOB NOT NULL, config BLOB NOT NULL, size INTEGER NOT NULL,
    mend TEXT, mend_bytes INTEGER NOT NULL DEFAULT 0, mend_inodes INTEGER NOT NULL DEFAULT 0,
    hidden INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS image_name (
    name TEXT PRIMARY KEY, image TEXT NOT NULL REFERENCES image_image(id)
) STRICT;
CREATE INDEX IF NOT EXISTS image_name_image ON image_name(image);
CREATE TABLE IF NOT EXISTS image_layer (
    diff_id TEXT PRIMARY KEY, bytes INTEGER NOT NULL, inodes INTEGER NOT NULL, implied BLOB NOT NULL, boot TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS image_stack (
    image TEXT NOT NULL REFERENCES image_image(id), position INTEGER NOT NULL,
    diff_id TEXT NOT NULL, PRIMARY KEY (image, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS image_stack_layer ON image_stack(diff_id);
CREATE TABLE IF NOT EXISTS image_snapshot (key TEXT PRIMARY KEY, image TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS image_view (
    key TEXT NOT NULL, image TEXT NOT NULL, PRIMARY KEY (key, image)
) STRICT, WITHOUT ROWID;
";

type Job = Box<dyn FnOnce(&mut Db) + Send>;

/// A handle on the thread.
#[derive(Clone)]
pub(crate) struct Store {
    jobs: mpsc::Sender<Job>,
}

impl Store {
    /// Opens the database and starts the thread, which ends when the last handle is gone.
    pub(crate) async fn open(path: &Path) -> Result<Store> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (ready, opened) = tokio::sync::oneshot::channel();
        let path = path.to_owned();
        std::thread::Builder::new()
            .name("image-store".into())
            .spawn(move || match Db::open(&path) {
                Ok(mut db) => {
                    let _ = ready.send(Ok(()));
                    while let Ok(job) = queue.recv() {
                        // A job that panics answers its caller by dropping the reply; the thread serves on.
                        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(&mut db)));
                    }
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            })
            .map_err(io("start the image store"))?;
        opened.await.map_err(|_| Error::Cancelled)??;
        Ok(Store { jobs })
    }

    /// Runs one closure on the thread, to its end even if the caller goes away.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Db) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let job: Job = Box::new(move |db| {
            let _ = reply.send(job(db));
        });
        self.jobs.send(job).map_err(|_| Error::Cancelled)?;
        answer.await.map_err(|_| Error::Cancelled)?
    }

    /// As [`Store::run`] without an answer; usable from a destructor.
    pub(crate) fn post(&self, job: impl FnOnce(&mut Db) + Send + 'static) {
        let _ = self.jobs.send(Box::new(job));
    }
}

/// The thread's state.
pub(crate) struct Db {
    connection: Connection,
    /// Layers that a pull in flight counts on, and how many pulls do.
    pins: HashMap<Digest, usize>,
    boot: String,
}

/// An image as it is stored.
pub(crate) struct ImageRow {
    pub(crate) id: String,
    pub(crate) manifest: Vec<u8>,
    pub(crate) config: Vec<u8>,
    pub(crate) size: u64,
    pub(crate) mend: Option<Mend>,
    pub(crate) hidden: bool,
    pub(crate) names: Vec<String>,
    pub(crate) stack: Vec<Digest>,
}

/// The directory that corrects what implied directories look like in one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mend {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

/// A layer as it is stored.
#[derive(Debug, Clone)]
pub(crate) struct LayerRow {
    pub(crate) diff_id: Digest,
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// Directories that entries imply but that the layer does not list, NUL between them.
    pub(crate) implied: Vec<u8>,
    /// Whether its data is known to be on the disk, or at least in this boot's page cache.
    pub(crate) trusted: bool,
}

impl Db {
    fn open(path: &Path) -> Result<Db> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(std::time::Duration::from_secs(10))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "cache_size", -512)?;
        connection.execute_batch(SCHEMA)?;
        let boot =
            std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
        Ok(Db { connection, pins: HashMap::new(), boot })
    }

    /// One transaction that survives a power cut once it returned.
    pub(crate) fn durable<T>(&mut self, work: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        let transaction =
            self.connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let value = work(&transaction)?;
        transaction.commit()?;
        Ok(value)
    }

    /// One transaction that survives our death, but perhaps not a power cut: no fsync.
    pub(crate) fn quick<T>(&mut self, work: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        self.connection.pragma_update(None, "synchronous", "NORMAL")?;
        let value = self.durable(work);
        self.connection.pragma_update(None, "synchronous", "FULL")?;
        value
    }

    /// The boot that unsynced layers are marked with.
    pub(crate) fn boot(&self) -> String {
        self.boot.clone()
    }

    /// Keeps layers from being collected.
    pub(crate) fn pin(&mut self, diff_ids: &[Digest]) {
        for diff_id in diff_ids {
            *self.pins.entry(*diff_id).or_default() += 1;
        }
    }

    /// Undoes one [`Db::pin`].
    pub(crate) fn unpin(&mut self, diff_ids: &[Digest]) {
        for diff_id in diff_ids {
            if let Some(count) = self.pins.get_mut(diff_id) {
                *count -= 1;
                if *count == 0 {
                    self.pins.remove(diff_id);
                }
            }
        }
    }

    /// All images. A row that cannot be read is reported and left alone.
    pub(crate) fn images(&mut self) -> Result<Vec<ImageRow>> {
        let mut statement = self.connection.prepare(
            "SELECT id, manifest, config, size, mend, mend_bytes, mend_inodes, hidden FROM image_image",
        )?;
        let mut images: Vec<ImageRow> = statement
            .query_map([], |row| {
                let mend = row.get::<_, Option<String>>(4)?;
                let (bytes, inodes) = (row.get::<_, i64>(5)?, row.get::<_, i64>(6)?);
                Ok(ImageRow {
                    id: row.get(0)?,
                    manifest: row.get(1)?,
                    config: row.get(2)?,
                    size: row.get::<_, i64>(3)?.max(0).cast_unsigned(),
                    mend: mend.map(|name| Mend {
                        name,
                        bytes: bytes.max(0).cast_unsigned(),
                        inodes: inodes.max(0).cast_unsigned(),
                    }),
                    hidden: row.get::<_, i64>(7)? != 0,
                    names: Vec::new(),
                    stack: Vec::new(),
                })
            })?
            .filter_map(|row| {
                row.inspect_err(|error| tracing::error!(%error, "an image row is unreadable")).ok()
            })
            .collect();
        drop(statement);
        let mut names =
            self.connection.prepare("SELECT name FROM image_name WHERE image = ?1 ORDER BY name")?;
        let mut stack =
            self.connection.prepare("SELECT diff_id FROM image_stack WHERE image = ?1 ORDER BY position")?;
        for image in &mut images {
            image.names = names.query_map([&image.id], |row| row.get(0))?.collect::<Result<_, _>>()?;
            let digests: Vec<String> =
                stack.query_map([&image.id], |row| row.get(0))?.collect::<Result<_, _>>()?;
            image.stack = digests.iter().map(|digest| digest.parse()).collect::<Result<_>>()?;
        }
        Ok(images)
    }

    /// All layers.
    pub(crate) fn layers(&mut self) -> Result<Vec<LayerRow>> {
        let boot = self.boot.clone();
        let mut statement =
            self.connection.prepare("SELECT diff_id, bytes, inodes, implied, boot FROM image_layer")?;
        let rows = statement.query_map([], |row| layer_row(row, &boot))?;
        Ok(rows
            .filter_map(|row| {
                row.inspect_err(|error| tracing::error!(%error, "a layer row is unreadable")).ok()
            })
            .flatten()
            .collect())
    }

    /// One layer.
    pub(crate) fn layer(&mut self, diff_id: &Digest) -> Result<Option<LayerRow>> {
        let boot = self.boot.clone();
        let mut statement = self
            .connection
            .prepare("SELECT diff_id, bytes, inodes, implied, boot FROM image_layer WHERE diff_id = ?1")?;
        Ok(statement.query_row([diff_id.to_string()], |row| layer_row(row, &boot)).optional()?.flatten())
    }

    /// All snapshots: key and image.
    pub(crate) fn snapshots(&mut self) -> Result<Vec<(String, String)>> {
        let mut statement = self.connection.prepare("SELECT key, image FROM image_snapshot")?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Forgets hidden images that no snapshot uses and layers that no image and no pull uses. Returns the directory
    /// names that the caller must remove: the rows are gone first, so a crash leaves garbage and never a lie.
    pub(crate) fn collect(&mut self) -> Result<Vec<String>> {
        let pins = std::mem::take(&mut self.pins);
        let garbage = self.durable(|transaction| {
            let mut garbage = Vec::new();
            let unused = "hidden = 1 AND id NOT IN (SELECT image FROM image_snapshot UNION SELECT image FROM image_view)";
            let mut mends =
                transaction.prepare(&format!("SELECT id, mend FROM image_image WHERE {unused}"))?;
            let images: Vec<(String, Option<String>)> =
                mends.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_, _>>()?;
            for (id, mend) in images {
                transaction.execute("DELETE FROM image_stack WHERE image = ?1", [&id])?;
                transaction.execute("DELETE FROM image_name WHERE image = ?1", [&id])?;
                transaction.execute("DELETE FROM image_image WHERE id = ?1", [&id])?;
                garbage.extend(mend);
            }
            let mut layers = transaction.prepare(
                "SELECT diff_id FROM image_layer WHERE diff_id NOT IN (SELECT diff_id FROM image_stack)",
            )?;
            let unused: Vec<String> = layers.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
            for text in unused {
                match text.parse::<Digest>() {
                    Ok(diff_id) if pins.contains_key(&diff_id) => continue,
                    Ok(diff_id) => garbage.push(diff_id.file_name()),
                    Err(_) => {}
                }
                transaction.execute("DELETE FROM image_layer WHERE diff_id = ?1", [&text])?;
            }
            Ok(garbage)
        });
        self.pins = pins;
        garbage
    }
}

/// A layer is written when it was unpacked, before anything synced it.
pub(crate) fn put_layer(transaction: &Transaction<'_>, layer: &LayerRow, boot: &str) -> Result<()> {
    transaction.execute(
        "INSERT OR REPLACE INTO image_layer (diff_id, bytes, inodes, implied, boot) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![
            layer.diff_id.to_string(),
            layer.bytes.cast_signed(),
            layer.inodes.cast_signed(),
            layer.implied,
            boot
        ],
    )?;
    Ok(())
}

/// An image is written when all of its files are on the disk: its layers count as synced from here on. Names move
/// to it from whatever image had them.
pub(crate) fn put_image(transaction: &Transaction<'_>, image: &ImageRow) -> Result<()> {
    let mend = image.mend.as_ref();
    transaction.execute(
        "INSERT INTO image_image (id, manifest, config, size, mend, mend_bytes, mend_inodes, hidden)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 0)
         ON CONFLICT (id) DO UPDATE SET manifest = ?2, config = ?3, size = ?4, mend = ?5, mend_bytes = ?6,
             mend_inodes = ?7, hidden = 0",
        params![
            image.id,
            image.manifest,
            image.config,
            image.size.cast_signed(),
            mend.map(|mend| &mend.name),
            mend.map_or(0, |mend| mend.bytes.cast_signed()),
            mend.map_or(0, |mend| mend.inodes.cast_signed()),
        ],
    )?;
    transaction.execute("DELETE FROM image_stack WHERE image = ?1", [&image.id])?;
    for (position, diff_id) in (0i64..).zip(&image.stack) {
        let diff_id = diff_id.to_string();
        transaction.execute(
            "INSERT INTO image_stack (image, position, diff_id) VALUES (?1, ?2, ?3)",
            params![image.id, position, diff_id],
        )?;
        transaction.execute("UPDATE image_layer SET boot = NULL WHERE diff_id = ?1", [diff_id])?;
    }
    for name in &image.names {
        transaction
            .execute("INSERT OR REPLACE INTO image_name (name, image) VALUES (?1, ?2)", [name, &image.id])?;
    }
    Ok(())
}

fn layer_row(row: &rusqlite::Row<'_>, boot: &str) -> rusqlite::Result<Option<LayerRow>> {
    let text: String = row.get(0)?;
    let Ok(diff_id) = text.parse() else { return Ok(None) };
    let unsynced: Option<String> = row.get(4)?;
    Ok(Some(LayerRow {
        diff_id,
        bytes: row.get::<_, i64>(1)?.max(0).cast_unsigned(),
        inodes: row.get::<_, i64>(2)?.max(0).cast_unsigned(),
        implied: row.get(3)?,
        trusted: unsynced.is_none_or(|unsynced| !boot.is_empty() && unsynced == boot),
    }))
}

//! What survives the death of the daemon: pods, containers and network attachments, in SQLite. Keeps rows whole
//! and finds damaged ones; what is in a row is the business of the one who wrote it.
//!
//! One thread writes. It takes all that waits into one transaction, so that many pods at once cost one commit.
//! WAL with `synchronous=NORMAL` outlives kill -9; after a power cut the last rows may be missing, and so are the
//! processes they spoke of.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, SystemTime},
};

use rusqlite::{Connection, ErrorCode, params};
use tokio::sync::oneshot;
use tracing::error;

/// The database.
#[derive(Clone)]
pub struct Store {
    jobs: mpsc::Sender<Job>,
}

/// What a row is about; one table each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Pod,
    Container,
    /// Of a pod to its network, from before the attempt until it is undone.
    Attachment,
}

/// One object: what a client asked for, and how far it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub kind: Kind,
    pub id: String,
    /// Protobuf, as in CRI.
    pub config: Vec<u8>,
    /// JSON.
    pub state: Vec<u8>,
}

/// One change.
#[derive(Clone, Debug)]
pub enum Change {
    Put(Row),
    Drop(Kind, String),
    /// Set a row aside that nobody can understand.
    Quarantine(Kind, String, String),
}

/// Why something could not be kept.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("open {0}: {1}")]
    Open(PathBuf, Arc<rusqlite::Error>),
    #[error("set aside the damaged {0}: {1}")]
    Aside(PathBuf, Arc<std::io::Error>),
    #[error("start the writer: {0}")]
    Writer(Arc<std::io::Error>),
    #[error("read: {0}")]
    Read(Arc<rusqlite::Error>),
    #[error("write: {0}")]
    Write(Arc<rusqlite::Error>),
    #[error("the writer is gone")]
    Gone,
}

/// Version of the rows. A row of another version is quarantined, not guessed at.
const VERSION: i64 = 1;
/// So many changes at most share a transaction.
const BATCH: usize = 128;

struct Job {
    changes: Vec<Change>,
    done: Option<oneshot::Sender<Result<(), Error>>>,
}

impl Kind {
    const ALL: [Kind; 3] = [Kind::Pod, Kind::Container, Kind::Attachment];

    fn table(self) -> &'static str {
        match self {
            Kind::Pod => "pods",
            Kind::Container => "containers",
            Kind::Attachment => "attachments",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.table())
    }
}

impl Store {
    /// Opens or makes the database and reads every good row. A damaged row moves to table `quarantine`; a file that
    /// is no database is set aside under another name. Nothing is deleted.
    pub fn open(path: &Path) -> Result<(Store, Vec<Row>), Error> {
        let mut connection = match connect(path) {
            Err(Error::Open(_, why)) if damaged(&why) => {
                aside(path)?;
                connect(path)?
            }
            other => other?,
        };
        let rows = load(&mut connection)?;
        let (jobs, inbox) = mpsc::channel();
        thread::Builder::new()
            .name("store".into())
            .spawn(move || write(connection, &inbox))
            .map_err(|e| Error::Writer(Arc::new(e)))?;
        Ok((Store { jobs }, rows))
    }

    /// Returns when the changes are kept, all or none of them.
    pub async fn apply(&self, changes: Vec<Change>) -> Result<(), Error> {
        let (done, outcome) = oneshot::channel();
        self.jobs.send(Job { changes, done: Some(done) }).map_err(|_| Error::Gone)?;
        outcome.await.map_err(|_| Error::Gone)?
    }

    /// As [`Store::apply`] for what ends an object: it is ended whether or not there is space to write so, and a new
    /// daemon that reads the old row ends it again.
    pub async fn forget(&self, changes: Vec<Change>) {
        if let Err(e) = self.apply(changes).await {
            error!(error = %e, "an ending could not be kept: a new daemon will repeat it");
        }
    }

    pub async fn put(&self, row: Row) -> Result<(), Error> {
        self.apply(vec![Change::Put(row)]).await
    }

    /// Keeps a row soon, in order with the other changes. For what can also be read from the run directory.
    pub fn put_later(&self, row: Row) {
        // A writer that is gone has said so, and the next call that must be kept fails by it.
        let _ = self.jobs.send(Job { changes: vec![Change::Put(row)], done: None });
    }
}

fn connect(path: &Path) -> Result<Connection, Error> {
    let open = || -> rusqlite::Result<Connection> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(Duration::from_secs(10))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        connection.pragma_update(None, "cache_size", -512)?;
        for kind in Kind::ALL {
            connection.execute_batch(&format!(
                "CREATE TABLE IF NOT EXISTS {kind} (id TEXT PRIMARY KEY, version INTEGER NOT NULL,
                 config BLOB NOT NULL, state BLOB NOT NULL, sum INTEGER NOT NULL)"
            ))?;
        }
        connection.execute_batch(
            "CREATE TABLE IF NOT EXISTS quarantine (kind TEXT, id TEXT, version, config, state, sum,
             why TEXT, at INTEGER)",
        )?;
        Ok(connection)
    };
    open().map_err(|e| Error::Open(path.into(), Arc::new(e)))
}

fn damaged(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt))
}

fn aside(path: &Path) -> Result<(), Error> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    for suffix in ["", "-wal", "-shm"] {
        let from = PathBuf::from(format!("{}{suffix}", path.display()));
        let to = PathBuf::from(format!("{}.damaged-{now}{suffix}", path.display()));
        match std::fs::rename(&from, &to) {
            Ok(()) => {
                error!(from = %from.display(), to = %to.display(), "database is damaged: set aside, beginning anew")
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::Aside(from, Arc::new(e))),
        }
    }
    Ok(())
}

fn load(connection: &mut Connection) -> Result<Vec<Row>, Error> {
    let read = |e| Error::Read(Arc::new(e));
    let mut rows = Vec::new();
    for kind in Kind::ALL {
        let mut bad = Vec::new();
        {
            // The row id finds a row also when its own id is what is damaged.
            let sql = format!("SELECT rowid, id, version, config, state, sum FROM {kind}");
            let mut statement = connection.prepare(&sql).map_err(read)?;
            let mut found = statement.query([]).map_err(read)?;
            while let Some(row) = found.next().map_err(read)? {
                let rowid: i64 = row.get(0).map_err(read)?;
                match whole(kind, row) {
                    Ok(row) => rows.push(row),
                    Err(why) => bad.push((rowid, why)),
                }
            }
        }
        for (rowid, why) in bad {
            error!(table = %kind, rowid, why, "record is damaged: quarantined");
            quarantine(connection, kind, "rowid", rowid, &why).map_err(|e| Error::Write(Arc::new(e)))?;
        }
    }
    Ok(rows)
}

fn whole(kind: Kind, row: &rusqlite::Row<'_>) -> Result<Row, String> {
    let read = || -> rusqlite::Result<(i64, i64, Row)> {
        let content = Row { kind, id: row.get(1)?, config: row.get(3)?, state: row.get(4)? };
        Ok((row.get(2)?, row.get(5)?, content))
    };
    let (version, sum, row) = read().map_err(|e| e.to_string())?;
    match () {
        () if version != VERSION => Err(format!("version {version} is not known")),
        () if sum != checksum(&row) => Err("content does not match its checksum".into()),
        () => Ok(row),
    }
}

fn write(mut connection: Connection, inbox: &mpsc::Receiver<Job>) {
    while let Ok(first) = inbox.recv() {
        let mut jobs = vec![first];
        jobs.extend(inbox.try_iter().take(BATCH));
        let result = commit(&mut connection, &jobs).map_err(|e| Error::Write(Arc::new(e)));
        for job in jobs {
            match (job.done, &result) {
                // The one who asked may have gone away.
                (Some(done), _) => drop(done.send(result.clone())),
                (None, Err(e)) => error!(error = %e, "state could not be kept"),
                (None, Ok(())) => {}
            }
        }
    }
}

fn commit(connection: &mut Connection, jobs: &[Job]) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    for change in jobs.iter().flat_map(|job| &job.changes) {
        match change {
            Change::Put(row) => {
                let table = row.kind;
                let sql = format!(
                    "INSERT OR REPLACE INTO {table} (id, version, config, state, sum) VALUES (?1, ?2, ?3, ?4, ?5)"
                );
                transaction.prepare(&sql)?.execute(params![
                    row.id,
                    VERSION,
                    row.config,
                    row.state,
                    checksum(row)
                ])?;
            }
            Change::Drop(kind, id) => {
                transaction.prepare(&format!("DELETE FROM {kind} WHERE id = ?1"))?.execute([id])?;
            }
            Change::Quarantine(kind, id, why) => quarantine(&transaction, *kind, "id", id, why)?,
        }
    }
    transaction.commit()
}

fn quarantine(
    connection: &Connection,
    kind: Kind,
    column: &str,
    value: impl rusqlite::ToSql,
    why: &str,
) -> rusqlite::Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    connection.execute(
        &format!(
            "INSERT INTO quarantine SELECT ?2, id, version, config, state, sum, ?3, ?4 FROM {kind} WHERE {column} = ?1"
        ),
        params![value, kind.table(), why, i64::try_from(now).unwrap_or(i64::MAX)],
    )?;
    connection.execute(&format!("DELETE FROM {kind} WHERE {column} = ?1"), params![value])?;
    Ok(())
}

/// FNV-1a over all parts and their lengths: finds damage, is no defence against malice.
fn checksum(row: &Row) -> i64 {
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    let mut eat = |byte: u8| sum = (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    for part in [row.kind.table().as_bytes(), row.id.as_bytes(), &row.config, &row.state] {
        part.len().to_le_bytes().into_iter().for_each(&mut eat);
        part.iter().copied().for_each(&mut eat);
    }
    sum.cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str) -> Row {
        Row { kind: Kind::Pod, id: id.into(), config: vec![0, 255, 1], state: b"{}".to_vec() }
    }

    fn reopened(path: &Path) -> Vec<Row> {
        Store::open(path).unwrap().1
    }

    #[tokio::test]
    async fn rows_come_back_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("crisp.db");
        let (store, rows) = Store::open(&path).unwrap();
        assert!(rows.is_empty());
        let attachment = Row { kind: Kind::Attachment, ..row("a") };
        store
            .apply(vec![Change::Put(row("a")), Change::Put(row("b")), Change::Put(attachment.clone())])
            .await
            .unwrap();
        store.forget(vec![Change::Drop(Kind::Pod, "b".into())]).await;
        store.put_later(row("c"));
        store.put(row("d")).await.unwrap();
        assert_eq!(reopened(&path), [row("a"), row("c"), row("d"), attachment]);
    }

    #[tokio::test]
    async fn one_damaged_row_is_quarantined_and_the_others_are_served() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("crisp.db");
        let (store, _) = Store::open(&path).unwrap();
        store.apply(vec![Change::Put(row("a")), Change::Put(row("b")), Change::Put(row("c"))]).await.unwrap();
        let other = Connection::open(&path).unwrap();
        other.execute("UPDATE pods SET config = x'00ff02' WHERE id = 'a'", []).unwrap();
        other.execute("UPDATE pods SET version = 7 WHERE id = 'b'", []).unwrap();
        assert_eq!(reopened(&path), [row("c")]);
        let kept: i64 = other.query_row("SELECT count(*) FROM quarantine", [], |row| row.get(0)).unwrap();
        assert_eq!(kept, 2);
        assert_eq!(reopened(&path), [row("c")]);
    }

    #[tokio::test]
    async fn a_row_that_its_reader_cannot_understand_can_be_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("crisp.db");
        let (store, _) = Store::open(&path).unwrap();
        store.put(row("a")).await.unwrap();
        store.apply(vec![Change::Quarantine(Kind::Pod, "a".into(), "not a pod".into())]).await.unwrap();
        assert!(reopened(&path).is_empty());
    }

    #[test]
    fn a_file_that_is_no_database_is_set_aside_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("crisp.db");
        std::fs::write(&path, vec![7_u8; 8192]).unwrap();
        assert!(reopened(&path).is_empty());
        let names: Vec<String> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        assert!(names.iter().any(|name| name.starts_with("crisp.db.damaged-")), "{names:?}");
    }

    #[test]
    fn every_part_of_a_row_counts_for_its_checksum() {
        let sum = checksum(&row("a"));
        for other in [
            row("b"),
            Row { kind: Kind::Container, ..row("a") },
            Row { config: vec![0, 255], ..row("a") },
            Row { state: b"{} ".to_vec(), ..row("a") },
            Row { config: vec![0, 255, 1, b'{'], state: b"}".to_vec(), ..row("a") },
        ] {
            assert_ne!(checksum(&other), sum, "{other:?}");
        }
    }
}

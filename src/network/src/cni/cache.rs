//! Remembers what was asked of which network for which pod, and what came of it, so that DEL is told the same as
//! ADD was, whatever became of the configuration since. One file per attachment, written by rename.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::conf::NetworkList;
use crate::attachment::Attachment;
use crate::error::Error;

/// One attachment of one pod to one network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) attachment: Attachment,
    pub(crate) interface: String,
    pub(crate) ranges: Vec<String>,
    pub(crate) network: NetworkList,
    /// Absent while ADD has not succeeded.
    pub(crate) result: Option<Value>,
}

/// The directory of all entries: one directory per pod in it.
#[derive(Clone, Debug)]
pub(crate) struct Cache(pub(crate) PathBuf);

impl Cache {
    pub(crate) fn write(&self, entry: &Entry) -> Result<(), Error> {
        let dir = self.0.join(&entry.attachment.pod_id);
        let failed = |cause| Error::Record { act: "write", path: dir.clone(), cause };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed)?;
        let path = self.path(entry);
        let temporary = path.with_extension("new");
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(failed)?;
        let text = serde_json::to_vec(entry).map_err(|e| failed(e.into()))?;
        file.write_all(&text).map_err(failed)?;
        fs::rename(&temporary, &path).map_err(failed)
    }

    /// The entries of one pod, in the order of their interfaces. One that cannot be read is an error: to forget
    /// it would be to leak what it stands for.
    pub(crate) fn of(&self, pod: &str) -> Result<Vec<Entry>, Error> {
        let dir = self.0.join(pod);
        let mut paths = match list(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(cause) => return Err(Error::Record { act: "read", path: dir, cause }),
            Ok(paths) => paths,
        };
        paths.retain(|path| path.extension().is_some_and(|e| e == "json"));
        paths.sort();
        paths.into_iter().map(|path| read(&path)).collect()
    }

    /// The pods that have entries.
    pub(crate) fn pods(&self) -> Result<Vec<String>, Error> {
        let found = match list(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(cause) => return Err(Error::Record { act: "read", path: self.0.clone(), cause }),
            Ok(found) => found,
        };
        Ok(found.iter().filter_map(|p| p.file_name()?.to_str().map(str::to_owned)).collect())
    }

    pub(crate) fn forget(&self, entry: &Entry) -> Result<(), Error> {
        let path = self.path(entry);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(Error::Record { act: "remove", path, cause: e })
            }
            _ => Ok(()),
        }
    }

    /// Removes the pod's directory, which has no entries any more.
    pub(crate) fn close(&self, pod: &str) -> Result<(), Error> {
        let dir = self.0.join(pod);
        for path in list(&dir).unwrap_or_default() {
            // A write that was cut short.
            if path.extension().is_some_and(|e| e == "new") {
                let _ = fs::remove_file(path);
            }
        }
        match fs::remove_dir(&dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(Error::Record { act: "remove", path: dir, cause: e })
            }
            _ => Ok(()),
        }
    }

    fn path(&self, entry: &Entry) -> PathBuf {
        let name = format!("{}@{}.json", entry.interface, entry.network.name);
        self.0.join(&entry.attachment.pod_id).join(name)
    }
}

fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(dir)?.map(|entry| entry.map(|e| e.path())).collect()
}

fn read(path: &Path) -> Result<Entry, Error> {
    let failed = |cause| Error::Record { act: "read", path: path.to_owned(), cause };
    let text = fs::read(path).map_err(failed)?;
    serde_json::from_slice(&text).map_err(|e| failed(e.into()))
}

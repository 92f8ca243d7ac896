//! Where an image comes from: a registry, or a directory on this machine. Two cases, so an enum.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use bytes::Bytes;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use tokio::io::AsyncReadExt as _;

use super::Top;
use crate::digest::Digest;
use crate::error::{Error, Result, io, sys};
use crate::images::blocking;
use crate::manifest::{self, Descriptor, Document};
use crate::registry::{Download, Session};
use crate::tree::DIRECTORY;

pub(super) enum Source {
    Registry(Box<Session>),
    /// An OCI image layout.
    Layout(OwnedFd),
}

/// A blob on its way from either.
pub(super) enum Blob<'a> {
    Registry(Box<Download<'a>>),
    Layout(tokio::fs::File),
}

impl Source {
    /// Opens a layout and reads its index.
    pub(super) fn layout(path: &Path) -> Result<(Source, Vec<Descriptor>)> {
        let what = format!("image layout {}", path.display());
        let directory =
            rustix::fs::open(path, DIRECTORY - OFlags::NOFOLLOW, Mode::empty()).map_err(sys(&what))?;
        let index = read(&directory, "index.json", &what)?;
        match manifest::parse(&what, &index, None)? {
            Document::Index(entries) => Ok((Source::Layout(directory), entries)),
            Document::Manifest(_) => Err(Error::Manifest { what, why: "its index.json is no index".into() }),
        }
    }

    /// A manifest or index, checked against its digest if that is known.
    pub(super) async fn manifest(&self, selector: &str, wanted: Option<Digest>) -> Result<Top> {
        match (self, wanted) {
            (Source::Registry(session), wanted) => {
                let fetched = session.manifest(selector, wanted).await?;
                Ok(Top { body: fetched.body, content_type: fetched.content_type, digest: fetched.digest })
            }
            (Source::Layout(_), Some(digest)) => {
                Ok(Top { body: self.blob(digest).await?, content_type: None, digest })
            }
            (Source::Layout(_), None) => Err(Error::NotFound(selector.to_owned())),
        }
    }

    /// A small blob, checked.
    pub(super) async fn blob(&self, digest: Digest) -> Result<Bytes> {
        match self {
            Source::Registry(session) => session.blob(digest).await,
            Source::Layout(directory) => {
                let directory = directory.try_clone().map_err(io("read an image layout"))?;
                blocking(move || {
                    let body = read(&directory, &path_of(&digest), &digest.to_string())?;
                    digest.check(&body).map_err(|actual| Error::Digest {
                        what: "image layout".into(),
                        expected: digest.to_string(),
                        actual: actual.to_string(),
                    })?;
                    Ok(body.into())
                })
                .await
            }
        }
    }

    /// A layer's bytes, unchecked.
    pub(super) fn open(&self, descriptor: &Descriptor) -> Result<Blob<'_>> {
        match self {
            Source::Registry(session) => {
                Ok(Blob::Registry(Box::new(session.download(descriptor.digest, descriptor.size))))
            }
            Source::Layout(directory) => {
                let file = open(directory, &path_of(&descriptor.digest), &descriptor.digest.to_string())?;
                Ok(Blob::Layout(tokio::fs::File::from_std(file)))
            }
        }
    }
}

impl Blob<'_> {
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>> {
        match self {
            Blob::Registry(download) => download.next().await,
            Blob::Layout(file) => {
                let mut chunk = bytes::BytesMut::with_capacity(256 << 10);
                let length = file.read_buf(&mut chunk).await.map_err(io("read an image layout"))?;
                Ok((length > 0).then(|| chunk.freeze()))
            }
        }
    }

    /// After bytes that were wrong: whether there is someone else to ask, from the start.
    pub(super) fn elsewhere(&mut self) -> bool {
        match self {
            Blob::Registry(download) => download.elsewhere(),
            Blob::Layout(_) => false,
        }
    }
}

fn path_of(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

/// Opens a regular file inside a layout, wherever its links point to inside of it.
fn open(directory: &OwnedFd, path: &str, what: &str) -> Result<std::fs::File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match openat2(directory, path, flags, Mode::empty(), ResolveFlags::BENEATH) {
        Err(rustix::io::Errno::NOENT) => return Err(Error::NotFound(what.to_owned())),
        other => other.map_err(sys(format!("open {path} of an image layout")))?,
    };
    let stat = fstat(&file).map_err(sys(format!("open {path} of an image layout")))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Error::NotFound(what.to_owned()));
    }
    Ok(file.into())
}

fn read(directory: &OwnedFd, path: &str, what: &str) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    let file = open(directory, path, what)?;
    file.take(manifest::MAX_DOCUMENT + 1).read_to_end(&mut body).map_err(io(format!("read {path}")))?;
    if body.len() as u64 > manifest::MAX_DOCUMENT { Err(manifest::too_long(what)) } else { Ok(body) }
}

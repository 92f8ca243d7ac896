//! The child's side: confine first, then read. Says one line on stdout, whatever happens.

use std::{ffi::OsString, io, io::Write, path::Path};

use rustix::fs::{Mode, OFlags};

use super::{
    Compression, MOST_REPLY, Reply, confine,
    decompress::{self, Archive},
    extract::{self, Extractor},
    raw,
};
use crate::digest::Hasher;

/// Runs the hidden command `unpack <compression> <algorithm> <directory>`; returns the exit status.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> i32 {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let [compression, algorithm, directory] = arguments.as_slice() else { return 64 };
    let Some(compression) = compression.to_str().and_then(Compression::of) else { return 64 };
    let Some(hasher) = algorithm.to_str().and_then(Hasher::named) else { return 64 };
    let confined = raw::close_inherited()
        .and_then(|()| confine::to(Path::new(directory)))
        .and_then(|()| raw::file_system_only());
    let reply = match confined {
        Ok(()) => unpack(compression, hasher),
        Err(error) => Reply::Host(format!("confine the unpack helper to its directory: {error}")),
    };
    let status = i32::from(!matches!(reply, Reply::Unpacked(_)));
    match say(reply) {
        Ok(()) => status,
        Err(_) => 74,
    }
}

fn say(mut reply: Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(&reply)?;
    if line.len() as u64 >= MOST_REPLY {
        if let Reply::Unpacked(unpacked) = &mut reply {
            unpacked.implied.clear();
        }
        line = serde_json::to_vec(&reply)?;
    }
    io::stdout().lock().write_all(&line)
}

fn unpack(compression: Compression, hasher: Hasher) -> Reply {
    rustix::process::umask(Mode::empty());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = match rustix::fs::openat(rustix::fs::CWD, "/", flags, Mode::empty()) {
        Ok(root) => root,
        Err(error) => return Reply::Host(format!("open the layer's directory: {error}")),
    };
    let archive =
        Archive::of(io::stdin(), compression, hasher).map_err(|error| Reply::Host(error.to_string()));
    let mut archive = match archive {
        Ok(archive) => archive,
        Err(reply) => return reply,
    };
    let mut extractor = Extractor::new(root);
    if let Err(error) = extractor.run(&mut archive) {
        return failed(error);
    }
    match archive.digest() {
        Ok(diff_id) => Reply::Unpacked(extractor.unpacked(diff_id)),
        Err(error) => failed(extract::Error::Read(error)),
    }
}

fn failed(error: extract::Error) -> Reply {
    let text = error.to_string();
    match error {
        extract::Error::Read(source) if source.kind() == decompress::BOMB => Reply::Exhausted(text),
        extract::Error::TooMany(_) | extract::Error::TooMuch(_) => Reply::Exhausted(text),
        extract::Error::Host { source, .. } if is_full(source) => Reply::NoSpace(text),
        extract::Error::Host { .. } => Reply::Host(text),
        extract::Error::Read(_) | extract::Error::Archive(_) | extract::Error::Entry { .. } => {
            Reply::Malformed(text)
        }
    }
}

fn is_full(error: rustix::io::Errno) -> bool {
    matches!(error, rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT)
}

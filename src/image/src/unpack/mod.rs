//! Unpacks layers, each in a disposable child: this side starts the child, feeds it and believes nothing but the
//! sizes and the digest it reports. What a layer may contain is `extract`'s business, what the child may do
//! `confine`'s. Which layers make an image is left to pull.
//!
//! The child gets three descriptors: the compressed stream as stdin, the reply as stdout, the log as stderr. The
//! reply is one line of JSON.

use std::{ffi::OsString, io, path::Path, path::PathBuf, process::Stdio, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{
    io::AsyncReadExt,
    process::{Child, ChildStdin, ChildStdout, Command},
};

mod confine;
mod decompress;
mod extract;
#[cfg(fuzzing)]
pub(crate) mod fuzz;
mod helper;
mod raw;

pub use helper::main;

/// The longest reply: [`Unpacked::implied`] is cut to fit.
const MOST_REPLY: u64 = 4 << 20;

/// The longest file of a layer, holes included.
const MOST_FILE: u64 = 1 << 40;

/// How a layer's bytes are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// A tar archive as it is.
    Plain,
    /// RFC 1952, any number of members.
    Gzip,
    /// RFC 8878, any number of frames, windows up to 128 MiB.
    Zstd,
}

impl Compression {
    fn name(self) -> &'static str {
        match self {
            Compression::Plain => "plain",
            Compression::Gzip => "gzip",
            Compression::Zstd => "zstd",
        }
    }

    /// Tells by the first four bytes, as every runtime does: media types in the wild are wrong too often.
    pub fn sniff(magic: &[u8]) -> Compression {
        match magic {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            // A frame, or a skippable one before it (RFC 8878, section 3.1).
            [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Compression::Zstd,
            _ => Compression::Plain,
        }
    }

    fn of(name: &str) -> Option<Compression> {
        [Compression::Plain, Compression::Gzip, Compression::Zstd].into_iter().find(|c| c.name() == name)
    }
}

/// Starts children.
#[derive(Clone, Debug)]
pub struct Unpacker {
    /// The program and its first arguments; ours follow.
    argv: Vec<OsString>,
}

/// A child at work.
#[derive(Debug)]
pub struct Unpacking {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
}

/// What became of a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unpacked {
    /// Digest of the uncompressed archive, by the algorithm that was asked for.
    pub diff_id: String,
    /// Whether the layer says how the root itself looks.
    pub root: bool,
    /// Bytes allocated on the file system.
    pub bytes: u64,
    /// Files, directories and everything else.
    pub inodes: u64,
    /// Directories that the layer implies but does not list, relative to its root. They were made root:root 0755
    /// and take their attributes from the layers below, if those have them.
    pub implied: Vec<PathBuf>,
}

/// Why a layer was not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The child could not be started.
    #[error("start the unpack helper: {0}")]
    Start(#[source] io::Error),
    /// The archive breaks its format, or wants something that no layer may have.
    #[error("{0}")]
    Malformed(String),
    /// The layer is out of all proportion.
    #[error("{0}")]
    Exhausted(String),
    /// The file system is full.
    #[error("{0}")]
    NoSpace(String),
    /// A system call failed for a reason of the host.
    #[error("{0}")]
    Host(String),
    /// The child ended without a word, by a limit or a signal.
    #[error("the unpack helper ended without an answer ({0})")]
    Died(String),
    /// The child did not end in time.
    #[error("the unpack helper did not end within {0:?}")]
    Deadline(Duration),
}

/// The one line that the child says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    Unpacked(Unpacked),
    Malformed(String),
    Exhausted(String),
    NoSpace(String),
    Host(String),
}

impl Unpacker {
    /// `argv` is a program that calls [`main`] with the arguments behind these.
    pub fn new(argv: Vec<OsString>) -> Unpacker {
        Unpacker { argv }
    }

    /// A child that unpacks into `directory`, which exists and is empty, and hashes the archive with `algorithm`,
    /// `sha256` or `sha512`. It is killed when the value is dropped.
    pub fn start(
        &self,
        directory: &Path,
        compression: Compression,
        algorithm: &str,
    ) -> Result<Unpacking, Error> {
        let Some((program, arguments)) = self.argv.split_first() else {
            return Err(Error::Start(io::ErrorKind::InvalidInput.into()));
        };
        let mut child = Command::new(program)
            .args(arguments)
            .arg(compression.name())
            .arg(algorithm)
            .arg(directory)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(Error::Start)?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let stdout = stdout.ok_or_else(|| Error::Start(io::ErrorKind::BrokenPipe.into()))?;
        Ok(Unpacking { child, stdin, stdout })
    }
}

impl Unpacking {
    /// Where the compressed bytes go. A broken pipe means that the child has given up: [`Unpacking::finish`] says why.
    pub fn stdin(&mut self) -> Option<&mut ChildStdin> {
        self.stdin.as_mut()
    }

    /// Ends the input and waits for the child's word.
    pub async fn finish(mut self, deadline: Duration) -> Result<Unpacked, Error> {
        drop(self.stdin.take());
        let word = async {
            let mut reply = Vec::new();
            let _ = (&mut self.stdout).take(MOST_REPLY).read_to_end(&mut reply).await;
            let status = self.child.wait().await;
            (reply, status)
        };
        let Ok((reply, status)) = tokio::time::timeout(deadline, word).await else {
            return Err(Error::Deadline(deadline));
        };
        match serde_json::from_slice(&reply) {
            Ok(Reply::Unpacked(unpacked)) => Ok(unpacked),
            Ok(Reply::Malformed(why)) => Err(Error::Malformed(why)),
            Ok(Reply::Exhausted(why)) => Err(Error::Exhausted(why)),
            Ok(Reply::NoSpace(why)) => Err(Error::NoSpace(why)),
            Ok(Reply::Host(why)) => Err(Error::Host(why)),
            Err(_) => Err(Error::Died(status.map_or_else(|e| e.to_string(), |s| s.to_string()))),
        }
    }
}

//! What can go wrong between a reference and its directories. One variant per step; the daemon maps them to
//! gRPC codes at its door.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// An error of this library. Cheap to clone, because everyone who joined a pull gets the same answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The name is not an image reference.
    #[error("invalid image reference {reference:?}: {why}")]
    InvalidReference {
        /// What was given.
        reference: String,
        /// Which rule it breaks.
        why: &'static str,
    },
    /// A digest is malformed or uses an algorithm we do not take.
    #[error("invalid digest {0:?}")]
    InvalidDigest(String),
    /// An argument other than a reference is unusable: credentials that do not decode, a snapshot key with a slash.
    #[error("invalid argument: {0}")]
    InvalidArgument(String),
    /// No registry that was asked has it, or no image of that name is here.
    #[error("{0}: not found")]
    NotFound(String),
    /// The registry wants (other) credentials.
    #[error("{host}: not authorized to pull {what}: {why}")]
    Unauthorized {
        /// The registry that refused.
        host: String,
        /// What was asked for.
        what: String,
        /// Its words, shortened.
        why: String,
    },
    /// The registry could not be reached, or broke off more often than we retry.
    #[error("{host}: {why}")]
    RegistryUnavailable {
        /// The registry.
        host: String,
        /// The last failure.
        why: String,
    },
    /// The registry answered something that it must not answer.
    #[error("{host}: {why}")]
    Registry {
        /// The registry.
        host: String,
        /// What was wrong.
        why: String,
    },
    /// Something the registry or a redirect asked for would leave the set of hosts that we trust with it.
    #[error("{host}: refused: {why}")]
    Refused {
        /// Who asked.
        host: String,
        /// What we do not do.
        why: String,
    },
    /// The bytes are not those that were promised.
    #[error("{what}: digest mismatch: expected {expected}, got {actual}")]
    Digest {
        /// Which document or layer.
        what: String,
        /// The promised digest.
        expected: String,
        /// The digest of what came.
        actual: String,
    },
    /// A manifest, index or image configuration breaks the specification.
    #[error("{what}: {why}")]
    Manifest {
        /// Which document.
        what: String,
        /// Which rule it breaks.
        why: String,
    },
    /// The image exists, but not for this machine.
    #[error("{reference}: no image for platform {platform}")]
    Platform {
        /// The image.
        reference: String,
        /// What we looked for.
        platform: String,
    },
    /// A limit of ours was exceeded: sizes, counts, expansion of compressed data.
    #[error("{what}: too large: {why}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// The limit.
        why: String,
    },
    /// The disk (or its quota, or its inodes) is full.
    #[error("{0}: no space left")]
    Exhausted(String),
    /// A layer could not be unpacked.
    #[error("unpack layer {layer}: {why}")]
    Unpack {
        /// The layer's digest.
        layer: String,
        /// What the helper said.
        why: String,
    },
    /// A `hosts.toml`, a certificate or the auth file cannot be used.
    #[error("{path}: {why}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        why: String,
    },
    /// The database refused.
    #[error("image store: {0}")]
    Store(Arc<rusqlite::Error>),
    /// The file system refused.
    #[error("{act}: {cause}")]
    Io {
        /// What was being done to what.
        act: String,
        /// The kernel's answer.
        cause: Arc<io::Error>,
    },
    /// The work was given up before it was finished.
    #[error("cancelled")]
    Cancelled,
}

/// Our results.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => Error::Exhausted("image store".into()),
            _ => Error::Store(Arc::new(error)),
        }
    }
}

/// Says what was being done when the kernel refused; a full disk becomes [`Error::Exhausted`].
pub(crate) fn io(act: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    move |cause| {
        let act = act.into();
        match cause.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
            Some(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) => Error::Exhausted(act),
            _ => Error::Io { act, cause: Arc::new(cause) },
        }
    }
}

/// As [`io()`], for the kernel's bare error numbers.
pub(crate) fn sys(act: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> Error {
    let io = io(act);
    move |errno| io(errno.into())
}

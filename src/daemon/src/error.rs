//! What can go wrong while a call is answered. Says what happened to whom; which gRPC code that is, only the
//! door knows (`cri/mod.rs`).

use std::{path::PathBuf, sync::Arc, time::Duration};

/// Shared, because callers that joined a call in flight get the same answer.
pub type Error = Arc<Fault>;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One variant per way to fail that a caller or an operator must tell apart.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("pod {0:?} not found")]
    NoPod(String),
    #[error("container {0:?} not found")]
    NoContainer(String),
    #[error("image {0:?} not found")]
    NoImage(String),
    #[error("id {0:?} is not unique")]
    Ambiguous(String),
    #[error("{0}")]
    Invalid(String),
    #[error("pod {0} is not ready")]
    PodNotReady(String),
    #[error("container {0} is {1}, not {2}")]
    ContainerState(String, &'static str, &'static str),
    #[error("name {0} is taken by {1}")]
    Taken(String, String),
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    #[error("{act} did not end within {after:?}")]
    Deadline { act: String, after: Duration },
    #[error("kill container {0}: its process cannot be killed: it is in uninterruptible sleep (state D)")]
    Unkillable(String),
    #[error("{act} {path}: {source}")]
    Io { act: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{act}: {source}")]
    Shim { act: String, source: crate::shim::Error },
    #[error("start container {id}: {why}")]
    Start { id: String, why: String },
    #[error("{act}: {source}")]
    Network { act: &'static str, source: network::Error },
    #[error("{act}: {source}")]
    Image { act: &'static str, source: image::Error },
    #[error(transparent)]
    Spec(#[from] crate::containers::spec::Error),
    #[error("store: {0}")]
    Store(#[from] crate::store::Error),
    #[error(transparent)]
    Full(streaming::Full),
    #[error("the client of container {0} reads slower than it prints")]
    Slow(String),
    #[error("{0} ended without an answer")]
    Panicked(&'static str),
}

impl Fault {
    /// For a field of a request that cannot be honoured.
    pub fn invalid(why: impl Into<String>) -> Error {
        Arc::new(Fault::Invalid(why.into()))
    }

    pub fn shim(act: impl Into<String>) -> impl FnOnce(crate::shim::Error) -> Error {
        move |source| Arc::new(Fault::Shim { act: act.into(), source })
    }

    pub fn network(act: &'static str) -> impl FnOnce(network::Error) -> Error {
        move |source| Arc::new(Fault::Network { act, source })
    }

    pub fn image(act: &'static str) -> impl FnOnce(image::Error) -> Error {
        move |source| Arc::new(Fault::Image { act, source })
    }

    pub fn io(act: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Arc::new(Fault::Io { act, path, source })
    }
}

impl From<crate::store::Error> for Error {
    fn from(error: crate::store::Error) -> Error {
        Arc::new(Fault::Store(error))
    }
}

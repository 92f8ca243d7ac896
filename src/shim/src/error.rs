//! What can go wrong in the shim. The texts reach users through the kubelet, so each ends in its cause; which
//! ttrpc code an error gets is the door's business.

use std::io;

use container::cgroup;

use crate::{log, stream};

/// An act that failed, or could not be begun.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0:?} cannot be an id")]
    Id(String),
    #[error("{what} {id}: not found")]
    Unknown { what: &'static str, id: String },
    #[error("{what} {id} already exists")]
    Exists { what: &'static str, id: String },
    #[error("container {id} is {state}")]
    State { id: String, state: &'static str },
    #[error("exec {id} is {state}")]
    ExecState { id: String, state: &'static str },
    #[error("process of {id} already finished: not found")]
    Finished { id: String },
    #[error("{0}")]
    Invalid(String),
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    #[error("the pod has no {0} namespace of its own")]
    NoNamespace(&'static str),
    #[error("the pod is stopping")]
    Stopping,
    #[error("{act} did not end in time")]
    Deadline { act: &'static str },
    #[error("{act}: {cause}")]
    Io { act: String, cause: io::Error },
    #[error(transparent)]
    Container(#[from] container::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    Log(#[from] log::Error),
    #[error(transparent)]
    Stream(#[from] stream::Error),
}

/// Names the act that an I/O error belongs to.
pub(crate) trait Act<T> {
    fn act(self, act: impl Into<String>) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Act<T> for Result<T, E> {
    fn act(self, act: impl Into<String>) -> Result<T, Error> {
        self.map_err(|cause| Error::Io { act: act.into(), cause: cause.into() })
    }
}

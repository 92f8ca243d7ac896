//! The image configuration: the part of it that a container can be told. It is data, never control (S42):
//! nothing here selects what the host does.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer};

use crate::digest::Digest;

/// What the image says about the process that it is for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Config {
    /// `user`, `uid`, `user:group`, `uid:gid`; unresolved.
    #[serde(deserialize_with = "lenient")]
    pub user: String,
    /// `NAME=value`.
    #[serde(deserialize_with = "lenient")]
    pub env: Vec<String>,
    /// The program and its fixed arguments.
    #[serde(deserialize_with = "lenient")]
    pub entrypoint: Vec<String>,
    /// Arguments that a caller may replace.
    #[serde(deserialize_with = "lenient")]
    pub cmd: Vec<String>,
    /// Where the process starts.
    #[serde(deserialize_with = "lenient")]
    pub working_dir: String,
    /// Paths that the image wants to be volumes.
    #[serde(deserialize_with = "keys")]
    pub volumes: BTreeSet<String>,
    /// `port/protocol`.
    #[serde(deserialize_with = "keys")]
    pub exposed_ports: BTreeSet<String>,
    /// Free text.
    #[serde(deserialize_with = "lenient")]
    pub labels: BTreeMap<String, String>,
    /// A signal name or number.
    #[serde(deserialize_with = "lenient")]
    pub stop_signal: String,
    /// Windows-style arguments are one string; kept so that we can say no to it.
    #[serde(deserialize_with = "lenient")]
    pub args_escaped: bool,
}

/// The whole document.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Document {
    #[serde(default, deserialize_with = "lenient")]
    pub(crate) architecture: String,
    #[serde(default, deserialize_with = "lenient")]
    pub(crate) os: String,
    #[serde(default, deserialize_with = "lenient")]
    pub(crate) config: Config,
    pub(crate) rootfs: RootFs,
}

/// Which layers, by the digests of their uncompressed tars, lowest first.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default, deserialize_with = "lenient")]
    pub(crate) diff_ids: Vec<Digest>,
}

/// Builders write `null` where they mean nothing.
fn lenient<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// A set, written as an object whose values mean nothing.
fn keys<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeSet<String>, D::Error> {
    let map: BTreeMap<String, serde::de::IgnoredAny> = lenient(deserializer)?;
    Ok(map.into_keys().collect())
}

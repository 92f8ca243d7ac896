//! What survives the death of the daemon: pods, containers and network attachments, in SQLite.

/// The database, written by one thread.
pub struct Store {}

/// Why something could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {}

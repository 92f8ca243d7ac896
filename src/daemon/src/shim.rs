//! One pod's shim as the daemon sees it: its process and a ttrpc connection. The only file that knows ttrpc.

/// A shim that answers, or did.
pub struct Shim {}

/// Why a shim did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {}

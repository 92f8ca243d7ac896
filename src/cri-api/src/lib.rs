//! The CRI wire format as Rust types and tonic services, generated from `proto/cri/v1/api.proto` and committed.
//! Holds no behaviour; what a call means is the business of the daemon.

use std::fmt;

/// Package `runtime.v1`: every message, both services, clients and servers.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, rustdoc::all)]
pub mod v1 {
    include!("generated/runtime.v1.rs");
}

/// Shows who logs in where, never with what: the fields marked `debug_redact` are left out.
impl fmt::Debug for v1::AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthConfig")
            .field("username", &self.username)
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}

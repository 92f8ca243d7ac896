//! What a daemon and a shim say to each other: containerd's Task v3, Sandbox v1 and events, and crisp's own
//! `Pod` service. Types and names only; the files of a pod's run directory are described in [`rundir`].

pub use containerd_shim_protos as containerd;
pub use {protobuf, ttrpc};

/// crisp's own service and the options that crispd sends, from `proto/shim/v1/shim.proto`.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, clippy::unwrap_used)]
#[path = "generated/shim.rs"]
pub mod shim;
/// Client and server of crisp's own service.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, clippy::unwrap_used)]
#[path = "generated/shim_ttrpc.rs"]
pub mod shim_ttrpc;

pub mod rundir;

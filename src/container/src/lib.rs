//! One OCI container on this kernel: namespaces, mounts, cgroups, clone3, exec.
//!
//! Blocking, without threads of its own, and to be called from a process that has only one: a child that is
//! cloned without an exec inherits every lock another thread holds, and ours allocates before it execs.
//! Knows no pods and no CRI; those are the business of the shim and the daemon.
// The crate where unsafe lives; each block says why it is sound.
#![allow(unsafe_code)]

pub mod spec;

mod create;
pub mod exec;
mod hooks;
pub mod init;
pub mod namespace;
pub mod rootfs;

mod capability;
pub mod cgroup;
pub mod seccomp;

pub mod error;
mod kernel;

pub use create::{Created, Pending, Request, Rootfs, Starting, Stdio, create, poststop};
pub use error::Error;
pub use namespace::Join;
pub use spec::Spec;

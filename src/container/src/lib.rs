//! One OCI container on this kernel: namespaces, mounts, cgroups, clone3, exec.
//!
//! Blocking, without threads of its own, and to be called from a process that has only one: a child that is
//! cloned without an exec inherits every lock another thread holds, and ours allocates before it execs.
//! Knows no pods and no CRI; those are the business of the shim and the daemon.
// The crate where unsafe lives; each block says why it is sound.
#![allow(unsafe_code)]

pub mod spec;

pub mod cgroup;
pub mod seccomp;

//! What can go wrong with cgroups, one variant for each step.

use std::path::PathBuf;

use rustix::io::Errno;

/// An act on cgroups that failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("read /proc/self/mountinfo: {cause}")]
    Mounts { cause: std::io::Error },
    #[error("no cgroup file system is mounted on this host")]
    NoCgroups,
    #[error("open cgroup file system at {}: {cause}", mount.display())]
    Root { mount: PathBuf, cause: Errno },
    #[error("cgroup path {path:?} {why}")]
    Path { path: String, why: &'static str },
    #[error("make cgroup {path} in {tree}: {cause}")]
    Make { tree: String, path: String, cause: Errno },
    #[error("cgroup {path} in {tree} is already used by {count} processes")]
    Occupied { tree: String, path: String, count: usize },
    #[error("take over the processors and memory nodes of the parent of cgroup {path}: {cause}")]
    Inherit { path: String, cause: Errno },
    #[error("enable controllers for cgroup {path}: {cause}")]
    Enable { path: String, cause: Errno },
    #[error("open cgroup {path} in {tree}: {cause}")]
    Open { tree: String, path: String, cause: Errno },
    #[error("cgroup controller {controller} is not available, so {file} cannot be set")]
    Absent { controller: String, file: String },
    #[error("{what} {why}")]
    Value { what: String, why: String },
    #[error("write {value:?} to {file} of cgroup {path}{hint}: {cause}")]
    Write { file: String, value: String, path: String, hint: String, cause: Errno },
    #[error("{step} device program: {cause}")]
    Bpf { step: &'static str, cause: Errno },
    #[error("put process {pid} into cgroup {path} in {tree}: {cause}")]
    Add { pid: u32, tree: String, path: String, cause: Errno },
    #[error("list processes of cgroup {path}: {cause}")]
    List { path: String, cause: Errno },
    #[error("cgroup {path} cannot be frozen: {cause}")]
    Freeze { path: String, cause: Errno },
    #[error("cgroup {path} did not freeze in time")]
    FreezeTimeout { path: String },
    #[error("kill cgroup {path}: {cause}")]
    Kill { path: String, cause: Errno },
    #[error("{count} processes of cgroup {path} do not die")]
    Undead { path: String, count: usize },
    #[error("read {file} of cgroup {path}: {cause}")]
    Read { file: &'static str, path: String, cause: Errno },
    #[error("watch cgroup {path} for lack of memory: {cause}")]
    Watch { path: String, cause: Errno },
    #[error("remove cgroup {path} from {tree}: {cause}")]
    Remove { tree: String, path: String, cause: Errno },
}

impl Error {
    /// Whether the cgroup still holds processes, so that trying again later can help.
    pub fn is_busy(&self) -> bool {
        matches!(
            self,
            Error::Remove { cause: Errno::BUSY, .. } | Error::Undead { .. } | Error::Occupied { .. }
        )
    }
}

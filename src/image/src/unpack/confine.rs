//! Takes away from the unpack child what unpacking does not need, before it reads the first hostile byte: the rest of
//! the file system, the network, most capabilities, and resources without bound. Nothing here is inherited by
//! anybody: the child starts no process.

use std::{io, path::Path};

use nix::sched::CloneFlags;
use rustix::{
    mount::{
        MountFlags, MountPropagationFlags, UnmountFlags, mount_bind, mount_change, mount_remount, unmount,
    },
    process::{Resource, Rlimit, chdir, fchdir, pivot_root, setrlimit},
    thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs},
};

/// The address space that the largest zstd window, the buffers and the list of directories fit into.
const MEMORY: u64 = 1 << 30;
/// CPU time of one layer.
const CPU_SECONDS: u64 = 3600;
/// Descriptors: three from outside, the root, a parent directory and the file at hand, with room.
const DESCRIPTORS: u64 = 64;

/// What unpacking as root needs: owners, modes of others' files, devices, file capabilities, and trusted.* attributes
/// (xattr(7)), which the kernel gives to CAP_SYS_ADMIN alone.
const NEEDED: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SYS_ADMIN);

/// Makes `directory` the root and nothing else reachable, within bounds.
pub(super) fn to(directory: &Path) -> io::Result<()> {
    limits()?;
    alone_in(directory)
}

/// As [`to`], for the calling thread and without its bounds.
pub(super) fn alone_in(directory: &Path) -> io::Result<()> {
    let spaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    nix::sched::unshare(spaces)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    // A new root must be a mount (pivot_root(2)); bound with flags that keep what is unpacked from working here.
    mount_bind(directory, directory)?;
    let flags = MountFlags::BIND | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_remount(directory, flags, "")?;
    chdir(directory)?;
    let root = rustix::fs::open(
        ".",
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    fchdir(&root)?;
    chdir("/")?;
    set_no_new_privs(true)?;
    let sets = CapabilitySets { effective: NEEDED, permitted: NEEDED, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets)?;
    Ok(())
}

fn limits() -> io::Result<()> {
    let bounds = [
        (Resource::As, MEMORY),
        (Resource::Cpu, CPU_SECONDS),
        (Resource::Nofile, DESCRIPTORS),
        (Resource::Fsize, super::MOST_FILE),
        (Resource::Core, 0),
    ];
    for (resource, bound) in bounds {
        setrlimit(resource, Rlimit { current: Some(bound), maximum: Some(bound) })?;
    }
    Ok(())
}

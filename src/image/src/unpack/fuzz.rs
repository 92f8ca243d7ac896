//! Unpacks layers in the fuzzer's own process, on a thread that has nothing but one directory.

use std::{
    io::Cursor,
    path::Path,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
};

use rustix::{
    fs::{CWD, Mode, OFlags, mkdirat, openat},
    mount::{MountFlags, mount},
};

use super::{Compression, confine, decompress::Archive, extract::Extractor};
use crate::{digest::Hasher, tree};

/// The thread.
pub struct Layers {
    layers: SyncSender<Vec<u8>>,
    done: Receiver<()>,
}

impl Default for Layers {
    fn default() -> Layers {
        Layers::new()
    }
}

impl Layers {
    /// Starts it, on a tmpfs that nobody else sees.
    pub fn new() -> Layers {
        let (layers, todo) = sync_channel::<Vec<u8>>(0);
        let (tell, done) = sync_channel(0);
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("a mount namespace");
            let private =
                rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).expect("private mounts");
            mount("tmpfs", "/tmp", "tmpfs", MountFlags::empty(), c"size=256m").expect("a tmpfs");
            confine::alone_in(Path::new("/tmp")).expect("to be alone");
            for layer in todo {
                unpack(layer);
                if tell.send(()).is_err() {
                    return;
                }
            }
        });
        Layers { layers, done }
    }

    /// Unpacks one layer and removes it. The last byte chooses the compression.
    pub fn unpack(&mut self, layer: &[u8]) {
        self.layers.send(layer.to_vec()).expect("the thread lives");
        self.done.recv().expect("the thread lives");
    }
}

fn unpack(mut layer: Vec<u8>) {
    let compression = match layer.pop() {
        Some(1) => Compression::Gzip,
        Some(2) => Compression::Zstd,
        _ => Compression::Plain,
    };
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let above =
        openat(CWD, "/", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).expect("/");
    mkdirat(&above, "layer", Mode::RWXU).expect("a directory");
    let root = openat(&above, "layer", directory, Mode::empty()).expect("the directory");
    let hasher = Hasher::named("sha256").expect("an algorithm");
    let mut archive = Archive::of(Cursor::new(layer), compression, hasher).expect("a thread");
    if Extractor::new(root).run(&mut archive).is_ok() {
        let _ = archive.digest();
    }
    use std::os::fd::AsFd;
    tree::remove(above.as_fd(), c"layer").expect("removal");
    assert!(tree::names(above.as_fd()).expect("names").is_empty(), "something was made outside");
}

//! Makes, pins, enters and removes network namespaces. A namespace lives as long as the bind mount that pins it;
//! who is in it, and with which addresses, is the business of others.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::error::Error;
use crate::netlink::Socket;

/// The number of the namespace file system, `NSFS_MAGIC` in linux/magic.h.
const NSFS: u64 = 0x6e73_6673;
/// The loopback interface is the first of every network namespace.
const LOOPBACK: u32 = 1;
/// Mounts stacked on one path; more than one means that somebody else was here.
const MAX_STACKED: usize = 16;

/// Makes a network namespace with the loopback up and pins it at `path`, which must not exist.
pub fn create(path: &Path) -> Result<(), Error> {
    create_with(path, &[])
}

/// As [`create`], and writes settings in the new namespace, each as its path below `/proc/sys` and its value.
pub fn create_with(path: &Path, sysctls: &[(&str, &str)]) -> Result<(), Error> {
    let fd = make(path, sysctls)?;
    attach(&fd, path)
}

/// Pins a namespace that somebody else made.
pub fn pin(from: BorrowedFd<'_>, path: &Path) -> Result<(), Error> {
    let failed = failing("pin", path);
    if !is_namespace(from).map_err(&failed)? {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a namespace")));
    }
    attach(&from, path)
}

/// Unpins the namespace and removes the file it was pinned on. Succeeds when there is nothing left to do.
pub fn remove(path: &Path) -> Result<(), Error> {
    let failed = failing("remove", path);
    for _ in 0..MAX_STACKED {
        // NOFOLLOW: whatever became of the path, only a mount on this very name is taken away.
        match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL) => break,
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(failed(errno.into())),
        }
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(e)),
        _ => Ok(()),
    }
}

/// Whether a namespace is pinned at `path`.
pub fn exists(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type as u64 == NSFS)
}

/// Opens the namespace pinned at `path`.
pub fn open(path: &Path) -> Result<OwnedFd, Error> {
    let failed = failing("open", path);
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| failed(e.into()))?;
    match is_namespace(&fd).map_err(&failed)? {
        true => Ok(fd),
        false => Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a namespace"))),
    }
}

/// Runs `work` on a thread of its own inside the namespace. The thread ends with the work, so that no other
/// work can ever find itself in the wrong namespace.
pub fn run<T: Send>(path: &Path, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let fd = open(path)?;
    let failed = failing("enter", path);
    on_thread(path, || {
        enter(&fd).map_err(&failed)?;
        Ok(work())
    })
}

/// Moves the calling thread, which should not live on, into the namespace.
pub(crate) fn enter(fd: &OwnedFd) -> io::Result<()> {
    use std::os::fd::AsFd;
    Ok(move_into_link_name_space(fd.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// Runs `work` on a fresh thread and waits for it.
pub(crate) fn on_thread<T: Send>(
    path: &Path,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> Result<T, Error> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("netns".into()).spawn_scoped(scope, work);
        let thread = thread.map_err(failing("start a thread for", path))?;
        thread.join().unwrap_or_else(|_| Err(Error::Worker(format!("panic in {}", path.display()))))
    })
}

fn make(path: &Path, sysctls: &[(&str, &str)]) -> Result<OwnedFd, Error> {
    let failed = failing("create", path);
    on_thread(path, || {
        // SAFETY: NEWNET alone unshares nothing that Rust's standard library holds (no file table, no memory),
        // and this thread ends with the closure.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(|e| failed(e.into()))?;
        loopback_up().map_err(&failed)?;
        for (name, value) in sysctls {
            sysctl(name, value)?;
        }
        let own = File::open("/proc/thread-self/ns/net").map_err(&failed)?;
        Ok(own.into())
    })
}

/// Writes one setting of the namespace that the calling thread is in.
pub(crate) fn sysctl(name: &str, value: &str) -> Result<(), Error> {
    let path = Path::new("/proc/sys").join(name);
    fs::write(&path, value).map_err(|cause| Error::Sysctl { path, cause })
}

fn loopback_up() -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = LOOPBACK;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    Socket::route()?.request(RouteNetlinkMessage::SetLink(link), 0).map_err(|refusal| refusal.cause)
}

fn attach(namespace: &impl AsRawFd, path: &Path) -> Result<(), Error> {
    let failed = failing("pin", path);
    OpenOptions::new().write(true).create_new(true).mode(0o400).open(path).map_err(&failed)?;
    // mount(2) resolves the magic link to the namespace itself, and the mount holds it from then on.
    let source = format!("/proc/thread-self/fd/{}", namespace.as_raw_fd());
    mount_bind(source.as_str(), path).map_err(|errno| {
        let _ = fs::remove_file(path);
        failed(errno.into())
    })
}

fn is_namespace(fd: impl std::os::fd::AsFd) -> io::Result<bool> {
    Ok(rustix::fs::fstatfs(fd)?.f_type as u64 == NSFS)
}

fn failing<'a>(act: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |cause| Error::Netns { act, path: path.to_owned(), cause }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    struct Pinned(tempfile::TempDir);

    impl Pinned {
        fn new() -> Pinned {
            Pinned(tempfile::tempdir().unwrap())
        }

        fn path(&self) -> std::path::PathBuf {
            self.0.path().join("ns")
        }
    }

    impl Drop for Pinned {
        fn drop(&mut self) {
            remove(&self.path()).unwrap();
        }
    }

    #[test]
    fn a_new_namespace_has_its_loopback_up_and_nothing_else() {
        let pinned = Pinned::new();
        create(&pinned.path()).unwrap();
        assert!(exists(&pinned.path()));
        run(&pinned.path(), || {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let routes = fs::read_to_string("/proc/thread-self/net/route").unwrap();
            assert_eq!(routes.lines().count(), 1, "{routes}");
        })
        .unwrap();
    }

    #[test]
    fn settings_are_written_in_the_new_namespace_only() {
        let pinned = Pinned::new();
        let name = "net/ipv4/ip_unprivileged_port_start";
        let before = fs::read_to_string(format!("/proc/sys/{name}")).unwrap();
        create_with(&pinned.path(), &[(name, "77")]).unwrap();
        let inside = run(&pinned.path(), || fs::read_to_string(format!("/proc/sys/{name}")).unwrap());
        assert_eq!(inside.unwrap().trim(), "77");
        assert_eq!(fs::read_to_string(format!("/proc/sys/{name}")).unwrap(), before);
    }

    #[test]
    fn a_refused_setting_leaves_nothing_behind() {
        let pinned = Pinned::new();
        assert!(matches!(create_with(&pinned.path(), &[("net/no/such", "1")]), Err(Error::Sysctl { .. })));
        assert!(!pinned.path().exists());
    }

    #[test]
    fn removing_is_idempotent() {
        let pinned = Pinned::new();
        create(&pinned.path()).unwrap();
        remove(&pinned.path()).unwrap();
        assert!(!pinned.path().exists());
        remove(&pinned.path()).unwrap();
        fs::write(pinned.path(), "a file that was never mounted on").unwrap();
        remove(&pinned.path()).unwrap();
        assert!(!pinned.path().exists());
    }

    #[test]
    fn a_path_that_is_taken_is_not_mounted_over() {
        let pinned = Pinned::new();
        create(&pinned.path()).unwrap();
        assert!(create(&pinned.path()).is_err());
    }

    #[test]
    fn a_namespace_of_somebody_else_can_be_pinned() {
        let (one, two) = (Pinned::new(), Pinned::new());
        create(&one.path()).unwrap();
        pin(open(&one.path()).unwrap().as_fd(), &two.path()).unwrap();
        remove(&one.path()).unwrap();
        assert!(exists(&two.path()));
        run(&two.path(), || TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
    }

    #[test]
    fn only_namespaces_are_pinned_or_opened() {
        let pinned = Pinned::new();
        let file = File::open("/dev/null").unwrap();
        assert!(pin(file.as_fd(), &pinned.path()).is_err());
        fs::write(pinned.path(), "").unwrap();
        assert!(open(&pinned.path()).is_err());
        assert!(!exists(&pinned.path()));
    }

    #[test]
    fn work_inside_a_namespace_leaves_the_caller_where_it_was() {
        let pinned = Pinned::new();
        create(&pinned.path()).unwrap();
        let here = || fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
        let before = here();
        let inside = run(&pinned.path(), here).unwrap();
        assert_ne!(inside, before);
        assert_eq!(here(), before);
    }
}

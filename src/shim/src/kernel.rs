//! The three things that no safe interface offers: taking over a descriptor that was inherited by its number,
//! naming a real-time signal, and telling the event loop that a descriptor stays what it is.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{BorrowedFd, FromRawFd, OwnedFd},
};

use rustix::{
    io::{FdFlags, fcntl_setfd},
    net::sockopt,
    process::Signal,
};
use shim_api::rundir::LISTEN_FD;
use tokio::io::{Interest, unix::AsyncFd};

/// The listening socket that crispd hands over. Called once, before anything else opens descriptors.
pub(crate) fn inherited_listener() -> io::Result<OwnedFd> {
    // SAFETY: only looked at, and the number is open for as long as it takes or the call fails.
    let fd = unsafe { BorrowedFd::borrow_raw(LISTEN_FD) };
    if !sockopt::socket_acceptconn(fd)? {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a listening socket"));
    }
    fcntl_setfd(fd, FdFlags::CLOEXEC)?;
    // SAFETY: it is open, as the two calls before have shown, and nobody else in this process knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(LISTEN_FD) })
}

/// A descriptor that can be waited for.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor stays open and the same until it is dropped with the `AsyncFd`.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// A descriptor that can be waited for to become readable, by one who does not own it.
pub(crate) fn watch_borrowed(fd: BorrowedFd<'_>) -> io::Result<AsyncFd<BorrowedFd<'_>>> {
    // SAFETY: a borrowed descriptor stays open and the same as long as the borrow, which the `AsyncFd` is in.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// The signal with a number, real-time ones among them: images name them as stop signals.
pub(crate) fn signal(number: u32) -> Option<Signal> {
    let number = i32::try_from(number).ok().filter(|number| (1..=64).contains(number))?;
    // SAFETY: the number is one that the kernel has. The libc's own real-time signals are no danger to us, since
    // it is another process that gets them.
    Some(unsafe { Signal::from_raw_unchecked(number) })
}

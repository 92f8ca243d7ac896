//! A connection to a port on a pod's own localhost. Only the socket is made in the pod's network namespace: it stays
//! there wherever it is used.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    thread,
    time::Duration,
};

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socket_with},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::oneshot,
    time::timeout,
};

use super::Pod;

/// How long a connection may take; it goes nowhere.
const CONNECT: Duration = Duration::from_secs(10);

/// Connects to a port as a process of the pod would to `localhost`.
pub async fn connect(pod: &Pod, port: u16) -> io::Result<TcpStream> {
    let mut failed = io::ErrorKind::ConnectionRefused.into();
    for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        let connected = async {
            socket(pod.netns.clone(), address.is_ipv6()).await?.connect((address, port).into()).await
        };
        match timeout(CONNECT, connected).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            // What is said of IPv4 is what most want to know.
            Ok(Err(error)) if address.is_ipv4() => failed = error,
            Ok(Err(_)) => {}
            Err(_) => failed = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(failed)
}

/// A socket of a network namespace, made by a thread of its own: one that has moved is of no use to others.
async fn socket(netns: Option<PathBuf>, six: bool) -> io::Result<TcpSocket> {
    let make = move || -> io::Result<OwnedFd> {
        let family = if six { AddressFamily::INET6 } else { AddressFamily::INET };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        Ok(socket_with(family, SocketType::STREAM, flags, None)?)
    };
    let Some(path) = netns else { return Ok(TcpSocket::from_std_stream(make()?.into())) };
    let (send, receive) = oneshot::channel();
    let work = move || -> io::Result<OwnedFd> {
        move_into_link_name_space(File::open(path)?.as_fd(), Some(LinkNameSpaceType::Network))?;
        make()
    };
    thread::Builder::new().name("netns".into()).stack_size(64 << 10).spawn(move || {
        // Nobody waits any more: the socket goes.
        let _ = send.send(work());
    })?;
    let socket: io::Result<_> = receive.await.map_err(io::Error::other)?;
    Ok(TcpSocket::from_std_stream(socket?.into()))
}

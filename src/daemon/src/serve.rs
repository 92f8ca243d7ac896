//! The CRI socket: who may connect, how large messages may be, and how serving ends.

use std::{
    fs::{self, Permissions},
    future::Future,
    io,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use cri_api::v1::{image_service_server::ImageServiceServer, runtime_service_server::RuntimeServiceServer};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::{Stream, StreamExt, wrappers::UnixListenerStream};
use tonic::transport::Server;
use tracing::warn;

use crate::{config::Grpc, cri, daemon::Daemon, streams::Streaming};

/// How long calls in flight may take to end once the daemon is asked to.
const DRAIN: Duration = Duration::from_secs(10);
/// A request's headers are a few hundred bytes.
const HEADERS: u32 = 16 << 10;

/// Binds the socket. What was there is of a daemon that is gone: this one holds the lock.
pub fn bind(path: &Path, keys: &Grpc) -> Result<UnixListener> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("remove old socket {}", path.display()));
        }
        _ => {}
    }
    // The umask makes it 0600 from birth; it is opened to the group only when all is set.
    let listener = UnixListener::bind(path).with_context(|| format!("bind {}", path.display()))?;
    let mode = if keys.gid == 0 { 0o600 } else { 0o660 };
    chown(path, Some(keys.uid), Some(keys.gid))
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(mode)))
        .with_context(|| format!("set owner and mode of {}", path.display()))?;
    Ok(listener)
}

/// Serves until `end`, then lets the calls in flight end, for a bounded time.
pub async fn run(
    daemon: Arc<Daemon>,
    streams: Arc<Streaming>,
    listener: UnixListener,
    end: impl Future<Output = ()>,
) -> Result<()> {
    let keys = daemon.config().grpc.clone();
    let runtime =
        RuntimeServiceServer::new(cri::runtime::Runtime { daemon: daemon.clone(), streams: streams.clone() })
            .max_decoding_message_size(keys.max_recv_message_size)
            .max_encoding_message_size(keys.max_send_message_size);
    let images = ImageServiceServer::new(cri::image::Images(daemon.clone()))
        .max_decoding_message_size(keys.max_recv_message_size)
        .max_encoding_message_size(keys.max_send_message_size);
    let (ended, ending) = tokio::sync::watch::channel(false);
    let mut heard = ending.clone();
    let server = Server::builder()
        .http2_max_header_list_size(HEADERS)
        .add_service(runtime)
        .add_service(images)
        .serve_with_incoming_shutdown(peers(listener, keys), async move {
            let _ = heard.wait_for(|ended| *ended).await;
        });
    let mut server = std::pin::pin!(server);
    tokio::select! {
        result = &mut server => return result.context("serve"),
        () = end => {}
    }
    let _ = ended.send(true);
    // Streams of events never end by themselves.
    daemon.events.close();
    let (drained, ()) = tokio::join!(tokio::time::timeout(DRAIN, server), streams.end());
    match drained {
        Ok(result) => result.context("serve"),
        Err(_) => {
            warn!(after = ?DRAIN, "calls are still in flight: they are left");
            Ok(())
        }
    }
}

/// Connections of those who may: the socket's mode says the same, but modes can be changed.
fn peers(listener: UnixListener, keys: Grpc) -> impl Stream<Item = io::Result<UnixStream>> {
    UnixListenerStream::new(listener).filter(move |stream| match stream {
        Err(_) => true,
        Ok(stream) => match stream.peer_cred() {
            // Whether a peer is in the group is not told, so with one the mode alone decides.
            Ok(peer) if keys.gid != 0 || peer.uid() == 0 || peer.uid() == keys.uid => true,
            Ok(peer) => {
                warn!(uid = peer.uid(), "a connection to the CRI socket is refused");
                false
            }
            Err(_) => false,
        },
    })
}

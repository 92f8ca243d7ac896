//! Port-forward: pairs of streams, each pair a connection to a port on the pod's own localhost. Over SPDY (also in a
//! WebSocket tunnel) clients open pairs as they need them; over the old WebSocket protocol the ports are in the query
//! and there is one connection for each.

use std::{collections::HashMap, io, pin::pin, sync::Arc, time::Duration};

use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tokio_tungstenite::WebSocketStream;
use tokio_util::sync::PollSender;

use crate::{
    Backend, Reader, copy,
    negotiate::Channels,
    spdy::{Connection, Stream},
    websocket::{self, ChannelWriter},
};

/// Pairs of which one stream has come. More at a time is no client, but an attack.
const MOST_HALVES: usize = 256;
/// Input of one connection that may wait for the pod's process, with the old WebSocket protocol.
const MOST_INPUT: usize = 1 << 20;
/// Ports of one request with the old WebSocket protocol; two channels each have to fit into a byte.
pub(crate) const MOST_PORTS: usize = 64;

/// One stream of a pair, until the other comes.
struct Half {
    stream: Stream,
    is_error: bool,
    since: Instant,
}

/// Serves the pairs that a client opens, until it leaves or `end` comes.
pub(crate) async fn serve<B: Backend>(
    mut connection: Connection,
    pod: &str,
    creation: Duration,
    backend: &Arc<B>,
    end: impl Future<Output = &'static str>,
) {
    let mut end = pin!(end);
    let mut halves: HashMap<String, Half> = HashMap::new();
    let mut running = JoinSet::new();
    loop {
        let oldest = halves.values().map(|half| half.since + creation).min();
        let patience = oldest.unwrap_or_else(|| Instant::now() + Duration::from_secs(24 * 3600));
        let opened = tokio::select! {
            opened = timeout_at(patience, connection.accept()) => opened,
            _ = &mut end => break,
        };
        match opened {
            Ok(None) => break,
            // A stream whose other half never came is dropped, which resets it.
            Err(_) => halves.retain(|_, half| half.since.elapsed() < creation),
            Ok(Some(stream)) => {
                while running.try_join_next().is_some() {}
                let Some((key, port, is_error)) = describe(&stream) else { continue };
                match halves.remove(&key) {
                    Some(half) if half.is_error != is_error => {
                        let (data, error) =
                            if is_error { (half.stream, stream) } else { (stream, half.stream) };
                        let (pod, backend) = (pod.to_owned(), backend.clone());
                        running.spawn(async move { pair(data, error, &pod, port, &*backend).await });
                    }
                    // Two of a kind: the request is void, and so are both.
                    Some(_) => {}
                    None if halves.len() < MOST_HALVES => {
                        halves.insert(key, Half { stream, is_error, since: Instant::now() });
                    }
                    None => {}
                }
            }
        }
    }
    running.shutdown().await;
    connection.close().await;
}

/// Which pair a stream belongs to, its port, and whether it is for errors. Old clients leave the request id out:
/// their data stream is the one opened right after its error stream.
fn describe(stream: &Stream) -> Option<(String, u16, bool)> {
    let is_error = match stream.headers.get("streamtype")?.to_ascii_lowercase().as_str() {
        "error" => true,
        "data" => false,
        _ => return None,
    };
    let port = stream.headers.get("port")?.parse().ok().filter(|port| *port != 0)?;
    let key = match stream.headers.get("requestid") {
        Some(id) => format!("id {id}"),
        None => format!("stream {}", if is_error { stream.id } else { stream.id.checked_sub(2)? }),
    };
    Some((key, port, is_error))
}

async fn pair(mut data: Stream, mut error: Stream, pod: &str, port: u16, backend: &impl Backend) {
    match backend.connect(pod, port).await {
        Ok((mut from, mut to)) => {
            let (mut input, mut output) = tokio::io::split(&mut data);
            let up = one_way(&mut input, &mut to);
            let down = one_way(&mut from, &mut output);
            let (up, down) = tokio::join!(up, down);
            if let Some(failed) = up.err().or(down.err()) {
                tracing::debug!(pod, port, error = %failed, "forwarded connection ended");
            }
        }
        Err(failed) => {
            let text = format!("forward port {port} to pod {pod}: {failed}");
            let _ = error.write_all(text.as_bytes()).await;
        }
    }
    let _ = error.shutdown().await;
}

/// Copies one direction and passes its half-close on.
async fn one_way(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let copied = copy(from, to).await;
    let _ = to.shutdown().await;
    copied
}

/// Serves the old WebSocket protocol: channel 2n is the data of the n-th port, 2n + 1 its errors; the first message
/// on each carries the port, little endian.
pub(crate) async fn serve_websocket<Io, B>(
    socket: WebSocketStream<Io>,
    channels: Channels,
    pod: &str,
    ports: &[u16],
    backend: &B,
) where
    Io: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    B: Backend,
{
    let (mut sink, mut source) = socket.split();
    // Room for the first message of every channel, so that none waits.
    let (output, mut messages) = mpsc::channel(2 * MOST_PORTS + 8);
    let mut inputs = Vec::new();
    let mut ends = Vec::new();
    for (number, port) in ports.iter().take(MOST_PORTS).enumerate() {
        let channel = u8::try_from(number * 2).unwrap_or(u8::MAX);
        let (reader, writer) = tokio::io::duplex(MOST_INPUT);
        inputs.push(Some(writer));
        for channel in [channel, channel + 1] {
            let _ = output.try_send(channels.message(channel, &port.to_le_bytes()));
        }
        let to = |channel| ChannelWriter { channels, channel, output: PollSender::new(output.clone()) };
        let (data, errors) = (to(channel), to(channel + 1));
        ends.push(forwarded(Box::pin(reader), data, errors, pod, *port, backend));
    }
    drop(output);
    let writing = async move {
        while let Some(message) = messages.recv().await {
            if sink.send(message).await.is_err() {
                return;
            }
        }
        let _ = sink.send(websocket::close()).await;
    };
    let mut reading = pin!(async move {
        while let Some(Ok(message)) = source.next().await {
            if message.is_close() {
                break;
            }
            if !message.is_binary() && !message.is_text() {
                continue;
            }
            let Some((channel, payload)) = channels.parse(&message.into_data()) else { break };
            let input = inputs.get_mut(usize::from(channel / 2)).filter(|_| channel % 2 == 0);
            if let Some(Some(writer)) = input
                && writer.write_all(&payload).await.is_err()
            {
                // This connection is over; the others go on.
                if let Some(input) = inputs.get_mut(usize::from(channel / 2)) {
                    *input = None;
                }
            }
        }
    });
    tokio::select! {
        () = &mut reading => return,
        _ = async { tokio::join!(writing, futures_util::future::join_all(ends)) } => {}
    }
    // Until the client has closed as well, so that no reset destroys what it has yet to read.
    let _ = timeout(websocket::GOODBYE, reading).await;
}

async fn forwarded(
    mut input: Reader,
    mut data: ChannelWriter,
    mut errors: ChannelWriter,
    pod: &str,
    port: u16,
    backend: &impl Backend,
) {
    match backend.connect(pod, port).await {
        Ok((mut from, mut to)) => {
            let up = one_way(&mut input, &mut to);
            let down = one_way(&mut from, &mut data);
            // The client has no way to half-close: the connection is over when the pod's end is.
            tokio::select! {
                _ = down => {}
                _ = async { let _ = up.await; std::future::pending::<()>().await } => {}
            }
        }
        Err(failed) => {
            let text = format!("forward port {port} to pod {pod}: {failed}");
            let _ = errors.write_all(text.as_bytes()).await;
        }
    }
}

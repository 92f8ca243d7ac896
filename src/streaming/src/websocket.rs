//! Channels over WebSocket: each binary message is a channel's number and bytes (or an ASCII digit and base64).
//! Version 5 adds the close signal, `[255, channel]`, the only way to half-close one direction. Also the byte stream
//! that tunnelled SPDY runs in.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures_util::{
    Sink, SinkExt, Stream, StreamExt,
    stream::{SplitSink, SplitStream},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf},
    sync::mpsc,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};
use tokio_util::sync::PollSender;

use crate::{
    Backend, Size, Streams, Wanted, Writer,
    negotiate::{Channels, Version},
    remote::{Call, Sizes},
    status::Outcome,
};

/// The longest message that is read. Clients write 32 KiB and the channel.
const MOST_MESSAGE: usize = 1 << 20;
/// The longest payload that is sent.
const MOST_SENT: usize = 32 << 10;
/// Input that may wait for the process before the client is not read from any more.
const MOST_INPUT: usize = 4 << 20;
/// Messages that may wait for the client.
const WAITING: usize = 8;
/// Sizes that may wait.
const SIZES: usize = 16;
/// How long the end may take when the client does not answer.
pub(crate) const GOODBYE: Duration = Duration::from_secs(5);

const CLOSE_SIGNAL: u8 = 255;

/// The channels of exec and attach.
mod channel {
    pub(super) const STDIN: u8 = 0;
    pub(super) const STDOUT: u8 = 1;
    pub(super) const STDERR: u8 = 2;
    pub(super) const ERROR: u8 = 3;
    pub(super) const RESIZE: u8 = 4;
}

/// A WebSocket whose handshake is done.
pub(crate) async fn accept<Io: AsyncRead + AsyncWrite + Unpin>(io: Io) -> WebSocketStream<Io> {
    let config =
        WebSocketConfig::default().max_message_size(Some(MOST_MESSAGE)).max_frame_size(Some(MOST_MESSAGE));
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await
}

/// Serves one exec or attach. `end` says when it is to end early, and why.
pub(crate) async fn serve<Io>(
    socket: WebSocketStream<Io>,
    call: Call,
    channels: Channels,
    backend: &impl Backend,
    end: impl Future<Output = &'static str>,
) where
    Io: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let wanted = call.wanted();
    let (sink, source) = socket.split();
    let (output, messages) = mpsc::channel(WAITING);
    let writer = tokio::spawn(write(sink, messages));
    let (streams, input) = channels.open(wanted, &output);
    // The reference server says hello on its lowest channel, and some clients wait for it.
    let _ = output.send(channels.message(channel::STDIN, b"")).await;
    let reading = read(source, channels, input);
    tokio::pin!(reading);
    let outcome = tokio::select! {
        outcome = call.run(backend, streams) => Some(outcome),
        () = &mut reading => None,
        why = end => Some(Outcome::Failed(why.into())),
    };
    if let Some(outcome) = outcome {
        let word = channels.message(channel::ERROR, &outcome.text(channels.version >= Version::V4));
        let end = async {
            let _ = output.send(word).await;
            let _ = output.send(close()).await;
            // Until the client has closed as well, so that the last word is not lost in a reset.
            reading.await;
        };
        let _ = timeout(GOODBYE, end).await;
    }
    drop(output);
    let abort = writer.abort_handle();
    if timeout(GOODBYE, writer).await.is_err() {
        abort.abort();
    }
}

/// The normal end.
pub(crate) fn close() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: Default::default() }))
}

/// Where the client's messages go.
struct Input {
    stdin: Option<DuplexStream>,
    sizes: mpsc::Sender<Size>,
    parser: Sizes,
}

impl Channels {
    fn open(self, wanted: Wanted, output: &mpsc::Sender<Message>) -> (Streams, Input) {
        let (sizes, resize) = mpsc::channel(SIZES);
        let (reader, stdin) = tokio::io::duplex(MOST_INPUT);
        let writer = |wanted: bool, channel| {
            let writer = ChannelWriter { channels: self, channel, output: PollSender::new(output.clone()) };
            wanted.then(|| -> Writer { Box::pin(writer) })
        };
        let streams = Streams {
            stdin: wanted.stdin.then(|| -> crate::Reader { Box::pin(reader) }),
            stdout: writer(wanted.stdout, channel::STDOUT),
            stderr: writer(wanted.stderr && !wanted.tty, channel::STDERR),
            resize,
        };
        (streams, Input { stdin: wanted.stdin.then_some(stdin), sizes, parser: Sizes::default() })
    }

    /// A message of ours.
    pub(crate) fn message(self, channel: u8, payload: &[u8]) -> Message {
        if self.base64 {
            let mut text = String::with_capacity(1 + payload.len() * 4 / 3 + 4);
            text.push(char::from(b'0'.saturating_add(channel)));
            STANDARD.encode_string(payload, &mut text);
            return Message::text(text);
        }
        let mut bytes = Vec::with_capacity(1 + payload.len());
        bytes.push(channel);
        bytes.extend_from_slice(payload);
        Message::binary(bytes)
    }

    /// A message of the client's: its channel and payload. None for what is neither.
    pub(crate) fn parse(self, message: &[u8]) -> Option<(u8, Vec<u8>)> {
        let (first, payload) = message.split_first()?;
        match self.base64 {
            false => Some((*first, payload.to_vec())),
            true => {
                Some((first.checked_sub(b'0').filter(|digit| *digit < 10)?, STANDARD.decode(payload).ok()?))
            }
        }
    }
}

/// Reads until the client leaves or breaks the protocol.
async fn read<Io>(mut source: SplitStream<WebSocketStream<Io>>, channels: Channels, mut input: Input)
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(Ok(message)) = source.next().await {
        if message.is_close() {
            break;
        }
        if !message.is_binary() && !message.is_text() {
            continue;
        }
        let Some((channel, payload)) = channels.parse(&message.into_data()) else { break };
        match channel {
            channel::STDIN => {
                let Some(stdin) = &mut input.stdin else { continue };
                // The process has closed its end: what still comes is dropped, as a pipe would.
                if !payload.is_empty() && stdin.write_all(&payload).await.is_err() {
                    input.stdin = None;
                }
            }
            channel::RESIZE => {
                let Some(sizes) = input.parser.feed(&payload) else { break };
                for size in sizes {
                    // A terminal that nobody reads sizes of loses them.
                    let _ = input.sizes.try_send(size);
                }
            }
            CLOSE_SIGNAL if channels.version >= Version::V5 && payload == [channel::STDIN] => {
                input.stdin = None
            }
            _ => {}
        }
    }
}

/// Reads what a client sent, all of it at once.
#[cfg(fuzzing)]
pub(crate) async fn fuzz(choice: u8, bytes: &[u8]) {
    let version = if choice & 1 == 0 { Version::V5 } else { Version::V1 };
    let channels = Channels { version, base64: choice & 2 != 0 };
    let (mut client, server) = tokio::io::duplex(1 << 20);
    let (output, _messages) = mpsc::channel(WAITING);
    let wanted = Wanted { tty: true, stdin: true, stdout: true, stderr: false };
    let (_streams, input) = channels.open(wanted, &output);
    let (_sink, source) = accept(server).await.split();
    let sent = client.write_all(bytes).await;
    drop(client);
    if sent.is_ok() {
        read(source, channels, input).await;
    }
}

/// Sends what comes through the channel until all its senders are gone.
async fn write<Io>(mut sink: SplitSink<WebSocketStream<Io>, Message>, mut messages: mpsc::Receiver<Message>)
where
    Io: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(message) = messages.recv().await {
        let last = message.is_close();
        if sink.send(message).await.is_err() || last {
            break;
        }
    }
    let _ = sink.close().await;
}

/// One channel towards the client. Every write is a message.
pub(crate) struct ChannelWriter {
    pub(crate) channels: Channels,
    pub(crate) channel: u8,
    pub(crate) output: PollSender<Message>,
}

impl AsyncWrite for ChannelWriter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.output.poll_reserve(cx)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        let length = bytes.len().min(MOST_SENT);
        let message = self.channels.message(self.channel, bytes.get(..length).unwrap_or_default());
        self.output.send_item(message).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Ends of output are told by the last word, not per channel.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The binary messages of a WebSocket joined together, as SPDY in a tunnel wants them.
pub(crate) struct Tunnel<Io> {
    socket: WebSocketStream<Io>,
    rest: Bytes,
}

impl<Io> Tunnel<Io> {
    pub(crate) fn new(socket: WebSocketStream<Io>) -> Tunnel<Io> {
        Tunnel { socket, rest: Bytes::new() }
    }
}

fn broken(error: tungstenite::Error) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tunnel<Io> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.rest = bytes,
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
            }
        }
        let length = self.rest.len().min(out.remaining());
        out.put_slice(&self.rest.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tunnel<Io> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(broken)?;
        let piece = bytes.get(..bytes.len().min(MOST_SENT)).unwrap_or_default();
        Pin::new(&mut self.socket).start_send(Message::binary(piece.to_vec())).map_err(broken)?;
        // Sent when the socket takes it: at the latest, the next write waits for that.
        let _ = Pin::new(&mut self.socket).poll_flush(cx).map_err(broken)?;
        Poll::Ready(Ok(piece.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(broken)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(cx).map_err(broken)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: Channels = Channels { version: Version::V5, base64: false };
    const BASE64: Channels = Channels { version: Version::V4, base64: true };

    #[test]
    fn messages_name_their_channel() {
        assert_eq!(PLAIN.message(1, b"a").into_data(), Bytes::from_static(b"\x01a"));
        assert_eq!(BASE64.message(2, b"a").into_data(), Bytes::from_static(b"2YQ=="));
        assert_eq!(BASE64.parse(b"4e30="), Some((4, b"{}".to_vec())));
        for bad in [&b""[..], b"/YQ==", b":YQ==", b"1!"] {
            assert_eq!(BASE64.parse(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_message_ends_in_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = PLAIN.parse(&bytes);
            let _ = BASE64.parse(&bytes);
        }

        #[test]
        fn what_is_sent_can_be_read(channel in 0u8..10, payload in prop::collection::vec(any::<u8>(), 0..200)) {
            for channels in [PLAIN, BASE64] {
                let message = channels.message(channel, &payload).into_data();
                prop_assert_eq!(channels.parse(&message), Some((channel, payload.clone())));
            }
        }
    }
}

//! One SPDY connection, serving side: a reading task takes frames apart and fills the streams' inboxes, a writing
//! task sends what the streams give.
//!
//! The protocol as it is used has no flow control, so memory is bounded here: a peer that sends more to one stream
//! than its owner reads is not read from until there is room ([`MOST_BUFFERED`], per connection). Pings are
//! answered, and streams accepted, on a way of their own: a slow peer cannot hold up the reading task, and one
//! that asks for answers without taking them is cut off ([`MOST_ANSWERS`]).

use std::{
    collections::{HashMap, VecDeque},
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf},
    sync::{Notify, mpsc},
    time::timeout,
};
use tokio_util::{sync::PollSender, task::AbortOnDropHandle};

use super::{
    Headers, Violation,
    frame::{self, Frame},
    headers::{Deflater, Inflater},
};

/// Bytes that may lie in the inboxes of one connection.
pub const MOST_BUFFERED: usize = 4 << 20;
/// Streams that may be open at a time. A port-forward has two for each connection.
pub const MOST_STREAMS: usize = 4096;
/// Answers (pings, accepted and refused streams) that may wait for the peer to take them.
pub const MOST_ANSWERS: usize = 8192;
/// Chunks of output that may wait for the peer.
const WAITING: usize = 8;
/// How long the goodbye may take when the peer does not read, and how long its own end is waited for afterwards.
const GOODBYE: Duration = Duration::from_secs(5);
/// How much is read at once.
const READ: usize = 128 << 10;

/// Status of a reset: we have no more use for the stream.
const CANCEL: u32 = 5;

/// A served connection. Dropping it without a goodbye closes it at once.
pub struct Connection {
    shared: Arc<Shared>,
    opened: mpsc::UnboundedReceiver<Stream>,
    output: mpsc::Sender<Output>,
    writer: AbortOnDropHandle<()>,
    reader: AbortOnDropHandle<()>,
}

/// A stream that the peer opened. Reading ends where the peer half-closed; shutting down half-closes our side.
/// Dropping it resets what is still open.
pub struct Stream {
    /// Odd, growing.
    pub id: u32,
    /// What the peer said of it.
    pub headers: Headers,
    shared: Arc<Shared>,
    output: PollSender<Output>,
    finished: bool,
}

struct Shared {
    state: Mutex<State>,
    /// There is room again, or the connection has ended.
    room: Notify,
    answers: mpsc::UnboundedSender<Answer>,
}

struct State {
    inboxes: HashMap<u32, Inbox>,
    buffered: usize,
    /// Handed to the writing task and not yet written.
    answers: usize,
    last: u32,
    ended: bool,
    active: Instant,
}

#[derive(Default)]
struct Inbox {
    chunks: VecDeque<Bytes>,
    finished: bool,
    reset: bool,
    waker: Option<Waker>,
    /// Outputs on their way to the peer, and that a reset has to follow the last of them.
    queued: usize,
    dropped: bool,
}

/// Output of a stream. It waits when the peer is slow.
enum Output {
    Data { id: u32, payload: Bytes },
    Finish { id: u32 },
    Close,
}

/// What the peer must be told, however slow it is.
enum Answer {
    Accept(u32),
    Reset(u32),
    Ping(u32),
}

impl Connection {
    /// Serves the peer at the other end of `io`; `early` was read from it already.
    pub fn serve<Io>(io: Io, early: Bytes) -> Connection
    where
        Io: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (input, sink) = tokio::io::split(io);
        let (output, outputs) = mpsc::channel(WAITING);
        let (answers, answered) = mpsc::unbounded_channel();
        let (open, opened) = mpsc::unbounded_channel();
        let state = State {
            inboxes: HashMap::new(),
            buffered: 0,
            answers: 0,
            last: 0,
            ended: false,
            active: Instant::now(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), room: Notify::new(), answers });
        let writer = AbortOnDropHandle::new(tokio::spawn(write(sink, outputs, answered, shared.clone())));
        let reading = Reading {
            shared: shared.clone(),
            open,
            output: output.downgrade(),
            inflater: Inflater::default(),
        };
        let reader = AbortOnDropHandle::new(tokio::spawn(reading.run(input, early)));
        Connection { shared, opened, output, writer, reader }
    }

    /// The next stream that the peer opens; none when the connection has ended.
    pub async fn accept(&mut self) -> Option<Stream> {
        self.opened.recv().await
    }

    /// For how long nothing has come or gone.
    pub fn idle(&self) -> Duration {
        self.shared.state().active.elapsed()
    }

    /// Sends what streams have given, says goodbye and closes. Bounded, whatever the peer does.
    ///
    /// What the peer still sends is read until it closes as well: closing a socket with unread bytes makes the kernel
    /// send a reset, and that destroys what the peer has not read yet (RFC 1122, section 4.2.2.13).
    pub async fn close(self) {
        let Connection { shared, opened, output, mut writer, mut reader } = self;
        drop(opened);
        let goodbye = async {
            if output.send(Output::Close).await.is_ok() {
                let _ = (&mut writer).await;
            }
        };
        let said = timeout(GOODBYE, goodbye).await.is_ok();
        shared.end();
        if said {
            let _ = timeout(GOODBYE, &mut reader).await;
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes everyone: there will be no more bytes.
    fn end(&self) {
        let mut state = self.state();
        state.ended = true;
        let wakers: Vec<_> = state.inboxes.values_mut().filter_map(|inbox| inbox.waker.take()).collect();
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
        self.room.notify_waiters();
        self.room.notify_one();
    }

    /// An output of a stream is written. True when it was the last one of a stream that is to be reset.
    fn sent(&self, id: u32) -> bool {
        let mut state = self.state();
        let Some(inbox) = state.inboxes.get_mut(&id) else { return false };
        inbox.queued = inbox.queued.saturating_sub(1);
        let last = inbox.dropped && inbox.queued == 0;
        last && state.inboxes.remove(&id).is_some_and(|inbox| !inbox.reset)
    }

    fn answer(&self, answer: Answer) -> Result<(), Violation> {
        let mut state = self.state();
        state.answers += 1;
        if state.answers > MOST_ANSWERS {
            return Err(Violation::Flood);
        }
        // The writing task is gone only when the connection has ended.
        let _ = self.answers.send(answer);
        Ok(())
    }
}

/// The reading task.
struct Reading {
    shared: Arc<Shared>,
    open: mpsc::UnboundedSender<Stream>,
    output: mpsc::WeakSender<Output>,
    inflater: Inflater,
}

impl Reading {
    async fn run<Io: AsyncRead + Send>(mut self, mut input: ReadHalf<Io>, early: Bytes) {
        let mut buffer = BytesMut::from(early.as_ref());
        let mut frames = frame::Reader::default();
        let mut going = true;
        while going {
            loop {
                match frames.next(&mut buffer) {
                    Ok(Some(Frame::GoAway)) => going = false,
                    Ok(Some(frame)) => {
                        if let Err(violation) = self.take(frame).await {
                            tracing::debug!(%violation, "SPDY connection closed");
                            return self.shared.end();
                        }
                    }
                    Ok(None) => break,
                    Err(violation) => {
                        tracing::debug!(%violation, "SPDY connection closed");
                        return self.shared.end();
                    }
                }
            }
            buffer.reserve(READ);
            match input.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(_) => self.shared.state().active = Instant::now(),
            }
            if self.shared.state().ended {
                break;
            }
        }
        self.shared.end();
        drop(self);
        let mut rest = vec![0; frame::MOST_SENT];
        while let Ok(1..) = input.read(&mut rest).await {}
    }

    async fn take(&mut self, frame: Frame) -> Result<(), Violation> {
        match frame {
            Frame::SynStream { id, fin, block } => self.opened(id, fin, &block),
            Frame::Data { id, fin, payload } => self.data(id, fin, payload).await,
            Frame::Headers { id, fin, block } => {
                // Read for the sake of the shared compression; we act on none.
                self.inflater.headers(&block)?;
                self.data(id, fin, Bytes::new()).await
            }
            Frame::SynReply { block, .. } => self.inflater.headers(&block).map(drop),
            Frame::Reset { id, .. } => {
                self.change(id, |inbox, _| inbox.reset = true);
                Ok(())
            }
            // Ours are odd numbered nowhere: we send no pings, so each is the peer's.
            Frame::Ping { id } => self.shared.answer(Answer::Ping(id)),
            Frame::GoAway | Frame::Other => Ok(()),
        }
    }

    fn opened(&mut self, id: u32, fin: bool, block: &[u8]) -> Result<(), Violation> {
        let headers = self.inflater.headers(block)?;
        let Some(output) = self.output.upgrade() else { return Ok(()) };
        {
            let mut state = self.shared.state();
            if id.is_multiple_of(2) || id <= state.last {
                return Err(Violation::StreamId);
            }
            if state.inboxes.len() >= MOST_STREAMS {
                return Err(Violation::Streams);
            }
            state.last = id;
            state.inboxes.insert(id, Inbox { finished: fin, ..Inbox::default() });
        }
        let stream = Stream {
            id,
            headers,
            shared: self.shared.clone(),
            output: PollSender::new(output),
            finished: false,
        };
        self.shared.answer(Answer::Accept(id))?;
        // Nobody accepts any more: dropping the stream resets it.
        let _ = self.open.send(stream);
        Ok(())
    }

    /// Waits for room before it keeps more than the connection may; data of a closed stream is dropped.
    async fn data(&mut self, id: u32, fin: bool, payload: Bytes) -> Result<(), Violation> {
        while !payload.is_empty() {
            let room = self.shared.room.notified();
            {
                let state = self.shared.state();
                let wanted = state.inboxes.get(&id).is_some_and(|inbox| !inbox.dropped);
                if state.ended || state.buffered < MOST_BUFFERED || !wanted {
                    break;
                }
            }
            room.await;
        }
        let length = payload.len();
        self.change(id, |inbox, buffered| {
            if length > 0 && !inbox.dropped {
                inbox.chunks.push_back(payload);
                *buffered += length;
            }
            inbox.finished |= fin;
        });
        Ok(())
    }

    fn change(&self, id: u32, change: impl FnOnce(&mut Inbox, &mut usize)) {
        let mut state = self.shared.state();
        let State { inboxes, buffered, .. } = &mut *state;
        let Some(inbox) = inboxes.get_mut(&id) else { return };
        change(inbox, buffered);
        let waker = inbox.waker.take();
        drop(state);
        waker.into_iter().for_each(Waker::wake);
    }
}

/// The writing task.
async fn write<Io: AsyncWrite + Send>(
    mut sink: WriteHalf<Io>,
    mut outputs: mpsc::Receiver<Output>,
    mut answers: mpsc::UnboundedReceiver<Answer>,
    shared: Arc<Shared>,
) {
    let mut deflater = Deflater::default();
    let mut frames = BytesMut::new();
    loop {
        let mut payload = Bytes::new();
        let mut trailer = None;
        let mut closing = false;
        tokio::select! {
            biased;
            answer = answers.recv() => {
                let Some(answer) = answer else { break };
                let mut next = Some(answer);
                while let Some(answer) = next {
                    if put(&mut frames, &mut deflater, answer).is_err() {
                        return shared.end();
                    }
                    let mut state = shared.state();
                    state.answers = state.answers.saturating_sub(1);
                    drop(state);
                    next = answers.try_recv().ok();
                }
            }
            output = outputs.recv() => match output {
                Some(Output::Data { id, payload: bytes }) => {
                    frame::data_header(&mut frames, id, false, bytes.len());
                    payload = bytes;
                    // A reset cannot stand between a header and its payload.
                    if shared.sent(id) {
                        trailer = Some(id);
                    }
                }
                Some(Output::Finish { id }) => {
                    frame::data_header(&mut frames, id, true, 0);
                    if shared.sent(id) {
                        trailer = Some(id);
                    }
                }
                Some(Output::Close) | None => {
                    let last = shared.state().last;
                    frame::go_away(&mut frames, last);
                    closing = true;
                }
            },
        }
        let head = frames.split().freeze();
        if let Some(id) = trailer {
            frame::reset(&mut frames, id, CANCEL);
        }
        let mut whole = head.chain(payload).chain(frames.split().freeze());
        if sink.write_all_buf(&mut whole).await.is_err() {
            break;
        }
        shared.state().active = Instant::now();
        if closing {
            break;
        }
    }
    let _ = sink.shutdown().await;
    shared.end();
}

fn put(frames: &mut BytesMut, deflater: &mut Deflater, answer: Answer) -> Result<(), Violation> {
    match answer {
        Answer::Accept(id) => frame::syn_reply(frames, id, false, &deflater.block(&Headers::default())?),
        Answer::Reset(id) => frame::reset(frames, id, CANCEL),
        Answer::Ping(id) => frame::ping(frames, id),
    }
    Ok(())
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.shared.state();
        let ended = state.ended;
        let Some(inbox) = state.inboxes.get_mut(&self.id) else { return Poll::Ready(Ok(())) };
        if inbox.chunks.is_empty() {
            return match (inbox.reset, inbox.finished, ended) {
                (true, ..) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                (_, true, _) | (.., true) => Poll::Ready(Ok(())),
                _ => {
                    inbox.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            };
        }
        let before = out.remaining();
        while let Some(chunk) = inbox.chunks.front_mut().filter(|_| out.remaining() > 0) {
            let length = chunk.len().min(out.remaining());
            out.put_slice(&chunk.split_to(length));
            if chunk.is_empty() {
                inbox.chunks.pop_front();
            }
        }
        let length = before - out.remaining();
        state.buffered = state.buffered.saturating_sub(length);
        drop(state);
        self.shared.room.notify_one();
        Poll::Ready(Ok(()))
    }
}

impl Stream {
    /// A place for one output, or an error when nobody will read it.
    fn poll_place(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        {
            let state = self.shared.state();
            if state.ended || state.inboxes.get(&self.id).is_none_or(|inbox| inbox.reset) {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
        }
        self.output.poll_reserve(cx).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn put(&mut self, output: Output) -> io::Result<()> {
        if let Some(inbox) = self.shared.state().inboxes.get_mut(&self.id) {
            inbox.queued += 1;
        }
        self.output.send_item(output).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        std::task::ready!(self.poll_place(cx))?;
        let length = bytes.len().min(frame::MOST_SENT);
        let payload = Bytes::copy_from_slice(bytes.get(..length).unwrap_or_default());
        let id = self.id;
        self.put(Output::Data { id, payload })?;
        Poll::Ready(Ok(length))
    }

    /// Every write is on its way already.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.finished {
            return Poll::Ready(Ok(()));
        }
        // Half-closing a stream that the peer has left is no error.
        if std::task::ready!(self.poll_place(cx)).is_ok() {
            let id = self.id;
            self.put(Output::Finish { id })?;
        }
        self.finished = true;
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        let Some(inbox) = state.inboxes.get_mut(&self.id) else { return };
        let left: usize = inbox.chunks.drain(..).map(|chunk| chunk.len()).sum();
        let over = inbox.reset || (inbox.finished && self.finished);
        // What was written goes out first: answers overtake it.
        inbox.dropped = !over && inbox.queued > 0;
        if !inbox.dropped {
            state.inboxes.remove(&self.id);
        }
        let now = !over && !state.inboxes.contains_key(&self.id);
        state.buffered = state.buffered.saturating_sub(left);
        drop(state);
        self.shared.room.notify_one();
        if now {
            let _ = self.shared.answer(Answer::Reset(self.id));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;

    use super::*;

    /// The other end, by hand.
    struct Peer {
        io: DuplexStream,
        out: BytesMut,
        input: BytesMut,
        frames: frame::Reader,
        deflater: Deflater,
    }

    impl Peer {
        fn new(size: usize) -> (Peer, Connection) {
            let (io, served) = tokio::io::duplex(size);
            let peer = Peer {
                io,
                out: BytesMut::new(),
                input: BytesMut::new(),
                frames: frame::Reader::default(),
                deflater: Deflater::default(),
            };
            (peer, Connection::serve(served, Bytes::new()))
        }

        fn open(&mut self, id: u32) {
            let block = self.deflater.block(&Headers::from([("streamtype", "data")])).unwrap();
            frame::syn_stream(&mut self.out, id, false, &block);
        }

        fn data(&mut self, id: u32, fin: bool, bytes: &[u8]) {
            frame::data_header(&mut self.out, id, fin, bytes.len());
            self.out.extend_from_slice(bytes);
        }

        async fn send(&mut self) {
            let out = self.out.split();
            self.io.write_all(&out).await.unwrap();
        }

        async fn next(&mut self) -> Option<Frame> {
            loop {
                if let Some(frame) = self.frames.next(&mut self.input).unwrap() {
                    return Some(frame);
                }
                if self.io.read_buf(&mut self.input).await.unwrap() == 0 {
                    return None;
                }
            }
        }
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_half_closes_are_kept_apart() {
        let (mut peer, mut connection) = Peer::new(1 << 16);
        peer.open(1);
        peer.data(1, true, b"in");
        peer.send().await;
        let mut stream = connection.accept().await.unwrap();
        assert_eq!((stream.id, stream.headers.get("streamtype")), (1, Some("data")));
        let mut got = String::new();
        stream.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "in");
        stream.write_all(b"out").await.unwrap();
        stream.shutdown().await.unwrap();
        assert!(matches!(peer.next().await, Some(Frame::SynReply { id: 1, .. })));
        assert!(
            matches!(peer.next().await, Some(Frame::Data { fin: false, payload, .. }) if payload == "out")
        );
        assert!(matches!(peer.next().await, Some(Frame::Data { fin: true, .. })));
        drop(stream);
        connection.close().await;
        assert_eq!(peer.next().await, Some(Frame::GoAway));
        assert_eq!(peer.next().await, None);
    }

    #[tokio::test]
    async fn a_ping_is_echoed_while_a_stream_is_stuck() {
        let (mut peer, mut connection) = Peer::new(1 << 20);
        peer.open(1);
        peer.data(1, false, &[7; 100_000]);
        frame::ping(&mut peer.out, 5);
        peer.send().await;
        let _stuck = connection.accept().await.unwrap();
        assert!(matches!(peer.next().await, Some(Frame::SynReply { .. })));
        assert_eq!(peer.next().await, Some(Frame::Ping { id: 5 }));
    }

    #[tokio::test]
    async fn a_peer_that_floods_a_stream_is_not_read_from_until_there_is_room() {
        let (mut peer, mut connection) = Peer::new(1 << 10);
        peer.open(1);
        peer.send().await;
        let mut stream = connection.accept().await.unwrap();
        let shared = connection.shared.clone();
        let flood = tokio::spawn(async move {
            for _ in 0..2 * MOST_BUFFERED / frame::MOST_SENT {
                peer.data(1, false, &[1; frame::MOST_SENT]);
                peer.send().await;
            }
            peer.data(1, true, b"");
            peer.send().await;
            peer
        });
        while shared.state().buffered < MOST_BUFFERED {
            tokio::task::yield_now().await;
        }
        assert!(!flood.is_finished());
        assert!(shared.state().buffered <= MOST_BUFFERED + frame::MOST_SENT);
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await.unwrap();
        assert_eq!(got.len(), 2 * MOST_BUFFERED / frame::MOST_SENT * frame::MOST_SENT);
        assert_eq!(shared.state().buffered, 0);
        flood.await.unwrap();
    }

    #[tokio::test]
    async fn what_a_peer_sends_after_the_goodbye_is_read_until_it_closes() {
        let (mut peer, mut connection) = Peer::new(64);
        peer.open(1);
        peer.send().await;
        let mut stream = connection.accept().await.unwrap();
        assert!(matches!(peer.next().await, Some(Frame::SynReply { .. })));
        stream.write_all(b"last").await.unwrap();
        drop(stream);
        let closing = tokio::spawn(connection.close());
        while peer.next().await.unwrap() != Frame::GoAway {}
        // More than fits in between: it is taken, whatever it is.
        peer.io.write_all(&[0; 1000]).await.unwrap();
        assert!(!closing.is_finished());
        assert_eq!(peer.next().await, None);
        drop(peer);
        closing.await.unwrap();
    }

    #[tokio::test]
    async fn streams_that_come_out_of_order_end_the_connection() {
        for ids in [[3, 1], [1, 1], [1, 2]] {
            let (mut peer, mut connection) = Peer::new(1 << 16);
            ids.into_iter().for_each(|id| peer.open(id));
            peer.send().await;
            while connection.accept().await.is_some() {}
        }
    }

    #[tokio::test]
    async fn pings_without_end_end_the_connection() {
        let (mut peer, mut connection) = Peer::new(1 << 10);
        let flood = async {
            loop {
                frame::ping(&mut peer.out, 1);
                let out = peer.out.split();
                if peer.io.write_all(&out).await.is_err() {
                    break;
                }
            }
        };
        let ended = async {
            assert!(connection.accept().await.is_none());
            connection.close().await;
        };
        tokio::join!(flood, ended);
    }

    #[tokio::test]
    async fn a_reset_does_not_overtake_what_was_written_before_it() {
        // Room for little, so that outputs wait.
        let (mut peer, mut connection) = Peer::new(64);
        peer.open(1);
        peer.send().await;
        let mut stream = connection.accept().await.unwrap();
        assert!(matches!(peer.next().await, Some(Frame::SynReply { .. })));
        for _ in 0..WAITING {
            stream.write_all(&[7; 100]).await.unwrap();
        }
        drop(stream);
        let mut got = 0;
        loop {
            match peer.next().await.unwrap() {
                Frame::Data { id: 1, payload, .. } => got += payload.len(),
                frame => break assert_eq!(frame, Frame::Reset { id: 1, status: CANCEL }),
            }
        }
        assert_eq!(got, WAITING * 100);
        assert!(connection.shared.state().inboxes.is_empty());
    }

    #[tokio::test]
    async fn a_dropped_stream_is_reset_and_the_others_live() {
        let (mut peer, mut connection) = Peer::new(1 << 16);
        peer.open(1);
        peer.open(3);
        peer.send().await;
        drop(connection.accept().await);
        let mut other = connection.accept().await.unwrap();
        for _ in 0..2 {
            assert!(matches!(peer.next().await, Some(Frame::SynReply { .. })));
        }
        assert_eq!(peer.next().await, Some(Frame::Reset { id: 1, status: CANCEL }));
        peer.data(1, true, b"late");
        peer.data(3, true, b"on");
        peer.send().await;
        let mut got = String::new();
        other.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "on");
    }
}

//! Exec and attach, whatever carries them: a set of streams that the client opened becomes one call of the backend,
//! and its outcome the last word. Here also the collecting of SPDY streams; WebSocket has its channels from the start.

use std::{pin::pin, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    time::timeout,
};

use crate::{
    Attach, Backend, Exec, Reader, Size, Streams, Wanted, Writer,
    negotiate::Version,
    spdy::{Connection, Stream},
    status::Outcome,
};

/// Sizes that may wait for the backend; more would be of a terminal that is being dragged.
const SIZES: usize = 16;
/// The longest JSON object of a size, with room.
const MOST_SIZE: usize = 256;
/// How long the last word may take when the client does not read.
const LAST_WORD: Duration = Duration::from_secs(30);

/// What is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Exec(Exec),
    Attach(Attach),
}

impl Call {
    pub(crate) fn wanted(&self) -> Wanted {
        match self {
            Call::Exec(exec) => exec.streams,
            Call::Attach(attach) => attach.streams,
        }
    }

    pub(crate) async fn run(self, backend: &impl Backend, streams: Streams) -> Outcome {
        let outcome = match self {
            Call::Exec(exec) => backend.exec(exec, streams).await.map(Outcome::Exit),
            Call::Attach(attach) => backend.attach(attach, streams).await.map(|()| Outcome::Exit(0)),
        };
        outcome.unwrap_or_else(Outcome::Failed)
    }
}

/// Serves one exec or attach over SPDY. `end` says when it is to end early, and why.
pub(crate) async fn serve(
    mut connection: Connection,
    call: Call,
    version: Version,
    creation: Duration,
    backend: &impl Backend,
    end: impl Future<Output = &'static str>,
) {
    let mut end = pin!(end);
    let opened = tokio::select! {
        opened = timeout(creation, collect(&mut connection, call.wanted(), version)) => opened,
        _ = &mut end => return connection.close().await,
    };
    if let Ok(Some(Opened { mut error, streams })) = opened {
        let outcome = tokio::select! {
            outcome = call.run(backend, streams) => outcome,
            // The client left; the backend notices by its streams' ends, or here by being dropped.
            () = gone(&mut connection) => return connection.close().await,
            why = end => Outcome::Failed(why.into()),
        };
        let word = async {
            error.write_all(&outcome.text(version >= Version::V4)).await?;
            error.shutdown().await
        };
        let _ = timeout(LAST_WORD, word).await;
    }
    connection.close().await;
}

/// Returns when the client has left. Streams that it opens meanwhile have no use and are reset.
async fn gone(connection: &mut Connection) {
    while connection.accept().await.is_some() {}
}

struct Opened {
    error: Stream,
    streams: Streams,
}

/// Waits for every stream that was asked for. None when the client leaves first.
async fn collect(connection: &mut Connection, wanted: Wanted, version: Version) -> Option<Opened> {
    let (mut error, mut stdin, mut stdout, mut stderr) = (None, None, None, None);
    let (sizes, resize) = mpsc::channel(SIZES);
    let mut sizes = Some(sizes);
    loop {
        let complete = error.is_some()
            && wanted.stdin == stdin.is_some()
            && wanted.stdout == stdout.is_some()
            && (wanted.stderr && !wanted.tty) == stderr.is_some()
            && (!wanted.tty || version < Version::V3 || sizes.is_none());
        if complete {
            break;
        }
        let stream = connection.accept().await?;
        let kind = stream.headers.get("streamtype").unwrap_or_default().to_ascii_lowercase();
        match kind.as_str() {
            "error" => error = Some(stream),
            "stdin" if wanted.stdin => stdin = Some(stream),
            "stdout" if wanted.stdout => stdout = Some(stream),
            "stderr" if wanted.stderr && !wanted.tty => stderr = Some(stream),
            "resize" if wanted.tty => {
                if let Some(sizes) = sizes.take() {
                    tokio::spawn(read_sizes(stream, sizes));
                }
            }
            // Not asked for: dropped, which resets it.
            _ => {}
        }
    }
    let reader = |stream: Stream| -> Reader { Box::pin(stream) };
    let writer = |stream: Stream| -> Writer { Box::pin(stream) };
    let streams =
        Streams { stdin: stdin.map(reader), stdout: stdout.map(writer), stderr: stderr.map(writer), resize };
    Some(Opened { error: error?, streams })
}

async fn read_sizes(mut stream: Stream, sizes: mpsc::Sender<Size>) {
    let mut parser = Sizes::default();
    let mut bytes = [0; MOST_SIZE];
    while let Ok(length @ 1..) = stream.read(&mut bytes).await {
        let Some(found) = parser.feed(bytes.get(..length).unwrap_or_default()) else { return };
        for size in found {
            if sizes.send(size).await.is_err() {
                return;
            }
        }
    }
}

/// Takes JSON objects that follow one another apart.
#[derive(Debug, Default)]
pub(crate) struct Sizes {
    rest: Vec<u8>,
}

impl Sizes {
    /// The sizes that are complete now; none when this is no stream of sizes.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Option<Vec<Size>> {
        self.rest.extend_from_slice(bytes);
        let mut objects = serde_json::Deserializer::from_slice(&self.rest).into_iter::<Size>();
        let mut sizes = Vec::new();
        let mut used = 0;
        let broken = loop {
            match objects.next() {
                Some(Ok(size)) => {
                    sizes.push(size);
                    used = objects.byte_offset();
                }
                Some(Err(error)) => break !error.is_eof(),
                None => break false,
            }
        };
        drop(objects);
        self.rest.drain(..used.min(self.rest.len()));
        (!broken && self.rest.len() <= MOST_SIZE).then_some(sizes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_come_in_any_pieces() {
        let text = br#"{"Width":80,"Height":24} {"Width":100,"Height":30}"#;
        for step in 1..text.len() {
            let mut parser = Sizes::default();
            let found: Vec<Size> = text.chunks(step).flat_map(|piece| parser.feed(piece).unwrap()).collect();
            assert_eq!(
                found,
                [Size { width: 80, height: 24 }, Size { width: 100, height: 30 }],
                "step {step}"
            );
        }
    }

    #[test]
    fn what_is_no_size_ends_the_stream() {
        for text in ["x", r#"{"Width":-1,"Height":2}"#, r#"{"Width":70000,"Height":2}"#, &" ".repeat(300)] {
            assert_eq!(Sizes::default().feed(text.as_bytes()), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Sizes::default().feed(&bytes);
        }
    }
}

//! Turns the compressed stream into the archive on a thread of its own, hashing it on the way, and refuses what
//! inflates out of all proportion.

use std::{
    cell::Cell,
    io::{self, BufReader, Read},
    rc::Rc,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread::JoinHandle,
};

use flate2::bufread::MultiGzDecoder;

use super::Compression;
use crate::digest::Hasher;

/// Pieces of this size go from one thread to the other.
const PIECE: usize = 256 << 10;
/// So many of them may wait.
const WAITING: usize = 4;

/// An archive may always have this many bytes.
const FREE: u64 = 1 << 30;
/// Beyond them, so many bytes for each compressed one. Layers of real images stay below 30 on the whole; gzip itself
/// ends at 1032.
const PROPORTION: u64 = 200;

/// zstd's own bound for decoders: 128 MiB.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Text of the error for an archive that is out of proportion; told from other errors by its kind.
pub(super) const BOMB: io::ErrorKind = io::ErrorKind::FileTooLarge;

/// The archive, as the other thread makes it.
pub(super) struct Archive {
    pieces: Receiver<io::Result<Vec<u8>>>,
    piece: Vec<u8>,
    at: usize,
    thread: JoinHandle<String>,
}

impl Archive {
    pub(super) fn of(
        compressed: impl Read + Send + 'static,
        compression: Compression,
        hasher: Hasher,
    ) -> io::Result<Archive> {
        let (send, pieces) = sync_channel(WAITING);
        let work = move || decompress(compressed, compression, hasher, &send);
        let thread = std::thread::Builder::new().name("decompress".into()).spawn(work)?;
        Ok(Archive { pieces, piece: Vec::new(), at: 0, thread })
    }

    /// Reads what is left, which is part of the digest, and says the digest of it all.
    pub(super) fn digest(mut self) -> io::Result<String> {
        let mut rest = [0; 4096];
        while self.read(&mut rest)? != 0 {}
        drop(self.pieces);
        self.thread.join().map_err(|_| io::Error::other("the decompressing thread panicked"))
    }
}

impl Read for Archive {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() {
            match self.pieces.recv() {
                Ok(piece) => (self.piece, self.at) = (piece?, 0),
                Err(_) => return Ok(0),
            }
        }
        let rest = self.piece.get(self.at..).unwrap_or_default();
        let length = rest.len().min(out.len());
        if let (Some(out), Some(rest)) = (out.get_mut(..length), rest.get(..length)) {
            out.copy_from_slice(rest);
        }
        self.at += length;
        Ok(length)
    }
}

/// Counts what is read through it.
struct Counted<R> {
    inner: R,
    count: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(out)?;
        self.count.set(self.count.get() + length as u64);
        Ok(length)
    }
}

fn decompress(
    compressed: impl Read,
    compression: Compression,
    mut hash: Hasher,
    send: &SyncSender<io::Result<Vec<u8>>>,
) -> String {
    let count = Rc::new(Cell::new(0));
    let input = BufReader::with_capacity(PIECE, Counted { inner: compressed, count: count.clone() });
    let mut archive: Box<dyn Read> = match reader(input, compression) {
        Ok(archive) => archive,
        Err(error) => {
            let _ = send.send(Err(error));
            return String::new();
        }
    };
    let mut total = 0u64;
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        let read = archive.by_ref().take(PIECE as u64).read_to_end(&mut piece);
        hash.update(&piece);
        total += piece.len() as u64;
        let proportionate = total <= FREE + count.get().saturating_mul(PROPORTION);
        let last = piece.is_empty();
        let message = match read {
            Err(error) => Err(error),
            Ok(_) if !proportionate => Err(io::Error::new(BOMB, "the layer inflates out of all proportion")),
            Ok(_) if last => break,
            Ok(_) => Ok(piece),
        };
        let failed = message.is_err();
        // The reader has gone when extraction failed.
        if send.send(message).is_err() || failed {
            break;
        }
    }
    hash.finish().to_string()
}

fn reader<'a>(input: BufReader<impl Read + 'a>, compression: Compression) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match compression {
        Compression::Plain => Box::new(input),
        Compression::Gzip => Box::new(MultiGzDecoder::new(input)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
    })
}

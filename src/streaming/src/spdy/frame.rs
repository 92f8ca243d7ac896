//! Frames of SPDY/3.1 (draft-mbelshe-httpbis-spdy-00, section 2.2 and on; 3.1 differs in flow control, which no
//! client of ours uses). Reads and writes them; what they mean for a stream is the connection's business.
//!
//! Data frames may be 16 MiB long, so their payload is handed on as it comes. Control frames are short, and one that
//! claims to be long ends the connection.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::Violation;

/// The longest control frame that is read. Their headers are cut at 16 KiB when inflated.
pub const MOST_CONTROL: usize = 32 << 10;

/// The longest payload that we send in one data frame.
pub const MOST_SENT: usize = 64 << 10;

const VERSION: u16 = 3;
const FIN: u8 = 1;

/// What was read, by its stream's id. Header blocks are still compressed. `fin` half-closes the peer's direction.
#[allow(missing_docs)] // The fields are those of the draft, which is where they are explained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Opens a stream.
    SynStream { id: u32, fin: bool, block: Bytes },
    /// Accepts one.
    SynReply { id: u32, fin: bool, block: Bytes },
    /// Ends one in both directions.
    Reset { id: u32, status: u32 },
    /// Wants the same back.
    Ping { id: u32 },
    /// No more streams.
    GoAway,
    /// More headers for a stream.
    Headers { id: u32, fin: bool, block: Bytes },
    /// A part of a data frame's payload; `fin` comes with its last part.
    Data { id: u32, fin: bool, payload: Bytes },
    /// SETTINGS, WINDOW_UPDATE, NOOP, CREDENTIAL: read and passed over.
    Other,
}

/// Cuts a byte stream into frames.
#[derive(Debug, Default)]
pub struct Reader {
    /// Stream, remaining bytes and FIN of the data frame that is being read.
    data: Option<(u32, usize, bool)>,
}

impl Reader {
    /// The next frame, or none until more bytes have come. Takes what it used from the buffer.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, Violation> {
        if let Some((id, left, fin)) = self.data {
            return Ok(self.payload(buffer, id, left, fin));
        }
        let Some(header) = buffer.first_chunk::<8>() else { return Ok(None) };
        let word = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
        let flags = header[4];
        let length = u32::from_be_bytes([0, header[5], header[6], header[7]]) as usize;
        if word & 0x8000_0000 == 0 {
            if word == 0 {
                return Err(Violation::StreamId);
            }
            buffer.advance(8);
            return Ok(self.payload(buffer, word, length, flags & FIN != 0));
        }
        if (word >> 16) & 0x7fff != u32::from(VERSION) {
            return Err(Violation::Version);
        }
        if length > MOST_CONTROL {
            return Err(Violation::FrameTooLarge);
        }
        if buffer.len() < 8 + length {
            return Ok(None);
        }
        buffer.advance(8);
        control(word as u16, flags, buffer.split_to(length).freeze()).map(Some)
    }

    fn payload(&mut self, buffer: &mut BytesMut, id: u32, left: usize, fin: bool) -> Option<Frame> {
        if buffer.is_empty() && left > 0 {
            self.data = Some((id, left, fin));
            return None;
        }
        let payload = buffer.split_to(left.min(buffer.len())).freeze();
        let left = left - payload.len();
        self.data = (left > 0).then_some((id, left, fin));
        Some(Frame::Data { id, fin: fin && left == 0, payload })
    }
}

fn control(kind: u16, flags: u8, mut body: Bytes) -> Result<Frame, Violation> {
    let fin = flags & FIN != 0;
    let mut word = || body.try_get_u32().map_err(|_| Violation::FrameTooShort);
    Ok(match kind {
        1 => {
            let id = stream_id(word()?)?;
            let _associated = word()?;
            // Priority and slot: nothing that we act on.
            body.try_get_u16().map_err(|_| Violation::FrameTooShort)?;
            Frame::SynStream { id, fin, block: body }
        }
        2 => Frame::SynReply { id: stream_id(word()?)?, fin, block: body },
        3 => Frame::Reset { id: stream_id(word()?)?, status: word()? },
        6 => Frame::Ping { id: word()? },
        7 => Frame::GoAway,
        8 => Frame::Headers { id: stream_id(word()?)?, fin, block: body },
        _ => Frame::Other,
    })
}

fn stream_id(word: u32) -> Result<u32, Violation> {
    match word & 0x7fff_ffff {
        0 => Err(Violation::StreamId),
        id => Ok(id),
    }
}

/// Opens a stream; only tests and clients send it.
pub fn syn_stream(out: &mut BytesMut, id: u32, fin: bool, block: &[u8]) {
    header(out, 1, fin, block.len() + 10);
    out.put_u32(id);
    out.put_u32(0);
    out.put_u16(0);
    out.put_slice(block);
}

/// Accepts a stream. Clients wait for it.
pub fn syn_reply(out: &mut BytesMut, id: u32, fin: bool, block: &[u8]) {
    header(out, 2, fin, block.len() + 4);
    out.put_u32(id);
    out.put_slice(block);
}

/// Ends a stream in both directions.
pub fn reset(out: &mut BytesMut, id: u32, status: u32) {
    header(out, 3, false, 8);
    out.put_u32(id);
    out.put_u32(status);
}

/// A ping, or the echo of one.
pub fn ping(out: &mut BytesMut, id: u32) {
    header(out, 6, false, 4);
    out.put_u32(id);
}

/// No more streams; status 0 is OK.
pub fn go_away(out: &mut BytesMut, last: u32) {
    header(out, 7, false, 8);
    out.put_u32(last);
    out.put_u32(0);
}

/// The eight bytes in front of a payload, which is at most [`MOST_SENT`] long.
pub fn data_header(out: &mut BytesMut, id: u32, fin: bool, length: usize) {
    out.put_u32(id & 0x7fff_ffff);
    flags_and_length(out, fin, length);
}

fn header(out: &mut BytesMut, kind: u16, fin: bool, length: usize) {
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    flags_and_length(out, fin, length);
}

fn flags_and_length(out: &mut BytesMut, fin: bool, length: usize) {
    // Every caller's length is below 2^24: payloads are cut, control frames are short.
    out.put_u32(u32::from(if fin { FIN } else { 0 }) << 24 | (length as u32 & 0x00ff_ffff));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(bytes: &[u8], step: usize) -> Result<Vec<Frame>, Violation> {
        let (mut reader, mut buffer, mut frames) = (Reader::default(), BytesMut::new(), Vec::new());
        for part in bytes.chunks(step.max(1)) {
            buffer.extend_from_slice(part);
            while let Some(frame) = reader.next(&mut buffer)? {
                frames.push(frame);
            }
        }
        Ok(frames)
    }

    #[test]
    fn frames_come_back_whatever_the_pieces() {
        let mut out = BytesMut::new();
        syn_stream(&mut out, 1, false, b"block");
        data_header(&mut out, 1, true, 3);
        out.put_slice(b"abc");
        data_header(&mut out, 3, true, 0);
        ping(&mut out, 7);
        reset(&mut out, 1, 5);
        go_away(&mut out, 1);
        let whole = all(&out, out.len()).unwrap();
        assert_eq!(
            whole,
            [
                Frame::SynStream { id: 1, fin: false, block: Bytes::from_static(b"block") },
                Frame::Data { id: 1, fin: true, payload: Bytes::from_static(b"abc") },
                Frame::Data { id: 3, fin: true, payload: Bytes::new() },
                Frame::Ping { id: 7 },
                Frame::Reset { id: 1, status: 5 },
                Frame::GoAway,
            ]
        );
        let bytewise = all(&out, 1).unwrap();
        assert_eq!(bytewise.last(), Some(&Frame::GoAway));
        let payload: Vec<u8> = bytewise
            .iter()
            .filter_map(|f| match f {
                Frame::Data { id: 1, payload, .. } => Some(payload.to_vec()),
                _ => None,
            })
            .flatten()
            .collect();
        assert_eq!(payload, b"abc");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(all(&[0, 0, 0, 0, 0, 0, 0, 0], 8), Err(Violation::StreamId));
        assert_eq!(all(&[0x80, 2, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1], 12), Err(Violation::Version));
        assert_eq!(all(&[0x80, 3, 0, 6, 0, 0, 0, 2, 0, 0], 10), Err(Violation::FrameTooShort));
        assert_eq!(all(&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff], 8), Err(Violation::FrameTooLarge));
        assert_eq!(
            all(&[0x80, 3, 0, 1, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 18),
            Err(Violation::StreamId)
        );
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..400), step in 1usize..40) {
            let _ = all(&bytes, step);
        }
    }
}

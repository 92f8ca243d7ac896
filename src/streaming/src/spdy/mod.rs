//! SPDY/3.1, as much as kubectl, kubelet, crictl and critest speak of it: the peer opens streams, each has headers
//! and two directions of bytes. What the streams are for is the business of `exec` and `forward`.

pub mod connection;
mod dictionary;
pub mod frame;
pub mod headers;

pub use connection::{Connection, Stream};
pub use headers::Headers;

/// Why a connection is closed: the peer broke the protocol, or a bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Control frame of another SPDY version.
    #[error("control frame of another SPDY version")]
    Version,
    /// Frame is too short for its type.
    #[error("frame is too short for its type")]
    FrameTooShort,
    /// Control frame is too large.
    #[error("control frame is too large")]
    FrameTooLarge,
    /// Stream id is zero, even, used before or out of order.
    #[error("stream id is zero, even, used before or out of order")]
    StreamId,
    /// Header block is malformed.
    #[error("header block is malformed")]
    Headers,
    /// Header block is too large.
    #[error("header block is too large")]
    HeadersTooLarge,
    /// Header block cannot be decompressed.
    #[error("header block cannot be decompressed")]
    Compression,
    /// Too many streams at a time.
    #[error("too many streams at a time")]
    Streams,
    /// Too many frames that want an answer.
    #[error("too many frames that want an answer")]
    Flood,
}

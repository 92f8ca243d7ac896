//! Frames of SPDY, from a client: the first byte says in how large pieces they arrive.
#![no_main]

use bytes::BytesMut;
use streaming::spdy::frame::Reader;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((step, bytes)) = bytes.split_first() else { return };
    let (mut reader, mut buffer) = (Reader::default(), BytesMut::new());
    for piece in bytes.chunks(usize::from(*step).max(1)) {
        buffer.extend_from_slice(piece);
        loop {
            match reader.next(&mut buffer) {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});

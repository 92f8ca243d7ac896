//! Header blocks of SPDY, from a client: several on one compressed stream, each behind its length.
#![no_main]

use streaming::spdy::headers::{Deflater, Inflater, MOST_HEADERS};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let (mut inflater, mut rest) = (Inflater::default(), bytes);
    while let Some((length, more)) = rest.split_first_chunk::<2>() {
        let (block, more) = more.split_at(usize::from(u16::from_be_bytes(*length)).min(more.len()));
        let Ok(headers) = inflater.headers(block) else { return };
        assert!(headers.0.len() <= MOST_HEADERS);
        let again = Deflater::default().block(&headers).expect("what was read can be written");
        assert_eq!(Inflater::default().headers(&again).ok(), Some(headers));
        rest = more;
    }
});

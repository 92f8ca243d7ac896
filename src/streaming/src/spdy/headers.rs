//! Header blocks: name and value pairs behind one zlib stream per direction, which lives as long as the connection
//! (SPDY/3 draft, sections 2.6.10 and 2.6.10.1). Bounded before anything is believed: a block of a few bytes can
//! claim, or inflate to, any size.

use bytes::{Buf, BufMut, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::{Violation, dictionary};

/// A block may inflate to this many bytes.
pub const MOST_INFLATED: usize = 16 << 10;
/// A block may have this many headers.
pub const MOST_HEADERS: usize = 64;

/// Names in lower case, in the order of the wire. A name may occur once per block; several values of one name are
/// joined by NUL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(pub Vec<(String, String)>);

impl Headers {
    /// The first value of a header.
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.0.iter().find(|(n, _)| n == name)?;
        value.split('\0').next()
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Headers {
    fn from(pairs: [(&str, &str); N]) -> Headers {
        Headers(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }
}

/// The receiving direction of one connection.
pub struct Inflater(Decompress);

/// The sending direction of one connection.
pub struct Deflater(Compress);

impl Default for Inflater {
    fn default() -> Inflater {
        Inflater(Decompress::new(true))
    }
}

impl Inflater {
    /// The headers of one block. After an error the stream is of no more use: close the connection.
    pub fn headers(&mut self, block: &[u8]) -> Result<Headers, Violation> {
        // One byte more than allowed, so that "full" means "too large" and the loop below is bounded.
        let mut plain = Vec::with_capacity(MOST_INFLATED + 1);
        let begin = self.0.total_in();
        loop {
            let used = usize::try_from(self.0.total_in() - begin).unwrap_or(usize::MAX);
            let rest = block.get(used..).ok_or(Violation::Compression)?;
            let before = (used, plain.len());
            match self.0.decompress_vec(rest, &mut plain, FlushDecompress::Sync) {
                Ok(Status::StreamEnd) => return Err(Violation::Compression),
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(dictionary::bytes()).map_err(|_| Violation::Compression)?;
                    continue;
                }
                Err(_) => return Err(Violation::Compression),
            }
            if plain.len() > MOST_INFLATED {
                return Err(Violation::HeadersTooLarge);
            }
            let used = usize::try_from(self.0.total_in() - begin).unwrap_or(usize::MAX);
            if before == (used, plain.len()) {
                break;
            }
        }
        parse(&plain)
    }
}

impl Default for Deflater {
    fn default() -> Deflater {
        let mut compress = Compress::new(Compression::fast(), true);
        // A fresh stream takes any dictionary; without it the peer reads nothing, which a test would show.
        let _ = compress.set_dictionary(dictionary::bytes());
        Deflater(compress)
    }
}

impl Deflater {
    /// One block, flushed so that the peer can read it at once.
    pub fn block(&mut self, headers: &Headers) -> Result<Vec<u8>, Violation> {
        let mut plain = BytesMut::new();
        plain.put_u32(length(headers.0.len())?);
        for (name, value) in &headers.0 {
            for part in [name, value] {
                plain.put_u32(length(part.len())?);
                plain.put_slice(part.as_bytes());
            }
        }
        let mut block = Vec::with_capacity(plain.len() + 64);
        let before = self.0.total_in();
        loop {
            let used = usize::try_from(self.0.total_in() - before).unwrap_or(usize::MAX);
            let rest = plain.get(used..).unwrap_or_default();
            self.0.compress_vec(rest, &mut block, FlushCompress::Sync).map_err(|_| Violation::Compression)?;
            if block.len() < block.capacity() {
                return Ok(block);
            }
            block.reserve(block.capacity());
        }
    }
}

fn length(length: usize) -> Result<u32, Violation> {
    u32::try_from(length).map_err(|_| Violation::HeadersTooLarge)
}

fn parse(mut plain: &[u8]) -> Result<Headers, Violation> {
    let count = number(&mut plain)?;
    if count > MOST_HEADERS {
        return Err(Violation::HeadersTooLarge);
    }
    let mut headers = Headers(Vec::with_capacity(count));
    for _ in 0..count {
        let (name, value) = (text(&mut plain)?, text(&mut plain)?);
        headers.0.push((name.to_ascii_lowercase(), value));
    }
    match plain.is_empty() {
        true => Ok(headers),
        false => Err(Violation::Headers),
    }
}

fn number(plain: &mut &[u8]) -> Result<usize, Violation> {
    let number = plain.try_get_u32().map_err(|_| Violation::Headers)?;
    usize::try_from(number).map_err(|_| Violation::Headers)
}

fn text(plain: &mut &[u8]) -> Result<String, Violation> {
    let length = number(plain)?;
    let (text, rest) = plain.split_at_checked(length).ok_or(Violation::Headers)?;
    *plain = rest;
    String::from_utf8(text.to_vec()).map_err(|_| Violation::Headers)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn blocks_of_one_direction_share_a_stream() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        for round in 0..20 {
            let headers = Headers(vec![
                ("streamtype".into(), "error".into()),
                ("port".into(), "8080".into()),
                ("requestid".into(), round.to_string()),
            ]);
            let block = deflater.block(&headers).unwrap();
            assert_eq!(inflater.headers(&block), Ok(headers), "round {round}");
        }
    }

    #[test]
    fn a_block_that_inflates_beyond_the_bound_is_refused() {
        let big = Headers(vec![("x".into(), "a".repeat(MOST_INFLATED))]);
        let block = Deflater::default().block(&big).unwrap();
        assert!(block.len() < 1000, "a bomb is small");
        assert_eq!(Inflater::default().headers(&block), Err(Violation::HeadersTooLarge));
    }

    #[test]
    fn counts_and_lengths_are_not_believed() {
        for plain in [
            &[0xff; 4][..],
            &[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff],
            &[0, 0, 0, 1, 0, 0, 0, 1],
            &[],
            &[0, 0, 0, 0, 1],
        ] {
            assert!(parse(plain).is_err(), "{plain:?}");
        }
        assert_eq!(parse(&[0; 4]), Ok(Headers::default()));
    }

    proptest! {
        #[test]
        fn any_headers_come_back(pairs in prop::collection::vec(("[a-z]{1,20}", "\\PC{0,40}"), 0..20)) {
            let headers = Headers(pairs);
            let block = Deflater::default().block(&headers).unwrap();
            prop_assert_eq!(Inflater::default().headers(&block), Ok(headers));
        }

        #[test]
        fn any_bytes_end_in_an_answer(block in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = Inflater::default().headers(&block);
        }
    }
}

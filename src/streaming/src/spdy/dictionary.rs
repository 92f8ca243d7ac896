//! The compression dictionary of SPDY/3 (draft-mbelshe-httpbis-spdy-00, section 2.6.10.1): words with their
//! lengths in front, then a tail without. Both ends must have the same 1423 bytes.

use std::sync::OnceLock;

const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language \
    accept-ranges age allow authorization cache-control connection content-base content-encoding content-language \
    content-length content-location content-md5 content-range content-type date etag expect expires from host \
    if-match if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards \
    pragma proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding \
    upgrade user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public \
    set-cookie keep-alive origin";

const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
    203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden\
    404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable\
    Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT\
    chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,\
    text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

/// The dictionary's bytes.
pub(super) fn bytes() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let mut bytes = Vec::with_capacity(1423);
        for word in WORDS.split_ascii_whitespace().map(|word| word.replace('_', " ")) {
            // The longest word has 19 letters.
            bytes.extend_from_slice(&[0, 0, 0, word.len() as u8]);
            bytes.extend_from_slice(word.as_bytes());
        }
        bytes.extend_from_slice(TAIL.as_bytes());
        bytes
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_dictionary_has_its_length_and_checksum() {
        let bytes = super::bytes();
        // Adler-32, as the zlib stream of every SPDY/3 peer names it (RFC 1950).
        let (a, b) = bytes.iter().fold((1u32, 0u32), |(a, b), byte| {
            let a = (a + u32::from(*byte)) % 65521;
            (a, (b + a) % 65521)
        });
        assert_eq!((bytes.len(), b << 16 | a), (1423, 0xe3c6_a7c2));
    }
}

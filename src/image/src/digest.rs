//! Digests: typed bytes before anything uses them (S37), and the hashers that make them.

use std::fmt;
use std::str::FromStr;

use sha2::Digest as _;

use crate::error::Error;

/// A content digest. Only what the OCI specification registers: sha256 and sha512.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Digest {
    /// `sha256:` and 64 hex digits.
    Sha256([u8; 32]),
    /// `sha512:` and 128 hex digits.
    Sha512([u8; 64]),
}

impl Digest {
    /// The sha256 digest of some bytes.
    pub fn sha256(bytes: &[u8]) -> Digest {
        Digest::Sha256(sha2::Sha256::digest(bytes).into())
    }

    /// `sha256` or `sha512`.
    pub fn algorithm(&self) -> &'static str {
        match self {
            Digest::Sha256(_) => "sha256",
            Digest::Sha512(_) => "sha512",
        }
    }

    /// The digits after the colon.
    pub fn hex(&self) -> String {
        let bytes = self.bytes();
        let mut hex = String::with_capacity(bytes.len() * 2);
        for byte in bytes {
            for nibble in [byte >> 4, byte & 15] {
                hex.push(char::from_digit(nibble.into(), 16).unwrap_or('0'));
            }
        }
        hex
    }

    /// The name that a file or directory of this content has: for sha256 the bare digits, as everyone writes them.
    pub(crate) fn file_name(&self) -> String {
        match self {
            Digest::Sha256(_) => self.hex(),
            Digest::Sha512(_) => format!("sha512-{}", self.hex()),
        }
    }

    /// A hasher of the same algorithm, to check something against this digest.
    pub(crate) fn hasher(&self) -> Hasher {
        match self {
            Digest::Sha256(_) => Hasher::Sha256(sha2::Sha256::new()),
            Digest::Sha512(_) => Hasher::Sha512(Box::new(sha2::Sha512::new())),
        }
    }

    /// Whether these bytes have this digest; the digest that they have if not.
    pub(crate) fn check(&self, bytes: &[u8]) -> Result<(), Digest> {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        let actual = hasher.finish();
        if actual == *self { Ok(()) } else { Err(actual) }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Digest::Sha256(bytes) => bytes,
            Digest::Sha512(bytes) => bytes,
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm(), self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Digest, Error> {
        let parsed = match text.split_once(':') {
            Some(("sha256", hex)) => unhex(hex).map(Digest::Sha256),
            Some(("sha512", hex)) => unhex(hex).map(Digest::Sha512),
            _ => None,
        };
        // What is echoed is cut: the text comes from a registry.
        parsed.ok_or_else(|| Error::InvalidDigest(text.chars().take(160).collect()))
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Hashes a stream.
#[derive(Clone)]
pub(crate) enum Hasher {
    Sha256(sha2::Sha256),
    Sha512(Box<sha2::Sha512>),
}

impl Hasher {
    /// The hasher of a named algorithm.
    pub(crate) fn named(algorithm: &str) -> Option<Hasher> {
        match algorithm {
            "sha256" => Some(Hasher::Sha256(sha2::Sha256::new())),
            "sha512" => Some(Hasher::Sha512(Box::new(sha2::Sha512::new()))),
            _ => None,
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::Sha512(hasher) => hasher.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        match self {
            Hasher::Sha256(hasher) => Digest::Sha256(hasher.finalize().into()),
            Hasher::Sha512(hasher) => Digest::Sha512(hasher.finalize().into()),
        }
    }
}

/// Lower-case hex of exactly N bytes.
fn unhex<const N: usize>(hex: &str) -> Option<[u8; N]> {
    let digits = hex.as_bytes();
    if digits.len() != N * 2 {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair.iter().try_fold(0u8, |value, digit| {
            let nibble = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'f' => digit - b'a' + 10,
                _ => return None,
            };
            Some(value << 4 | nibble)
        })?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_survives_its_text() {
        for digest in [Digest::sha256(b"x"), Digest::Sha512([0xa5; 64])] {
            assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        }
    }

    #[test]
    fn s37_a_malformed_digest_is_an_error_and_never_a_path() {
        let upper = format!("sha256:{}", "A".repeat(64));
        let long = format!("sha256:{}", "a".repeat(65));
        for bad in
            ["", "sha256:", "sha256:../../x", &upper, &long, "md5:d41d8cd98f00b204e9800998ecf8427e", "sha256"]
        {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_empty_string_hashes_as_the_world_knows() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::sha256(b"").to_string(), empty);
        assert!(empty.parse::<Digest>().unwrap().check(b"").is_ok());
        assert!(empty.parse::<Digest>().unwrap().check(b"x").is_err());
    }
}

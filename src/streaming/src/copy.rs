//! Copies one direction of a stream.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Read at first, and at most, at once.
const FIRST: usize = 8 << 10;
const MOST: usize = 128 << 10;

/// Copies to the end of the input. The buffer grows with what comes at once, so that streams that say little cost
/// little and a fast one takes few system calls.
pub async fn copy(
    from: &mut (impl AsyncRead + Unpin + ?Sized),
    to: &mut (impl AsyncWrite + Unpin + ?Sized),
) -> io::Result<()> {
    let mut buffer = vec![0; FIRST];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        to.write_all(buffer.get(..count).unwrap_or_default()).await?;
        if count == buffer.len() && count < MOST {
            buffer.resize(2 * count, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_byte_arrives_in_order() {
        let text: Vec<u8> = (0..1_000_000u32).map(|n| n as u8).collect();
        let mut copied = Vec::new();
        copy(&mut &text[..], &mut copied).await.unwrap();
        assert!(copied == text);
    }
}

//! What the targets in `fuzz/` reach of this crate. Only there when cargo-fuzz builds.

use crate::websocket;

/// Everything that a client sends over a WebSocket; the first byte chooses the protocol.
pub fn websocket(bytes: &[u8]) {
    let Some((choice, bytes)) = bytes.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(websocket::fuzz(*choice, bytes));
}

//! A WebSocket's bytes after the handshake, from a client: the first one chooses the protocol.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| streaming::fuzz::websocket(bytes));

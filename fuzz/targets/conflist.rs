//! A CNI network, from whoever installs it.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &[u8]| network::fuzz::conflist(text));

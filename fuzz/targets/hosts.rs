//! hosts.toml, from an operator.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| image::fuzz::hosts(text));

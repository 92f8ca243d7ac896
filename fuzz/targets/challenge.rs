//! `WWW-Authenticate`, from a registry.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| image::fuzz::challenge(text));

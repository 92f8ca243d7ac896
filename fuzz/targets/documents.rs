//! Manifest, index and configuration of an image, from a registry.
#![no_main]

libfuzzer_sys::fuzz_target!(|body: &[u8]| image::fuzz::documents(body));

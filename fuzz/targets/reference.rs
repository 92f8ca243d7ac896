//! The name of an image, from a client.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| image::fuzz::reference(text));

//! What the targets in `fuzz/` reach of this crate: the readers of what registries, images and clients send. Only
//! there when cargo-fuzz builds.

use std::path::Path;

use crate::{
    Digest, Reference, manifest,
    platform::Host,
    registry::{challenge, hosts},
};

pub use crate::unpack::fuzz::Layers;

/// A reference that was understood says itself again.
pub fn reference(text: &str) {
    if let Ok(reference) = Reference::parse(text, Some("registry.example")) {
        let name = match (reference.tag(), reference.digest()) {
            (_, Some(digest)) => reference.with_digest(&digest),
            (Some(tag), None) => format!("{}:{tag}", reference.name()),
            (None, None) => reference.name(),
        };
        let again = Reference::parse(&name, None).expect("a name that we made");
        assert_eq!((again.host(), again.path()), (reference.host(), reference.path()), "{name}");
    }
}

/// A manifest or an index, and a configuration.
pub fn documents(body: &[u8]) {
    if let Ok(manifest::Document::Index(entries)) = manifest::parse("fuzz", body, None) {
        let _ = manifest::candidates(&entries, &Host::detect());
    }
    for layers in 0..2 {
        let _ = manifest::config(&Digest::sha256(b""), body, layers);
    }
}

/// The header of a 401.
pub fn challenge(header: &str) {
    let _ = challenge::parse(header);
}

/// An operator's hosts.toml.
pub fn hosts(text: &str) {
    let _ = hosts::parse(text, Path::new("/nonexistent"));
}

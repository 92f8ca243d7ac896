//! What the targets in `fuzz/` reach of this crate. Only there when cargo-fuzz builds.

use crate::cni::conf;

/// A network's configuration, and what its plugins would read.
pub fn conflist(text: &[u8]) {
    let Ok(value) = serde_json::from_slice(text) else { return };
    let Ok(network) = conf::parse(value) else { return };
    for plugin in &network.list.plugins {
        assert!(!plugin.kind().contains('/'));
        let input = plugin.input(&network.list, serde_json::Map::new());
        serde_json::from_slice::<serde_json::Value>(&input).expect("JSON for the plugin");
    }
}

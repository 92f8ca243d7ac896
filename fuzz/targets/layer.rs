//! One layer, from a registry: its last byte chooses the compression, and what follows is unpacked into a directory
//! that nothing may leave.
#![no_main]

use std::cell::RefCell;

use image::fuzz::Layers;

thread_local! {
    static LAYERS: RefCell<Option<Layers>> = const { RefCell::new(None) };
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    LAYERS.with_borrow_mut(|layers| layers.get_or_insert_with(Layers::new).unpack(bytes));
});

//! The records of a run directory, from a disk that lost power.
#![no_main]

// The file alone: its crate brings all of containerd's protocol.
#[allow(dead_code)]
#[path = "../../src/shim-api/src/rundir.rs"]
mod rundir;

use rundir::{Exit, Init, Shim, decode, encode};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = decode::<Shim>(bytes);
    let _ = decode::<Init>(bytes);
    if let Ok(exit) = decode::<Exit>(bytes) {
        let again = encode(&exit).expect("numbers can be written");
        assert_eq!(decode::<Exit>(&again), Ok(exit));
    }
});

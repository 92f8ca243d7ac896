//! An OCI runtime spec, and the program that its seccomp profile becomes.
#![no_main]

use container::{seccomp, spec};

/// What the kernel takes (BPF_MAXINSNS).
const MOST: usize = 4096;

libfuzzer_sys::fuzz_target!(|text: &[u8]| {
    let _ = spec::Spec::from_json(text);
    if let Ok(profile) = serde_json::from_slice::<spec::Seccomp>(text)
        && let Ok(program) = seccomp::compile(&profile)
    {
        assert!((1..=MOST).contains(&program.filters.len()));
    }
});

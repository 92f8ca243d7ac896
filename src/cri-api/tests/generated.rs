//! Compares the committed code with what `proto/cri/v1/api.proto` generates. `UPDATE=1` writes it anew.

use std::path::Path;

#[test]
fn the_committed_code_is_what_the_proto_generates() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let proto = here.join("../../proto/cri/v1");
    let files = protox::compile([proto.join("api.proto")], [&proto]).expect("the proto compiles");
    let out = tempfile::tempdir().expect("a directory to generate into");
    tonic_prost_build::configure()
        .out_dir(out.path())
        .skip_debug(["runtime.v1.AuthConfig"])
        .compile_fds(files)
        .expect("code is generated");
    let fresh = std::fs::read_to_string(out.path().join("runtime.v1.rs")).expect("generated code");
    let committed = here.join("src/generated/runtime.v1.rs");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&committed, &fresh).expect("write the generated code");
    }
    let committed = std::fs::read_to_string(&committed).unwrap_or_default();
    assert!(committed == fresh, "run `UPDATE=1 cargo test -p crisp-cri-api` and commit the result");
}

//! Compares the committed code with what `proto/shim/v1/shim.proto` generates. `UPDATE=1` writes it anew.

use std::path::Path;

#[test]
fn the_committed_code_is_what_the_proto_generates() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let proto = here.join("../../proto/shim/v1");
    let out = tempfile::tempdir().expect("a directory to generate into");
    ttrpc_codegen::Codegen::new()
        .out_dir(out.path())
        .input(proto.join("shim.proto"))
        .include(&proto)
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .run()
        .expect("code is generated");
    for file in ["shim.rs", "shim_ttrpc.rs"] {
        let fresh = std::fs::read_to_string(out.path().join(file)).expect("generated code");
        let committed = here.join("src/generated").join(file);
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&committed, &fresh).expect("write the generated code");
        }
        let committed = std::fs::read_to_string(&committed).unwrap_or_default();
        assert!(committed == fresh, "run `UPDATE=1 cargo test -p crisp-shim-api` and commit the result");
    }
}

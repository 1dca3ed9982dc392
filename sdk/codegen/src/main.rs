//! Writes the checked-in client code of the Rust SDK from `proto/`.
//!
//! It reads the three files of package `ledger.v1` and writes two files into `sdk/rust/src/gen`: the message types
//! and clients (`ledger.v1.rs`), and the descriptors of every file they need (`descriptor.bin`). It does not link the
//! SDK, so that a stale or broken file can always be written anew. The same input gives the same bytes.

#[cfg(test)]
mod reference;

#[cfg(test)]
use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use protox::prost::Message as _;

const FILES: [&str; 3] = ["ledger/v1/admin.proto", "ledger/v1/task.proto", "ledger/v1/worker.proto"];
const OUT: &str = "sdk/rust/src/gen";

fn main() -> Result<(), Box<dyn Error>> {
    let out = root().join(OUT);
    fs::create_dir_all(&out)?;
    write(&out)
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn write(out: &Path) -> Result<(), Box<dyn Error>> {
    let mut compiler = protox::Compiler::new([root().join("proto").canonicalize()?])?;
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;
    let described = compiler.file_descriptor_set();

    // Comments serve the generated code; a program that reads descriptors has no use for them.
    let mut bare = described.clone();
    for file in &mut bare.file {
        file.source_code_info = None;
    }
    fs::write(out.join("descriptor.bin"), bare.encode_to_vec())?;

    tonic_prost_build::configure()
        .build_server(false)
        .bytes(".")
        .btree_map(".")
        .emit_rerun_if_changed(false)
        .out_dir(out)
        .compile_fds(described)?;
    Ok(())
}

#[test]
fn the_client_code_is_as_the_files_say() {
    let read = |folder: &Path| -> BTreeMap<_, _> {
        let files =
            fs::read_dir(folder).expect("the folder is there").map(|file| file.expect("it is listed"));
        files.map(|file| (file.file_name(), fs::read(file.path()).expect("it is readable"))).collect()
    };
    let now = tempfile::tempdir().expect("a folder");
    write(now.path()).expect("the files compile");
    let (written, now) = (read(&root().join(OUT)), read(now.path()));
    assert!(written.keys().eq(now.keys()), "{OUT} has other files: run `just gen`");
    for (name, bytes) in now {
        assert!(written[&name] == bytes, "{name:?} is not what `just gen` writes: run it and look at {OUT}");
    }
}

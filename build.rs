//! Makes the daemon's half of the wire from `proto/`: server code, and the descriptors that reflection serves.
//!
//! With protox, so that no protoc is needed. Clients have their half checked in; see `sdk/codegen`.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use prost::Message as _;

const FILES: [&str; 4] = [
    "ledger/v1/admin.proto",
    "ledger/v1/task.proto",
    "ledger/v1/worker.proto",
    // KEDA's, for whom we are a scaler.
    "externalscaler/externalscaler.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);

    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).open_files(FILES)?;
    let described = compiler.file_descriptor_set();
    fs::write(out.join("descriptor.bin"), described.encode_to_vec())?;

    tonic_prost_build::configure()
        .build_client(false)
        // Payloads and results are handed on as they came, without a copy.
        .bytes(".")
        // Maps in the order of their keys: the same message always has the same encoding, which digests rely on.
        .btree_map(".")
        .emit_rerun_if_changed(false)
        .compile_fds(described)?;
    Ok(())
}

//! Makes the daemon's half of the wire from `proto/`: server code, the descriptors that reflection serves, and the list
//! of methods, so that a method without a permission does not compile.
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
    fs::write(out.join("methods.rs"), methods(&described))?;

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

/// An enum with every method of every service, and how to tell one by its path.
fn methods(described: &prost_types::FileDescriptorSet) -> String {
    let mut all = Vec::new();
    for file in &described.file {
        for service in &file.service {
            let methods = service.method.iter().map(|method| method.name());
            all.extend(methods.map(|name| (name, format!("/{}.{}/{name}", file.package(), service.name()))));
        }
    }
    let list = |line: &dyn Fn(&str, &str) -> String| -> String {
        all.iter().map(|(name, path)| line(name, path)).collect()
    };
    format!(
        "/// Every method of our services.\n\
         #[derive(Clone, Copy, Debug, PartialEq, Eq)]\n\
         pub(crate) enum Method {{\n{}}}\n\
         impl Method {{\n\
         #[cfg(test)]\n\
         pub(crate) const ALL: &[Self] = &[{}];\n\
         /// The method with this path.\n\
         pub(crate) fn at(path: &str) -> Option<Self> {{\nmatch path {{\n{}_ => None,\n}}\n}}\n}}\n",
        list(&|name, path| format!("/// `{path}`\n{name},\n")),
        list(&|name, _| format!("Self::{name}, ")),
        list(&|name, path| format!("{path:?} => Some(Self::{name}),\n")),
    )
}

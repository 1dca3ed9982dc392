//! Makes the daemon's half of the wire from `proto/`: server code, the descriptors that reflection serves, the list of
//! methods, so that a method without a permission does not compile, and where messages have lists, so that those are counted.
//!
//! With protox, so that no protoc is needed. Clients have their half checked in; see `sdk/codegen`.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::{env, fs};

use prost::Message as _;
use prost_types::DescriptorProto;
use prost_types::field_descriptor_proto::{Label, Type};

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
    fs::write(out.join("shapes.rs"), shapes(&described))?;

    tonic_prost_build::configure()
        .build_client(false)
        // Payloads and results are handed on as they came, without a copy.
        .bytes(".")
        // Maps in the order of their keys: the same message always has the same encoding, which digests rely on.
        .btree_map(".")
        // Counts what a message holds before any of it is made.
        .codec_path("crate::grpc::counted::Counted")
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

/// For every message that a method takes, its fields that are messages or lists, and theirs.
fn shapes(described: &prost_types::FileDescriptorSet) -> String {
    let mut messages = BTreeMap::new();
    for file in &described.file {
        for message in &file.message_type {
            gather(&format!(".{}", file.package()), message, &mut messages);
        }
    }
    let numbers: BTreeMap<&str, usize> =
        messages.keys().enumerate().map(|(number, name)| (name.as_str(), number)).collect();
    let mut text = format!("static SHAPES: [&[Field]; {}] = [\n", messages.len());
    for (name, message) in &messages {
        let _ = write!(text, "    // {name}\n    &[");
        for field in &message.field {
            let is_list = field.label() == Label::Repeated;
            let inside = numbers.get(field.type_name()).filter(|_| field.r#type() == Type::Message);
            let is_entry = messages
                .get(field.type_name())
                .is_some_and(|of| of.options.as_ref().is_some_and(|options| options.map_entry()));
            let of = match (is_list, inside) {
                (false, None) => continue,
                (false, Some(_)) => "One",
                (true, _) if is_entry => "Entries",
                (true, Some(_)) => "Messages",
                (true, None) => "Values",
            };
            let _ =
                write!(text, "Field {{ number: {}, of: Of::{of}, inside: {inside:?} }}, ", field.number());
        }
        text.push_str("],\n");
    }
    text.push_str("];\n");
    let services = described.file.iter().flat_map(|file| &file.service);
    let taken: BTreeSet<&str> =
        services.flat_map(|service| &service.method).map(|method| method.input_type()).collect();
    for name in taken {
        let path = match name.rsplit_once('.') {
            Some((".ledger.v1", short)) => format!("super::wire::{short}"),
            Some((".externalscaler", short)) => format!("super::scaler::wire::{short}"),
            _ => continue,
        };
        let _ = writeln!(text, "impl Shaped for {path} {{ const SHAPE: usize = {}; }}", numbers[name]);
    }
    text
}

/// A message and those inside it, by their full names.
fn gather<'a>(within: &str, message: &'a DescriptorProto, into: &mut BTreeMap<String, &'a DescriptorProto>) {
    let name = format!("{within}.{}", message.name());
    for nested in &message.nested_type {
        gather(&name, nested, into);
    }
    into.insert(name, message);
}

//! Writes `docs/reference/wire.md` from `proto/`: every service, method, message, field and enum with its comment.
//!
//! With `LEDGERD_WRITE_REFERENCE=1` its test writes the page, without it the page is compared.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use protox::prost_reflect::prost_types::FileDescriptorProto;
use protox::prost_reflect::{
    DescriptorPool, EnumDescriptor, FieldDescriptor, FileDescriptor, Kind, MessageDescriptor,
    MethodDescriptor, ServiceDescriptor,
};

/// In the order in which one gets to know them.
const FILES: [&str; 4] = [
    "ledger/v1/task.proto",
    "ledger/v1/worker.proto",
    "ledger/v1/admin.proto",
    "externalscaler/externalscaler.proto",
];

const HEAD: &str = "# The wire

Generated from [proto](../../proto); a test holds that it is so. A field without a word about its absence may be left out: then it is 0, empty
or false. What is `optional` or a message can be told from that. Reasons of refusals are [here](errors.md).
";

/// Comments of one file, by what they are about.
struct Comments(BTreeMap<Vec<i32>, String>);

impl Comments {
    fn of(file: &FileDescriptorProto) -> Self {
        let said = file.source_code_info.iter().flat_map(|info| &info.location).map(|location| {
            let (before, after) = (location.leading_comments(), location.trailing_comments());
            let words = before.split_whitespace().chain(after.split_whitespace());
            (location.path.clone(), words.collect::<Vec<_>>().join(" "))
        });
        Self(said.filter(|(_, text)| !text.is_empty()).collect())
    }

    /// Of one thing, within a cell of a table.
    ///
    /// # Panics
    /// There is none: a thing without a word is a fault of the file.
    fn about(&self, path: &[i32], name: &str) -> String {
        let text = self.0.get(path).unwrap_or_else(|| panic!("{name} has no comment"));
        text.replace('|', "\\|").replace('<', "&lt;")
    }
}

fn page(pool: &DescriptorPool) -> String {
    let mut text = HEAD.to_owned();
    for name in FILES {
        let file = pool.get_file_by_name(name).expect("it was compiled");
        let comments = Comments::of(file.file_descriptor_proto());
        let _ = writeln!(text, "\n## {name}\n\n{}", about_file(&file, &comments));
        file.services().for_each(|service| write_service(&mut text, &comments, &service));
        file.messages().for_each(|message| write_message(&mut text, &comments, &message));
        file.enums().for_each(|one| write_enum(&mut text, &comments, &one));
    }
    text
}

/// The comment before everything else belongs to the line with the syntax.
fn about_file(file: &FileDescriptor, comments: &Comments) -> String {
    comments.about(&[12], file.name())
}

fn write_service(text: &mut String, comments: &Comments, service: &ServiceDescriptor) {
    let about = comments.about(service.path(), service.full_name());
    let _ = writeln!(text, "\n### {}\n\n{about}\n", service.name());
    let _ = writeln!(text, "| method | takes | gives | what |\n| --- | --- | --- | --- |");
    for method in service.methods() {
        let (takes, gives) = sides(&method);
        let about = comments.about(method.path(), method.full_name());
        let _ = writeln!(text, "| `{}` | {takes} | {gives} | {about} |", method.name());
    }
}

fn sides(method: &MethodDescriptor) -> (String, String) {
    let side = |message: &MessageDescriptor, streams| {
        format!("{}{}", if streams { "stream of " } else { "" }, linked(message.name()))
    };
    (
        side(&method.input(), method.is_client_streaming()),
        side(&method.output(), method.is_server_streaming()),
    )
}

fn write_message(text: &mut String, comments: &Comments, message: &MessageDescriptor) {
    let about = comments.about(message.path(), message.full_name());
    let _ = writeln!(text, "\n### {}\n\n{about}", message.name());
    if message.fields().len() != 0 {
        let _ = writeln!(text, "\n| | field | type | what |\n| --- | --- | --- | --- |");
    }
    let mut fields: Vec<_> = message.fields().collect();
    fields.sort_by_key(FieldDescriptor::number);
    for field in fields {
        let about = comments.about(field.path(), field.full_name());
        let _ = writeln!(text, "| {} | `{}` | {} | {about} |", field.number(), field.name(), typed(&field));
    }
    for inner in message.child_messages().filter(|inner| !inner.is_map_entry()) {
        write_message(text, comments, &inner);
    }
    message.child_enums().for_each(|one| write_enum(text, comments, &one));
}

fn write_enum(text: &mut String, comments: &Comments, one: &EnumDescriptor) {
    let about = comments.about(one.path(), one.full_name());
    let _ = writeln!(text, "\n### {}\n\n{about}\n\n| | value | what |\n| --- | --- | --- |", one.name());
    for value in one.values() {
        let about = comments.about(value.path(), value.full_name());
        let _ = writeln!(text, "| {} | `{}` | {about} |", value.number(), value.name());
    }
}

/// The type of a field, with how often and with what else it may be there.
fn typed(field: &FieldDescriptor) -> String {
    if let (true, Kind::Message(entry)) = (field.is_map(), field.kind()) {
        let (key, value) = (entry.map_entry_key_field(), entry.map_entry_value_field());
        return format!("map from {} to {}", kind(&key.kind()), kind(&value.kind()));
    }
    let kind = kind(&field.kind());
    match field.containing_oneof() {
        Some(oneof) if !oneof.is_synthetic() => format!("{kind}, one of `{}`", oneof.name()),
        Some(_) => format!("optional {kind}"),
        None if field.is_list() => format!("repeated {kind}"),
        None => kind,
    }
}

fn kind(kind: &Kind) -> String {
    match kind {
        Kind::Message(message) if message.package_name() == "google.protobuf" => message.name().to_owned(),
        Kind::Message(message) => linked(message.name()),
        Kind::Enum(one) => linked(one.name()),
        scalar => format!("{scalar:?}"),
    }
}

fn linked(name: &str) -> String {
    format!("[{name}](#{})", name.to_lowercase())
}

#[test]
fn the_reference_is_as_the_files_say() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut compiler = protox::Compiler::new([root.join("proto")]).expect("the folder is there");
    compiler.include_imports(true).include_source_info(true).open_files(FILES).expect("they compile");
    let (text, path) = (page(&compiler.descriptor_pool()), root.join("docs/reference/wire.md"));
    if std::env::var_os("LEDGERD_WRITE_REFERENCE").is_some() {
        std::fs::write(&path, &text).expect("the folder is writable");
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == text,
        "run this test with LEDGERD_WRITE_REFERENCE=1 and look at docs/reference/wire.md"
    );
}

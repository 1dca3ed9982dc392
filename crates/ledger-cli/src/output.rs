//! What commands print: tables for people, proto JSON for programs.
//!
//! Standard output carries the answer and nothing else; remarks go to standard error. A reader that goes away early
//! (`| head`) is no error. What others wrote (labels, messages, payloads) is shown with its control characters
//! escaped, so that a task cannot write to the terminal of who looks at it.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};

use comfy_table::{Cell, Color, Table, presets};
use ledgerd_client::v1::TaskState;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};

use crate::failure::Failure;
use crate::time;

/// How answers are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// One JSON document, in the standard JSON form of protobuf.
    Json,
}

/// Prints text that ends in a line end.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(())
}

/// Prints a remark for people.
pub(crate) fn remark(text: &str) {
    // With standard error gone there is nobody left to tell.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Prints a message of package `ledger.v1`.
pub(crate) fn print_json(name: &str, message: &impl Message) -> Result<(), Failure> {
    print(&json(name, message))
}

/// A message in its JSON form: lowerCamelCase names, 64-bit numbers as strings, bytes in base64. Fields at their
/// default are written too: `created: false` is an answer, and an empty list is one as well.
pub(crate) fn json(name: &str, message: &impl Message) -> String {
    let mut text = Vec::new();
    let mut serializer = serde_json::Serializer::pretty(&mut text);
    write_json(name, message, &mut serializer);
    text.push(b'\n');
    String::from_utf8(text).expect("JSON is UTF-8")
}

/// Prints a message of package `ledger.v1` as one of many, on a line of its own.
pub(crate) fn print_json_line(name: &str, message: &impl Message) -> Result<(), Failure> {
    let mut text = Vec::new();
    write_json(name, message, &mut serde_json::Serializer::new(&mut text));
    text.push(b'\n');
    print(&String::from_utf8(text).expect("JSON is UTF-8"))
}

fn write_json<W: Write, F: serde_json::ser::Formatter>(
    name: &str,
    message: &impl Message,
    serializer: &mut serde_json::Serializer<W, F>,
) {
    let pool = DescriptorPool::decode(ledgerd_client::DESCRIPTOR).expect("the SDK's descriptors are valid");
    let descriptor =
        pool.get_message_by_name(&format!("ledger.v1.{name}")).expect("the message is of ledger.v1");
    let message = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .expect("what prost encodes its own descriptor decodes");
    message
        .serialize_with_options(serializer, &SerializeOptions::new().skip_default_fields(false))
        .expect("a decoded message has a JSON form");
}

/// Rows under a heading, or `nothing` when there are none.
pub(crate) struct Rows {
    table: Table,
    columns: usize,
    empty: bool,
}

impl Rows {
    pub(crate) fn new<const N: usize>(heading: [&str; N]) -> Self {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        if !colours(std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()), stdout_is_terminal())
        {
            table.force_no_tty();
        }
        table.set_header(heading);
        for (index, column) in table.column_iter_mut().enumerate() {
            column.set_padding((if index == 0 { 0 } else { 1 }, 1));
        }
        Self { table, columns: N, empty: true }
    }

    pub(crate) fn push<const N: usize>(&mut self, cells: [Cell; N]) {
        debug_assert_eq!(N, self.columns, "a row has a cell for each column");
        self.table.add_row(cells);
        self.empty = false;
    }

    /// The text; empty without rows.
    pub(crate) fn render(&self) -> String {
        if self.empty {
            return String::new();
        }
        self.table.lines().fold(String::new(), |mut text, line| {
            text.push_str(line.trim_end());
            text.push('\n');
            text
        })
    }

    /// Prints the rows, or says on standard error that there are none.
    pub(crate) fn print(&self, none: &str) -> Result<(), Failure> {
        if self.empty {
            remark(none);
        }
        print(&self.render())
    }
}

fn stdout_is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

fn colours(no_color: bool, terminal: bool) -> bool {
    terminal && !no_color
}

/// A cell of plain text, on one line.
pub(crate) fn cell(text: impl std::fmt::Display) -> Cell {
    Cell::new(one_line(&text.to_string()))
}

/// A cell for the state of a task, with its reason.
pub(crate) fn state_cell(state: i32, reason: &str) -> Cell {
    let text = with_reason(task_state(state), reason);
    match TaskState::try_from(state) {
        Ok(TaskState::Done) => cell(text).fg(Color::Green),
        Ok(TaskState::Failed) => cell(text).fg(Color::Red),
        Ok(TaskState::Running) => cell(text).fg(Color::Cyan),
        Ok(TaskState::Retry | TaskState::Blocked) => cell(text).fg(Color::Yellow),
        _ => cell(text),
    }
}

/// Lines of `name  value`, names aligned; entries without a value are left out.
#[derive(Default)]
pub(crate) struct Facts(Vec<(String, String)>);

impl Facts {
    pub(crate) fn push(&mut self, name: impl Into<String>, value: impl std::fmt::Display) {
        let value = value.to_string();
        if !value.is_empty() {
            self.0.push((name.into(), value));
        }
    }

    pub(crate) fn render(&self) -> String {
        let width = self.0.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let indent = " ".repeat(width + 2);
        self.0.iter().fold(String::new(), |mut text, (name, value)| {
            let value = escape(value);
            for (index, line) in value.trim_end_matches('\n').split('\n').enumerate() {
                if index == 0 {
                    let _ = write!(text, "{name:width$}  ");
                } else {
                    text.push_str(&indent);
                }
                text.push_str(line.trim_end());
                text.push('\n');
            }
            text
        })
    }
}

/// `RETRY (BACKOFF)`.
pub(crate) fn with_reason(state: &str, reason: &str) -> String {
    if reason.is_empty() { state.into() } else { format!("{state} ({reason})") }
}

/// The name of a state.
pub(crate) fn task_state(state: i32) -> &'static str {
    let name = TaskState::try_from(state).unwrap_or(TaskState::Unspecified).as_str_name();
    name.strip_prefix("TASK_STATE_").unwrap_or(name)
}

/// An instant of the wire; empty when absent.
pub(crate) fn instant(at: Option<&prost_types::Timestamp>) -> String {
    at.and_then(time::from_wire).map(time::show_time).unwrap_or_default()
}

/// The same to the millisecond, where rows follow each other closely.
pub(crate) fn moment(at: Option<&prost_types::Timestamp>) -> String {
    at.and_then(time::from_wire).map(time::show_moment).unwrap_or_default()
}

/// A duration of the wire; empty when absent.
pub(crate) fn span(duration: Option<&prost_types::Duration>) -> String {
    duration.map(|duration| time::show_duration(time::duration_from_wire(duration))).unwrap_or_default()
}

/// `a=1 b=2`.
pub(crate) fn pairs(map: &std::collections::BTreeMap<String, String>) -> String {
    map.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
}

/// Bytes as people can read them: text when it is text, else their number.
pub(crate) fn readable(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.chars().all(|c| !c.is_control() || matches!(c, '\n' | '\t' | '\r')) => text.into(),
        _ => format!("<{} bytes>", bytes.len()),
    }
}

/// Text with control characters escaped, but for line ends and tabs.
pub(crate) fn escape(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        match c {
            '\n' | '\t' => out.push(c),
            '\r' => {}
            c if c.is_control() || is_reordering(c) => {
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
            c => out.push(c),
        }
        out
    })
}

/// Characters that make a terminal show other text than there is.
fn is_reordering(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The same, on one line.
pub(crate) fn one_line(text: &str) -> String {
    escape(text).replace(['\n', '\t'], " ")
}

#[cfg(test)]
mod tests {
    use ledgerd_client::v1::{EnqueueTaskResponse, ListTasksResponse, Task};

    use super::*;

    #[test]
    fn rows_are_aligned_without_borders_or_trailing_blanks() {
        let mut rows = Rows::new(["ID", "AGENT", "STATE"]);
        rows.push([cell("t1"), cell("claude"), state_cell(3, "BACKOFF")]);
        rows.push([cell("t1k3"), cell("x"), state_cell(5, "")]);
        assert_eq!(
            rows.render(),
            "ID    AGENT   STATE\n\
             t1    claude  RETRY (BACKOFF)\n\
             t1k3  x       DONE\n"
        );
    }

    #[test]
    fn no_rows_are_no_text() {
        assert_eq!(Rows::new(["ID"]).render(), "");
    }

    #[test]
    fn colour_is_for_terminals_that_want_it() {
        assert!(colours(false, true));
        assert!(!colours(true, true));
        assert!(!colours(false, false));
    }

    #[test]
    fn facts_are_aligned_and_empty_ones_left_out() {
        let mut facts = Facts::default();
        facts.push("id", "t1");
        facts.push("nothing", "");
        facts.push("last error", "first\nsecond\n");
        assert_eq!(facts.render(), "id          t1\nlast error  first\n            second\n");
    }

    #[test]
    fn a_task_cannot_write_to_the_terminal() {
        assert_eq!(escape("a\u{1b}[2Jb\u{202e}\r\n\tc"), "a\\u{1b}[2Jb\\u{202e}\n\tc");
        assert_eq!(one_line("a\nb"), "a b");
        assert_eq!(readable("{\"a\": 1}\n".as_bytes()), "{\"a\": 1}\n");
        assert_eq!(readable(b"\x00\xff"), "<2 bytes>");
        assert_eq!(readable(b"\x1b[2J"), "<4 bytes>");
    }

    #[test]
    fn json_is_the_standard_form_with_defaults_written() {
        let answer = EnqueueTaskResponse { task_id: "t1k3".into(), created: false };
        assert_eq!(
            json("EnqueueTaskResponse", &answer),
            "{\n  \"taskId\": \"t1k3\",\n  \"created\": false\n}\n"
        );
        let page = ListTasksResponse {
            tasks: vec![Task {
                state: 5,
                version: 7,
                result: "{}".into(),
                create_time: Some(prost_types::Timestamp { seconds: 0, nanos: 5_000_000 }),
                ..Task::default()
            }],
            next_page_token: String::new(),
        };
        let value: serde_json::Value = serde_json::from_str(&json("ListTasksResponse", &page)).expect("JSON");
        let task = &value["tasks"][0];
        assert_eq!(task["state"], "TASK_STATE_DONE");
        assert_eq!(task["version"], "7");
        assert_eq!(task["result"], "e30=");
        assert_eq!(task["createTime"], "1970-01-01T00:00:00.005Z");
        assert_eq!(value["nextPageToken"], "");
    }
}

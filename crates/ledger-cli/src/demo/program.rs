//! The programs that the demo's workers run, one process for each task.
//!
//! They are what a user's program would be: the payload on standard input, the result on standard output, a failure is
//! a sentence on standard error and an exit code. [`super::check`] computes the same in another way; nothing here is
//! shared with it but the [facts](Program) in words.

use std::io::Read as _;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::failure::{Exit, Failure};
use crate::output::print;

/// While the file that this variable names exists, `outline` fails.
pub(super) const OUTAGE: &str = "LEDGERD_DEMO_OUTAGE";

/// One of the three.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(super) enum Program {
    /// Names after `fn`, `struct`, `class` and `def` at the start of a line, modifiers before them left out; in
    /// Markdown the headings.
    Outline,
    /// Lines (a last one without its end counts), words between ASCII white space, bytes of the longest line.
    Statistics,
    /// SHA-256.
    Digest,
}

#[derive(Deserialize)]
struct Payload {
    path: PathBuf,
}

impl Program {
    pub(super) const ALL: [Self; 3] = [Self::Outline, Self::Statistics, Self::Digest];

    /// The name of the agent, and of the program.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Outline => "outline",
            Self::Statistics => "statistics",
            Self::Digest => "digest",
        }
    }

    pub(super) const fn task_type(self) -> &'static str {
        match self {
            Self::Outline => "list-definitions",
            Self::Statistics => "count",
            Self::Digest => "sha256",
        }
    }

    pub(super) const fn about(self) -> &'static str {
        match self {
            Self::Outline => "the definitions in a file",
            Self::Statistics => "its lines, words and longest line",
            Self::Digest => "its SHA-256",
        }
    }

    /// Runs as a worker's program.
    ///
    /// # Errors
    /// In an outage; for a payload or a file that cannot be read.
    pub(super) async fn run(self, think: Duration) -> Result<(), Failure> {
        let mut payload = Vec::new();
        std::io::stdin().lock().read_to_end(&mut payload)?;
        let is_out = || std::env::var_os(OUTAGE).is_some_and(|marker| PathBuf::from(marker).exists());
        if self == Self::Outline && is_out() {
            return Err(Failure::new(Exit::Failure, "the service that outline needs does not answer"));
        }
        let Payload { path } = serde_json::from_slice(&payload)
            .map_err(|error| Failure::usage(format!("the payload must be {{\"path\": FILE}}: {error}")))?;
        tokio::time::sleep(think).await;
        let bytes = std::fs::read(&path).map_err(|error| {
            Failure::new(Exit::Failure, format!("cannot read {}: {error}", path.display()))
        })?;
        let is_markdown = path.extension().is_some_and(|extension| extension == "md");
        print(&format!("{}\n", self.result(&bytes, is_markdown)))
    }

    pub(super) fn result(self, bytes: &[u8], is_markdown: bool) -> Value {
        match self {
            Self::Outline => json!({ "definitions": outline(bytes, is_markdown) }),
            Self::Statistics => statistics(bytes),
            Self::Digest => json!({ "sha256": hex(&Sha256::digest(bytes)) }),
        }
    }
}

fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.strip_suffix(b"\n").unwrap_or(bytes).split(|byte| *byte == b'\n').take(if bytes.is_empty() {
        0
    } else {
        usize::MAX
    })
}

fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

fn outline(bytes: &[u8], is_markdown: bool) -> Vec<String> {
    let definition = if is_markdown { heading } else { definition };
    let numbered = (1..).zip(lines(bytes));
    numbered.filter_map(|(number, line)| Some(format!("{number}: {}", definition(line)?))).collect()
}

fn heading(line: &[u8]) -> Option<String> {
    let mut words = words(line);
    let marks = words.next()?;
    if !line.starts_with(b"#") || marks.len() > 6 || marks.iter().any(|byte| *byte != b'#') {
        return None;
    }
    let text: Vec<_> = words.map(String::from_utf8_lossy).collect();
    Some(format!("{} {}", "#".repeat(marks.len()), text.join(" ")).trim_end().into())
}

fn definition(line: &[u8]) -> Option<String> {
    let is_modifier = |word: &&[u8]| {
        let known: [&[u8]; 8] =
            [b"async", b"const", b"unsafe", b"export", b"default", b"abstract", b"public", b"static"];
        known.contains(word) || *word == b"pub" || (word.starts_with(b"pub(") && word.ends_with(b")"))
    };
    let mut words = words(line).skip_while(is_modifier);
    let first = words.next()?;
    let kind = ["fn", "struct", "class", "def"].into_iter().find(|kind| kind.as_bytes() == first)?;
    let name = words.next()?;
    let end =
        name.iter().position(|byte| !byte.is_ascii_alphanumeric() && *byte != b'_').unwrap_or(name.len());
    let name = std::str::from_utf8(&name[..end]).ok().filter(|name| !name.is_empty())?;
    Some(format!("{kind} {name}"))
}

fn statistics(bytes: &[u8]) -> Value {
    json!({
        "lines": lines(bytes).count(),
        "words": words(bytes).count(),
        "longest_line": lines(bytes).map(<[u8]>::len).max().unwrap_or(0),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUST: &[u8] =
        b"//! Text.\npub(crate) struct Bars<'a> {\n\n    pub const fn len(&self) -> usize {\n\
        const X: u8 = 1;\nfn\nfn (\n// fn no\nstructure x\nasync fn run(self)\n";

    #[test]
    fn definitions_are_named_with_their_lines() {
        assert_eq!(outline(RUST, false), ["2: struct Bars", "4: fn len", "10: fn run"]);
        let python = b"class Task(Base):\n    async def end(self):\n        pass\n# no heading\n";
        assert_eq!(outline(python, false), ["1: class Task", "2: def end"]);
        assert_eq!(outline(b"export default class Page {}", false), ["1: class Page"]);
    }

    #[test]
    fn headings_count_in_markdown_only() {
        let text = b"# One\n\n##  Two words \n#hash\n####### seven\n #indented\n#\nfn x\n";
        assert_eq!(outline(text, true), ["1: # One", "3: ## Two words", "7: #"]);
        assert_eq!(outline(text, false), ["8: fn x"]);
    }

    #[test]
    fn statistics_count_the_last_line_without_its_end() {
        for (text, found) in [
            ("", (0, 0, 0)),
            ("\n", (1, 0, 0)),
            ("a", (1, 1, 1)),
            ("a\n", (1, 1, 1)),
            ("a b\n\n  longer line\n", (3, 4, 13)),
            ("a\r\nb", (2, 2, 2)),
        ] {
            let (lines, words, longest) = found;
            let expected = json!({ "lines": lines, "words": words, "longest_line": longest });
            assert_eq!(statistics(text.as_bytes()), expected, "{text:?}");
        }
    }

    #[test]
    fn the_digest_is_the_known_one() {
        let empty = Program::Digest.result(b"", false);
        assert_eq!(empty["sha256"], "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}

//! What the results must be, computed in another way than by the programs: byte by byte over positions instead of with
//! iterators, and the digest by `sha256sum` where there is one. A verifier that shared the programs' code would agree
//! with their mistakes.

use std::io;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::files::Source;
use super::program::Program;

/// Files for one call of `sha256sum`: far below what an argument list may hold.
const FILES_A_CALL: usize = 200;

/// The right results of one file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Right {
    outline: Value,
    statistics: Value,
    digest: Value,
}

impl Right {
    pub(super) fn of(&self, program: Program) -> &Value {
        match program {
            Program::Outline => &self.outline,
            Program::Statistics => &self.statistics,
            Program::Digest => &self.digest,
        }
    }
}

/// The right results of all files, in their order, and who computed the digests.
///
/// # Errors
/// When a file cannot be read.
pub(super) async fn right(files: &[Source]) -> io::Result<(Vec<Right>, &'static str)> {
    let mut digests = Vec::with_capacity(files.len());
    for some in files.chunks(FILES_A_CALL) {
        let paths: Vec<&Path> = some.iter().map(|source| source.copy.as_path()).collect();
        match sha256sum(&paths).await {
            Some(found) => digests.extend(found),
            None => break,
        }
    }
    let by = if digests.len() == files.len() { "sha256sum" } else { "a second call of the library" };
    let mut all = Vec::with_capacity(files.len());
    for (index, source) in files.iter().enumerate() {
        let bytes = std::fs::read(&source.copy)?;
        let digest = match digests.get(index) {
            Some(digest) => digest.clone(),
            None => format!("{:x}", Sha256::new().chain_update(&bytes).finalize()),
        };
        all.push(Right {
            outline: json!({ "definitions": definitions(&bytes, source.name.ends_with(".md")) }),
            statistics: count(&bytes),
            digest: json!({ "sha256": digest }),
        });
    }
    Ok((all, by))
}

/// Digests by the system's program; none when there is no such program or it says anything unexpected.
async fn sha256sum(files: &[&Path]) -> Option<Vec<String>> {
    let mut command = tokio::process::Command::new("sha256sum");
    command.arg("--").args(files).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    // A line that begins with a backslash has a name with one in it; names are not looked at, the order is.
    let digests: Option<Vec<String>> =
        text.lines().map(|line| Some(line.trim_start_matches('\\').get(..64)?.to_owned())).collect();
    digests.filter(|digests| digests.len() == files.len())
}

fn count(bytes: &[u8]) -> Value {
    let (mut lines, mut words, mut longest, mut length, mut in_word) = (0_u64, 0_u64, 0_u64, 0_u64, false);
    for &byte in bytes {
        let blank = matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0c);
        if !blank && !in_word {
            words += 1;
        }
        in_word = !blank;
        if byte == b'\n' {
            lines += 1;
            length = 0;
        } else {
            length += 1;
            longest = longest.max(length);
        }
    }
    if length > 0 {
        lines += 1;
    }
    json!({ "lines": lines, "words": words, "longest_line": longest })
}

/// Walks each line as text from its first mark on.
fn definitions(bytes: &[u8], markdown: bool) -> Vec<String> {
    let mut found = Vec::new();
    let (mut at, mut number) = (0, 0);
    while at < bytes.len() {
        let mut end = at;
        while end < bytes.len() && bytes[end] != b'\n' {
            end += 1;
        }
        number += 1;
        let line = String::from_utf8_lossy(&bytes[at..end]);
        let what = if markdown { title(&line) } else { named(&line) };
        if let Some(what) = what {
            found.push(format!("{number}: {what}"));
        }
        at = end + 1;
    }
    found
}

fn title(line: &str) -> Option<String> {
    let rest = line.trim_start_matches('#');
    let level = line.len() - rest.len();
    let ends_well = rest.is_empty() || rest.starts_with(is_blank);
    if level == 0 || level > 6 || !ends_well {
        return None;
    }
    let mut title = line[..level].to_owned();
    let mut gap = true;
    for c in rest.chars() {
        if is_blank(c) {
            gap = true;
            continue;
        }
        if gap {
            title.push(' ');
            gap = false;
        }
        title.push(c);
    }
    Some(title)
}

fn named(line: &str) -> Option<String> {
    let mut rest = line.trim_start_matches(is_blank);
    loop {
        let end = rest.find(is_blank)?;
        let (word, after) = rest.split_at(end);
        let after = after.trim_start_matches(is_blank);
        match word {
            "fn" | "struct" | "class" | "def" => {
                let name: String =
                    after.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                return (!name.is_empty()).then(|| format!("{word} {name}"));
            }
            "pub" | "async" | "const" | "unsafe" | "export" | "default" | "abstract" | "public"
            | "static" => {}
            word if word.starts_with("pub(") && word.ends_with(')') => {}
            _ => return None,
        }
        rest = after;
    }
}

fn is_blank(c: char) -> bool {
    c.is_ascii_whitespace()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_and_titles_are_found() {
        let text =
            b"pub(in crate::x) fn no\npub(super) async fn end<T>(x: T) {\nclass\n\tdef _x1(self):\nfn \nfn x";
        assert_eq!(definitions(text, false), ["2: fn end", "4: def _x1", "6: fn x"]);
        let text = b"#  A  b\n#x\n\n###### six\n####### seven\n#";
        assert_eq!(definitions(text, true), ["1: # A b", "4: ###### six", "6: #"]);
    }

    #[test]
    fn counts_are_those_of_wc() {
        let text = "a  b\n\nlonger\tline\nend";
        assert_eq!(count(text.as_bytes()), json!({ "lines": 4, "words": 5, "longest_line": 11 }));
        assert_eq!(count(b""), json!({ "lines": 0, "words": 0, "longest_line": 0 }));
        assert_eq!(count(b"\n\n"), json!({ "lines": 2, "words": 0, "longest_line": 0 }));
    }

    #[tokio::test]
    async fn both_ways_agree_on_this_package() {
        let folder = tempfile::tempdir().expect("a folder");
        let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
        let found = super::super::files::copy(sources, folder.path(), 1_000).expect("copied").files;
        let (right, _) = right(&found).await.expect("read");
        assert_eq!(right.len(), found.len());
        assert!(found.len() > 10, "the package has sources");
        for (source, right) in found.iter().zip(&right) {
            let bytes = std::fs::read(&source.copy).expect("a copy");
            for program in Program::ALL {
                let result = program.result(&bytes, source.name.ends_with(".md"));
                assert_eq!(&result, right.of(program), "{} of {}", program.name(), source.name);
            }
        }
    }

    #[tokio::test]
    async fn without_sha256sum_nothing_is_guessed() {
        assert_eq!(sha256sum(&[Path::new("/nowhere/at/all")]).await, None);
    }
}

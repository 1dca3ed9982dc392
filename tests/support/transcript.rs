//! What a command prints, held against a checked-in file.
//!
//! Ids, instants, spans and numbers that time moves become placeholders. `UPDATE_TRANSCRIPTS=1` writes the files anew.

use super::{Daemon, command};
use std::fmt::Write as _;
use std::path::PathBuf;

/// Runs the command against the daemon and compares what it says with `tests/transcripts/{name}.txt`. Of the tasks the
/// first is `<task>` there.
pub(crate) fn check(name: &str, daemon: &Daemon, args: &[&str], tasks: &[&str]) {
    let output = command().args(["--address", &daemon.address]).args(args).output().expect("the binary runs");
    let mut said = format!("$ ledgerd {}\n", args.join(" "));
    said += &String::from_utf8(output.stdout).expect("text");
    said += &String::from_utf8(output.stderr).expect("text");
    match output.status.code() {
        Some(0) => {}
        code => said += &format!("exit code {}\n", code.expect("no signal ended it")),
    }
    let said = masked(&said, tasks);
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/transcripts/{name}.txt"));
    if std::env::var_os("UPDATE_TRANSCRIPTS").is_some_and(|value| value == "1") {
        std::fs::create_dir_all(path.parent().expect("it has a folder")).expect("writable");
        std::fs::write(&path, said).expect("the tree is writable");
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        expected == said,
        "{} differs (UPDATE_TRANSCRIPTS=1 accepts):\n{}",
        path.display(),
        diff(&expected, &said)
    );
}

/// With placeholders for what differs from run to run.
pub(crate) fn masked(text: &str, tasks: &[&str]) -> String {
    let is_word = |c: char| c.is_alphanumeric() || matches!(c, '.' | ':' | '+' | '-');
    let (mut out, mut rest, mut before) = (String::new(), text, "");
    while let Some(first) = rest.chars().next() {
        let end = rest.find(|c| is_word(c) != is_word(first)).unwrap_or(rest.len());
        let (piece, tail) = rest.split_at(end);
        rest = tail;
        if !is_word(first) {
            out += piece;
            continue;
        }
        let word = piece.trim_end_matches(['.', ':']);
        let unit = matches!(word, "ms" | "s" | "min" | "h" | "d");
        if unit && before.parse::<f64>().is_ok() && out.ends_with(&format!("{before} ")) {
            out.truncate(out.len() - before.len() - 1);
            // Of a span of two units one placeholder is enough.
            if !out.ends_with("<span> ") {
                out += "<span>";
            } else {
                out.truncate(out.len() - 1);
            }
        } else if let Some(at) = tasks.iter().position(|task| *task == word) {
            out += if at == 0 { "<task>" } else { "<other>" };
        } else if word.len() > 18 && word.as_bytes()[4] == b'-' && word.as_bytes()[10] == b'T' {
            out += "<time>";
        } else if before == "share" {
            out += "<tokens>";
        } else {
            out += word;
        }
        out += &piece[word.len()..];
        before = word;
    }
    out
}

fn diff(expected: &str, said: &str) -> String {
    let (mut old, mut new) = (expected.lines(), said.lines());
    let mut text = String::new();
    loop {
        let _ = match (old.next(), new.next()) {
            (None, None) => return text,
            (Some(old), Some(new)) if old == new => writeln!(text, "  {old}"),
            (Some(old), Some(new)) => writeln!(text, "- {old}\n+ {new}"),
            (Some(old), None) => writeln!(text, "- {old}"),
            (None, Some(new)) => writeln!(text, "+ {new}"),
        };
    }
}

#[test]
fn what_time_moves_is_masked_and_nothing_else() {
    let text = "t1 RETRY: it is due in 1 min 5 s (until 2026-11-24T05:00:00+01:00); 2 of 3, all agents share 99.4, t2 t12.";
    assert_eq!(
        masked(text, &["t1", "t2"]),
        "<task> RETRY: it is due in <span> (until <time>); 2 of 3, all agents share <tokens>, <other> t12."
    );
    assert_eq!(masked("\"2026-11-24T05:00:00Z\", 250 ms.\n12 sheep", &[]), "\"<time>\", <span>.\n12 sheep");
}

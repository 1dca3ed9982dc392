//! The program's own commands, run to their end.

use super::command;
use std::path::Path;
use std::process::Output;

/// Runs a command.
pub(crate) fn ledgerd(args: &[&str]) -> Output {
    command().args(args).output().expect("the binary runs")
}

/// All that it printed.
pub(crate) fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Runs a command that does what it is asked for; what it prints on standard output.
pub(crate) fn done(args: &[&str]) -> String {
    let output = ledgerd(args);
    assert!(output.status.success(), "{args:?}: {}", said(&output));
    String::from_utf8(output.stdout).expect("text")
}

/// Runs a command that is refused, with this exit code and this sentence.
pub(crate) fn refused(args: &[&str], code: i32, sentence: &str) {
    let output = ledgerd(args);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {}", said(&output));
    assert!(said(&output).contains(sentence), "{args:?}: {}", said(&output));
}

/// A path as an argument.
pub(crate) fn shown(path: &Path) -> String {
    path.display().to_string()
}

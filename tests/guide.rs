//! Pages whose every command is run, in order, as they stand; and what each prints is what the page says it prints.
//!
//! A page holds blocks marked `console`: lines that begin with `$ ` are commands, a command that ends in ` &` is left
//! running, and what follows a command is its output. Instants and spans may differ. A command that only looks is
//! repeated until it shows what the page says. `UPDATE_TRANSCRIPTS=1` writes what was printed into the page.

use crate::support::{Daemon, transcript};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Looks at a page, 50 ms apart, before it is held to be wrong.
const LOOKS: usize = 400;
/// Time that what was started before gets, when a page is written and there is nothing to wait for.
const SETTLE: Duration = Duration::from_millis(1_500);

/// A program left running, with all it has started.
struct Left(Child);

impl Drop for Left {
    fn drop(&mut self) {
        let group = format!("-{}", self.0.id());
        let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
        let _ = self.0.wait();
    }
}

struct Shell<'a> {
    daemon: &'a Daemon,
    folder: &'a Path,
    left: Vec<Left>,
}

impl Shell<'_> {
    fn command(&self, line: &str) -> Command {
        let binary = Path::new(env!("CARGO_BIN_EXE_ledgerd")).parent().expect("it is in a folder");
        let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("sh");
        command
            .args(["-c", line])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("PATH", path)
            .env("LEDGERD_ADDRESS", &self.daemon.address)
            .env("TMPDIR", self.folder)
            .env("TZ", "UTC")
            .stdin(Stdio::null());
        command
    }

    fn leave_running(&mut self, line: &str) {
        let mut command = self.command(&format!("exec {line}"));
        command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        self.left.push(Left(command.spawn().expect("sh starts")));
    }

    /// What it prints, errors included, and its exit code where that is not 0.
    fn run(&self, line: &str) -> String {
        let output = self.command(&format!("{{ {line}\n}} 2>&1")).output().expect("sh runs");
        let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.code() {
            Some(0) => {}
            code => said += &format!("(exit code {})\n", code.unwrap_or(-1)),
        }
        // A page has no trailing blanks.
        said.lines().map(|line| format!("{}\n", line.trim_end())).collect()
    }
}

/// Whether a command changes nothing, so that it may be repeated.
fn only_looks(line: &str) -> bool {
    let words: Vec<_> = line.split_whitespace().take(3).collect();
    match words[..] {
        ["ledgerd", "stats", ..] => true,
        ["ledgerd", _, verb] => {
            matches!(verb, "show" | "list" | "history" | "explain" | "group" | "events" | "wait")
        }
        _ => false,
    }
}

/// Whether a program says what its page does. A history may have more STARTED than there, for a short attempt has one where the
/// machine is slow to start programs; never fewer.
fn same(said: &str, page: &str) -> bool {
    let (said, page) = (masked(said), masked(page));
    let (told, expected) = (without_started(&said), without_started(&page));
    said == page || told.1 > expected.1 && told.0 == expected.0
}

/// Lines without STARTED, and without the numbers that rows of a history have; and how many such lines there were.
fn without_started(masked: &str) -> (Vec<String>, usize) {
    let mut started = 0;
    let mut line = |line: &str| {
        let words: Vec<_> = line.split(' ').collect();
        match &words[..] {
            [_, "<time>", "STARTED", ..] => {
                started += 1;
                None
            }
            [_, rest @ ..] if rest.first() == Some(&"<time>") => Some(rest.join(" ")),
            _ => Some(line.to_owned()),
        }
    };
    let lines = masked.lines().filter_map(&mut line).collect();
    (lines, started)
}

/// Instants and spans become placeholders, runs of blanks one: columns are as wide as what is in them.
fn masked(text: &str) -> String {
    let is_span = |word: &str| {
        let word = word.trim_matches([',', '.', '(', ')']);
        word.starts_with(|c: char| c.is_ascii_digit())
            && word.ends_with(['s', 'm', 'h'])
            && word.chars().all(|c| c.is_ascii_digit() || matches!(c, 'm' | 's' | 'h' | '.'))
    };
    let line = |line: &str| {
        let words = line.split_whitespace().map(|word| if is_span(word) { "<span>" } else { word });
        words.collect::<Vec<_>>().join(" ")
    };
    transcript::masked(text, &[]).lines().map(line).collect::<Vec<_>>().join("\n")
}

/// Runs a page; what it should say instead, when that differs.
fn run_page(path: &str) {
    let update = std::env::var_os("UPDATE_TRANSCRIPTS").is_some_and(|value| value == "1");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    let page = std::fs::read_to_string(&file).expect("the page is there");
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().expect("a folder");
    let mut shell = Shell { daemon: &daemon, folder: folder.path(), left: Vec::new() };
    let (mut written, mut commands, mut wrong) = (String::new(), 0, Vec::new());
    let mut lines = page.lines().peekable();
    let mut inside = false;
    while let Some(line) = lines.next() {
        written += line;
        written.push('\n');
        if line.starts_with("```") {
            inside = !inside && line == "```console";
            continue;
        }
        let Some(command) = line.strip_prefix("$ ").filter(|_| inside) else { continue };
        commands += 1;
        let mut expected = String::new();
        while let Some(said) = lines.next_if(|line| !line.starts_with("$ ") && !line.starts_with("```")) {
            expected += said;
            expected.push('\n');
        }
        if let Some(command) = command.strip_suffix(" &") {
            shell.leave_running(command);
            continue;
        }
        let looks = if !only_looks(command) {
            1
        } else if update {
            std::thread::park_timeout(SETTLE);
            1
        } else {
            LOOKS
        };
        let mut said = String::new();
        for look in 0..looks {
            if look > 0 {
                std::thread::park_timeout(Duration::from_millis(50));
            }
            said = shell.run(command);
            if same(&said, &expected) {
                break;
            }
        }
        if same(&said, &expected) {
            written += &expected;
        } else {
            written += &said;
            wrong.push(format!("$ {command}\n--- the page\n{expected}--- the program\n{said}"));
        }
        if !wrong.is_empty() && !update {
            break;
        }
    }
    assert!(commands > 0, "{path} has no command");
    if update {
        std::fs::write(&file, written).expect("the tree is writable");
        return;
    }
    assert!(wrong.is_empty(), "{path} (UPDATE_TRANSCRIPTS=1 accepts):\n{}", wrong.join("\n"));
}

#[test]
fn when_things_go_wrong() {
    run_page("docs/when-things-go-wrong.md");
}

#[test]
fn a_history_may_have_more_started_than_its_page_and_no_fewer() {
    let short = "#  TIME                           EVENT      STATE    ATTEMPT  FENCE  WORKER  NOTE\n\
        1  2026-11-30T10:13:53.219+00:00  ASSIGNED   RUNNING  0        1      w\n\
        2  2026-11-30T10:13:53.735+00:00  COMPLETED  DONE     1        1      w\n";
    let long = short.replace(
        "2  2026",
        "2  2026-11-30T10:13:53.726+00:00  STARTED    RUNNING  1        1      w\n3  2026",
    );
    assert!(same(short, short) && same(&long, &long) && same(&long, short));
    assert!(!same(short, &long), "it was started");
    assert!(!same(&long, &short.replace("COMPLETED", "FAILED   ")));
    assert!(!same(&short.replace("2  2026", "3  2026"), short), "a row is missing");
}

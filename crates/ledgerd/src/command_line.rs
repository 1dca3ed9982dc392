//! Writes `docs/reference/cli.md` from clap's tree of commands.

use crate::Cli;
use clap::builder::StyledStr;
use clap::{Arg, ArgAction, Command, CommandFactory};
use std::collections::BTreeMap;
use std::fmt::Write as _;

const HEAD: &str = "# The command line

Generated from the code; a test holds that it is so. `ledgerd COMMAND --help` says the same. What `serve` goes by can stand in a file and in the
environment too: [configuration](configuration.md), [exit codes](configuration.md#exit-codes).
";

/// Lines of a table that is shown once, however many commands have it.
const LONG: usize = 10;

fn page() -> String {
    let mut program = Cli::command();
    // Fills in what commands inherit, and their full names.
    program.build();
    let mut text = HEAD.to_owned();
    let _ = writeln!(text, "\n## Flags of every client command\n\nBefore or after the command.");
    text.push_str(&options(&program, true));
    let mut said = BTreeMap::new();
    for command in program.get_subcommands_mut() {
        write_command(&mut text, command, &mut said);
    }
    text
}

/// What has been said of options is not said again: `said` knows where.
fn write_command(text: &mut String, command: &mut Command, said: &mut BTreeMap<String, String>) {
    if command.is_hide_set() || command.get_name() == "help" {
        return;
    }
    let usage = command.render_usage().to_string();
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name()).to_owned();
    let level = "#".repeat(name.split(' ').count());
    let about = command.get_long_about().or_else(|| command.get_about());
    let about = about.map(StyledStr::to_string).unwrap_or_default();
    let _ = writeln!(text, "\n{level} {name}\n\n{}", escaped(about.trim()));
    if !command.has_subcommands() {
        let usage: Vec<_> = usage.trim_start_matches("Usage:").split_whitespace().collect();
        let _ = writeln!(text, "\n```console\n$ {}\n```", usage.join(" "));
    }
    let options = options(command, false);
    match said.get(&options) {
        Some(other) if options.lines().count() > LONG => {
            let _ = writeln!(text, "\nIts options are those of [{other}](#{}).", other.replace(' ', "-"));
        }
        _ => text.push_str(&options),
    }
    said.entry(options).or_insert(name);
    for inner in command.get_subcommands_mut() {
        write_command(text, inner, said);
    }
}

/// A table of what may be said, if there is anything.
fn options(command: &Command, global: bool) -> String {
    let ours = |arg: &&Arg| !arg.is_hide_set() && !matches!(arg.get_id().as_str(), "help" | "version");
    let args: Vec<_> =
        command.get_arguments().filter(ours).filter(|arg| arg.is_global_set() == global).collect();
    let mut text = String::new();
    if args.is_empty() {
        return text;
    }
    let _ = writeln!(text, "\n| | default | variable | what |\n| --- | --- | --- | --- |");
    for arg in args {
        let Row { spelled, default, variable, what } = Row::of(arg);
        let code = |text: &str| {
            if text.is_empty() { String::new() } else { format!("`{}`", text.replace('|', "\\|")) }
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} |",
            code(&spelled),
            code(&default),
            code(&variable),
            escaped(&what)
        );
    }
    text
}

/// What a table says of one option.
struct Row {
    spelled: String,
    default: String,
    variable: String,
    what: String,
}

impl Row {
    fn of(arg: &Arg) -> Self {
        let said = arg.get_long_help().or_else(|| arg.get_help());
        let said = said.map(StyledStr::to_string).unwrap_or_default();
        let mut what = said.split_whitespace().collect::<Vec<_>>().join(" ");
        // Those of `serve` come from several places, so clap knows neither; their help says both.
        let mut default = taken(&mut what, "default");
        let mut variable = taken(&mut what, "env");
        let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
        if takes_value && default.is_empty() {
            let values: Vec<_> =
                arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
            default = values.join(",");
        }
        if let Some(name) = arg.get_env() {
            variable = name.to_string_lossy().into_owned();
        }
        let words: Vec<_> = arg
            .get_possible_values()
            .iter()
            .filter(|word| !word.is_hide_set())
            .map(|word| format!("`{}`", word.get_name()))
            .collect();
        if takes_value && !words.is_empty() {
            let _ = write!(what, ": {}", words.join(", "));
        }
        if arg.is_required_set() {
            what.push_str(" (needed)");
        }
        Self { spelled: spelled(arg), default, variable, what }
    }
}

/// Takes `[NAME: VALUE]` out of a help text.
fn taken(help: &mut String, name: &str) -> String {
    let begin = format!(" [{name}: ");
    let Some(at) = help.find(&begin) else { return String::new() };
    let rest = &help[at + begin.len()..];
    let Some(end) = rest.find(']') else { return String::new() };
    let value = rest[..end].to_owned();
    help.replace_range(at..at + begin.len() + end + 1, "");
    value
}

/// `-o, --output <OUTPUT>`, or the name of a value that stands by itself.
fn spelled(arg: &Arg) -> String {
    let names =
        [arg.get_short().map(|short| format!("-{short}")), arg.get_long().map(|long| format!("--{long}"))];
    let mut text = names.into_iter().flatten().collect::<Vec<_>>().join(", ");
    if !matches!(arg.get_action(), ArgAction::Set | ArgAction::Append) {
        return text;
    }
    let several = arg.get_num_args().is_some_and(|count| count.max_values() > 1);
    let values = match arg.get_value_names() {
        Some(names) => names.iter().map(|name| name.to_string()).collect::<Vec<_>>().join(" "),
        None => arg.get_id().as_str().to_ascii_uppercase(),
    };
    if !text.is_empty() {
        text.push(' ');
    }
    text.push_str(&values);
    if several {
        text.push_str("...");
    }
    text
}

/// Text that a table and a page show as it is.
fn escaped(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;")
}

#[test]
fn the_reference_has_every_command() {
    crate::reference::is_kept("cli.md", &page());
}

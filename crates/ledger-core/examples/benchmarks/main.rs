//! Puts the figures of `ledgerd bench suite --curves` into docs/benchmarks.md and draws its plots.
//!
//! `benchmarks FILE`: what lies between the marks in the page is replaced; all else in it is written by people.

mod plot;

use serde_json::Value;
use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;

const PAGE: &str = "docs/benchmarks.md";
const FOLDER: &str = "docs/benchmarks";

type Failed = Box<dyn Error>;

fn main() -> Result<(), Failed> {
    let file = std::env::args().nth(1).ok_or("name the file with the figures")?;
    let report: Value = serde_json::from_str(&std::fs::read_to_string(file)?)?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let page = root.join(PAGE);
    let mut text = std::fs::read_to_string(&page)?;
    for (name, content) in
        [("machine", machine(&report)), ("goals", goals(&report)), ("facts", facts(&report))]
    {
        text = put(&text, name, &content)?;
    }
    std::fs::write(&page, text)?;
    if !report["curves"].is_null() {
        plot::all(&report["curves"], &root.join(FOLDER))?;
    }
    Ok(())
}

/// Replaces what is between two marks.
fn put(text: &str, name: &str, content: &str) -> Result<String, Failed> {
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->"));
    let from = text.find(&begin).ok_or_else(|| format!("no mark {begin}"))? + begin.len();
    let to = text.find(&end).ok_or_else(|| format!("no mark {end}"))?;
    Ok(format!("{}{content}{}", &text[..from], &text[to..]))
}

fn machine(report: &Value) -> String {
    let (machine, size) = (&report["machine"], &report["size"]);
    format!(
        "{} cores, {}, {}; ledgerd {}; {} rounds of {} s, {} finished and {} waiting tasks stored.\n",
        machine["cores"],
        text(&machine["cpu"]),
        text(&machine["system"]),
        text(&report["version"]),
        size["rounds"],
        size["seconds"],
        size["finished"],
        size["waiting"],
    )
}

fn goals(report: &Value) -> String {
    let mut out = String::from(
        "| goal | what | floor | stretch | median | lowest to highest | reached |\n|---|---|---|---|---|---|---|\n",
    );
    for row in report["rows"].as_array().into_iter().flatten() {
        let number = |name: &str| row[name].as_f64().unwrap_or(f64::NAN);
        let (floor, stretch, measured, unit) =
            (number("floor"), number("stretch"), number("measured"), text(&row["unit"]));
        let reached = match row["held"].as_bool() {
            Some(true) if (stretch > floor) == (measured >= stretch) => "stretch",
            Some(true) => "floor",
            _ => "**missed**",
        };
        let _ = writeln!(
            out,
            "| {} | {} | {floor}{unit} | {stretch}{unit} | {measured}{unit} | {} to {} | {reached} |",
            text(&row["goal"]).trim(),
            text(&row["what"]),
            number("lowest"),
            number("highest"),
        );
    }
    out
}

fn facts(report: &Value) -> String {
    let mut out = String::from("| fact | figure |\n|---|---|\n");
    for (name, value) in report["facts"].as_object().into_iter().flatten() {
        let shown = match value {
            Value::Array(items) => items.iter().map(show).collect::<Vec<_>>().join("; "),
            one => show(one),
        };
        let _ = writeln!(out, "| {} | {shown} |", name.replace('_', " "));
    }
    out
}

fn show(value: &Value) -> String {
    match value {
        Value::Array(items) => items.iter().map(show).collect::<Vec<_>>().join(" / "),
        Value::Number(number) => match number.as_f64() {
            Some(number) if number.fract() != 0.0 => format!("{number:.3}"),
            _ => number.to_string(),
        },
        other => text(other),
    }
}

fn text(value: &Value) -> String {
    value.as_str().map(str::to_owned).unwrap_or_default()
}

//! The page about the real daemon, drawn from what `ledgerd bench outage` printed.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::plot::{Failed, Line, Panel, draw};

/// Writes `daemon.md` and its plots. Fails, after that, when the run held not what is promised.
pub(super) fn write(file: &Path, out: &Path) -> Result<(), Failed> {
    let report: Value = serde_json::from_str(&fs::read_to_string(file)?)?;
    let runs = report["runs"].as_array().ok_or("the report has no runs")?;
    for fault in ["A", "B"] {
        let runs: Vec<_> = runs.iter().filter(|run| run["fault"] == fault).collect();
        if !runs.is_empty() {
            plot(&out.join(format!("daemon-{}.svg", fault.to_lowercase())), fault, &report, &runs)?;
        }
    }
    fs::write(out.join("daemon.md"), page(&report, runs))?;
    if report["held"] == true { Ok(()) } else { Err("a bound did not hold; the page says which".into()) }
}

fn plot(file: &Path, fault: &str, report: &Value, runs: &[&Value]) -> Result<(), Failed> {
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let lines = |figure: &str| -> Vec<Line> {
        let line = |run: &&Value| {
            let seconds = run["seconds"].as_array().map_or(&[][..], Vec::as_slice);
            let point = |(at, second): (usize, &Value)| {
                (at as f64, number(&second[figure]) / number(&second["arrivals"]).max(1.0))
            };
            let is_control = run["policy"] == "control";
            Line {
                name: if is_control { "without breaker and budget" } else { "ledgerd" }.into(),
                colour: if is_control { 0 } else { 4 },
                points: seconds.iter().enumerate().map(point).collect(),
            }
        };
        runs.iter().map(line).collect()
    };
    let longest = runs.iter().filter_map(|run| run["seconds"].as_array()).map(Vec::len).max();
    let panel = |caption: &str, top, lines| Panel {
        caption: caption.into(),
        x_label: "seconds",
        x: 0.0..longest.unwrap_or(1) as f64,
        top,
        log: false,
        shaded: Some((number(&runs[0]["fault_from_s"]), number(&runs[0]["fault_until_s"]))),
        lines,
    };
    let panels = [
        panel("calls at the backend per arrival", 8.0, lines("calls")),
        panel("goodput per arrival", 1.6, lines("good")),
    ];
    let what = if fault == "A" { "every call fails" } else { "40 % of the capacity" };
    let title = format!(
        "Fault {fault}: {what} (shaded); {} agents, daemon killed every {} s",
        report["agents"], report["kill_every_s"]
    );
    draw(file, &title, &panels)
}

fn page(report: &Value, runs: &[Value]) -> String {
    let mut table = String::new();
    for run in runs {
        let recovers =
            run["recovers_after_s"].as_u64().map_or_else(|| "never".into(), |after| format!("{after} s"));
        let control = run["policy"] == "control";
        let _ = writeln!(
            table,
            "| {}, fault {} | {} | {} | {} | {recovers} | {} of {} | {} | {} | {} ms |",
            if control { "without breaker and budget" } else { "ledgerd" },
            text(&run["fault"]),
            run["amplification"],
            run["peak"],
            run["peak_with_kills"],
            run["done"],
            run["tasks"],
            run["failed"],
            run["kills"],
            run["slowest_restart_ms"],
        );
    }
    let misses: Vec<&str> =
        runs.iter().filter_map(|run| run["misses"].as_array()).flatten().map(text).collect();
    let verdict = match misses.as_slice() {
        [] => "Every bound held.".to_owned(),
        misses => format!("**Not every bound held:** {}.", misses.join("; ")),
    };
    let machine = &report["machine"];
    format!(
        "# An outage, on a real daemon

[simulation.md](simulation.md) in virtual time; here with all that surrounds it: gRPC, streams, leases, SQLite, and a daemon
that is killed with SIGKILL every {kill} s, during the whole run. Written by `just outage`.

{agents} agents, a worker each through the Rust SDK with {slots} slots, share one scripted backend: {capacity} calls a second,
first come, first served, 3 s of queue, callers that give up after 1 s. Tasks arrive at {rate} a second, evenly, whether or not
the daemon is there; a producer repeats a call with the same request id until it is answered. Agents have max_retries 3 and
breakers that open for {open} s; all else is the default, the ramp of 10 s after a breaker has closed too. Fault A: every call is refused for 30 s. Fault B: 40 % of the
capacity for 20 s. The control has neither breaker nor budget, and workers with 1,000 slots.

| run | amplification | peak | peak with kills | recovers | done | failed | kills | slowest restart |
|---|---|---|---|---|---|---|---|---|
{table}
{verdict}

- *amplification*: calls at the backend per arrival, from 2 s into the fault until its end. Bound: 0.35; the control over 3.
- *peak*: the most calls in one second, as a multiple of {rate}, of the seconds in which the daemon was not killed, nor in the
  one before. Bound: 1.4. *With kills*: of all seconds. A kill stops all calls for a moment, and then every free slot is
  filled at once: load that was put off, not added.
- *recovers*: seconds from the end of the fault until goodput is 95 % of the arrivals in each five seconds that follow, while
  tasks arrive. Bound: 90 s.
- *done*: when nothing arrives any more the rest has three minutes. Bound: all of them. The control is not waited for.

![Fault A over time](daemon-a.svg)

![Fault B over time](daemon-b.svg)

Machine: {cores} cores, {cpu}, {system}; ledgerd {version}.

## Again

```
just outage                  # this page and its plots
just outage --kill-every 0s  # without kills
```
",
        kill = report["kill_every_s"],
        agents = report["agents"],
        slots = report["slots_per_agent"],
        capacity = report["backend_per_s"],
        rate = report["arrivals_per_s"],
        open = report["open_s"],
        cores = machine["cores"],
        cpu = text(&machine["cpu"]),
        system = text(&machine["system"]),
        version = text(&report["version"]),
    )
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

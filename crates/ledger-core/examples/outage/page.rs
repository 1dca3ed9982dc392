//! The page about the simulation. The words say what was done and how to do it again; all figures are in the tables.

use std::fmt::Write as _;

use super::world::{BASE, Fault};
use super::{ROWS, Runs, SLOTS};

/// What is the same for every seed in the tables.
const SHOWN: [u32; 3] = [100, 10, 1_000];

pub(super) fn page(seeds: u64, runs: &[Runs]) -> String {
    format!(
        "# An outage, simulated

What do retries do to a backend that is in trouble, and how long does the trouble last after its cause has gone? Written by
`just outage-plot`: the same seeds give the same page.

## The world

Arrivals are open, 1,000 a second on average, on N agents behind one backend. The backend serves 1,250 calls a second, first
come, first served, and lets calls for 3 s of its full speed wait. A caller gives up after 1 s; the backend does not know and
works on. At 30 s comes the fault:

- **A**: every call is refused at once for 60 s;
- **B**: the backend has 40 % of its capacity for 20 s. This is what starts a metastable failure: the queue outgrows the
  callers' patience, so all work is done for callers that have left, and their retries keep the queue full.

Time is virtual and ends at 240 s. The decisions are made by the code that ledgerd runs: `retry_core::Policy`,
`ledger_core::Agent` with its own bucket (10 tokens), the shared one (100) and the floors, `breaker_core::Breaker`, all with
the daemon's default settings unless the row says otherwise.

- *Plain retries* are calls of independent clients: nothing bounds how many run at one time.
- *Worker slots* bound it, as the capacity of workers does in ledgerd: there are 1,000 of them, shared out evenly, which is
  what the arrivals would need if every call took until its timeout.
- *Budget only*: a retry that finds no token waits for one instead of failing, since a ledger can keep it. Tasks that still
  wait at the end are not counted as failed.
- *Breaker only* has slots and plain retries. Tasks of an agent whose breaker is open wait in its queue; the head of the queue
  is the probe, and a failed probe does not count as a retry.
- *ledgerd* is slots, breaker, budget, and a ramp after a breaker has closed: the agent's slots grow from a tenth to all of
  them in 10 s. The limit is the breaker's own, as in the daemon.

## What came of it

Means over {seeds} seeds, but for the peak, the recovery and the failures, where the worst seed counts.

- *amplification*: calls at the backend per arrival, from 2 s into the fault until its end;
- *peak*: the most calls in one second, as a multiple of {BASE:.0};
- *recovers*: seconds from the end of the fault until goodput is 95 % of the arrivals in each five seconds that follow, to the
  end of the run;
- *failed*: tasks whose retries were used up, of 240,000.

{tables}
## Plots, 100 agents

![Fault A over time](a.svg)

![Fault B over time](b.svg)

![Amplification against the number of agents](agents.svg)

## Again

```
just outage-plot            # this page and its plots
just outage-plot --seeds 20
```

`cargo test -p ledger-core outage` runs 100 agents with one seed and asserts the bounds we set ourselves.
",
        tables = tables(runs)
    )
}

pub(super) fn tables(runs: &[Runs]) -> String {
    let mut text = String::new();
    for agents in SHOWN {
        let rows: Vec<_> = (0..ROWS.len()).map(|row| (ROWS[row].name.to_owned(), row, agents, 1)).collect();
        table(&mut text, &format!("{agents} agents"), &rows, runs);
    }
    let mut rows = Vec::new();
    for row in (0..ROWS.len()).filter(|row| ROWS[*row].policy.slots) {
        for slots in SLOTS {
            rows.push((format!("{}, {slots} × the slots", ROWS[row].name), row, 100, slots));
        }
    }
    table(&mut text, "More slots than the backend can serve in time, 100 agents", &rows, runs);
    text
}

fn table(text: &mut String, title: &str, rows: &[(String, usize, u32, u32)], runs: &[Runs]) {
    let _ = writeln!(text, "### {title}\n");
    let _ = writeln!(
        text,
        "| policy | A: amplification | peak | recovers | failed | B: amplification | peak | recovers | failed |"
    );
    let _ = writeln!(text, "|---|---|---|---|---|---|---|---|---|");
    for (name, row, agents, slots) in rows {
        let _ = write!(text, "| {name} ");
        for fault in Fault::ALL {
            let found = runs.iter().find(|runs| runs.is(*row, fault, *agents, *slots));
            let _ = write!(text, "{}", cells(found.expect("every row of a table was run")));
        }
        let _ = writeln!(text, "|");
    }
    text.push('\n');
}

fn cells(runs: &Runs) -> String {
    let span = runs.fault.span();
    let slowest = runs
        .records
        .iter()
        .map(|record| record.recovers_after(span))
        .max_by_key(|after| after.unwrap_or(u32::MAX));
    let recovers = slowest.flatten().map_or_else(|| "never".into(), |after| format!("{after} s"));
    let (amplification, peak) = (runs.amplification(), runs.worst(|record| record.peak(BASE)));
    let failed = runs.worst(|record| f64::from(record.failed));
    format!("| {amplification:.2} | {peak:.2} | {recovers} | {} ", thousands(failed as u64))
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

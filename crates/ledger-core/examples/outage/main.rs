//! What an outage does to load and goodput under several retry policies: tables and plots.
//!
//! `just outage-plot` runs the simulation of `world` and writes `docs/outage/simulation.md` with its plots. `--daemon
//! FILE` draws what `ledgerd bench outage` has measured instead. Neither page holds a number that was typed in.

mod daemon;
mod page;
mod plot;
mod world;

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use world::{Fault, Policy, Record, Setup};

/// Numbers of agents that are simulated; the tables show some of them.
const AGENTS: [u32; 5] = [10, 32, 100, 316, 1_000];
/// Multiples of the slots in the table about slots.
const SLOTS: [u32; 3] = [1, 2, 4];

/// One policy of the tables.
struct Row {
    name: &'static str,
    short: &'static str,
    policy: Policy,
}

const ROWS: [Row; 6] = [
    Row { name: "plain retries (3, exponential, ±50 %)", short: "plain retries", policy: Policy::PLAIN },
    Row { name: "plain retries within worker slots", short: "plain, slots", policy: Policy::SLOTS },
    Row { name: "budget only; refused retries wait", short: "budget only", policy: Policy::BUDGET },
    Row { name: "breaker only, open 5 s", short: "breaker only, 5 s", policy: Policy::BREAKER },
    Row { name: "ledgerd, open 5 s", short: "ledgerd, 5 s", policy: Policy::OURS },
    Row { name: "ledgerd, open 60 s (default)", short: "ledgerd, 60 s", policy: Policy::DEFAULT },
];

/// The runs of one row with every seed.
struct Runs {
    row: usize,
    fault: Fault,
    agents: u32,
    slots: u32,
    records: Vec<Record>,
}

struct Args {
    seeds: u64,
    out: PathBuf,
    daemon: Option<PathBuf>,
}

fn main() -> ExitCode {
    match arguments(std::env::args().skip(1)).and_then(|args| run(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outage: {error}");
            ExitCode::FAILURE
        }
    }
}

fn arguments(mut words: impl Iterator<Item = String>) -> Result<Args, Box<dyn Error>> {
    let mut args = Args { seeds: 5, out: "docs/outage".into(), daemon: None };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        match word.as_str() {
            "--seeds" => args.seeds = value()?.parse().map_err(|_| "--seeds is a number")?,
            "--out" => args.out = value()?.into(),
            "--daemon" => args.daemon = Some(value()?.into()),
            _ => return Err(format!("{word} is none of --seeds N, --out DIR, --daemon FILE").into()),
        }
    }
    if args.seeds == 0 { Err("--seeds is at least 1".into()) } else { Ok(args) }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(&args.out)?;
    if let Some(file) = &args.daemon {
        return daemon::write(file, &args.out);
    }
    let runs = simulate(args.seeds);
    plot::over_time(&args.out, &runs)?;
    plot::over_agents(&args.out, &runs)?;
    fs::write(args.out.join("simulation.md"), page::page(args.seeds, &runs))?;
    print!("{}", page::tables(&runs));
    Ok(())
}

/// Everything that the page shows. Runs know nothing of each other, so seeds are shared out to the cores.
fn simulate(seeds: u64) -> Vec<Runs> {
    let mut all = Vec::new();
    for fault in Fault::ALL {
        for agents in AGENTS {
            for row in 0..ROWS.len() {
                all.push(Runs { row, fault, agents, slots: 1, records: Vec::new() });
            }
        }
        for slots in SLOTS.into_iter().filter(|slots| *slots > 1) {
            for row in (0..ROWS.len()).filter(|row| ROWS[*row].policy.slots) {
                all.push(Runs { row, fault, agents: 100, slots, records: Vec::new() });
            }
        }
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = all.len().div_ceil(threads);
    std::thread::scope(|scope| {
        for part in all.chunks_mut(share) {
            scope.spawn(move || {
                for runs in part {
                    let policy = ROWS[runs.row].policy;
                    let setup = |seed| Setup {
                        slots: runs.slots,
                        ..Setup::new(policy, runs.fault, runs.agents, seed)
                    };
                    runs.records = (1..=seeds).map(|seed| setup(seed).run()).collect();
                }
            });
        }
    });
    all
}

impl Runs {
    fn is(&self, row: usize, fault: Fault, agents: u32, slots: u32) -> bool {
        (self.row, self.fault, self.agents, self.slots) == (row, fault, agents, slots)
    }

    /// The mean over the seeds.
    fn mean(&self, figure: impl Fn(&Record) -> f64) -> f64 {
        self.records.iter().map(figure).sum::<f64>() / self.records.len() as f64
    }

    /// The worst of the seeds.
    fn worst(&self, figure: impl Fn(&Record) -> f64) -> f64 {
        self.records.iter().map(figure).fold(0.0, f64::max)
    }

    fn amplification(&self) -> f64 {
        self.mean(|record| record.amplification(self.fault.span()))
    }
}

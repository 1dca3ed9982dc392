//! `ledgerd demo`: the main job on real input, with trouble.
//!
//! A daemon on a file, a worker process for each of three agents, every text file of a folder a task for each. While it
//! runs, a worker is killed with SIGKILL and another agent's programs fail until its breaker opens. In the end every
//! task must be DONE and every result right: they are computed again here, in another way.
//!
//! All processes are ended with the demo, however that ends; see module `daemon`.

mod check;
mod files;
mod program;
mod scene;
mod screen;
mod settings;
mod summary;
mod verdict;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ledgerd_client::Client;

use crate::connect::connect;
use crate::daemon::{self, Daemon, Process, cannot};
use crate::failure::{Exit, Failure};
use crate::guard::Guard;
use crate::output::{Facts, print, remark};
use crate::policy::Span;
use crate::time::show_duration;
use crate::{Format, Global};
use files::Sources;
use program::Program;
use scene::{Plan, Scene};
use screen::Screen;
use summary::{Summary, Tally};
use verdict::Verdict;

/// The fewest tasks: below, there would be nothing left to do when the trouble begins.
const FEWEST_TASKS: usize = 300;
/// How fast files are enqueued: each task is a process, and two cores start some hundred a second.
const TASKS_PER_S: f64 = 40.0;
/// How long enqueueing takes at least and at most. The outage is over after about ten seconds.
const ENQUEUE: [f64; 2] = [13.0, 25.0];
/// How long everything may take, from the first enqueue.
const LIMIT: Duration = Duration::from_secs(50);
/// What a process costs beside its thinking, on a machine that is busy.
const PROCESS: Duration = Duration::from_millis(60);
/// Below, a task is over before its worker says that it started; above, the demo takes too long.
const THINK: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(2);
/// How long a process that is told to end gets.
const STOP: Duration = Duration::from_secs(5);

/// `demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder whose text files are worked on; .git, target, node_modules, files over 1 MiB are left out
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Print one JSON object instead of a table, as -o json does
    #[arg(long)]
    json: bool,
    /// Leave the daemon running, and say what to try next
    #[arg(long)]
    keep: bool,
    /// Files that are taken at most
    #[arg(long, value_name = "N", default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..))]
    files: u32,
    /// How long each program waits before it works, as it would for the answer of a model
    #[arg(long, value_name = "DUR", default_value = "250ms")]
    think: Span,
    /// Store of the daemon
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// Data directory of the daemon; else a temporary one
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Be one of the programs that the demo's workers run
    #[arg(long, hide = true, value_enum)]
    program: Option<Program>,
}

impl Args {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        if let Some(program) = self.program {
            return program.run(self.think.0).await;
        }
        if !THINK.contains(&self.think.0) {
            let [least, most] = [THINK.start(), THINK.end()].map(|span| show_duration(*span));
            return Err(Failure::usage(format!(
                "--think is {least} to {most}: a task must run when its worker is killed"
            )));
        }
        let told_to_end = daemon::told_to_end()?;
        // What is dropped half-way ends its processes.
        tokio::select! {
            shown = self.show(global) => shown,
            () = told_to_end => Err(Failure::new(Exit::Failure, "interrupted; the demo's processes are ended")),
        }
    }

    async fn show(self, global: &Global) -> Result<(), Failure> {
        // Declared first, removed last: after all processes that write to it.
        let folder = tempfile::Builder::new()
            .prefix("ledgerd-demo-")
            .tempdir()
            .map_err(|error| cannot("make a temporary folder", &error))?;
        let guard = daemon::guard()?;
        let sources = self.sources(folder.path())?;
        let plan = self.plan(folder.path(), &sources);
        let data_dir = self.data_dir.clone().unwrap_or_else(|| folder.path().join("data"));
        let mut daemon = Daemon::start(&data_dir, self.store.as_deref(), &guard).await?;
        remark(&self.introduce(&plan, &sources, &daemon));
        let played = self.play(global, &plan, &daemon.address, &guard).await;
        let (summary, verdict) = played.map_err(|failure| daemon.blame(failure))?;
        let is_json = self.json || global.output == Format::Json;
        if is_json {
            print(&summary.json())?;
        } else {
            remark("");
            print(&summary.table())?;
        }
        verdict.check()?;
        if self.keep {
            let (address, id) = (daemon.address.clone(), daemon.process.id());
            daemon.process.let_go();
            remark(&next(&address, id, &folder.keep(), &verdict));
        } else {
            daemon.process.stop(STOP).await;
        }
        Ok(())
    }

    /// Copies the input, and says what it is.
    fn sources(&self, folder: &Path) -> Result<Sources, Failure> {
        let dir = self.dir.display();
        let sources = files::copy(&self.dir, &folder.join("files"), self.files as usize)
            .map_err(|error| cannot(&format!("read {dir}"), &error))?;
        if sources.files.is_empty() {
            return Err(Failure::usage(format!("there is no text file under {dir}; name another folder")));
        }
        Ok(sources)
    }

    fn plan(&self, folder: &Path, sources: &Sources) -> Plan {
        let files = sources.files.len();
        let rounds = FEWEST_TASKS.div_ceil(files * Program::ALL.len());
        let tasks = files * rounds * Program::ALL.len();
        let seconds = (tasks as f64 / TASKS_PER_S).clamp(ENQUEUE[0], ENQUEUE[1]);
        let think = self.think.0;
        // As many as keep up with what is enqueued, and half as many again to make up for the outage.
        let rate = tasks as f64 / Program::ALL.len() as f64 / seconds;
        let capacity = (rate * (think + PROCESS).as_secs_f64() * 1.5).ceil().clamp(4.0, 64.0) as usize;
        Plan {
            files: sources.files.clone(),
            rounds,
            enqueue_for: Duration::from_secs_f64(seconds),
            label: crate::time::now().as_millisecond().to_string(),
            marker: folder.join("outage"),
            capacity,
            think,
            folder: folder.to_owned(),
        }
    }

    /// What is about to happen, for people.
    fn introduce(&self, plan: &Plan, sources: &Sources, daemon: &Daemon) -> String {
        let mut facts = Facts::default();
        let (files, found) = (sources.files.len(), sources.found);
        let of = if found > files { format!(" of {found}") } else { String::new() };
        let bytes = indicatif::BinaryBytes(sources.bytes);
        let dir = self.dir.display();
        facts.push(
            "input",
            format!("{files}{of} text files under {dir}, {bytes}, copied so that edits change nothing"),
        );
        let times = if plan.rounds > 1 { format!(", {} times each", plan.rounds) } else { String::new() };
        let seconds = plan.enqueue_for.as_secs();
        let tasks = plan.tasks_of_agent() * Program::ALL.len() as u64;
        facts
            .push("tasks", format!("{tasks}: one for each file and agent{times}, enqueued over {seconds} s"));
        let agents = Program::ALL.map(|program| format!("{:10}  {}", program.name(), program.about()));
        facts.push("agents", agents.join("\n"));
        let think = show_duration(plan.think);
        facts.push(
            "workers",
            format!(
                "a process for each agent, {} programs at one time; each task starts a program, which\n\
                 waits {think} as for the answer of a model, then reads the file and does its work",
                plan.capacity
            ),
        );
        facts.push("settings", settings::describe());
        let (address, process, log) = (&daemon.address, daemon.process.id(), daemon.log.display());
        facts.push("daemon", format!("{address}, process {process}, log {log}"));
        facts.render()
    }

    async fn play(
        &self,
        global: &Global,
        plan: &Plan,
        address: &str,
        guard: &Guard,
    ) -> Result<(Summary, Verdict), Failure> {
        let client =
            connect(&Global { address: address.into(), output: global.output, ..Global::default() }).await?;
        settings::configure(&client).await?;
        let screen = Screen::new(Program::ALL.len());
        let scene = Scene::new(plan, &client, address, &screen, guard);
        let mut workers: Vec<Process> = Vec::new();
        for program in Program::ALL {
            workers.push(scene.worker(program)?);
        }
        let digest = &mut workers[scene::index(Program::Digest)];
        let (jobs, seen) = scene.play(digest, LIMIT).await?;
        let seconds = screen.elapsed().as_secs_f64();
        screen.end();
        for worker in &mut workers {
            worker.stop(STOP).await;
        }
        let (right, digests_by) =
            check::right(&plan.files).await.map_err(|error| cannot("read the files again", &error))?;
        let mut agents: Vec<_> = Program::ALL.map(|program| (program, Tally::default())).into();
        for (program, tally) in &mut agents {
            tally.trips = seen.trips[scene::index(*program)];
        }
        let mut verdict = Verdict::default();
        for (job, found) in jobs.iter().zip(verdict::fetch(&client, &jobs).await?) {
            let right = right[job.file].of(job.program);
            let fate = verdict.judge(job, &plan.files[job.file].name, &found, right);
            agents[scene::index(job.program)].1.add(&fate);
        }
        Ok((Summary { agents, seconds, digests_by }, verdict))
    }
}

/// What to do with a daemon that stays.
fn next(address: &str, process: u32, folder: &Path, verdict: &Verdict) -> String {
    let this = std::env::args().next().unwrap_or_else(|| "ledgerd".into());
    let history = |id: &Option<String>, what: &str| {
        id.as_ref().map(|id| format!("  {this} task history {id}   # {what}\n")).unwrap_or_default()
    };
    format!(
        "the daemon stays at {address}, process {process}. Try:\n  \
         export LEDGERD_ADDRESS={address}\n  \
         {this} stats\n  \
         {this} task list --agent outline --limit 5\n\
         {lost}{retried}  \
         {this} breaker show outline\n  \
         {this} worker exec --agent words -- wc -w &\n  \
         {this} task enqueue words count --payload '\"any program is a worker\"' --wait\n\
         and to end it: kill {process}; rm -r {folder}",
        lost = history(&verdict.lost, "lost with the killed worker, and done"),
        retried = history(&verdict.retried, "failed in the outage, and done"),
        folder = folder.display(),
    )
}

/// A client of the daemon whose agents have nothing left to do.
async fn refuse_leftovers(client: &Client) -> Result<(), Failure> {
    for program in Program::ALL {
        crate::bench::refuse_leftovers(client, program.name(), "use an empty store for the demo").await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn plan(files: usize) -> Plan {
        let args = Line::try_parse_from(["demo"]).expect("no arguments are needed").args;
        let source = files::Source { name: "a".into(), copy: "a".into() };
        args.plan(Path::new("/nowhere"), &Sources { files: vec![source; files], bytes: 0, found: files })
    }

    #[test]
    fn there_are_always_enough_tasks_and_never_too_many_at_once() {
        for (files, rounds, seconds, capacity) in
            [(1, 100, 13, 4), (99, 2, 14, 7), (160, 1, 13, 6), (400, 1, 25, 8)]
        {
            let plan = plan(files);
            assert!(plan.tasks_of_agent() * 3 >= FEWEST_TASKS as u64);
            assert_eq!((plan.rounds, plan.enqueue_for.as_secs()), (rounds, seconds), "{files}");
            assert_eq!(plan.capacity, capacity, "{files}");
        }
    }

    #[test]
    fn what_to_try_next_names_the_daemon() {
        let mut verdict = Verdict::default();
        verdict.lost = Some("t7".into());
        let text = next("127.0.0.1:4100", 12, Path::new("/x"), &verdict);
        assert!(
            text.contains("export LEDGERD_ADDRESS=127.0.0.1:4100\n") && text.ends_with("kill 12; rm -r /x"),
            "{text}"
        );
        assert!(text.contains(" task history t7   # lost") && !text.contains("# failed"), "{text}");
    }
}

//! What happens in the demo, all at one time: files are enqueued one after the other, `outline` has an outage, the worker
//! of `digest` is killed, and somebody watches.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use ledgerd_client::v1::{
    BatchMode, BreakerState, ListAgentsRequest, ListBreakersRequest, ListTasksRequest, Task, TaskState,
};
use ledgerd_client::{Client, NewTask};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{interval, sleep, timeout};

use super::files::Source;
use super::program::{OUTAGE, Program};
use super::screen::{Line, Screen};
use crate::breaker::state_name;
use crate::daemon::{self, Process, cannot};
use crate::failure::{Exit, Failure};
use crate::guard::Guard;

const AGENTS: usize = Program::ALL.len();
/// How often the ledger is looked at. A breaker stays open for seconds, so no opening is missed.
const LOOK: Duration = Duration::from_millis(100);
/// How often it is asked whether the worker to be killed holds something: its tasks take about as long as `LOOK`.
const PEEK: Duration = Duration::from_millis(15);
/// When the trouble begins: after everybody has seen what it is like without.
const OUTAGE_AT: Duration = Duration::from_secs(2);
const KILL_AT: Duration = Duration::from_secs(4);
/// How often the worker is killed until the ledger counts a loss: a task that is finished in the moment between the
/// look and the signal is no loss.
const KILLS: usize = 3;
/// Tasks that the worker must have started when it is killed.
const HELD: usize = 2;
/// How long any one thing that is waited for may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the scene is about.
pub(super) struct Plan {
    pub(super) files: Vec<Source>,
    /// How often each file is enqueued for each agent.
    pub(super) rounds: usize,
    /// How long it takes to enqueue them all.
    pub(super) enqueue_for: Duration,
    /// Label of all tasks, to tell them from others of a ledger that was given.
    pub(super) label: String,
    /// While it exists, `outline` fails.
    pub(super) marker: PathBuf,
    /// Programs that a worker runs at one time.
    pub(super) capacity: usize,
    /// How long each of them thinks.
    pub(super) think: Duration,
    /// Where workers log to.
    pub(super) folder: PathBuf,
}

/// A task that was enqueued.
pub(super) struct Job {
    pub(super) program: Program,
    /// Of `Plan::files`.
    pub(super) file: usize,
    pub(super) id: String,
}

/// What was seen last, by the index of [`Program::ALL`].
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    pub(super) trips: [u64; AGENTS],
    breakers: [(BreakerState, u64); AGENTS],
    done: [u64; AGENTS],
    live: u64,
}

pub(super) struct Scene<'a> {
    pub(super) plan: &'a Plan,
    pub(super) client: &'a Client,
    pub(super) address: &'a str,
    pub(super) screen: &'a Screen,
    pub(super) guard: &'a Guard,
    /// Calls that have stored a task for each agent.
    stored: AtomicU64,
    all_stored: AtomicBool,
    seen: watch::Sender<Seen>,
}

impl Plan {
    pub(super) fn tasks_of_agent(&self) -> u64 {
        (self.files.len() * self.rounds) as u64
    }
}

impl<'a> Scene<'a> {
    pub(super) fn new(
        plan: &'a Plan,
        client: &'a Client,
        address: &'a str,
        screen: &'a Screen,
        guard: &'a Guard,
    ) -> Self {
        let (seen, _) = watch::channel(Seen::default());
        Self {
            plan,
            client,
            address,
            screen,
            guard,
            stored: AtomicU64::new(0),
            all_stored: AtomicBool::new(false),
            seen,
        }
    }

    /// Starts the worker of an agent.
    pub(super) fn worker(&self, program: Program) -> Result<Process, Failure> {
        let name = program.name();
        let mut command = daemon::command()?;
        command.args([
            "worker",
            "exec",
            "--address",
            self.address,
            "--agent",
            name,
            "--worker-id",
            &worker_id(program),
        ]);
        command.args(["--capacity", &self.plan.capacity.to_string(), "--"]);
        command.arg(daemon::this_program()?).args(["demo", "--program", name]);
        command.args(["--think", &format!("{}ms", self.plan.think.as_millis())]);
        command.env(OUTAGE, &self.plan.marker);
        let path = self.plan.folder.join(format!("{name}.log"));
        let log = OpenOptions::new().create(true).append(true).open(&path);
        let both = log.and_then(|log| Ok((log.try_clone()?, log)));
        let (stdout, stderr) =
            both.map_err(|error| cannot(&format!("write to {}", path.display()), &error))?;
        Process::start(command, stdout, stderr, self.guard)
    }

    /// Plays it to its end: gives the tasks, and what was seen of the breakers. `digest` is the worker to kill.
    pub(super) async fn play(
        &self,
        digest: &mut Process,
        limit: Duration,
    ) -> Result<(Vec<Job>, Seen), Failure> {
        let all = async { tokio::try_join!(self.enqueue(), self.outage(), self.kill(digest), self.watch()) };
        match timeout(limit, all).await {
            Ok(played) => Ok((played?.0, self.seen.borrow().clone())),
            Err(_) => {
                let seen = self.seen.borrow().clone();
                let (done, all) = (seen.done.iter().sum::<u64>(), self.plan.tasks_of_agent() * AGENTS as u64);
                let limit = limit.as_secs();
                Err(failed(format!(
                    "{done} of {all} tasks were done after {limit} s, which is too slow for a demo"
                )))
            }
        }
    }

    async fn enqueue(&self) -> Result<Vec<Job>, Failure> {
        let plan = self.plan;
        let mut jobs = Vec::new();
        let calls = u32::try_from(plan.tasks_of_agent()).unwrap_or(u32::MAX).max(1);
        let mut pace = interval((plan.enqueue_for / calls).max(Duration::from_micros(1)));
        for _ in 0..plan.rounds {
            for (file, source) in plan.files.iter().enumerate() {
                pace.tick().await;
                let tasks = Program::ALL.map(|program| {
                    NewTask::new(program.name(), program.task_type(), &json!({ "path": source.copy }))
                        .label("demo", &plan.label)
                        .label("file", head(&source.name))
                });
                let stored = self.client.enqueue_many(tasks.into(), BatchMode::Atomic).await?;
                for (program, handle) in Program::ALL.into_iter().zip(stored) {
                    jobs.push(Job { program, file, id: handle?.id().into() });
                }
                self.stored.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.all_stored.store(true, Ordering::Relaxed);
        self.screen.event(&format!("all {} tasks are enqueued", jobs.len()));
        Ok(jobs)
    }

    /// `outline` fails until its breaker has opened and a probe has failed as well; then it works again.
    async fn outage(&self) -> Result<(), Failure> {
        sleep(OUTAGE_AT.saturating_sub(self.screen.elapsed())).await;
        let marker = &self.plan.marker;
        let at = |error| cannot(&format!("write to {}", marker.display()), &error);
        let outline = index(Program::Outline);
        let before = self.seen.borrow().trips[outline];
        fs::write(marker, "").map_err(at)?;
        self.screen.event("outline: every attempt fails from now on, as if a service it needs were down");
        self.until("the breaker of outline did not open", |seen| seen.trips[outline] > before).await?;
        self.until("no probe of outline failed", |seen| seen.trips[outline] > before + 1).await?;
        fs::remove_file(marker).map_err(at)?;
        self.screen
            .event("outline: works again; the ledger does not know yet, its next probes will find out");
        self.until("the breaker of outline did not close", |seen| {
            seen.breakers[outline].0 == BreakerState::Closed
        })
        .await
    }

    /// The worker of `digest` is killed with tasks in its hands, and a new process takes over its name.
    async fn kill(&self, worker: &mut Process) -> Result<(), Failure> {
        sleep(KILL_AT.saturating_sub(self.screen.elapsed())).await;
        let name = worker_id(Program::Digest);
        let lost = |tasks: &[Task]| tasks.iter().map(|task| u64::from(task.losses)).sum::<u64>();
        for _ in 0..KILLS {
            let before = lost(&self.digests(Vec::new()).await?);
            let started = async {
                loop {
                    let running = self.digests(vec![TaskState::Running.into()]).await?;
                    let started = running.iter().filter(|task| task.attempt > 0).count();
                    if started >= HELD {
                        return Ok::<_, Failure>(started);
                    }
                    sleep(PEEK).await;
                }
            };
            let started = timeout(PATIENCE, started)
                .await
                .map_err(|_| failed("the worker of digest never held two tasks"))??;
            let old = worker.id();
            worker.kill();
            self.screen.event(&format!(
                "worker {name}: process {old} killed (SIGKILL) while it ran {started} tasks"
            ));
            *worker = self.worker(Program::Digest)?;
            let new = worker.id();
            self.screen.event(&format!(
                "worker {name}: process {new} started under the same name, a higher incarnation"
            ));
            let counted = async {
                loop {
                    let lost = lost(&self.digests(Vec::new()).await?) - before;
                    if lost > 0 {
                        return Ok::<_, Failure>(lost);
                    }
                    sleep(LOOK).await;
                }
            };
            // All that was running may have ended just before the signal.
            if let Ok(lost) = timeout(PATIENCE / 4, counted).await {
                let lost = lost?;
                self.screen.event(&format!(
                    "ledger: {lost} of its tasks are LOST with the old process, and tried again"
                ));
                return Ok(());
            }
        }
        Err(failed(format!("the worker of digest was killed {KILLS} times and no task was counted as lost")))
    }

    /// The demo's tasks of `digest` in these states.
    async fn digests(&self, states: Vec<i32>) -> Result<Vec<Task>, Failure> {
        let mut pages = self.client.list(ListTasksRequest {
            agent: Program::Digest.name().into(),
            states,
            labels: [("demo".to_owned(), self.plan.label.clone())].into(),
            page_size: 1_000,
            ..ListTasksRequest::default()
        });
        let mut all = Vec::new();
        while let Some(page) = pages.next_page().await? {
            all.extend(page);
        }
        Ok(all)
    }

    /// Looks until all tasks have ended; tells each step of a breaker.
    async fn watch(&self) -> Result<(), Failure> {
        let mut look = interval(LOOK);
        loop {
            look.tick().await;
            // In this order: what was stored before the look cannot be missed by it.
            let (all_stored, stored) =
                (self.all_stored.load(Ordering::Relaxed), self.stored.load(Ordering::Relaxed));
            let (seen, lines) = self.look(stored).await?;
            let live = seen.live;
            self.seen.send_replace(seen);
            self.screen.state(self.plan.tasks_of_agent() * AGENTS as u64, &lines);
            if all_stored && live == 0 {
                self.screen.event("all tasks have ended");
                return Ok(());
            }
        }
    }

    async fn look(&self, stored: u64) -> Result<(Seen, Vec<Line>), Failure> {
        let mut admin = self.client.admin();
        let breakers = admin.list_breakers(ListBreakersRequest::default()).await?.into_inner().breakers;
        let agents = admin.list_agents(ListAgentsRequest::default()).await?.into_inner().agents;
        let mut seen = self.seen.borrow().clone();
        seen.live = 0;
        let mut lines = Vec::with_capacity(AGENTS);
        for program in Program::ALL {
            let (at, name) = (index(program), program.name());
            let found = agents.iter().find(|agent| agent.agent == name);
            let count = |state: TaskState| {
                let counts = found.map(|agent| agent.counts.as_slice()).unwrap_or_default();
                counts.iter().find(|count| count.state() == state).map_or(0, |count| count.count)
            };
            let mut line = Line {
                agent: name,
                running: count(TaskState::Running),
                waiting: count(TaskState::Queued),
                retry: count(TaskState::Retry),
                blocked: count(TaskState::Blocked),
                ..Line::default()
            };
            let live = line.running + line.waiting + line.retry + line.blocked;
            // A call that was stored and not yet counted can be among the live.
            line.done = stored.saturating_sub(live).max(seen.done[at]);
            seen.done[at] = line.done;
            seen.live += live;
            if let Some(breaker) = breakers.iter().find(|breaker| breaker.agent == name) {
                let (before, now) = (seen.breakers[at], (breaker.state(), breaker.epoch));
                for step in steps(before, now) {
                    let [from, to] = step.map(|state| state_name(state.into()));
                    self.screen.event(&format!("breaker {name}: {from} → {to}"));
                    seen.trips[at] += u64::from(step[1] == BreakerState::Open);
                }
                seen.breakers[at] = now;
                line.breaker = state_name(breaker.state);
            }
            lines.push(line);
        }
        Ok((seen, lines))
    }

    async fn until(&self, otherwise: &str, is_so: impl FnMut(&Seen) -> bool) -> Result<(), Failure> {
        let mut seen = self.seen.subscribe();
        let waited = timeout(PATIENCE, seen.wait_for(is_so)).await;
        // The sender is ours, so only time can run out.
        waited.map(|_| ()).map_err(|_| failed(format!("{otherwise} within {} s", PATIENCE.as_secs())))
    }
}

/// The steps from one look at a breaker to the next. The epoch rises by one with each. Half-open can pass between two
/// looks; the other states last.
fn steps(before: (BreakerState, u64), now: (BreakerState, u64)) -> Vec<[BreakerState; 2]> {
    let ((from, first), (to, last)) = (before, now);
    match last.saturating_sub(first) {
        _ if from == BreakerState::Unspecified => Vec::new(),
        0 => Vec::new(),
        2 if from == BreakerState::Open && to != BreakerState::HalfOpen => {
            vec![[from, BreakerState::HalfOpen], [BreakerState::HalfOpen, to]]
        }
        _ => vec![[from, to]],
    }
}

pub(super) fn index(program: Program) -> usize {
    program as usize
}

fn worker_id(program: Program) -> String {
    format!("demo/{}", program.name())
}

/// A name as a label: these are short.
fn head(name: &str) -> String {
    let mut end = name.len().min(255);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name[..end].into()
}

fn failed(sentence: impl Into<String>) -> Failure {
    Failure::new(Exit::Failure, sentence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_of_a_breaker_is_told_once() {
        use BreakerState::{Closed, HalfOpen, Open, Unspecified};
        assert_eq!(
            steps((Unspecified, 0), (Closed, 0)),
            Vec::<[_; 2]>::new(),
            "the first look has nothing before it"
        );
        assert_eq!(steps((Closed, 4), (Closed, 4)), Vec::<[_; 2]>::new());
        assert_eq!(steps((Closed, 4), (Open, 5)), [[Closed, Open]]);
        assert_eq!(steps((Open, 5), (Open, 7)), [[Open, HalfOpen], [HalfOpen, Open]]);
        assert_eq!(steps((Open, 5), (Closed, 7)), [[Open, HalfOpen], [HalfOpen, Closed]]);
        assert_eq!(steps((HalfOpen, 6), (Open, 7)), [[HalfOpen, Open]]);
    }

    #[test]
    fn programs_are_indexed_in_their_order() {
        assert_eq!(Program::ALL.map(index), [0, 1, 2]);
    }

    #[test]
    fn long_names_become_labels_between_characters() {
        assert_eq!(head("a/b.rs"), "a/b.rs");
        assert_eq!(head(&"ä".repeat(200)).len(), 254);
    }
}

//! Why a task is not running: every gate that is shut, in the order in which they are passed, and one sentence over all.
//!
//! Pure: it decides from [`Facts`], which whoever holds the ledger's memory gathers. Here is which gates are shut;
//! `words` has what is said of them. Every `until` is on the wall clock, as users read it.

mod words;

use crate::event::Record;
use crate::limits::{UNACKED_RUN, UNSENT_BYTES};
use crate::session::Session;
use crate::store::Pause;
use crate::task::{EventKind, Reason, State, Task};
use crate::time::{Now, Timestamp};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Tasks that come first are counted so far: beyond it the number means nothing but "many", and counting takes time.
pub const AHEAD: usize = 10_000;
/// Types that are named of those that workers take.
const TYPES: usize = 5;

/// What a task must pass before it runs, in this order. The numbers are those on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum GateKind {
    /// Its worker blocked it.
    Blocked = 1,
    /// Its `run_at` lies ahead.
    NotDue = 2,
    /// Its retry waits for a budget token.
    Budget = 3,
    /// Its agent is paused.
    Paused = 4,
    /// Its breaker lets nothing through.
    Breaker = 5,
    /// Its breaker lets only part through.
    Ramp = 6,
    /// No worker of its agent is connected.
    NoWorker = 7,
    /// No connected worker takes its type.
    TypeNotServed = 8,
    /// No worker that takes it has room.
    NoRoom = 9,
    /// Others come first.
    Behind = 10,
    /// The daemon is going away.
    Draining = 11,
}

/// A gate that is shut.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    /// Which.
    pub kind: GateKind,
    /// One sentence.
    pub detail: String,
    /// When it opens by itself, where that is known.
    pub until: Option<Timestamp>,
    /// The number that counts; 0 where there is none.
    pub current: f64,
    /// What it is measured against; 0 where there is none.
    pub limit: f64,
}

/// Why a task is where it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// Where it is.
    pub state: State,
    /// Finer meaning of that.
    pub reason: Reason,
    /// One sentence.
    pub summary: String,
    /// What keeps it from running; empty when it runs, has ended, or is handed out next.
    pub gates: Vec<Gate>,
}

/// What is known of a task and of all that it may wait for. Instants are on the steady clock, but for those that the
/// task has on the wall clock.
#[derive(Clone, Debug)]
pub struct Facts {
    /// When.
    pub now: Now,
    /// The task.
    pub task: Task,
    /// Its agent's name.
    pub agent: Arc<str>,
    /// Retries that it has.
    pub max_retries: u32,
    /// What its losses may weigh.
    pub max_losses: u32,
    /// Whoever runs it.
    pub runner: Option<Runner>,
    /// What its retries are paid from.
    pub budget: BudgetFacts,
    /// Why its agent's tasks are not handed out.
    pub pause: Option<Pause>,
    /// The breaker that its deliveries go through; none where it has none.
    pub breaker: Option<BreakerFacts>,
    /// How that breaker comes back, while it does.
    pub ramp: Option<RampFacts>,
    /// Connected workers of its agent.
    pub workers: WorkerFacts,
    /// Tasks that come first, as far as [`AHEAD`] and one more; looked at only for a task that is due.
    pub ahead: usize,
    /// The daemon is going away.
    pub draining: bool,
    /// The row of its history that says more than the task does; see [`Facts::hear`].
    pub told: Option<Record>,
}

/// The worker of a running task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runner {
    /// Whether it has a stream.
    pub connected: bool,
    /// Its last beat.
    pub beat_at: Timestamp,
    /// End of the lease, as beats moved it; before the ack, of the time to acknowledge.
    pub lease_until: Timestamp,
}

/// A retry budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BudgetFacts {
    /// Thousandths of tokens that the agent has.
    pub own: u64,
    /// Thousandths of tokens that all agents share.
    pub shared: u64,
    /// When time alone will have brought enough for this task; none: it never does.
    pub affordable_at: Option<Timestamp>,
    /// Retries of the agent that get a token before it, as far as [`AHEAD`] and one more.
    pub before: usize,
}

/// A breaker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BreakerFacts {
    /// Its state.
    pub state: breaker_core::State,
    /// Why it moved there, where that is known.
    pub cause: Option<breaker_core::Cause>,
    /// Since when.
    pub since: Timestamp,
    /// When it ends by itself.
    pub until: Option<Timestamp>,
    /// Probes in flight.
    pub probes: u32,
    /// Probes at one time.
    pub permits: u32,
    /// Who ordered it; empty: nobody.
    pub actor: Arc<str>,
    /// Why, in their words.
    pub reason: Arc<str>,
    /// The type it is for; empty: the agent's own.
    pub task_type: Arc<str>,
}

impl BreakerFacts {
    /// How many deliveries it lets through; none: any number.
    #[must_use]
    pub fn admits(&self, now: Timestamp) -> Option<u32> {
        use breaker_core::State::{Closed, Disabled, ForcedOpen, HalfOpen, Observe, Open};
        let over = self.until.is_some_and(|until| until <= now);
        match self.state {
            Closed | Disabled | Observe => None,
            ForcedOpen if over => None,
            Open if over => Some(self.permits),
            HalfOpen => Some(self.permits.saturating_sub(self.probes)),
            Open | ForcedOpen => Some(0),
        }
    }
}

/// A breaker that closed a short while ago.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RampFacts {
    /// The part of the usual number that may run now, 0 to 1.
    pub share: f64,
    /// That number.
    pub limit: u32,
    /// Tasks that run under it.
    pub running: u32,
    /// When all may run.
    pub until: Timestamp,
}

/// The connected workers of an agent, as one of its tasks sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerFacts {
    /// Workers connected.
    pub connected: usize,
    /// Types that they take, the first few by name, and how many more; all that are listed by somebody.
    pub types: Vec<Arc<str>>,
    /// Types beside those.
    pub more_types: usize,
    /// Workers that take the task's type.
    pub takers: usize,
    /// Types that those take, the task's own included; none: all.
    pub taken: Option<Vec<Arc<str>>>,
    /// Of the takers, those that asked for nothing.
    pub closed: usize,
    /// Those that hold all they can.
    pub full: usize,
    /// Those with too many bytes unsent.
    pub slow: usize,
    /// Bytes unsent to those.
    pub unsent: usize,
    /// Those that acknowledged none of their last deliveries.
    pub silent: usize,
    /// Tasks that the takers hold.
    pub held: usize,
    /// Tasks that they may hold.
    pub capacity: usize,
    /// Tasks that they may be sent now.
    pub room: usize,
    /// The worker of the agent that left last, and its last beat; none when that is not known.
    pub last_seen: Option<(Arc<str>, Timestamp)>,
}

impl WorkerFacts {
    /// What these sessions of one agent are for a task of this type.
    #[must_use]
    pub fn of<'a>(sessions: impl IntoIterator<Item = &'a Session>, task_type: &str) -> Self {
        let mut facts = Self::default();
        let mut types = BTreeSet::new();
        let mut taken = Some(BTreeSet::new());
        for session in sessions {
            facts.connected += 1;
            types.extend(session.types.iter().flat_map(|types| types.iter()));
            if !session.takes(task_type) {
                continue;
            }
            match (&mut taken, &session.types) {
                (Some(taken), Some(types)) => taken.extend(types.iter()),
                _ => taken = None,
            }
            facts.takers += 1;
            facts.held += session.held.len();
            facts.capacity += session.capacity as usize;
            facts.room += session.room();
            let unsent = session.unsent.bytes();
            if session.capacity == 0 {
                facts.closed += 1;
            } else if session.held.len() >= session.capacity as usize {
                facts.full += 1;
            } else if unsent > UNSENT_BYTES {
                facts.slow += 1;
                facts.unsent += unsent;
            } else if session.unacked_run >= UNACKED_RUN {
                facts.silent += 1;
            }
        }
        facts.more_types = types.len().saturating_sub(TYPES);
        facts.types = types.into_iter().take(TYPES).cloned().collect();
        facts.taken = taken.map(|taken| taken.into_iter().cloned().collect());
        facts
    }
}

impl Facts {
    /// Whether the task's history says more than the task: who blocked it and what they asked, how it ended, what made
    /// its back-off longer.
    #[must_use]
    pub fn asks_history(&self) -> bool {
        telling(&self.task).is_some()
    }

    /// Takes from the task's history, oldest first, the row that says more. Rows that are newer than the task as it is
    /// known here are passed over.
    pub fn hear(&mut self, rows: impl IntoIterator<Item = Record>) {
        let Some(tells) = telling(&self.task) else { return };
        let version = self.task.version;
        self.told = rows.into_iter().filter(|row| row.version <= version && tells(row)).last();
    }

    /// How many more tasks of its kind may be handed out now.
    fn room(&self) -> usize {
        let breaker = self.breaker.as_ref().and_then(|breaker| breaker.admits(self.now.at));
        let ramp = self.ramp.map(|ramp| ramp.limit.saturating_sub(ramp.running));
        let most = breaker.into_iter().chain(ramp).min().map_or(usize::MAX, |most| most as usize);
        self.workers.room.min(most)
    }
}

/// Which row of a task's history says more than the task; the last of them counts.
fn telling(task: &Task) -> Option<fn(&Record) -> bool> {
    match (task.state, task.reason) {
        (State::Blocked, Reason::Worker) => Some(|row| row.kind == EventKind::Blocked),
        (State::Retry, Reason::Backoff | Reason::Budget) => {
            Some(|row| row.from == Some(State::Running) && row.to == State::Retry)
        }
        (state, _) if state.is_terminal() => Some(|row| row.to.is_terminal() && row.from != Some(row.to)),
        _ => None,
    }
}

/// Why the task of these facts is where it is.
#[must_use]
pub fn explain(facts: &Facts) -> Explanation {
    let Task { state, reason, .. } = facts.task;
    let gates = match state {
        State::Queued | State::Retry | State::Blocked => gates(facts),
        State::Running | State::Done | State::Failed | State::Cancelled => Vec::new(),
    };
    Explanation { state, reason, summary: words::summary(facts, &gates), gates }
}

fn gates(facts: &Facts) -> Vec<Gate> {
    let mut shut: Vec<Gate> = [blocked, not_due, budget, paused, breaker, ramp, workers]
        .iter()
        .filter_map(|gate| gate(facts))
        .collect();
    // Where nothing can go, whoever comes first stays first; else only those count that the room does not suffice for.
    let room = if shut.is_empty() && !facts.draining { facts.room() } else { 0 };
    shut.extend(behind(facts, room));
    shut.extend(facts.draining.then(|| gate(GateKind::Draining, words::draining())));
    shut
}

/// A gate without end and numbers.
fn gate(kind: GateKind, detail: String) -> Gate {
    Gate { kind, detail, until: None, current: 0.0, limit: 0.0 }
}

/// A steady instant as the wall clock will show it.
fn wall(facts: &Facts, at: Timestamp) -> Timestamp {
    let Now { at: steady, skew } = facts.now;
    Now { at: steady, skew: skew.saturating_neg() }.from_wall(at)
}

fn blocked(facts: &Facts) -> Option<Gate> {
    let task = &facts.task;
    let shut = task.state == State::Blocked && !task.is_gated();
    let until = task.calendar.then_some(task.run_at);
    shut.then(|| Gate { until, ..gate(GateKind::Blocked, words::blocked(facts)) })
}

fn not_due(facts: &Facts) -> Option<Gate> {
    let task = &facts.task;
    let due = task.due_at(facts.now);
    let shut = matches!(task.state, State::Queued | State::Retry) && due > facts.now.at;
    shut.then(|| {
        let detail = words::not_due(facts, due.since(facts.now.at));
        Gate { until: Some(wall(facts, due)), ..gate(GateKind::NotDue, detail) }
    })
}

fn budget(facts: &Facts) -> Option<Gate> {
    let shut = facts.task.state == State::Retry && facts.task.reason == Reason::Budget;
    shut.then(|| {
        let until = facts.budget.affordable_at.filter(|_| facts.budget.before == 0);
        Gate {
            until: until.map(|at| wall(facts, at)),
            current: facts.budget.own.min(facts.budget.shared) as f64 / 1_000.0,
            limit: f64::from(facts.task.tokens),
            ..gate(GateKind::Budget, words::budget(facts))
        }
    })
}

fn paused(facts: &Facts) -> Option<Gate> {
    let pause = facts.pause.as_ref()?;
    let until = pause.until.map(|at| wall(facts, at));
    Some(Gate { until, ..gate(GateKind::Paused, words::paused(facts, pause)) })
}

fn breaker(facts: &Facts) -> Option<Gate> {
    let breaker = facts.breaker.as_ref().filter(|breaker| breaker.admits(facts.now.at) == Some(0))?;
    let detail = words::breaker(facts, breaker);
    let probing = breaker.state == breaker_core::State::HalfOpen;
    let (current, limit) = if probing { (breaker.probes, breaker.permits) } else { (0, 0) };
    Some(Gate {
        until: breaker.until.map(|at| wall(facts, at)),
        current: f64::from(current),
        limit: f64::from(limit),
        ..gate(GateKind::Breaker, detail)
    })
}

fn ramp(facts: &Facts) -> Option<Gate> {
    let ramp = facts.ramp.as_ref().filter(|ramp| ramp.running >= ramp.limit)?;
    Some(Gate {
        until: Some(wall(facts, ramp.until)),
        current: f64::from(ramp.running),
        limit: f64::from(ramp.limit),
        ..gate(GateKind::Ramp, words::ramp(facts, ramp))
    })
}

/// Of the three gates about workers one at most is shut: each asks for what the one before has found.
fn workers(facts: &Facts) -> Option<Gate> {
    let workers = &facts.workers;
    if workers.connected == 0 {
        return Some(gate(GateKind::NoWorker, words::no_worker(facts)));
    }
    if workers.takers == 0 {
        let detail = words::type_not_served(facts);
        return Some(Gate { limit: workers.connected as f64, ..gate(GateKind::TypeNotServed, detail) });
    }
    (workers.room == 0).then(|| Gate {
        current: workers.held as f64,
        limit: workers.capacity as f64,
        ..gate(GateKind::NoRoom, words::no_room(workers))
    })
}

fn behind(facts: &Facts, room: usize) -> Option<Gate> {
    // Who comes before a task that is not due is decided when it is.
    let counts = facts.task.can_be_claimed(facts.now) && facts.ahead > 0 && facts.ahead >= room;
    counts.then(|| Gate {
        current: facts.ahead.min(AHEAD) as f64,
        limit: room as f64,
        ..gate(GateKind::Behind, words::behind(facts.ahead))
    })
}

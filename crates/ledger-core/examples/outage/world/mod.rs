//! An outage in virtual time: many agents behind one backend, and what their retries do to it.
//!
//! Nothing sleeps and nothing is drawn but from the seed, so a run is a function of its [`Setup`]. Every decision is
//! made by the cores themselves: `retry_core::Policy` says whether and when to try again, `ledger_core::Agent` pays for
//! it (own bucket, shared bucket, floor), `breaker_core::Breaker` says whether to try at all. Here is only what surrounds
//! them: arrivals, the backend, worker slots, and tasks that wait.
//!
//! Not here: durability, leases, streams. `ledgerd bench outage` is the same experiment with all of these.

mod backend;
mod fleet;
mod record;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use retry_core::{Bucket, BucketConfig, ErrorClass, draw};

use backend::Backend;
use fleet::{Fleet, Leave};
pub(crate) use record::{Record, Span};

/// Virtual time, in microseconds since the start.
pub(crate) type Micros = u64;

const SECOND: Micros = 1_000_000;
/// Arrivals per second.
pub(crate) const BASE: f64 = 1_000.0;
/// How long a caller waits for an answer. The backend knows nothing of it and works on for nobody.
const TIMEOUT: Micros = SECOND;
/// How long it takes to be refused: by a backend that is down, or whose queue is full.
const REFUSAL: Micros = 1_000;
/// How often a ledger that lets retries wait for tokens looks at them, as a busy one would with each batch.
const BATCH: Micros = 10_000;
/// Streams of random numbers that are no task's.
const ARRIVALS: u64 = 1 << 40;

/// What is wrong with the backend, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Every call fails for 60 s.
    Down,
    /// 40 % of the capacity for 20 s: what sets off a metastable failure.
    Slow,
}

impl Fault {
    pub(crate) const ALL: [Self; 2] = [Self::Down, Self::Slow];

    pub(crate) const fn letter(self) -> &'static str {
        match self {
            Self::Down => "A",
            Self::Slow => "B",
        }
    }

    /// The seconds in which it lasts.
    pub(crate) const fn span(self) -> Span {
        match self {
            Self::Down => Span { from: 30, until: 90 },
            Self::Slow => Span { from: 30, until: 50 },
        }
    }
}

/// Who decides about a call, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Policy {
    /// Tasks of an agent that run at one time are bounded by the slots of its workers.
    pub(crate) slots: bool,
    /// Retries are paid for; one that cannot be paid waits.
    pub(crate) budget: bool,
    /// How long a breaker stays open; none: there is no breaker.
    pub(crate) open: Option<Duration>,
    /// A breaker that has closed lets work in step by step.
    pub(crate) ramp: bool,
}

impl Policy {
    /// Three retries, exponential, ±50 %: each caller for itself.
    pub(crate) const PLAIN: Self = Self { slots: false, budget: false, open: None, ramp: false };
    /// The same retries, made by workers with so many slots.
    pub(crate) const SLOTS: Self = Self { slots: true, ..Self::PLAIN };
    /// Retries that wait for a token.
    pub(crate) const BUDGET: Self = Self { budget: true, ..Self::PLAIN };
    /// A breaker and no budget.
    pub(crate) const BREAKER: Self = Self { open: Some(Duration::from_secs(5)), ..Self::SLOTS };
    /// All of it, as ledgerd has it.
    pub(crate) const OURS: Self = Self { budget: true, ramp: true, ..Self::BREAKER };
    /// With ledgerd's default open period.
    pub(crate) const DEFAULT: Self = Self { open: Some(Duration::from_secs(60)), ..Self::OURS };
}

/// One run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) agents: u32,
    pub(crate) policy: Policy,
    pub(crate) fault: Fault,
    pub(crate) seed: u64,
    /// Arrivals per second, over all agents. The backend serves a quarter more.
    pub(crate) rate: u32,
    /// Length in seconds.
    pub(crate) seconds: u32,
    /// Slots in all, as a multiple of those that the arrivals would need if every call took until its timeout.
    pub(crate) slots: u32,
}

impl Setup {
    /// The experiment of the design: 1,000 arrivals a second for 240 s.
    pub(crate) const fn new(policy: Policy, fault: Fault, agents: u32, seed: u64) -> Self {
        Self { agents, policy, fault, seed, rate: BASE as u32, seconds: 240, slots: 1 }
    }

    /// Runs it to its end.
    pub(crate) fn run(self) -> Record {
        World::new(self).run()
    }
}

/// A call under way.
#[derive(Clone, Copy)]
struct Call {
    task: u32,
    agent: u32,
    leave: Leave,
    /// Its caller still waits.
    awaited: bool,
}

struct World {
    setup: Setup,
    now: Micros,
    backend: Backend,
    fleet: Fleet,
    calls: Vec<Call>,
    /// When callers stop waiting, and when refusals arrive: each takes a fixed time, so each is in order.
    timeouts: VecDeque<(Micros, u32)>,
    refusals: VecDeque<(Micros, u32)>,
    /// When to look at an agent again.
    looks: BinaryHeap<Reverse<(Micros, u32)>>,
    next_arrival: Micros,
    next_batch: Micros,
    arrived: u32,
    record: Record,
}

/// What happens next. In the order in which it happens when the times are equal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Next {
    Served,
    Refused,
    TimedOut,
    Look,
    Batch,
    Arrival,
}

impl World {
    fn new(setup: Setup) -> Self {
        let shared = BucketConfig { capacity: 100, deposit: 0.1, floor: 1.0 };
        let shared = Bucket::full(shared.build().expect("the limits that ledgerd has"), Duration::ZERO);
        Self {
            setup,
            now: 0,
            backend: Backend::new(setup.rate),
            fleet: Fleet::new(&setup, shared),
            calls: Vec::new(),
            timeouts: VecDeque::new(),
            refusals: VecDeque::new(),
            looks: BinaryHeap::new(),
            next_arrival: 0,
            next_batch: 0,
            arrived: 0,
            record: Record::new(setup.seconds),
        }
    }

    fn run(mut self) -> Record {
        let end = Micros::from(self.setup.seconds) * SECOND;
        self.next_arrival = self.gap();
        loop {
            let (at, next) = self.next();
            if at >= end {
                break;
            }
            self.now = at;
            match next {
                Next::Served => self.served(),
                Next::Refused => {
                    let class = if self.is_down() { ErrorClass::Transient } else { ErrorClass::Overloaded };
                    let (_, call) = self.refusals.pop_front().expect("its time was read");
                    self.ended(call, Err(class));
                }
                Next::TimedOut => {
                    let (_, call) = self.timeouts.pop_front().expect("its time was read");
                    self.ended(call, Err(ErrorClass::Timeout));
                }
                Next::Look => {
                    let Reverse((_, agent)) = self.looks.pop().expect("its time was read");
                    self.dispatch(agent);
                }
                Next::Batch => {
                    self.next_batch = self.now + BATCH;
                    for agent in self.fleet.grant(self.now) {
                        self.dispatch(agent);
                    }
                }
                Next::Arrival => self.arrive(),
            }
        }
        self.record.waiting = self.arrived - self.record.done - self.record.failed;
        self.record
    }

    fn next(&self) -> (Micros, Next) {
        let front = |queue: &VecDeque<(Micros, u32)>| queue.front().map(|(at, _)| *at);
        let batch = self.fleet.someone_waits().then_some(self.next_batch.max(self.now));
        [
            (self.backend.due(), Next::Served),
            (front(&self.refusals), Next::Refused),
            (front(&self.timeouts), Next::TimedOut),
            (self.looks.peek().map(|Reverse((at, _))| *at), Next::Look),
            (batch, Next::Batch),
        ]
        .into_iter()
        .filter_map(|(at, next)| Some((at?, next)))
        .fold((self.next_arrival, Next::Arrival), Ord::min)
    }

    fn in_fault(&self) -> bool {
        let span = self.setup.fault.span();
        (Micros::from(span.from) * SECOND..Micros::from(span.until) * SECOND).contains(&self.now)
    }

    fn is_down(&self) -> bool {
        self.setup.fault == Fault::Down && self.in_fault()
    }

    /// Percent of the capacity that there is now.
    fn capacity(&self) -> u64 {
        if self.setup.fault == Fault::Slow && self.in_fault() { 40 } else { 100 }
    }

    /// Time to the next arrival: nobody waits for anybody, so it is exponential.
    fn gap(&self) -> Micros {
        let bits = draw(self.setup.seed, ARRIVALS, u64::from(self.arrived));
        let uniform = ((bits >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        (-uniform.ln() / f64::from(self.setup.rate) * 1e6) as Micros
    }

    fn arrive(&mut self) {
        let bits = draw(self.setup.seed, ARRIVALS + 1, u64::from(self.arrived));
        let agent = ((u128::from(bits) * u128::from(self.setup.agents)) >> 64) as u32;
        self.arrived += 1;
        self.next_arrival = self.now + self.gap();
        self.record.arrived(self.now);
        self.fleet.enqueue(agent, self.now);
        self.dispatch(agent);
    }

    /// Hands out what an agent's slots, breaker and ramp let through.
    fn dispatch(&mut self, agent: u32) {
        while let Some((task, leave)) = self.fleet.claim(agent, self.now) {
            self.call(task, agent, leave);
        }
        self.look(agent);
    }

    fn call(&mut self, task: u32, agent: u32, leave: Leave) {
        let call = u32::try_from(self.calls.len()).expect("fewer calls than that");
        self.calls.push(Call { task, agent, leave, awaited: true });
        self.record.called(self.now);
        if self.is_down() || !self.backend.offer(call, self.now, self.capacity()) {
            self.refusals.push_back((self.now + REFUSAL, call));
        } else {
            self.timeouts.push_back((self.now + TIMEOUT, call));
        }
    }

    fn served(&mut self) {
        let call = self.backend.finish(self.now, self.capacity());
        let result = if self.is_down() { Err(ErrorClass::Transient) } else { Ok(()) };
        self.ended(call, result);
    }

    /// The caller hears how its call ended, if it still listens.
    fn ended(&mut self, number: u32, result: Result<(), ErrorClass>) {
        let call = &mut self.calls[number as usize];
        if !std::mem::take(&mut call.awaited) {
            return;
        }
        let call = *call;
        match result {
            Ok(()) => {
                self.record.done(self.now);
                self.fleet.succeeded(call.agent, call.leave, self.now);
            }
            Err(class) => {
                if !self.fleet.failed(call.agent, call.task, call.leave, class, self.now) {
                    self.record.failed += 1;
                }
            }
        }
        self.dispatch(call.agent);
    }

    fn look(&mut self, agent: u32) {
        if let Some(at) = self.fleet.next_look(agent, self.now) {
            self.looks.push(Reverse((at, agent)));
        }
    }
}

//! The model: what replicas, calls and time may do in a state, and what must never come of it.

use super::row::{self, Row};
use super::{Size, Variant};
use breaker_core::{Availability, Config, Permit, Sample, State};
use stateright::{Model, Property};
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};

/// A replica of the daemon: what it remembers of the row. Since it may remember it for as long as it likes, the time
/// between a decision and its transaction needs no state of its own.
#[derive(Clone, Debug)]
pub(crate) struct Replica {
    cache: Option<Row>,
}

/// A piece of work that is called for again and again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    /// In flight, and which replica leads it.
    permit: Option<(Permit, usize)>,
    /// Its last outcome was recorded, and may be told again.
    answered: Option<Permit>,
    /// Its replica crashed: whether it still runs nobody knows. Its outcome counts until somebody claims it again.
    orphan: Option<Permit>,
}

/// A state. Replicas are alike and so are calls: of all ways to number them the least counts.
#[derive(Clone)]
pub(crate) struct Shared {
    row: Row,
    replicas: Vec<Replica>,
    calls: Vec<Call>,
    pub(crate) fault: Option<Fault>,
    identity: Box<[u8]>,
}

/// What must never be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    TooManyProbes,
    AdmittedWhileOpen,
    StaleDecides,
    CountedTwice,
}

impl Fault {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::TooManyProbes => "probes in flight never exceed the permits",
            Self::AdmittedWhileOpen => "nothing is admitted while open, and only probes while half-open",
            Self::StaleDecides => "a result of another epoch decides nothing",
            Self::CountedTwice => "an outcome that is told again is not counted again",
        }
    }
}

/// Something that may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Time passes: an open period, or the lease of a probe, comes nearer to its end.
    Tick,
    /// A replica reads the row.
    Refresh(usize),
    /// A replica decides from what it remembers to make a call, and then comes its claim transaction.
    Claim(usize, usize),
    /// A replica whose timer for the end of a half-open period rang lets time do its work in the row.
    Look(usize),
    /// A call ends, and a replica records how.
    Answer(usize, usize, Sample),
    /// A recorded outcome is told again.
    Repeat(usize, Sample),
    /// The outcome of a call whose replica crashed arrives.
    Late(usize, Sample),
    /// A replica dies and comes back, knowing nothing. Nobody will hear of its calls.
    Crash(usize),
}

pub(crate) struct Protocol {
    pub(crate) size: Size,
    pub(crate) variant: Variant,
    pub(crate) config: Config,
    pub(crate) walked: Arc<Mutex<Walked>>,
}

/// Edges that are no accident (nobody may count on a crash or on a late answer), and the closed states among their ends.
#[derive(Debug, Default)]
pub(crate) struct Walked {
    pub(crate) states: HashSet<u64>,
    pub(crate) closed: HashSet<u64>,
    /// To, from.
    pub(crate) back: Vec<(u64, u64)>,
    /// All edges, accidents too.
    pub(crate) edges: usize,
}

impl Shared {
    fn new(config: Config, size: Size) -> Self {
        let replica = Replica { cache: None };
        let call = Call { permit: None, answered: None, orphan: None };
        let (replicas, calls) = (vec![replica; size.replicas], vec![call; size.calls]);
        let mut shared =
            Self { row: Row::new(config), replicas, calls, fault: None, identity: Box::default() };
        shared.settle(config);
        shared
    }

    /// Brings a state into its normal form after a step.
    fn settle(&mut self, config: Config) {
        let newest = self.row.epoch();
        self.row.renumber(newest);
        let slots = self.row.renumber_slots();
        for replica in &mut self.replicas {
            if let Some(cache) = replica.cache.as_mut() {
                cache.renumber(newest);
                cache.renumber_slots();
                cache.forget(config);
            }
        }
        let renumber = |permit: &mut Option<Permit>| {
            *permit = permit.map(|permit| row::renumbered(permit, newest, &slots));
        };
        for call in &mut self.calls {
            call.permit = call.permit.map(|(permit, owner)| (row::renumbered(permit, newest, &slots), owner));
            renumber(&mut call.answered);
            renumber(&mut call.orphan);
        }
        self.identity = self.least();
    }

    fn least(&self) -> Box<[u8]> {
        let written = orders(self.replicas.len()).iter().map(|replicas| self.write(replicas));
        written.min().unwrap_or_default().into_boxed_slice()
    }

    /// The state as numbers, replicas in this order, calls in that of their numbers.
    fn write(&self, replicas: &[usize]) -> Vec<u8> {
        let place = |owner: usize| replicas.iter().position(|at| *at == owner).unwrap_or(0) as u8;
        let mut out = Vec::with_capacity(64);
        out.push(self.fault.map_or(0, |fault| 1 + fault as u8));
        self.row.write(&mut out);
        for at in replicas {
            match &self.replicas[*at].cache {
                None => out.push(u8::MAX),
                Some(cache) => cache.write(&mut out),
            }
        }
        let mut calls: Vec<[u8; 4]> = self
            .calls
            .iter()
            .map(|call| {
                let (permit, owner) = call.permit.unzip();
                let [permit, answered, orphan] = [permit, call.answered, call.orphan].map(row::number);
                [permit, owner.map_or(0, place), answered, orphan]
            })
            .collect();
        calls.sort_unstable();
        out.extend(calls.as_flattened());
        out
    }

    /// Probes of this half-open period that run, or may still run.
    fn probes(&self) -> usize {
        let counts = |permit: Option<Permit>| {
            usize::from(permit.is_some_and(|permit| permit.probe && permit.epoch == self.row.epoch()))
        };
        match self.row.state() {
            State::HalfOpen => self
                .calls
                .iter()
                .map(|call| counts(call.permit.map(|(permit, _)| permit)) + counts(call.orphan))
                .sum(),
            _ => 0,
        }
    }
}

/// All orders of so many things; the model has at most three of a kind.
fn orders(of: usize) -> &'static [&'static [usize]] {
    match of {
        1 => &[&[0]],
        2 => &[&[0, 1], &[1, 0]],
        _ => &[&[0, 1, 2], &[0, 2, 1], &[1, 0, 2], &[1, 2, 0], &[2, 0, 1], &[2, 1, 0]],
    }
}

const SAMPLES: [Sample; 3] = [Sample::Success, Sample::Failure, Sample::Neutral];

impl Protocol {
    fn claim(&self, next: &mut Shared, at: usize, call: usize) {
        let Some(cache) = &next.replicas[at].cache else { return };
        let probe = match cache.availability(self.config) {
            Availability::Yes => false,
            Availability::Probe => true,
            Availability::No { .. } => return,
        };
        let checks = self.variant != Variant::NoEpochCheck;
        let admitted = if !checks && !probe {
            Some(row::unchecked(cache.epoch(), false))
        } else if self.variant == Variant::NoGuard && next.row.state() == State::HalfOpen && probe {
            Some(row::unchecked(next.row.epoch(), true))
        } else if checks && cache.epoch() != next.row.epoch() {
            None
        } else {
            next.row.transact(self.config, |machine, now| machine.try_acquire(now)).ok()
        };
        if let Some(permit) = admitted {
            next.calls[call] = Call { permit: Some((permit, at)), answered: None, orphan: None };
            match next.row.state() {
                State::Open => next.fault = Some(Fault::AdmittedWhileOpen),
                State::HalfOpen if !permit.probe => next.fault = Some(Fault::AdmittedWhileOpen),
                _ => {}
            }
        }
        // Lost or won, the transaction read the row.
        next.replicas[at].cache = Some(next.row.clone());
    }

    /// An answered call may be answered again. Where that is recognised it changes nothing, so it is not even a step.
    fn remembers(&self, permit: Permit) -> Option<Permit> {
        (self.variant == Variant::NoIdentity).then_some(permit)
    }

    /// The outcome's transaction: the sample is applied in it.
    fn record(&self, next: &mut Shared, permit: Permit, sample: Sample) {
        let before = next.row.clone();
        let stale = permit.epoch != next.row.epoch();
        let taken_for = match self.variant {
            Variant::NoFence => row::unfenced(&next.row),
            _ => permit,
        };
        row::record(&mut next.row, self.config, taken_for, sample);
        if stale && next.row != before && next.row != row::ticked(&before, self.config) {
            next.fault = Some(Fault::StaleDecides);
        }
    }

    fn take(&self, before: &Shared, step: Step) -> Shared {
        let mut next = before.clone();
        match step {
            Step::Tick => {
                next.row.age();
                next.replicas.iter_mut().filter_map(|replica| replica.cache.as_mut()).for_each(Row::age);
            }
            Step::Refresh(at) => next.replicas[at].cache = Some(next.row.clone()),
            Step::Claim(at, call) => self.claim(&mut next, at, call),
            Step::Look(at) => {
                next.row = row::ticked(&next.row, self.config);
                next.replicas[at].cache = Some(next.row.clone());
            }
            Step::Answer(at, call, sample) => {
                if let Some((permit, _)) = next.calls[call].permit.take() {
                    next.calls[call].answered = self.remembers(permit);
                    // A clean success touches no row; whether it is clean the replica knows from memory.
                    let clean = sample == Sample::Success
                        && !permit.probe
                        && next.replicas[at]
                            .cache
                            .as_ref()
                            .is_some_and(|cache| cache.is_clean() && cache.epoch() == permit.epoch);
                    if !clean {
                        self.record(&mut next, permit, sample);
                    }
                }
            }
            Step::Repeat(call, sample) => {
                if let Some(permit) = next.calls[call].answered {
                    self.record(&mut next, permit, sample);
                    if next.row != before.row && next.row != row::ticked(&before.row, self.config) {
                        next.fault = Some(Fault::CountedTwice);
                    }
                }
            }
            Step::Late(call, sample) => {
                if let Some(permit) = next.calls[call].orphan.take() {
                    next.calls[call].answered = self.remembers(permit);
                    self.record(&mut next, permit, sample);
                }
            }
            Step::Crash(at) => {
                next.replicas[at] = Replica { cache: None };
                for call in &mut next.calls {
                    if let Some((permit, _)) = call.permit.take_if(|(_, owner)| *owner == at) {
                        call.orphan = Some(permit);
                    }
                }
            }
        }
        if next.fault.is_none() && next.probes() > self.size.permits as usize {
            next.fault = Some(Fault::TooManyProbes);
        }
        next.settle(self.config);
        next
    }
}

fn fingerprint(shared: &Shared) -> u64 {
    let mut hasher = DefaultHasher::new();
    shared.identity.hash(&mut hasher);
    hasher.finish()
}

impl Model for Protocol {
    type State = Shared;
    type Action = Step;

    fn init_states(&self) -> Vec<Shared> {
        vec![Shared::new(self.config, self.size)]
    }

    fn actions(&self, shared: &Shared, steps: &mut Vec<Step>) {
        if shared.fault.is_some() {
            return;
        }
        steps.push(Step::Tick);
        for (at, replica) in shared.replicas.iter().enumerate() {
            steps.extend([Step::Refresh(at), Step::Crash(at)]);
            if self.variant != Variant::NoTimer && replica.cache.as_ref().is_some_and(Row::is_overdue) {
                steps.push(Step::Look(at));
            }
            let idle = (0..shared.calls.len()).filter(|call| shared.calls[*call].permit.is_none());
            if replica.cache.is_some() {
                steps.extend(idle.map(|call| Step::Claim(at, call)));
            }
        }
        for (call, now) in shared.calls.iter().enumerate() {
            for sample in SAMPLES {
                if now.permit.is_some() {
                    steps.extend((0..shared.replicas.len()).map(|at| Step::Answer(at, call, sample)));
                }
                if now.answered.is_some() {
                    steps.push(Step::Repeat(call, sample));
                }
                if now.orphan.is_some() {
                    steps.push(Step::Late(call, sample));
                }
            }
        }
    }

    fn next_state(&self, before: &Shared, step: Step) -> Option<Shared> {
        let next = self.take(before, step);
        if next.identity == before.identity {
            return None;
        }
        let (from, to) = (fingerprint(before), fingerprint(&next));
        let mut walked = self.walked.lock().expect("no walker panics while it holds this");
        walked.states.extend([from, to]);
        walked.edges += 1;
        if next.row.state() == State::Closed {
            walked.closed.insert(to);
        }
        if !matches!(step, Step::Crash(_) | Step::Late(..) | Step::Repeat(..)) {
            walked.back.push((to, from));
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        macro_rules! never {
            ($($fault:ident),+) => {
                vec![$(Property::always(
                    Fault::$fault.name(),
                    |_, shared: &Shared| shared.fault != Some(Fault::$fault),
                )),+]
            };
        }
        never![TooManyProbes, AdmittedWhileOpen, StaleDecides, CountedTwice]
    }
}

impl Hash for Shared {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.identity.hash(hasher);
    }
}

impl PartialEq for Shared {
    fn eq(&self, other: &Self) -> bool {
        self.identity == other.identity
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("row", &self.row)
            .field("replicas", &self.replicas)
            .field("calls", &self.calls)
            .finish_non_exhaustive()
    }
}

//! Who wins: what one event does to everything at once: the task, its counts, its agent's breaker and its budget.
//!
//! The table is the reference's, a line of it a group of rows here, read through the design where that differs: a cancelled
//! task is CANCELLED, a redrive costs nothing, what is held back is BLOCKED, a probe passes after 60 s of beats, and a
//! daemon that could not listen loses nobody (which is the daemon's to keep, and not shown here). The breaker is the
//! real one, told what the task's effects say.

use crate::support::{
    LATER, Life, START, blocks, cancels, error, fails, holder, redrives, releases, seconds, unblocks,
};
use breaker_core::{Breaker, Config, Sample, State as B};
use ledger_core::{Class, Event, Outcome, Overrides, Reason as R, Refusal, ReleaseCause, State as S};

/// A task, and the breaker of its agent.
struct Case {
    life: Life,
    breaker: Breaker,
}

impl Case {
    /// A task that is due, and a breaker that opens on the second failure and closes on the second success.
    fn new() -> Self {
        Self::with(Life::new())
    }

    fn with(life: Life) -> Self {
        // As the daemon has it: the leases of tasks are those of probes.
        let config = Config {
            failure_threshold: 2,
            success_threshold: 2,
            open_jitter: 0.0,
            probe_timeout: None,
            ..Config::default()
        };
        Self { life, breaker: Breaker::new(config).expect("valid") }
    }

    /// Handed out under a permit of the breaker, when that gives one.
    fn claimed(mut self) -> Self {
        let now = self.life.now.at.since_epoch();
        let permit = Some(self.breaker.try_acquire(now).expect("the breaker lets it through"));
        self.life.apply(&Event::Claim { holder: holder("w"), permit });
        self
    }

    fn running(self) -> Self {
        let mut case = self.claimed();
        case.life.ack();
        case
    }

    /// Its first attempt failed; not yet due again.
    fn in_back_off(self) -> Self {
        self.running().then(|life| life.settle_event(fails(Class::Transient)))
    }

    /// Its lease ran out; not yet due again.
    fn lost(self) -> Self {
        self.running().then(|_| Event::LeaseOver)
    }

    /// Somebody else's calls failed until the breaker opened.
    fn opened(mut self) -> Self {
        let now = self.life.now.at.since_epoch();
        while self.breaker.state() == B::Closed {
            let permit = self.breaker.try_acquire(now).expect("closed");
            let _ = self.breaker.record(permit, Sample::Failure, now, 0);
        }
        self
    }

    /// One failure more opens the breaker.
    fn on_the_brink(mut self) -> Self {
        let now = self.life.now.at.since_epoch();
        let permit = self.breaker.try_acquire(now).expect("closed");
        let _ = self.breaker.record(permit, Sample::Failure, now, 0);
        self
    }

    /// The open period is over, and this task the probe.
    fn probing(self) -> Self {
        self.opened().later().running()
    }

    fn later(mut self) -> Self {
        self.life.wait(LATER);
        self
    }

    fn broke(mut self) -> Self {
        self.life.tokens = 0;
        self
    }

    /// What `event` does to the task, and what its effects do to the breaker.
    fn then(mut self, event: impl Fn(&Life) -> Event) -> Self {
        let event = event(&self.life);
        self.happens(&event).expect("in the table");
        self
    }

    fn happens(&mut self, event: &Event) -> Result<(Option<Sample>, bool), Refusal> {
        let effects = self.life.try_apply(event)?.effects;
        if let Some((permit, sample)) = effects.sample {
            let _ = self.breaker.record(permit, sample, self.life.now.at.since_epoch(), 0);
        }
        Ok((effects.sample.map(|(_, sample)| sample), effects.deposit))
    }

    fn opened_later(self) -> Self {
        self.later().opened()
    }

    fn then_wait(mut self, span: std::time::Duration) -> Self {
        self.life.wait(span);
        self
    }

    fn granted(mut self) -> Self {
        self.life.tokens = 5;
        self
    }

    fn reset(mut self) -> Self {
        self.breaker.reset(self.life.now.at.since_epoch());
        self
    }

    fn probe_passes(mut self) -> Self {
        self.life.wait(seconds(60));
        let (permit, sample) = self.life.task.probe_passes().expect("a probe that nobody told of");
        let _ = self.breaker.record(permit, sample, self.life.now.at.since_epoch(), 0);
        self
    }
}

/// What an event leaves.
struct After {
    /// The state and its reason; or the refusal, which changes nothing.
    task: Result<(S, R), Refusal>,
    /// Attempts begun; then retries, losses and failed probes as they are counted.
    counts: [u32; 4],
    /// What the breaker is told, and its state then.
    breaker: (Option<Sample>, B),
    /// What the event did to the tokens in the budget.
    tokens: i64,
    /// A success that funds the budget.
    deposit: bool,
}

const fn after(state: S, reason: R) -> After {
    After {
        task: Ok((state, reason)),
        counts: [1, 0, 0, 0],
        breaker: (None, B::Closed),
        tokens: 0,
        deposit: false,
    }
}

const fn refused(refusal: Refusal) -> After {
    After { task: Err(refusal), ..after(S::Queued, R::None) }
}

impl After {
    const fn attempts(mut self, attempts: u32) -> Self {
        self.counts[0] = attempts;
        self
    }
    const fn retries(mut self, retries: u32) -> Self {
        self.counts[1] = retries;
        self
    }
    const fn losses(mut self, losses: u32) -> Self {
        self.counts[2] = losses;
        self
    }
    const fn failed_probes(mut self, failed: u32) -> Self {
        self.counts[3] = failed;
        self
    }
    const fn told(mut self, sample: Sample) -> Self {
        self.breaker.0 = Some(sample);
        self
    }
    const fn breaker(mut self, state: B) -> Self {
        self.breaker.1 = state;
        self
    }
    const fn tokens(mut self, change: i64) -> Self {
        self.tokens = change;
        self
    }
    const fn funds(mut self) -> Self {
        self.deposit = true;
        self
    }
}

/// The line of the reference's table, the case, what was before, what happens, what is then.
type Row = (&'static str, &'static str, fn() -> Case, fn(&Life) -> Event, After);

const FAILS: fn(&Life) -> Event = |life| life.settle_event(fails(Class::Transient));
const FAILS_FOR_GOOD: fn(&Life) -> Event = |life| life.settle_event(fails(Class::Permanent));
const COMPLETES: fn(&Life) -> Event = |life| life.settle_event(Outcome::Complete);
const CLAIMED: fn(&Life) -> Event = |_| Event::Claim { holder: holder("v"), permit: None };
const CANCELS: fn(&Life) -> Event = |_| cancels();
const DEADLINE: fn(&Life) -> Event = |_| Event::DeadlinePassed;
const HINTS: fn(&Life) -> Event = |life| {
    let retry_after = Some(seconds(60));
    life.settle_event(Outcome::Fail { error: error(Class::Overloaded), retry_after })
};

fn with_deadline() -> Case {
    Case::with(Life::until(seconds(7_200)))
}

fn without_retries() -> Case {
    Case::with(Life::with(Overrides { max_retries: Some(0), ..Overrides::NONE }))
}

#[rustfmt::skip] // One row, one case: the table is to be read down its columns.
const TABLE: &[Row] = &[
    ("order", "cancel over deadline", || with_deadline().running().then(DEADLINE).then(CANCELS),
        |life| life.settle_event(Outcome::Cancelled), after(S::Cancelled, R::User).told(Sample::Neutral)),
    ("order", "deadline over cancel never: the first cause counts, but USER overrides",
        || with_deadline().running().then(CANCELS).then(DEADLINE),
        |life| life.settle_event(Outcome::Cancelled), after(S::Cancelled, R::User).told(Sample::Neutral)),
    ("order", "deadline over permanent", || Case::with(Life::until(seconds(30))).running().later(),
        FAILS_FOR_GOOD, after(S::Failed, R::Deadline).told(Sample::Neutral)),
    ("order", "permanent over max_retries", || without_retries().running(),
        FAILS_FOR_GOOD, after(S::Failed, R::Permanent).told(Sample::Neutral)),
    ("order", "max_retries over an empty budget", || without_retries().running().broke(),
        FAILS, after(S::Failed, R::RetriesExhausted).told(Sample::Failure)),
    ("order", "max_losses over an empty budget",
        || Case::with(Life::with(Overrides { max_losses: Some(1), ..Overrides::NONE })).running().broke(),
        |_| Event::LeaseOver, after(S::Failed, R::Poison).losses(1).told(Sample::Failure)),
    ("order", "an empty budget over a hint", || Case::new().running().broke(),
        HINTS, after(S::Retry, R::Budget).retries(1).told(Sample::Failure)),
    ("order", "a hint over back-off: not due when back-off is over",
        || Case::new().running().then(HINTS).then_wait(seconds(59)),
        CLAIMED, refused(Refusal::WrongState(S::Retry)).retries(1)),
    ("order", "a hint beyond the deadline gives up now", || Case::with(Life::until(seconds(60))).running(),
        HINTS, after(S::Failed, R::Deadline).told(Sample::Failure)),

    ("retryable failure", "it waits and pays", || Case::new().running(),
        FAILS, after(S::Retry, R::Backoff).retries(1).told(Sample::Failure).tokens(-1)),
    ("retryable failure", "one that opens the breaker alike", || Case::new().on_the_brink().running(),
        FAILS, after(S::Retry, R::Backoff).retries(1).told(Sample::Failure).breaker(B::Open).tokens(-1)),
    ("retryable failure", "a timeout costs double", || Case::new().running(),
        |life| life.settle_event(fails(Class::Timeout)),
        after(S::Retry, R::Backoff).retries(1).told(Sample::Failure).tokens(-2)),
    ("retryable failure", "one without an ack counts as an attempt, too", || Case::new().claimed(),
        FAILS, after(S::Retry, R::Backoff).retries(1).told(Sample::Failure).tokens(-1)),

    ("retry due while OPEN", "it is held back and keeps its token", || Case::new().in_back_off().opened_later(),
        |_| Event::Gate, after(S::Blocked, R::BreakerOpen).retries(1).breaker(B::Open)),
    ("retry due while OPEN", "one that is not due is not held back", || Case::new().in_back_off().opened(),
        |_| Event::Gate, refused(Refusal::WrongState(S::Retry)).retries(1).breaker(B::Open)),
    ("retry due while OPEN", "it goes on when the breaker closes, its token still with it",
        || Case::new().in_back_off().opened_later().then(|_| Event::Gate).reset(),
        |_| Event::Ungate, after(S::Queued, R::None).retries(1)),
    ("retry due while OPEN", "nobody answers for the breaker",
        || Case::new().in_back_off().opened_later().then(|_| Event::Gate),
        |_| unblocks(), refused(Refusal::BlockedByBreaker).retries(1).breaker(B::Open)),

    ("half-open", "a new task is the probe", || Case::new().opened().later().claimed(),
        |life| life.ack_event(), after(S::Running, R::None).breaker(B::HalfOpen)),
    ("half-open", "a retry is the probe, and its token is spent", || Case::new().in_back_off().opened_later().later().running(),
        COMPLETES, after(S::Done, R::None).attempts(2).retries(1).told(Sample::Success).breaker(B::HalfOpen).funds()),
    ("half-open", "a task held back is the probe",
        || Case::new().opened().then(|_| Event::Gate).later().claimed(),
        |life| life.ack_event(), after(S::Running, R::None).breaker(B::HalfOpen)),
    ("half-open", "a probe that completes is a success", || Case::new().probing(),
        COMPLETES, after(S::Done, R::None).told(Sample::Success).breaker(B::HalfOpen).funds()),
    ("half-open", "a probe that was beaten for 60 s has passed: its failure decides nothing and is the task's own",
        || Case::new().probing().probe_passes(),
        FAILS, after(S::Retry, R::Backoff).retries(1).breaker(B::HalfOpen).tokens(-1)),
    ("half-open", "a probe that is given back frees its slot", || Case::new().probing(),
        |life| life.settle_event(releases(ReleaseCause::Declined)),
        after(S::Queued, R::Declined).told(Sample::Neutral).breaker(B::HalfOpen)),
    ("half-open", "a probe that blocks says nothing", || Case::new().probing(),
        |life| life.settle_event(blocks()),
        after(S::Blocked, R::Worker).told(Sample::Neutral).breaker(B::HalfOpen)),

    ("probe fails", "it is not counted and costs nothing", || Case::new().probing(),
        FAILS, after(S::Retry, R::Backoff).failed_probes(1).told(Sample::Failure).breaker(B::Open)),
    ("probe fails", "it cannot kill a task that has no retries left", || {
        let one = Case::with(Life::with(Overrides { max_retries: Some(1), ..Overrides::NONE }));
        one.in_back_off().reset().later().probing()
    }, FAILS, after(S::Retry, R::Backoff).attempts(2).retries(1).failed_probes(1)
        .told(Sample::Failure).breaker(B::Open)),
    ("probe fails", "for good it is final and says nothing of the agent", || Case::new().probing(),
        FAILS_FOR_GOOD, after(S::Failed, R::Permanent).told(Sample::Neutral).breaker(B::HalfOpen)),
    ("probe fails", "without max_retries it is counted", || without_retries().probing(),
        FAILS, after(S::Failed, R::RetriesExhausted).told(Sample::Failure).breaker(B::Open)),
    ("probe fails", "its lease ran out", || Case::new().probing(),
        |_| Event::LeaseOver,
        after(S::Retry, R::Lost).losses(1).told(Sample::Failure).breaker(B::Open).tokens(-1)),

    ("lease runs out", "the agent is gone", || Case::new().running(),
        |_| Event::LeaseOver, after(S::Retry, R::Lost).losses(1).told(Sample::Failure).tokens(-1)),
    ("lease runs out", "an empty budget holds no loss back", || Case::new().running().broke(),
        |_| Event::LeaseOver, after(S::Retry, R::Lost).losses(1).told(Sample::Failure)),
    ("lease runs out", "lost together with others: one sample for all", || Case::new().running(),
        |_| Event::TakenBack { sampled: true },
        after(S::Retry, R::Lost).losses(1).told(Sample::Neutral).tokens(-1)),
    ("lease runs out", "nobody acknowledged it", || Case::new().claimed(),
        |_| Event::LeaseOver, after(S::Queued, R::AckTimeout).attempts(0).told(Sample::Neutral)),
    ("lease runs out", "the next offer revokes the fence", || Case::new().lost().later(),
        CLAIMED, after(S::Running, R::None).losses(1)),

    ("late result", "no newer fence: it is recorded, and the loss was its sample", || Case::new().lost(),
        COMPLETES, after(S::Done, R::None).losses(1).tokens(1).funds()),
    ("late result", "no newer fence: a failure is one, and its token takes the place of the loss's",
        || Case::new().lost(),
        FAILS, after(S::Retry, R::Backoff).retries(1).losses(1)),
    ("late result", "no newer fence, while held back", || Case::new().lost().opened_later().then(|_| Event::Gate),
        COMPLETES, after(S::Done, R::None).losses(1).breaker(B::Open).tokens(1).funds()),
    ("late result", "a newer fence: refused", || Case::new().lost().later().then(CLAIMED),
        |_| Event::Settle(crate::support::caller("w"), 1, Outcome::Complete),
        refused(Refusal::LeaseLost).losses(1)),
    ("late result", "an ended task: refused", || Case::new().lost().then(CANCELS),
        COMPLETES, refused(Refusal::TaskTerminal).losses(1)),
    ("late result", "of an epoch that is over: told, and it decides nothing",
        || Case::new().running().opened(),
        COMPLETES, after(S::Done, R::None).told(Sample::Success).breaker(B::Open).funds()),

    ("deadline passes", "QUEUED", with_deadline, DEADLINE, after(S::Failed, R::Deadline).attempts(0)),
    ("deadline passes", "RETRY: its token goes back", || with_deadline().in_back_off(),
        DEADLINE, after(S::Failed, R::Deadline).retries(1).tokens(1)),
    ("deadline passes", "RETRY, waiting for a token: there is none to go back",
        || with_deadline().running().broke().then(FAILS),
        DEADLINE, after(S::Failed, R::Deadline).retries(1)),
    ("deadline passes", "BLOCKED by the breaker: its token goes back",
        || with_deadline().in_back_off().opened_later().then(|_| Event::Gate),
        DEADLINE, after(S::Failed, R::Deadline).retries(1).breaker(B::Open).tokens(1)),
    ("deadline passes", "BLOCKED by its worker", || with_deadline().running().then(|life| life.settle_event(blocks())),
        DEADLINE, after(S::Failed, R::Deadline)),

    ("cancel", "in back-off: its token goes back", || Case::new().in_back_off(),
        CANCELS, after(S::Cancelled, R::User).retries(1).tokens(1)),
    ("cancel", "running: a stop is asked for, and nothing else yet", || Case::new().running(),
        CANCELS, after(S::Running, R::None)),
    ("cancel", "running, and the grace is over", || Case::new().running().then(CANCELS),
        |_| Event::GraceOver, after(S::Cancelled, R::Abandoned).told(Sample::Neutral)),
    ("cancel", "running, and it fails within the grace", || Case::new().running().then(CANCELS),
        FAILS, after(S::Cancelled, R::User).told(Sample::Neutral)),
    ("cancel", "success beats it", || Case::new().running().then(CANCELS),
        COMPLETES, after(S::Done, R::None).told(Sample::Success).funds()),
    ("cancel", "a probe's slot is freed", || Case::new().probing().then(CANCELS),
        |_| Event::GraceOver, after(S::Cancelled, R::Abandoned).told(Sample::Neutral).breaker(B::HalfOpen)),

    ("budget empty", "it waits for a token, and no retry is lost", || Case::new().running().broke(),
        FAILS, after(S::Retry, R::Budget).retries(1).told(Sample::Failure)),
    ("budget empty", "it is not handed out, due or not", || Case::new().running().broke().then(FAILS).later(),
        CLAIMED, refused(Refusal::WrongState(S::Retry)).retries(1)),
    ("budget empty", "a token came", || Case::new().running().broke().then(FAILS).granted(),
        |_| Event::BudgetGranted, after(S::Retry, R::Backoff).retries(1).tokens(-1)),
    ("budget empty", "none came in time", || Case::new().running().broke().then(FAILS),
        |_| Event::BudgetExpired, after(S::Failed, R::Budget).retries(1)),

    ("manual reset", "a probe's failure is late", || Case::new().probing().reset(),
        FAILS, after(S::Retry, R::Backoff).failed_probes(1).told(Sample::Failure)),
    ("manual reset", "a probe's success is late", || Case::new().probing().reset(),
        COMPLETES, after(S::Done, R::None).told(Sample::Success).funds()),

    ("redrive", "its counts begin anew, and it costs nothing", || without_retries().running().then(FAILS),
        |_| redrives(), after(S::Queued, R::Redriven)),
    ("redrive", "a discarded dead letter is refused",
        || without_retries().running().then(FAILS).then(|_| crate::support::discards()),
        |_| redrives(), refused(Refusal::Discarded)),
];

#[test]
fn who_wins() {
    let mut wrong = Vec::new();
    for (line, case, given, event, expected) in TABLE {
        let mut case_now = given();
        let before = i64::from(case_now.life.tokens);
        let happened = case_now.happens(&event(&case_now.life));
        let task = &case_now.life.task;
        let told = happened.unwrap_or((None, false));
        let got = (
            happened.map(|_| (task.state, task.reason)),
            [task.attempt, task.retry_count, task.losses, task.probe_failures],
            (told.0, case_now.breaker.state()),
            i64::from(case_now.life.tokens) - before,
            told.1,
        );
        let After { task, counts, breaker, tokens, deposit } = expected;
        let want = (*task, *counts, *breaker, *tokens, *deposit);
        if got != want {
            wrong.push(format!("{line} | {case}\n   got  {got:?}\n   want {want:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {} rows\n{}", wrong.len(), TABLE.len(), wrong.join("\n"));
}

#[test]
fn a_late_result_of_a_probe_is_counted_as_late_and_moves_nothing() {
    for (event, late) in [(COMPLETES, (1, 0)), (FAILS, (0, 1))] {
        let mut case = Case::new().probing().reset();
        let epoch = case.breaker.epoch();
        let event = event(&case.life);
        case.happens(&event).expect("in the table");
        let stats = case.breaker.stats();
        assert_eq!((stats.late_ok, stats.late_err), late);
        assert_eq!((case.breaker.epoch(), case.breaker.run()), (epoch, 0));
    }
}

#[test]
fn the_failure_that_opens_the_breaker_waits_no_longer_than_another() {
    let waits = |case: Case| case.running().then(FAILS).life.task.run_at.since(START);
    assert_eq!(waits(Case::new().on_the_brink()), waits(Case::new()));
}

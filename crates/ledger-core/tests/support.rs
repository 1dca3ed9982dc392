//! One task, its history, and the hands that move it.
//!
//! Every step checks what must hold at every step: a refusal changes nothing, a transition adds one row and one version,
//! and folding the rows gives the task. So each test proves these beside its own promise.

use ledger_core::fold::Folded;
use ledger_core::{
    AgentId, Applied, Caller, Class, Context, Event, EventKind, Holder, LostWith, Now, Outcome, Overrides,
    Reason, Record, Redrive, Refusal, ReleaseCause, SessionId, Settings, Spec, State, Task, TaskError,
    TaskId, Timestamp,
};
use std::sync::Arc;
use std::time::Duration;

/// When every test begins.
pub(crate) const START: Timestamp = Timestamp::from_millis(1_700_000_000_000);
/// Later than any back-off of the default settings.
pub(crate) const LATER: Duration = Duration::from_secs(3_600);

pub(crate) const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

pub(crate) fn caller(worker: &str) -> Caller {
    Caller { worker: worker.into(), session: Some(SessionId(1)) }
}

pub(crate) fn holder(worker: &str) -> Holder {
    Holder { worker: worker.into(), incarnation: 1, session: SessionId(1) }
}

pub(crate) fn error(class: Class) -> Arc<TaskError> {
    Arc::new(TaskError { class, code: "E".to_owned(), message: "it broke".to_owned(), detail: String::new() })
}

pub(crate) fn fails(class: Class) -> Outcome {
    Outcome::Fail { error: error(class), retry_after: None }
}

pub(crate) const fn releases(cause: ReleaseCause) -> Outcome {
    Outcome::Release { cause, delay: Duration::ZERO }
}

pub(crate) fn blocks() -> Outcome {
    Outcome::Block { question: "may I?".into(), until: None }
}

pub(crate) fn cancels() -> Event {
    Event::Cancel { note: "ann: enough".into() }
}

pub(crate) fn redrives() -> Event {
    Event::Redrive(Box::new(Redrive { note: "ann: mended".into(), ..Redrive::default() }))
}

pub(crate) fn updates(priority: Option<u8>, run_at: Option<Timestamp>) -> Event {
    Event::Update { priority, run_at, note: "ann: sooner".into() }
}

pub(crate) fn discards() -> Event {
    Event::Discard { note: "ann: obsolete".into() }
}

pub(crate) const fn unblocks() -> Event {
    Event::Unblock { answer: None, actor: None }
}

/// What may not differ where only soft fields changed: all but the lease's times and the stream that speaks.
pub(crate) fn hard(task: &Task) -> Task {
    let mut task = task.clone();
    if let Some(lease) = task.lease.as_mut() {
        lease.until = START;
        lease.progress_at = START;
    }
    if let Some(holder) = task.holder.as_mut() {
        holder.session = SessionId(0);
    }
    task
}

/// What the history must say of `task`.
pub(crate) fn folded(task: &Task) -> Folded {
    Folded {
        state: Some(task.state),
        reason: Some(task.reason),
        version: task.version,
        fence: task.fence,
        delivery: task.delivery,
        attempt: task.attempt,
        retry_count: task.retry_count,
        losses: task.losses,
        loss_weight: task.loss_weight,
        lost_at: task.lost_at,
        free_releases: task.free_releases,
        blocks: task.blocks,
        idle_deliveries: task.idle_deliveries,
        preemptions: task.preemptions,
        redrives: task.redrives,
        probe_failures: task.probe_failures,
        worker: task
            .holder
            .as_ref()
            .filter(|_| task.state == State::Running)
            .map(|holder| Arc::clone(&holder.worker)),
        stop: task.stop.map(|stop| (stop.cause, stop.until)),
        discarded: task.discarded,
    }
}

/// A task under test. Its usual worker is `w`.
#[derive(Clone)]
pub(crate) struct Life {
    pub(crate) task: Task,
    pub(crate) history: Vec<Record>,
    pub(crate) now: Now,
    pub(crate) settings: Settings,
    /// Tokens in the budget.
    pub(crate) tokens: u32,
    pub(crate) draw: u64,
    /// With what a lease ends.
    pub(crate) lost_with: LostWith,
}

impl Life {
    pub(crate) fn new() -> Self {
        Self::with(Overrides::NONE)
    }

    pub(crate) fn with(policy: Overrides) -> Self {
        Self::enqueued(policy, None, None)
    }

    pub(crate) fn until(deadline: Duration) -> Self {
        Self::enqueued(Overrides::NONE, None, Some(START.after(deadline)))
    }

    pub(crate) fn enqueued(
        policy: Overrides,
        run_at: Option<Timestamp>,
        deadline: Option<Timestamp>,
    ) -> Self {
        let spec = Arc::new(Spec {
            agent: AgentId(1),
            task_type: "thumbnail".into(),
            policy,
            created_at: START,
            frees_key: false,
        });
        let now = Now::steady(START);
        let (task, first) = Task::enqueue(TaskId(7), spec, 5, run_at, deadline, now);
        let settings = Settings::default();
        Self {
            task,
            history: vec![first],
            now,
            settings,
            tokens: 100,
            draw: u64::MAX / 2,
            lost_with: LostWith::ALONE,
        }
    }

    /// What `event` does; the test may expect a refusal.
    pub(crate) fn try_apply(&mut self, event: &Event) -> Result<Applied, Refusal> {
        let before = self.task.clone();
        let tokens = self.tokens;
        let affords = move |price: u32| price <= tokens;
        let cx = Context {
            now: self.now,
            settings: &self.settings,
            draw: self.draw,
            affords: &affords,
            digest: 42,
            lost_with: self.lost_with,
        };
        let result = self.task.apply(event, &cx);
        match &result {
            Err(refusal) => assert_eq!(self.task, before, "{event:?} was refused ({refusal}) and changed it"),
            Ok(Applied { record: None, effects }) => {
                assert_eq!(hard(&self.task), hard(&before), "{event:?} added no row");
                assert_eq!(*effects, Applied::soft().effects, "{event:?} has effects without a row");
            }
            Ok(Applied { record: Some(record), effects }) => {
                assert_eq!(record.version, before.version + 1);
                assert_eq!(self.task.version, record.version);
                assert_eq!(record.from, Some(before.state));
                assert_eq!((record.to, record.reason), (self.task.state, self.task.reason));
                self.tokens = (self.tokens + effects.refund).saturating_sub(effects.reserve);
                self.history.push(record.clone());
                assert_eq!(Folded::of(&self.history), Ok(folded(&self.task)), "after {event:?}");
            }
        }
        self.keeps_its_rules();
        result
    }

    /// What `event` does; refused, the test fails.
    #[track_caller]
    pub(crate) fn apply(&mut self, event: &Event) -> Applied {
        match self.try_apply(event) {
            Ok(applied) => applied,
            Err(refusal) => panic!("{event:?} in {} {}: {refusal}", self.task.state, self.task.reason),
        }
    }

    #[track_caller]
    pub(crate) fn refuses(&mut self, event: &Event) -> Refusal {
        self.try_apply(event).expect_err("refused")
    }

    fn keeps_its_rules(&self) {
        let task = &self.task;
        assert_eq!(task.holder.is_some(), task.lease.is_some(), "a lease without a holder, or the reverse");
        assert!(task.state != State::Running || task.holder.is_some(), "RUNNING with nobody");
        assert!(task.stop.is_none() || task.state == State::Running, "a stop outside RUNNING");
        assert!(!task.state.is_terminal() || task.holder.is_none(), "an ended task is held");
        assert!(!task.state.is_terminal() || task.tokens == 0, "an ended task keeps tokens");
        assert!(!task.discarded || task.state == State::Failed, "discarded and not FAILED");
    }

    pub(crate) fn wait(&mut self, span: Duration) -> &mut Self {
        self.now.at = self.now.at.after(span);
        self
    }

    pub(crate) fn claim_by(&mut self, worker: &str) -> Applied {
        self.apply(&Event::Claim { holder: holder(worker), permit: None })
    }

    pub(crate) fn claim(&mut self) -> Applied {
        self.claim_by("w")
    }

    pub(crate) fn claim_as(&mut self, probe: bool) -> Applied {
        let permit = Some(breaker_core::Permit { epoch: 3, probe, slot: 0 });
        self.apply(&Event::Claim { holder: holder("w"), permit })
    }

    pub(crate) fn ack_event(&self) -> Event {
        Event::Ack(caller("w"), self.task.fence)
    }

    pub(crate) fn beat_event(&self) -> Event {
        Event::Beat(caller("w"), self.task.fence)
    }

    pub(crate) fn settle_event(&self, outcome: Outcome) -> Event {
        Event::Settle(caller("w"), self.task.fence, outcome)
    }

    pub(crate) fn ack(&mut self) -> Applied {
        self.apply(&self.ack_event())
    }

    pub(crate) fn beat(&mut self) -> Applied {
        self.apply(&self.beat_event())
    }

    #[track_caller]
    pub(crate) fn settle(&mut self, outcome: Outcome) -> Applied {
        self.apply(&self.settle_event(outcome))
    }

    /// Claimed and acknowledged.
    pub(crate) fn start(&mut self) -> &mut Self {
        self.claim();
        self.ack();
        self
    }

    /// One more failed attempt, after which it is due again.
    pub(crate) fn fail_once(&mut self) -> Applied {
        self.start();
        let applied = self.settle(fails(Class::Transient));
        self.wait(LATER);
        applied
    }

    /// One more lost attempt, after which it is due again.
    pub(crate) fn lose_once(&mut self) -> Applied {
        self.start();
        let applied = self.apply(&Event::LeaseOver);
        self.wait(LATER);
        applied
    }

    pub(crate) fn last(&self) -> &Record {
        self.history.last().expect("a task has at least the row of its enqueue")
    }

    #[track_caller]
    pub(crate) fn is(&self, state: State, reason: Reason, kind: EventKind) {
        let got = (self.task.state, self.task.reason, self.last().kind);
        assert_eq!(got, (state, reason, kind), "history: {:#?}", self.history);
    }

    pub(crate) fn kinds(&self) -> Vec<EventKind> {
        self.history.iter().map(|row| row.kind).collect()
    }
}

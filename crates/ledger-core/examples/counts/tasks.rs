//! Rows of ledger-core's own: a task from its enqueue to its end.

use crate::row;
use breaker_core::Permit;
use ledger_core::{
    AgentId, Applied, Caller, Class, Context, Event, Holder, LostWith, Now, Outcome, Overrides, SessionId,
    Settings, Spec, State, Task, TaskError, TaskId, Timestamp,
};
use std::hint::black_box;
use std::mem::forget;
use std::sync::Arc;

const CALLS: u32 = 1_000;
const START: Now = Now::steady(Timestamp::from_millis(1_700_000_000_000));

pub(crate) fn rows() {
    let spec = Arc::new(Spec {
        agent: AgentId(1),
        task_type: "thumbnail".into(),
        policy: Overrides::NONE,
        created_at: START.at,
        frees_key: false,
    });
    let worker: Arc<str> = "w".into();
    let caller = Caller { worker: Arc::clone(&worker), session: Some(SessionId(1)) };
    let holder = Holder { worker, incarnation: 1, session: SessionId(1) };
    let permit = Some(Permit { epoch: 3, probe: false, slot: 0 });
    let error = Arc::new(TaskError {
        class: Class::Transient,
        code: "E".into(),
        message: "".into(),
        detail: "".into(),
    });
    let fails = Outcome::Fail { error, retry_after: None };

    let settings = Settings::default();
    let affords = |_| true;
    let (draw, lost_with) = (1 << 60, LostWith::ALONE);
    let cx = Context { now: START, settings: &settings, draw, affords: &affords, digest: 7, lost_with };

    let enqueue = || Task::enqueue(TaskId(7), Arc::clone(&spec), 5, None, None, START).0;
    let inputs = |_| {
        black_box(&spec);
        black_box(TaskId(7));
        black_box(START);
    };
    let enqueued = |_| {
        let spec = Arc::clone(black_box(&spec));
        let new = Task::enqueue(black_box(TaskId(7)), spec, 5, None, None, black_box(START));
        black_box(&new);
        // Its end is the caller's matter.
        forget(new);
    };
    row("task enqueue", CALLS, inputs, enqueued);

    let claim = Event::Claim { holder, permit };
    let ack = Event::Ack(caller.clone(), 1);
    let complete = Event::Settle(caller.clone(), 1, Outcome::Complete);
    let fail = Event::Settle(caller, 1, fails);
    for (name, before, event, after) in [
        ("task claim", &[][..], &claim, State::Running),
        ("task ack", &[&claim], &ack, State::Running),
        ("task settle, complete", &[&claim, &ack], &complete, State::Done),
        ("task settle, failure to retry", &[&claim, &ack], &fail, State::Retry),
    ] {
        let ready: Vec<Task> = (0..CALLS)
            .map(|_| {
                let mut task = enqueue();
                before.iter().for_each(|event| forget(task.apply(event, &cx)));
                task
            })
            .collect();
        let (mut given_to, mut tasks) = (ready.clone(), ready);
        let (mut idle, mut busy) = (given_to.iter_mut(), tasks.iter_mut());
        let inputs = |_| {
            black_box(idle.next());
            black_box((event, &cx));
        };
        let applied = |_| {
            let Some(task) = black_box(busy.next()) else { return };
            let (event, cx) = black_box((event, &cx));
            let applied: Result<Applied, _> = task.apply(event, cx);
            black_box(&applied);
            forget(applied);
        };
        row(name, CALLS, inputs, applied);
        assert!(tasks.iter().all(|task| task.state == after), "{name} ends in {after}");
    }
}

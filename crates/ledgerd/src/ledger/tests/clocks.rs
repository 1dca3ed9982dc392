//! A wall clock that is set, while the ledger serves and while it does not.

use super::*;

#[tokio::test]
async fn when_the_wall_clock_is_set_only_times_that_users_named_move() {
    let hour = 3_600_000;
    let fixture = Fixture::new("clock", false).await;
    let handle = &fixture.handle;
    let wall = handle.clock().now().wall();
    let half = |sign: i64| Some(Timestamp::from_millis(wall.millis() + sign * hour / 2));
    let on = |agent: &str, run_at, deadline| NewTask { run_at, deadline, ..task(agent).expect("a task") };
    let retries = Overrides { base_delay: Some(Duration::from_secs(1_200)), ..Overrides::NONE };
    let tasks = [
        NewTask { policy: retries, ..on("a", None, None) },
        on("a", None, None),
        on("b", half(1), None),
        on("b", None, half(1)),
    ];
    let stored = handle.enqueue(tasks.into_iter().map(Ok).collect(), BatchMode::Atomic, None).await;
    assert_eq!(stored.expect("stored").len(), 4);
    let [fails, runs, later, ends] = [1, 2, 3, 4].map(TaskId);
    let mut opened = handle.hello(Hello { capacity: 1, ..hello() }).await.expect("welcome");
    let ToWorker::Assignments(first) = next(&mut opened).await else { panic!("an assignment comes") };
    assert_eq!(first[0].task, fails);
    let error = ledger_core::TaskError {
        class: ledger_core::Class::Transient,
        code: String::new(),
        message: "no".into(),
        detail: String::new(),
    };
    let settlement = Settlement {
        task: fails,
        fence: first[0].fence,
        outcome: Outcome::Fail { error: error.into(), retry_after: None },
        result: None,
        checkpoint: None,
        follow_ups: Vec::new(),
        digest: 1,
    };
    handle.frame(opened.session, FromWorker::Outcomes(vec![settlement])).await.expect("taken");
    reaches(&fixture, runs, State::Running).await;
    handle.frame(opened.session, FromWorker::Acks(vec![(runs, 1)])).await.expect("taken");
    reaches(&fixture, fails, State::Retry).await;
    let due = async |id| {
        let found = handle.explain(id).await.expect("known");
        found.gates.iter().any(|gate| gate.kind == GateKind::NotDue)
    };
    assert!(due(later).await, "half an hour ahead");

    handle.clock().set_wall_by(hour);
    reaches(&fixture, ends, State::Failed).await;
    assert!(!due(later).await, "its time is past now");
    assert_eq!(state(&fixture, runs).await, State::Running, "no lease ends for it");
    assert_eq!(state(&fixture, fails).await, State::Retry, "no back-off is shorter for it");

    handle.clock().set_wall_by(-2 * hour);
    handle.flush().await.expect("it goes on");
    assert!(due(later).await, "its time is to come again");
    assert_eq!(state(&fixture, runs).await, State::Running);
    let settled = Settlement {
        task: runs,
        fence: 1,
        outcome: Outcome::Complete,
        result: None,
        checkpoint: None,
        follow_ups: Vec::new(),
        digest: 2,
    };
    handle.frame(opened.session, FromWorker::Outcomes(vec![settled])).await.expect("taken");
    reaches(&fixture, runs, State::Done).await;
    let rows = handle.reader().history(runs).await.expect("readable").expect("known");
    let times: Vec<_> = rows.iter().map(|row| row.record.at).collect();
    assert!(times.is_sorted(), "no row is of before the one before it: {times:?}");
}

#[tokio::test]
async fn time_goes_on_from_where_it_was_when_the_wall_clock_was_set_back_meanwhile() {
    let hour = Duration::from_secs(3_600);
    // Before it is set back, it is an hour ahead.
    let ahead = Clock::start();
    ahead.set_wall_by(3_600_000);
    ahead.go_on_from(ahead.now().wall());
    let mut fixture = Fixture::new("clock-back", false).await;
    fixture.again(ahead).await;
    let wall = Clock::start().now().at;
    let on = |agent: &str, policy| NewTask { policy, ..task(agent).expect("a task") };
    let short = Overrides { lease_duration: Some(Duration::from_secs(1)), ..Overrides::NONE };
    let tasks = [on("a", short), NewTask { run_at: Some(wall.after(hour * 2)), ..on("b", Overrides::NONE) }];
    let stored = fixture.handle.enqueue(tasks.into_iter().map(Ok).collect(), BatchMode::Atomic, None).await;
    assert_eq!(stored.expect("stored").len(), 2);
    let [runs, later] = [1, 2].map(TaskId);
    let opened = fixture.handle.hello(hello()).await.expect("welcome");
    fixture.handle.frame(opened.session, FromWorker::Acks(vec![(runs, 1)])).await.expect("taken");
    let due_in = async |fixture: &Fixture| {
        let clock = fixture.handle.clock();
        let task = fixture.handle.reader().task(later, false).await.expect("readable").expect("known").task;
        task.due_at(clock.now()).since(clock.now().at)
    };
    let before = due_in(&fixture).await;
    assert!(before <= hour && before > hour / 2, "{before:?}");

    fixture.again(Clock::start()).await;
    reaches(&fixture, runs, State::Retry).await;
    let after = due_in(&fixture).await;
    assert!(
        after <= hour * 2 && after > hour * 3 / 2,
        "by the wall clock, which is an hour behind: {after:?}"
    );
    let rows = fixture.handle.reader().history(runs).await.expect("readable").expect("known");
    let times: Vec<_> = rows.iter().map(|row| row.record.at).collect();
    assert!(times.is_sorted() && times[0] > wall.after(hour / 2), "{times:?}");
}

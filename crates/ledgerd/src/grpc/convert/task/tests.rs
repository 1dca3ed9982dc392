use super::*;
use std::collections::BTreeMap;

const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);

fn good() -> wire::NewTask {
    wire::NewTask { agent: "claude".into(), task_type: "review".into(), ..wire::NewTask::default() }
}

fn labels(key: &str, value: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(key.to_owned(), value.to_owned())])
}

fn read(new: wire::NewTask) -> Result<NewTask, LedgerError> {
    let mut check = Check::default();
    let task = new_task(&mut check, At::In("task"), new, NOW, &mut Names::default());
    check.done(task)
}

/// Fields at fault when `change` is made to a good task.
fn faults(change: impl FnOnce(&mut wire::NewTask)) -> Vec<String> {
    let mut new = good();
    change(&mut new);
    match read(new) {
        Ok(_) => Vec::new(),
        Err(LedgerError::Invalid(violations)) => violations.into_iter().map(|v| v.field).collect(),
        Err(error) => panic!("{error}"),
    }
}

fn policy_faults(change: impl FnOnce(&mut wire::TaskPolicy)) -> Vec<String> {
    let mut policy = wire::TaskPolicy::default();
    change(&mut policy);
    faults(|task| task.policy = Some(policy))
}

const fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

const fn at(seconds: i64, nanos: i32) -> Option<prost_types::Timestamp> {
    Some(prost_types::Timestamp { seconds, nanos })
}

#[test]
fn bad_fields_are_named() {
    let now = NOW.millis() / 1_000;
    let year = 366 * 24 * 3_600;
    type Change = Box<dyn FnOnce(&mut wire::NewTask)>;
    let table: Vec<(&str, Change)> = vec![
        ("agent", Box::new(|t| t.agent.clear())),
        ("agent", Box::new(|t| t.agent = "../x".into())),
        ("agent", Box::new(|t| t.agent = "a\0b".into())),
        ("agent", Box::new(|t| t.agent = "Claude".into())),
        ("agent", Box::new(|t| t.agent = "a".repeat(64))),
        ("task_type", Box::new(|t| t.task_type.clear())),
        ("task_type", Box::new(|t| t.task_type = "a\nb".into())),
        ("task_type", Box::new(|t| t.task_type = "a".repeat(129))),
        ("payload", Box::new(|t| t.payload = vec![0; PAYLOAD_BYTES + 1].into())),
        ("priority", Box::new(|t| t.priority = Some(10))),
        ("priority", Box::new(|t| t.priority = Some(-1))),
        ("run_at", Box::new(move |t| t.run_at = at(now, 2_000_000_000))),
        ("run_at", Box::new(move |t| t.run_at = at(now, -1))),
        ("run_at", Box::new(|t| t.run_at = at(253_402_300_800, 0))),
        ("run_at", Box::new(move |t| t.run_at = at(now + year + 1, 0))),
        ("deadline", Box::new(|t| t.deadline = at(253_402_300_800, 0))),
        ("idempotency_key", Box::new(|t| t.idempotency_key = "k".repeat(257))),
        ("idempotency_key", Box::new(|t| t.idempotency_key = "k\u{7f}".into())),
        ("unique", Box::new(|t| t.unique = 3)),
        ("labels", Box::new(|t| t.labels = labels("", "v"))),
        ("labels", Box::new(|t| t.labels = labels(&"k".repeat(64), "v"))),
        ("labels", Box::new(|t| t.labels = labels("k", &"v".repeat(256)))),
        ("labels", Box::new(|t| t.labels = labels("k", "a\u{202e}b"))),
        ("labels", Box::new(|t| t.labels = labels("a\u{2066}b", "v"))),
        ("labels", Box::new(|t| t.labels = (0..65).map(|n| (n.to_string(), String::new())).collect())),
        ("traceparent", Box::new(|t| t.traceparent = "0".repeat(129))),
        ("tracestate", Box::new(|t| t.tracestate = "0".repeat(513))),
    ];
    for (row, (field, change)) in table.into_iter().enumerate() {
        assert_eq!(faults(change), [format!("task.{field}")], "row {row}");
    }
}

#[test]
fn bad_policies_are_named() {
    type Change = Box<dyn FnOnce(&mut wire::TaskPolicy)>;
    let table: Vec<(&str, Change)> = vec![
        ("max_retries", Box::new(|p| p.max_retries = Some(-1))),
        ("max_retries", Box::new(|p| p.max_retries = Some(1_001))),
        ("base_delay", Box::new(|p| p.base_delay = seconds(-1))),
        ("exponential_base", Box::new(|p| p.exponential_base = Some(f64::NAN))),
        ("exponential_base", Box::new(|p| p.exponential_base = Some(f64::INFINITY))),
        ("jitter", Box::new(|p| p.jitter = 6)),
        ("jitter_ratio", Box::new(|p| p.jitter_ratio = Some(f64::NAN))),
        ("jitter_ratio", Box::new(|p| p.jitter_ratio = Some(1.5))),
        (
            "jitter_ratio",
            Box::new(|p| {
                p.jitter = wire::JitterKind::Full as i32;
                p.jitter_ratio = Some(0.5);
            }),
        ),
        ("lease_duration", Box::new(|p| p.lease_duration = seconds(0))),
        ("lease_duration", Box::new(|p| p.lease_duration = seconds(25 * 3_600))),
        ("attempt_timeout", Box::new(|p| p.attempt_timeout = seconds(0))),
        ("max_losses", Box::new(|p| p.max_losses = Some(0))),
    ];
    for (row, (field, change)) in table.into_iter().enumerate() {
        assert_eq!(policy_faults(change), [format!("task.policy.{field}")], "row {row}");
    }
}

#[test]
fn everything_wrong_is_found_at_once() {
    let found = faults(|task| {
        task.agent.clear();
        task.priority = Some(12);
        task.policy = Some(wire::TaskPolicy { max_retries: Some(-1), ..wire::TaskPolicy::default() });
    });
    assert_eq!(found, ["task.agent", "task.priority", "task.policy.max_retries"]);
}

#[test]
fn unusual_but_good_values_are_taken_literally() {
    assert!(faults(|t| t.labels = labels("q\"'", "'; DROP TABLE tasks; --")).is_empty());
    assert!(faults(|t| t.payload = vec![0; PAYLOAD_BYTES].into()).is_empty());
    assert!(faults(|t| t.idempotency_key = "k".repeat(256)).is_empty());
    assert!(faults(|t| t.run_at = at(-1, 0)).is_empty(), "the past is now");
    let task = read(good()).expect("a task");
    assert_eq!((task.priority, task.frees_key, task.policy), (5, false, Overrides::NONE));
}

#[test]
fn the_content_of_a_key_is_what_the_user_means_by_it() {
    let digest = |change: fn(&mut wire::NewTask)| {
        let mut new = wire::NewTask { idempotency_key: "k".into(), labels: labels("a", "b"), ..good() };
        change(&mut new);
        read(new).expect("a task").data.digest
    };
    let same = digest(|_| {});
    let content: [fn(&mut wire::NewTask); 5] = [
        |t| t.agent = "codex".into(),
        |t| t.task_type = "other".into(),
        |t| t.payload = vec![1].into(),
        |t| t.labels.clear(),
        |t| t.policy = Some(wire::TaskPolicy { max_retries: Some(0), ..wire::TaskPolicy::default() }),
    ];
    for (row, change) in content.into_iter().enumerate() {
        assert_ne!(digest(change), same, "row {row}");
    }
    let beside: [fn(&mut wire::NewTask); 5] = [
        |t| t.run_at = at(1_800_000_100, 0),
        |t| t.deadline = at(1_800_000_100, 0),
        |t| t.priority = Some(9),
        |t| t.traceparent = "00-1".into(),
        |t| t.policy = Some(wire::TaskPolicy::default()),
    ];
    for (row, change) in beside.into_iter().enumerate() {
        assert_eq!(digest(change), same, "row {row}");
    }
}

#[test]
fn numbers_of_words_are_the_same_on_the_wire_and_in_rows() {
    for known in State::ALL {
        let wire = wire::TaskState::try_from(state(*known)).expect("a state");
        assert_eq!(wire.as_str_name(), format!("TASK_STATE_{known}"));
    }
    for known in StopCause::ALL {
        let wire = wire::StopCause::try_from(stop_cause(*known)).expect("a cause");
        assert_eq!(wire.as_str_name(), format!("STOP_CAUSE_{known}"));
    }
    for known in Class::ALL {
        let wire = wire::ErrorClass::try_from(i32::from(known.code())).expect("a class");
        assert_eq!(wire.as_str_name(), format!("ERROR_CLASS_{known}"));
    }
}

#[test]
fn policies_come_back_as_they_were_given() {
    let given = wire::TaskPolicy {
        max_retries: Some(7),
        base_delay: seconds(1),
        jitter: wire::JitterKind::Proportional as i32,
        jitter_ratio: Some(0.25),
        stall_timeout: seconds(90),
        ..wire::TaskPolicy::default()
    };
    let mut check = Check::default();
    let read = overrides(&mut check, At::Root, Some(given));
    check.done(()).expect("a good policy");
    assert_eq!(policy_out(&read), Some(given));
    assert_eq!(policy_out(&Overrides::NONE), None);
}

#[test]
fn never_has_no_time_on_the_wire() {
    assert_eq!(time(Timestamp::FAR), None);
    assert_eq!(time(Timestamp::from_millis(-1)), at(-1, 999_000_000));
}

#[test]
fn a_task_keeps_nothing_of_the_message_it_came_in() {
    let mut message = good();
    message.payload = vec![7; 64].into();
    let buffer = Bytes::from(message.encode_to_vec());
    let decoded = wire::NewTask::decode(buffer.clone()).unwrap();
    let within = |part: &Bytes| buffer.as_ptr_range().contains(&part.as_ptr());
    assert!(within(&decoded.payload), "a copy already, made by the decoder");
    let task = read(decoded).unwrap();
    assert!(!within(&task.data.payload));
    assert_eq!(task.data.payload, message.payload);
}

#[test]
fn tasks_of_one_call_share_the_names_that_are_the_same_and_no_others() {
    let (mut check, mut names) = (Check::default(), Names::default());
    let mut made = |task_type: &str| {
        let new = wire::NewTask { task_type: task_type.into(), ..good() };
        new_task(&mut check, At::In("task"), new, NOW, &mut names)
    };
    let [one, two, other] = ["review", "review", "test"].map(&mut made);
    assert!(Arc::ptr_eq(&one.agent, &two.agent) && Arc::ptr_eq(&two.agent, &other.agent));
    assert!(Arc::ptr_eq(&one.task_type, &two.task_type));
    assert_eq!((&*two.task_type, &*other.task_type), ("review", "test"));
}

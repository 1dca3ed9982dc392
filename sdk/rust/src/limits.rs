//! The limits of the ledger that the client checks before it sends, so that a mistake costs no round trip.
//!
//! The daemon checks them again: these are not its guard. All sizes are in bytes.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use prost::Message as _;

use crate::error::{Error, Violation};
use crate::v1;

/// Largest message either side sends: 4 MiB.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Largest payload: 1 MiB.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;
/// Largest result: 1 MiB.
pub const MAX_RESULT_BYTES: usize = 1 << 20;
/// Largest checkpoint: 256 KiB.
pub const MAX_CHECKPOINT_BYTES: usize = 256 << 10;
/// Longest error message and longest question of a blocked task: 4 KiB.
pub const MAX_ERROR_MESSAGE_BYTES: usize = 4 << 10;
/// Longest error detail: 16 KiB.
pub const MAX_ERROR_DETAIL_BYTES: usize = 16 << 10;
/// Longest error code: 128 bytes.
pub const MAX_ERROR_CODE_BYTES: usize = 128;
/// Longest progress note: 1 KiB.
pub const MAX_NOTE_BYTES: usize = 1 << 10;
/// Longest reason of a cancel, change or discard: 1 KiB.
pub const MAX_REASON_BYTES: usize = 1 << 10;
/// Most labels: 64.
pub const MAX_LABELS: usize = 64;
/// Longest label key: 63 bytes.
pub const MAX_LABEL_KEY_BYTES: usize = 63;
/// Longest label value: 255 bytes.
pub const MAX_LABEL_VALUE_BYTES: usize = 255;
/// Longest request id or idempotency key: 256 bytes.
pub const MAX_KEY_BYTES: usize = 256;
/// Most items in one call: 1,000.
pub const MAX_ITEMS: usize = 1_000;
/// Most follow-ups of one completion: 100.
pub const MAX_FOLLOW_UPS: usize = 100;
/// Largest follow-ups of one completion, together: what a message leaves beside the largest result, 2.9 MiB.
pub const MAX_FOLLOW_UP_BYTES: usize = MAX_MESSAGE_BYTES - MAX_RESULT_BYTES - (64 << 10);
/// Longest answer to a blocked task: 16 KiB.
pub const MAX_ANSWER_BYTES: usize = 16 << 10;
/// Longest name of who does something: 128 bytes.
pub const MAX_ACTOR_BYTES: usize = 128;
/// Most tasks one worker may hold: 10,000.
pub const MAX_CAPACITY: u32 = 10_000;
/// Furthest `run_at`: 366 days ahead.
pub const MAX_AHEAD: Duration = Duration::from_secs(366 * 24 * 3_600);

/// Checks one task as [`v1::NewTask`] documents it. Policies are left to the daemon.
pub(crate) fn new_task(task: &v1::NewTask, now: SystemTime) -> Result<(), Error> {
    payload(task.payload.len())?;
    let mut found = Found::default();
    found.check(is_agent(&task.agent), "agent", "must match [a-z0-9][a-z0-9._-]{0,62}");
    found.check(is_task_type(&task.task_type), "task_type", "must be 1 to 128 bytes of printable text");
    found.priority(task.priority);
    found.check(task.idempotency_key.len() <= MAX_KEY_BYTES, "idempotency_key", "must be at most 256 bytes");
    found.labels(&task.labels);
    found.run_at(task.run_at, now);
    found.end()
}

/// Checks a whole batch: 1 to 1,000 items that fit in one message.
pub(crate) fn batch(request: &v1::EnqueueTasksRequest, now: SystemTime) -> Result<(), Error> {
    let count = request.tasks.len();
    if count == 0 || count > MAX_ITEMS {
        return Err(Error::invalid("tasks", "must hold 1 to 1,000 tasks"));
    }
    for (index, task) in request.tasks.iter().enumerate() {
        new_task(task, now).map_err(|error| error.in_item(index))?;
    }
    request_id(&request.request_id)?;
    let bytes = request.encoded_len();
    if bytes > MAX_MESSAGE_BYTES {
        return Err(Error::PayloadTooLarge { what: "batch", bytes, limit: MAX_MESSAGE_BYTES });
    }
    Ok(())
}

/// Checks one more task to follow a completion, beside those that do already.
pub(crate) fn follow_up(others: &[v1::NewTask], task: &v1::NewTask, now: SystemTime) -> Result<(), Error> {
    new_task(task, now)?;
    if others.len() >= MAX_FOLLOW_UPS {
        return Err(Error::invalid(
            "follow_ups",
            "must be at most 100 of one completion; enqueue the others",
        ));
    }
    let bytes = others.iter().chain([task]).map(|task| task.encoded_len() + 8).sum();
    if bytes > MAX_FOLLOW_UP_BYTES {
        return Err(Error::PayloadTooLarge { what: "follow-ups", bytes, limit: MAX_FOLLOW_UP_BYTES });
    }
    Ok(())
}

pub(crate) fn update(request: &v1::UpdateTaskRequest, now: SystemTime) -> Result<(), Error> {
    reason(&request.reason)?;
    request_id(&request.request_id)?;
    let mut found = Found::default();
    let changes = request.priority.is_some() || request.run_at.is_some();
    found.check(changes, "priority", "or run_at must be set");
    found.priority(request.priority);
    found.run_at(request.run_at, now);
    found.end()
}

pub(crate) fn unblock(request: &v1::UnblockTaskRequest) -> Result<(), Error> {
    let mut found = Found::default();
    found.check(request.answer.len() <= MAX_ANSWER_BYTES, "answer", "must be at most 16 KiB");
    found.check(request.actor.len() <= MAX_ACTOR_BYTES, "actor", "must be at most 128 bytes");
    found.end()
}

pub(crate) fn request_id(id: &str) -> Result<(), Error> {
    if id.len() > MAX_KEY_BYTES {
        return Err(Error::invalid("request_id", "must be at most 256 bytes"));
    }
    Ok(())
}

pub(crate) fn reason(reason: &str) -> Result<(), Error> {
    if reason.len() > MAX_REASON_BYTES {
        return Err(Error::invalid("reason", "must be at most 1 KiB"));
    }
    Ok(())
}

pub(crate) fn payload(bytes: usize) -> Result<(), Error> {
    if bytes > MAX_PAYLOAD_BYTES {
        return Err(Error::PayloadTooLarge { what: "payload", bytes, limit: MAX_PAYLOAD_BYTES });
    }
    Ok(())
}

pub(crate) fn is_agent(name: &str) -> bool {
    let head = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = name.as_bytes();
    bytes.len() <= 63
        && bytes.first().is_some_and(|b| head(*b))
        && bytes.iter().all(|b| head(*b) || b"._-".contains(b))
}

pub(crate) fn is_task_type(name: &str) -> bool {
    !name.is_empty() && name.len() <= 128 && !name.chars().any(char::is_control)
}

/// Gathers all faults, so that one answer names them all.
#[derive(Default)]
pub(crate) struct Found(Vec<Violation>);

impl Found {
    pub(crate) fn check(&mut self, holds: bool, field: &str, description: &str) {
        if !holds {
            self.0.push(Violation { field: field.to_owned(), description: description.to_owned() });
        }
    }

    fn priority(&mut self, priority: Option<i32>) {
        self.check(priority.is_none_or(|p| (0..=9).contains(&p)), "priority", "must be 0 to 9");
    }

    fn run_at(&mut self, at: Option<prost_types::Timestamp>, now: SystemTime) {
        let ahead = at.and_then(|at| SystemTime::try_from(at).ok()?.duration_since(now).ok());
        self.check(ahead.is_none_or(|ahead| ahead <= MAX_AHEAD), "run_at", "must be at most 366 days ahead");
    }

    pub(crate) fn labels(&mut self, labels: &BTreeMap<String, String>) {
        self.check(labels.len() <= MAX_LABELS, "labels", "must be at most 64");
        let key_fits = |key: &String| !key.is_empty() && key.len() <= MAX_LABEL_KEY_BYTES;
        self.check(labels.keys().all(key_fits), "labels", "keys must be 1 to 63 bytes");
        let value_fits = |value: &String| value.len() <= MAX_LABEL_VALUE_BYTES;
        self.check(labels.values().all(value_fits), "labels", "values must be at most 255 bytes");
    }

    pub(crate) fn end(self) -> Result<(), Error> {
        match self.0.first() {
            None => Ok(()),
            Some(first) => Err(Error::InvalidArgument {
                message: format!("{} {}", first.field, first.description),
                violations: self.0,
            }),
        }
    }
}

/// The longest head of `text` that fits in `limit` bytes and ends between characters.
pub(crate) fn head(mut text: String, limit: usize) -> String {
    if text.len() > limit {
        let end = (0..=limit).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    fn task() -> v1::NewTask {
        v1::NewTask { agent: "a".into(), task_type: "t".into(), ..Default::default() }
    }

    fn fields(task: &v1::NewTask) -> Vec<String> {
        match new_task(task, clock::now()) {
            Ok(()) => Vec::new(),
            Err(Error::InvalidArgument { violations, .. }) => {
                violations.into_iter().map(|v| v.field).collect()
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn agent_names_follow_the_pattern() {
        for good in ["a", "0", "claude", "a.b-c_d", &"a".repeat(63)] {
            assert!(is_agent(good), "{good}");
        }
        for bad in ["", "A", ".a", "-a", "_a", "a b", "a/b", "\u{e4}", &"a".repeat(64)] {
            assert!(!is_agent(bad), "{bad}");
        }
    }

    #[test]
    fn every_fault_of_a_task_is_named() {
        assert!(fields(&task()).is_empty());
        let bad = v1::NewTask {
            agent: "A".into(),
            task_type: "x\n".into(),
            priority: Some(10),
            idempotency_key: "k".repeat(257),
            labels: [(String::new(), "v".repeat(256))].into(),
            run_at: Some((clock::now() + MAX_AHEAD + Duration::from_secs(60)).into()),
            ..Default::default()
        };
        assert_eq!(
            fields(&bad),
            ["agent", "task_type", "priority", "idempotency_key", "labels", "labels", "run_at"]
        );
    }

    #[test]
    fn a_payload_over_one_mebibyte_is_refused() {
        let fits = v1::NewTask { payload: vec![0; MAX_PAYLOAD_BYTES].into(), ..task() };
        assert!(new_task(&fits, clock::now()).is_ok());
        let over = v1::NewTask { payload: vec![0; MAX_PAYLOAD_BYTES + 1].into(), ..task() };
        assert!(matches!(new_task(&over, clock::now()), Err(Error::PayloadTooLarge { .. })));
    }

    #[test]
    fn a_batch_is_bounded_in_items_and_bytes() {
        let of = |tasks| v1::EnqueueTasksRequest { tasks, ..Default::default() };
        assert!(batch(&of(Vec::new()), clock::now()).is_err());
        assert!(batch(&of(vec![task(); 1_000]), clock::now()).is_ok());
        assert!(batch(&of(vec![task(); 1_001]), clock::now()).is_err());
        let large = v1::NewTask { payload: vec![0; MAX_PAYLOAD_BYTES].into(), ..task() };
        assert!(matches!(
            batch(&of(vec![large; 5]), clock::now()),
            Err(Error::PayloadTooLarge { what: "batch", .. })
        ));
        let bad = v1::NewTask { agent: String::new(), ..task() };
        let Err(Error::InvalidArgument { violations, .. }) = batch(&of(vec![task(), bad]), clock::now())
        else {
            panic!("must be refused")
        };
        assert_eq!(violations[0].field, "tasks[1].agent");
    }

    #[test]
    fn follow_ups_fit_in_a_message_beside_the_largest_result() {
        let now = clock::now();
        assert!(follow_up(&vec![task(); 99], &task(), now).is_ok());
        assert!(follow_up(&vec![task(); 100], &task(), now).is_err());
        let large = v1::NewTask { payload: vec![0; MAX_PAYLOAD_BYTES].into(), ..task() };
        let others = vec![large.clone(); 2];
        assert!(follow_up(&others, &task(), now).is_ok());
        let error = follow_up(&others, &large, now).unwrap_err();
        assert!(matches!(error, Error::PayloadTooLarge { what: "follow-ups", .. }));
    }

    #[test]
    fn a_change_must_change_something_within_its_range() {
        let (now, nothing) = (clock::now(), v1::UpdateTaskRequest::default());
        let error = update(&nothing, now).unwrap_err();
        assert_eq!(error.to_string(), "priority or run_at must be set");
        assert!(update(&v1::UpdateTaskRequest { priority: Some(9), ..nothing.clone() }, now).is_ok());
        assert!(update(&v1::UpdateTaskRequest { priority: Some(10), ..nothing.clone() }, now).is_err());
        assert!(update(&v1::UpdateTaskRequest { run_at: Some(now.into()), ..nothing.clone() }, now).is_ok());
        let far = Some((now + 2 * MAX_AHEAD).into());
        assert!(update(&v1::UpdateTaskRequest { run_at: far, ..nothing }, now).is_err());
    }

    #[test]
    fn an_answer_is_bounded() {
        let of = |bytes| v1::UnblockTaskRequest { answer: "a".repeat(bytes), ..Default::default() };
        assert!(unblock(&of(0)).is_ok() && unblock(&of(MAX_ANSWER_BYTES)).is_ok());
        assert!(unblock(&of(MAX_ANSWER_BYTES + 1)).is_err());
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        assert_eq!(head("abc".into(), 3), "abc");
        assert_eq!(head("abc\u{20ac}".into(), 4), "abc");
        assert_eq!(head("\u{20ac}".into(), 2), "");
    }
}

//! One line of a task file: a JSON object with the fields of `task enqueue`.
//!
//! Fields that are not known are refused: a misspelt `prioritty` would else be a task that runs, only differently.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use ledgerd_client::v1::{NewTask, UniqueScope};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::enqueue::{PAYLOAD_LIMIT, Unique};
use crate::policy::{Jitter, PolicyArgs, Span};
use crate::time::{Direction, When, to_wire};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    agent: Option<String>,
    task_type: Option<String>,
    /// Kept as it is written: the digest behind an idempotency key is over these bytes.
    payload: Option<Box<RawValue>>,
    priority: Option<i32>,
    run_at: Option<String>,
    delay: Option<Span>,
    deadline: Option<String>,
    key: Option<String>,
    unique: Option<Unique>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    max_retries: Option<i32>,
    base_delay: Option<Span>,
    exponential_base: Option<f64>,
    max_delay: Option<Span>,
    jitter: Option<Jitter>,
    jitter_ratio: Option<f64>,
    ack_timeout: Option<Span>,
    lease: Option<Span>,
    attempt_timeout: Option<Span>,
    stall_timeout: Option<Span>,
    queue_timeout: Option<Span>,
    stop_grace: Option<Span>,
    max_losses: Option<i32>,
    hint_max: Option<Span>,
}

/// What lines have when they do not say.
#[derive(Clone, Debug)]
pub(crate) struct Defaults {
    pub(crate) agent: Option<String>,
    pub(crate) task_type: Option<String>,
    pub(crate) now: Timestamp,
}

/// The task of a line; the error is a sentence for people.
pub(crate) fn parse(line: &[u8], defaults: &Defaults) -> Result<NewTask, String> {
    let line: Line = serde_json::from_slice(line).map_err(|error| {
        // The error's own "line 1" would be mistaken for the file's.
        let text = error.to_string();
        let text = text.split(" at line ").next().unwrap_or_default().to_owned();
        if error.is_data() { text } else { format!("{text} at byte {}", error.column()) }
    })?;
    let need = |value: Option<String>, default: &Option<String>, name: &str| {
        value
            .or_else(|| default.clone())
            .filter(|text| !text.is_empty())
            .ok_or_else(|| format!("has no {name}"))
    };
    let agent = need(line.agent, &defaults.agent, "agent")?;
    let task_type = need(line.task_type, &defaults.task_type, "task_type")?;
    let payload =
        line.payload.map(|raw| Bytes::from(String::from(Box::<str>::from(raw)))).unwrap_or_default();
    if payload.len() > PAYLOAD_LIMIT {
        return Err(format!("payload has {} bytes and may have {PAYLOAD_LIMIT}", payload.len()));
    }
    if line.priority.is_some_and(|priority| !(0..=9).contains(&priority)) {
        return Err("priority is not 0 to 9".into());
    }
    if line.delay.is_some() && line.run_at.is_some() {
        return Err("has both delay and run_at".into());
    }
    if line.unique.is_some() && line.key.is_none() {
        return Err("has unique without a key".into());
    }
    let instant = |text: String, name: &str| {
        let when = When::parse(&text).map_err(|error| format!("{name}: {error}"))?;
        Ok::<_, String>(to_wire(when.resolve(defaults.now, Direction::Ahead)))
    };
    let run_at = match (line.run_at, line.delay) {
        (Some(text), _) => Some(instant(text, "run_at")?),
        (None, Some(Span(delay))) => {
            let delay = SignedDuration::try_from(delay).map_err(|error| format!("delay: {error}"))?;
            Some(to_wire(When::Distance(delay).resolve(defaults.now, Direction::Ahead)))
        }
        (None, None) => None,
    };
    let policy = PolicyArgs {
        max_retries: line.max_retries,
        base_delay: line.base_delay,
        exponential_base: line.exponential_base,
        max_delay: line.max_delay,
        jitter: line.jitter,
        jitter_ratio: line.jitter_ratio,
        ack_timeout: line.ack_timeout,
        lease: line.lease,
        attempt_timeout: line.attempt_timeout,
        stall_timeout: line.stall_timeout,
        queue_timeout: line.queue_timeout,
        stop_grace: line.stop_grace,
        max_losses: line.max_losses,
        hint_max: line.hint_max,
    };
    Ok(NewTask {
        agent,
        task_type,
        payload,
        priority: line.priority,
        run_at,
        deadline: line.deadline.map(|text| instant(text, "deadline")).transpose()?,
        idempotency_key: line.key.unwrap_or_default(),
        unique: line.unique.map_or(UniqueScope::Unspecified, UniqueScope::from).into(),
        labels: line.labels,
        policy: policy.into_wire(),
        ..NewTask::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_with(line: &str, agent: Option<&str>) -> Result<NewTask, String> {
        let now = "2026-01-31T09:00:00Z".parse().expect("a time");
        parse(line.as_bytes(), &Defaults { agent: agent.map(Into::into), task_type: None, now })
    }

    #[test]
    fn a_line_becomes_a_task() {
        let line = r#"{"agent":"claude","task_type":"review","payload":{"b": 1.0, "a":[]},"priority":9,"labels":{"k":"v"},
            "key":"a#1","unique":"active","delay":"10m","deadline":"2h","max_retries":5,"lease":"30s"}"#;
        let task = parse_with(&line.replace('\n', " "), None).expect("a task");
        assert_eq!(task.payload, r#"{"b": 1.0, "a":[]}"#, "the payload keeps its bytes");
        assert_eq!(task.run_at.map(|at| at.seconds), Some(1_769_850_000 + 600));
        assert_eq!(task.deadline.map(|at| at.seconds), Some(1_769_850_000 + 7_200));
        let policy = task.policy.expect("a policy");
        assert_eq!((policy.max_retries, policy.lease_duration.map(|d| d.seconds)), (Some(5), Some(30)));
    }

    #[test]
    fn a_line_may_lean_on_the_command_line() {
        let task = parse_with(r#"{"task_type":"t"}"#, Some("x")).expect("a task");
        assert_eq!((task.agent.as_str(), task.policy), ("x", None));
    }

    #[test]
    fn a_bad_line_is_refused_by_name() {
        for (line, reason) in [
            (r#"{"agent":"a","task_type":"t","prioritty":1}"#, "unknown field `prioritty`"),
            (r#"{"agent":"a"}"#, "has no task_type"),
            (r#"{"agent":"","task_type":"t"}"#, "has no agent"),
            (r#"{"agent":"a","task_type":"t","priority":10}"#, "priority is not 0 to 9"),
            (r#"{"agent":"a","task_type":"t","delay":"10"}"#, "is no duration"),
            (r#"{"agent":"a","task_type":"t","run_at":"soon"}"#, "run_at: `soon` is no time"),
            (r#"{"agent":"a","task_type":"t","delay":"1s","run_at":"1s"}"#, "both delay and run_at"),
            (r#"{"agent":"a","task_type":"t","unique":"active"}"#, "unique without a key"),
            (r#"{"agent":"a","task_type":"t","max_retries":"x"}"#, "invalid type"),
            (r#"{"agent":"a","task_type":"t"} x"#, "trailing characters"),
            ("[]", "invalid"),
            ("{", "EOF while parsing"),
        ] {
            let sentence = parse_with(line, None).expect_err(line);
            assert!(sentence.contains(reason), "{line}: {sentence}");
            assert!(!sentence.contains("line 1"), "{sentence}");
        }
    }

    #[test]
    fn the_task_files_of_the_examples_are_good() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/agents");
        // A packaged crate comes without them.
        let Ok(files) = std::fs::read_dir(folder) else { return };
        let files = files.map(|file| file.expect("an entry").path());
        for file in files.filter(|file| file.extension().is_some_and(|end| end == "jsonl")) {
            for line in std::fs::read_to_string(&file).expect("readable").lines() {
                parse_with(line, None).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            }
        }
    }
}

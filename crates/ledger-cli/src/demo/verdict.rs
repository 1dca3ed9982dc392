//! How each task ended, by the ledger's word, and whether its result is right.

use std::time::Duration;

use ledgerd_client::Client;
use ledgerd_client::v1::{HistoryEvent, Task, TaskState};
use serde_json::Value;
use tokio::task::JoinSet;

use super::scene::Job;
use super::summary::Fate;
use crate::failure::{Exit, Failure};
use crate::output::{one_line, task_state, with_reason};
use crate::time::from_wire;

/// Calls at one time.
const CALLS: usize = 8;
/// Differences that are shown, and how much of each side.
const SHOWN: usize = 3;
const SHOWN_CHARS: usize = 160;

/// A task with its history.
pub(super) type Found = (Task, Vec<HistoryEvent>);

/// All tasks, in the order of the jobs.
///
/// # Errors
/// Those of the calls.
pub(super) async fn fetch(client: &Client, jobs: &[Job]) -> Result<Vec<Found>, Failure> {
    let mut parts = JoinSet::new();
    let size = jobs.len().div_ceil(CALLS).max(1);
    for (part, some) in jobs.chunks(size).enumerate() {
        let handles: Vec<_> = some.iter().map(|job| client.task(&job.id)).collect();
        parts.spawn(async move {
            let mut found = Vec::with_capacity(handles.len());
            for handle in handles {
                found.push((handle.get().await?, handle.history().await?));
            }
            Ok::<_, ledgerd_client::Error>((part, found))
        });
    }
    let mut all = Vec::new();
    while let Some(part) = parts.join_next().await {
        all.push(part.expect("fetching does not panic")?);
    }
    all.sort_by_key(|(part, _)| *part);
    Ok(all.into_iter().flat_map(|(_, found)| found).collect())
}

/// What is wrong, and which tasks are worth a look.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    wrong: Vec<String>,
    /// A task that was lost once and done in the end; one that failed and was done in the end.
    pub(super) lost: Option<String>,
    pub(super) retried: Option<String>,
}

impl Verdict {
    /// Judges one task against the right result.
    pub(super) fn judge(&mut self, job: &Job, file: &str, (task, history): &Found, right: &Value) -> Fate {
        let is_done = task.state() == TaskState::Done;
        let result: Option<Value> = serde_json::from_slice(&task.result).ok();
        let fate = Fate {
            done: is_done,
            failed: task.state() == TaskState::Failed,
            attempts: task.attempt.into(),
            retries: task.retry_count.into(),
            losses: task.losses.into(),
            start: first_start(history),
            right: is_done && result.as_ref() == Some(right),
        };
        let what = format!("{} of {file} (task {})", job.program.name(), job.id);
        if !is_done {
            self.wrong.push(format!("{what} is {}", with_reason(task_state(task.state), &task.reason)));
        } else if !fate.right {
            let said = String::from_utf8_lossy(&task.result);
            self.wrong.push(format!("{what} said {}, and it is {}", short(&said), short(&right.to_string())));
        }
        if is_done && fate.losses > 0 {
            self.lost.get_or_insert_with(|| job.id.clone());
        }
        if is_done && fate.retries > 0 {
            self.retried.get_or_insert_with(|| job.id.clone());
        }
        fate
    }

    /// # Errors
    /// When anything is wrong, with the first few.
    pub(super) fn check(&self) -> Result<(), Failure> {
        if self.wrong.is_empty() {
            return Ok(());
        }
        let first = self.wrong.iter().take(SHOWN).fold(String::new(), |all, one| format!("{all}\n  {one}"));
        Err(Failure::new(
            Exit::Failure,
            format!("{} tasks are not as they should be:{first}", self.wrong.len()),
        ))
    }
}

/// From the enqueue to the first attempt. An outcome that stands for its ack has no row of its own for the start; its
/// own row is the first with an attempt then.
fn first_start(history: &[HistoryEvent]) -> Option<Duration> {
    let time = |event: &HistoryEvent| event.time.as_ref().and_then(from_wire);
    let enqueued = history.first().and_then(time)?;
    let started = history.iter().find(|event| event.attempt > 0).and_then(time)?;
    Duration::try_from(started.duration_since(enqueued)).ok()
}

fn short(text: &str) -> String {
    let text = one_line(text.trim());
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::program::Program;
    use super::*;

    fn event(millis: i32, event: &str, attempt: u32) -> HistoryEvent {
        let time = prost_types::Timestamp { seconds: 10, nanos: millis * 1_000_000 };
        HistoryEvent { event: event.into(), time: Some(time), attempt, ..HistoryEvent::default() }
    }

    fn done(result: &str) -> Found {
        let task = Task {
            state: TaskState::Done.into(),
            result: result.to_owned().into(),
            attempt: 1,
            ..Task::default()
        };
        (
            task,
            vec![
                event(0, "ENQUEUED", 0),
                event(2, "ASSIGNED", 0),
                event(27, "STARTED", 1),
                event(99, "COMPLETED", 1),
            ],
        )
    }

    fn job(id: &str) -> Job {
        Job { program: Program::Statistics, file: 0, id: id.into() }
    }

    #[test]
    fn a_right_result_is_right_however_it_is_spelled() {
        let mut verdict = Verdict::default();
        let fate = verdict.judge(
            &job("t1"),
            "a.rs",
            &done(" {\"words\": 2,\"lines\":1}\n"),
            &json!({ "lines": 1, "words": 2 }),
        );
        assert!(fate.right && fate.done);
        assert_eq!(fate.start, Some(Duration::from_millis(27)));
        assert_eq!(verdict.check(), Ok(()));
    }

    #[test]
    fn what_is_wrong_is_shown() {
        let mut verdict = Verdict::default();
        let right = json!({ "lines": 1 });
        assert!(!verdict.judge(&job("t1"), "a.rs", &done("{\"lines\":2}"), &right).right);
        assert!(!verdict.judge(&job("t2"), "b.rs", &done("no JSON"), &right).right);
        let failed = Task { state: TaskState::Failed.into(), reason: "POISON".into(), ..Task::default() };
        assert!(verdict.judge(&job("t3"), "c.rs", &(failed, Vec::new()), &right).failed);
        verdict.judge(&job("t4"), "d.rs", &done(&"x".repeat(1_000)), &right);
        let sentence = verdict.check().expect_err("four are wrong").sentence("").expect("a sentence");
        assert_eq!(
            sentence,
            "4 tasks are not as they should be:\n  \
             statistics of a.rs (task t1) said {\"lines\":2}, and it is {\"lines\":1}\n  \
             statistics of b.rs (task t2) said no JSON, and it is {\"lines\":1}\n  \
             statistics of c.rs (task t3) is FAILED (POISON)"
        );
    }

    #[test]
    fn tasks_worth_a_look_are_kept() {
        let mut verdict = Verdict::default();
        let mut lost = done("1");
        lost.0.losses = 1;
        verdict.judge(&job("t1"), "a", &done("1"), &json!(1));
        verdict.judge(&job("t2"), "a", &lost, &json!(1));
        assert_eq!((verdict.lost.as_deref(), verdict.retried), (Some("t2"), None));
    }

    #[test]
    fn an_outcome_without_an_ack_is_a_start() {
        let history = [event(5, "ENQUEUED", 0), event(6, "ASSIGNED", 0), event(9, "COMPLETED", 1)];
        assert_eq!(first_start(&history), Some(Duration::from_millis(4)));
        assert_eq!(first_start(&history[..2]), None);
        assert_eq!(first_start(&[]), None);
    }
}

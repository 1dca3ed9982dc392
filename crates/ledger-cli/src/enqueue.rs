//! `ledgerd task enqueue`: one task from flags, or many from a file.

use std::io::Read;

use bytes::Bytes;
use clap::{Args, ValueEnum};
use ledgerd_client::v1::{EnqueueTaskRequest, NewTask, UniqueScope};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::connect::connect;
use crate::failure::Failure;
use crate::output::{Format, print, print_json, remark};
use crate::policy::{PolicyArgs, Span, parse_label};
use crate::time::{Direction, When, now, to_wire};
use crate::{Global, import, wait};

/// Largest payload, the ledger's limit. Checked here so that a large file is refused before it travels.
pub(crate) const PAYLOAD_LIMIT: usize = 1024 * 1024;

/// `task enqueue`.
#[derive(Debug, Args)]
pub struct Enqueue {
    /// Class of workers that runs it; with --from, for lines that name none
    #[arg(required_unless_present = "from")]
    agent: Option<String>,
    /// What is to be done; with --from, for lines that name none
    #[arg(value_name = "TYPE", required_unless_present = "from")]
    task_type: Option<String>,
    /// Input of the task: JSON, @FILE, or - for standard input
    #[arg(long, value_name = "JSON|@FILE|-", allow_hyphen_values = true)]
    payload: Option<String>,
    /// The payload need not be JSON
    #[arg(long)]
    raw: bool,
    /// 0 to 9, higher sooner
    #[arg(long, value_name = "0-9")]
    priority: Option<i32>,
    /// Not before this time
    #[arg(long, value_name = "TIME", value_parser = When::parse, allow_hyphen_values = true)]
    run_at: Option<When>,
    /// Not before this time has passed
    #[arg(long, value_name = "DUR", conflicts_with = "run_at")]
    delay: Option<Span>,
    /// Fails when not ended by this time
    #[arg(long, value_name = "TIME|DUR", value_parser = When::parse, allow_hyphen_values = true)]
    deadline: Option<When>,
    /// A key of your own, unique for the agent: a second task with it is not made
    #[arg(long)]
    key: Option<String>,
    /// How long the key stays taken
    #[arg(long, value_enum, requires = "key")]
    unique: Option<Unique>,
    /// A label for filters; several may be given
    #[arg(long, value_name = "K=V", value_parser = parse_label)]
    label: Vec<(String, String)>,
    /// Makes a repeated call harmless
    #[arg(long, value_name = "ID", default_value = "")]
    request_id: String,
    /// Wait for the end and print the task
    #[arg(long)]
    wait: bool,
    /// Longest wait
    #[arg(long, value_name = "DUR", requires = "wait")]
    wait_timeout: Option<Span>,
    /// Enqueue a task for each line of this file, a JSON object each; - for standard input
    #[arg(
        long,
        value_name = "FILE.jsonl|-",
        conflicts_with_all = [
            "payload", "raw", "priority", "run_at", "delay", "deadline", "key", "unique", "label", "wait", "PolicyArgs",
        ]
    )]
    from: Option<String>,
    /// With --from: leave bad lines out instead of refusing the file
    #[arg(long, requires = "from")]
    skip_bad: bool,
    #[command(flatten)]
    policy: PolicyArgs,
}

/// How long a key stays taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Unique {
    /// As long as the task is stored.
    Stored,
    /// Until the task has ended.
    Active,
}

impl From<Unique> for UniqueScope {
    fn from(unique: Unique) -> Self {
        match unique {
            Unique::Stored => Self::WhileStored,
            Unique::Active => Self::WhileActive,
        }
    }
}

impl Enqueue {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        if let Some(path) = self.from {
            let job = import::Import {
                path,
                agent: self.agent,
                task_type: self.task_type,
                skip_bad: self.skip_bad,
                request_id: self.request_id,
            };
            return job.run(global).await;
        }
        let (wait, timeout) = (self.wait, self.wait_timeout);
        let request =
            EnqueueTaskRequest { request_id: self.request_id.clone(), task: Some(self.into_task()?) };
        let client = connect(global).await?;
        let response = client.tasks().enqueue_task(request).await?.into_inner();
        if !response.created {
            remark(&format!("task {} has this key already; nothing was made", response.task_id));
        }
        if wait {
            remark(&format!("waiting for task {}", response.task_id));
            return wait::for_end(&client, &response.task_id, timeout.map(|span| span.0), global.output)
                .await;
        }
        match global.output {
            Format::Json => print_json("EnqueueTaskResponse", &response),
            // Nothing but the id, so that it can be taken with $(...).
            Format::Table => print(&format!("{}\n", response.task_id)),
        }
    }

    fn into_task(self) -> Result<NewTask, Failure> {
        let now = now();
        let payload =
            self.payload.as_deref().map(|given| payload(given, self.raw)).transpose()?.unwrap_or_default();
        let delay =
            self.delay.and_then(|span| jiff::SignedDuration::try_from(span.0).ok()).map(When::Distance);
        let instant = |when: When| to_wire(when.resolve(now, Direction::Ahead));
        Ok(NewTask {
            agent: self.agent.unwrap_or_default(),
            task_type: self.task_type.unwrap_or_default(),
            payload,
            priority: self.priority,
            run_at: self.run_at.or(delay).map(instant),
            deadline: self.deadline.map(instant),
            idempotency_key: self.key.unwrap_or_default(),
            unique: self.unique.map_or(UniqueScope::Unspecified, UniqueScope::from).into(),
            labels: self.label.into_iter().collect(),
            policy: self.policy.into_wire(),
            ..NewTask::default()
        })
    }
}

/// The payload that a flag names: itself, `@FILE` or `-`; checked as far as that can be done here.
pub(crate) fn payload(given: &str, raw: bool) -> Result<Bytes, Failure> {
    let payload = read_payload(given)?;
    if !raw && !payload.is_empty() {
        serde_json::from_slice::<IgnoredAny>(&payload).map_err(|error| {
            Failure::usage(format!("the payload is not JSON: {error}; --raw sends it as it is"))
        })?;
    }
    if payload.len() > PAYLOAD_LIMIT {
        return Err(Failure::usage(format!(
            "the payload has {} bytes and may have {PAYLOAD_LIMIT}; store it elsewhere and send its address",
            payload.len()
        )));
    }
    Ok(payload)
}

fn read_payload(given: &str) -> Result<Bytes, Failure> {
    let mut bytes = Vec::new();
    // One byte more than may be sent is enough to know; a device file would never end.
    let limit = PAYLOAD_LIMIT as u64 + 1;
    if given == "-" {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes)?;
    } else if let Some(path) = given.strip_prefix('@') {
        std::fs::File::open(path)
            .and_then(|file| file.take(limit).read_to_end(&mut bytes))
            .map_err(|error| Failure::usage(format!("cannot read {path}: {error}")))?;
    } else {
        return Ok(Bytes::copy_from_slice(given.as_bytes()));
    }
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        enqueue: Enqueue,
    }

    fn task(args: &[&str]) -> Result<NewTask, Failure> {
        let line = Line::try_parse_from(std::iter::once(&"enqueue").chain(args)).expect("arguments");
        line.enqueue.into_task()
    }

    #[test]
    fn flags_become_a_task() {
        let args = "claude review --payload {\"a\":1} --priority 7 --key k --unique active --label a=1 --label b=x=y \
                    --max-retries 0 --attempt-timeout 10m --jitter none";
        let task = task(&args.split(' ').filter(|arg| !arg.is_empty()).collect::<Vec<_>>()).expect("a task");
        assert_eq!((task.agent.as_str(), task.task_type.as_str()), ("claude", "review"));
        assert_eq!(task.payload, r#"{"a":1}"#);
        assert_eq!(task.priority, Some(7));
        assert_eq!((task.idempotency_key.as_str(), task.unique()), ("k", UniqueScope::WhileActive));
        assert_eq!(task.labels["b"], "x=y");
        let policy = task.policy.expect("a policy");
        assert_eq!(policy.max_retries, Some(0));
        assert_eq!(policy.attempt_timeout.map(|span| span.seconds), Some(600));
        assert_eq!(policy.jitter, ledgerd_client::v1::JitterKind::None as i32);
    }

    #[test]
    fn what_is_not_given_stays_absent() {
        let task = task(&["claude", "review"]).expect("a task");
        let expected = NewTask { agent: "claude".into(), task_type: "review".into(), ..NewTask::default() };
        assert_eq!(task, expected);
    }

    #[test]
    fn a_payload_is_json_unless_raw() {
        assert!(matches!(
            task(&["a", "t", "--payload", "{oops"]),
            Err(Failure::Said(crate::failure::Exit::Usage, _))
        ));
        assert_eq!(task(&["a", "t", "--raw", "--payload", "{oops"]).expect("raw").payload, "{oops");
        assert!(task(&["a", "t", "--payload", "@/nowhere/at/all"]).is_err());
    }

    #[test]
    fn a_payload_over_the_limit_is_refused_before_it_travels() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        std::io::Write::write_all(&mut file, &vec![b'1'; PAYLOAD_LIMIT + 1]).expect("written");
        let path = format!("@{}", file.path().display());
        let Err(Failure::Said(_, sentence)) = task(&["a", "t", "--raw", "--payload", &path]) else {
            panic!("taken")
        };
        assert!(sentence.contains("may have 1048576"), "{sentence}");
    }

    #[test]
    fn arguments_that_exclude_each_other_are_refused() {
        for args in [
            vec!["a"],
            vec!["a", "t", "--delay", "1s", "--run-at", "now"],
            vec!["--from", "x.jsonl", "--payload", "1"],
            vec!["--from", "x.jsonl", "--max-retries", "1"],
            vec!["a", "t", "--skip-bad"],
            vec!["a", "t", "--unique", "active"],
            vec!["a", "t", "--wait-timeout", "1s"],
        ] {
            assert!(Line::try_parse_from(std::iter::once(&"enqueue").chain(&args)).is_err(), "{args:?}");
        }
    }
}

//! One attempt at a task by a program: what it is given, and what its end means.
//!
//! Standard output is the result, the exit code the outcome. Knows nothing of the stream to the daemon, so that it is
//! tested without one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use ledgerd_client::v1::{ErrorClass, NewTask};
use ledgerd_client::{CancellationToken, TaskError};

use crate::checkpoint::CheckpointFile;
use crate::child::{self, Cause, DETAIL_LIMIT, Ended, Run};
use crate::guard::Guard;
use crate::output::{one_line, remark};
use crate::reply::ReplyFile;
use crate::tail::{Tail, text_head, text_tail};
use crate::template::{Facts, Template};
use crate::time::show_duration;

/// Longest message of a failure: the ledger's limit.
const MESSAGE_LIMIT: usize = 4 * 1024;
/// How often a checkpoint file is looked at. Two looks a second would cost little, but a checkpoint more often than the
/// worker's beats tells the ledger nothing sooner.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(2);

/// What all attempts of a worker share.
pub(crate) struct Plan {
    pub(crate) program: PathBuf,
    pub(crate) template: Template,
    pub(crate) guard: Guard,
    pub(crate) timeout: Option<Duration>,
    pub(crate) grace: Duration,
    pub(crate) drain: Duration,
    pub(crate) checkpoint_name: Option<String>,
    pub(crate) codes: Codes,
}

/// What exit codes mean, beside 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Codes {
    pub(crate) retry: Vec<u8>,
    pub(crate) permanent: Vec<u8>,
}

/// The facts of one attempt.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attempt {
    pub(crate) task_id: String,
    pub(crate) agent: String,
    pub(crate) task_type: String,
    pub(crate) attempt: u32,
    pub(crate) delivery: u32,
    pub(crate) fence: u64,
    pub(crate) priority: i32,
    /// RFC 3339; none without a limit.
    pub(crate) deadline: Option<String>,
    /// What an earlier attempt asked, and what it was answered.
    pub(crate) question: String,
    pub(crate) answer: String,
    pub(crate) traceparent: String,
    pub(crate) tracestate: String,
    /// W3C baggage, as the producer labelled it.
    pub(crate) baggage: String,
    pub(crate) checkpoint: Option<Bytes>,
    pub(crate) payload: Bytes,
}

/// What may end an attempt from outside.
#[derive(Clone, Debug, Default)]
pub(crate) struct Signals {
    pub(crate) cancelled: CancellationToken,
    pub(crate) draining: CancellationToken,
}

/// What a success gives.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) result: Bytes,
    pub(crate) follow_ups: Vec<NewTask>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopped {
    Asked,
    Draining,
    Timeout,
}

impl Plan {
    /// Runs the program once. `share` takes a new checkpoint.
    ///
    /// Dropping the future kills the program's whole group.
    pub(crate) async fn run(
        &self,
        attempt: Attempt,
        signals: &Signals,
        share: impl Fn(Bytes),
    ) -> Result<Done, TaskError> {
        let args =
            self.template.fill(&attempt.facts()).map_err(|why| TaskError::fatal(why).code("BAD_PAYLOAD"))?;
        let earlier = attempt.checkpoint.as_deref();
        let mut file = CheckpointFile::prepare(self.checkpoint_name.as_deref(), earlier)?;
        let reply = ReplyFile::prepare()?;
        let env = attempt.env(file.as_ref().map(CheckpointFile::path), reply.path());
        let run = Run { program: self.program.as_os_str(), args, env, stdin: attempt.payload.clone() };
        let ended = {
            let run = child::run(run, &self.guard, self.stop(signals), self.grace);
            tokio::pin!(run);
            let mut look = tokio::time::interval(CHECKPOINT_INTERVAL);
            loop {
                tokio::select! {
                    ended = &mut run => break ended.map_err(|error| start_failure(&error))?,
                    _ = look.tick(), if file.is_some() => pass_on(&attempt.task_id, file.as_mut(), &share),
                }
            }
        };
        pass_on(&attempt.task_id, file.as_mut(), &share);
        match ended.stopped {
            None => {
                let outcome = self.codes.outcome(ended);
                concluded(&reply, outcome, &attempt.agent)
                    .unwrap_or_else(|why| Err(TaskError::fatal(why).code("BAD_REPLY")))
            }
            // Whatever its code: a program that was told to stop and exits with 0 has shut down well, not done its work.
            Some(Stopped::Asked) => Err(TaskError::cancelled()),
            Some(Stopped::Timeout) => {
                let limit = show_duration(self.timeout.unwrap_or_default());
                let error =
                    TaskError::timeout(format!("the program ran longer than {limit}")).code("TIMEOUT");
                Err(error.detail(detail(&ended.stderr)))
            }
            // The worker gives back what has not ended when its drain does, uncounted and with its checkpoint; anything
            // returned here would be an outcome of the task's own.
            Some(Stopped::Draining) => std::future::pending().await,
        }
    }

    async fn stop(&self, signals: &Signals) -> Stopped {
        // Programs may use the drain to finish; the end of it is left for them to stop in.
        let draining = async {
            signals.draining.cancelled().await;
            tokio::time::sleep(self.drain.saturating_sub(self.grace)).await;
        };
        let timeout = async {
            match self.timeout {
                Some(timeout) => tokio::time::sleep(timeout).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = signals.cancelled.cancelled() => Stopped::Asked,
            () = draining => Stopped::Draining,
            () = timeout => Stopped::Timeout,
        }
    }
}

/// The outcome, with what the program replied beside it. The error is a sentence about a reply that says nothing.
fn concluded(
    reply: &ReplyFile,
    outcome: Result<Bytes, TaskError>,
    agent: &str,
) -> Result<Result<Done, TaskError>, String> {
    let reply = reply.read()?;
    if let Some(block) = reply.block() {
        return Ok(Err(block));
    }
    Ok(match outcome {
        Ok(result) => Ok(Done { result, follow_ups: reply.follow_ups(agent)? }),
        Err(error) => Err(reply.refine(error)?),
    })
}

fn pass_on(task_id: &str, file: Option<&mut CheckpointFile>, share: &impl Fn(Bytes)) {
    match file.map(CheckpointFile::news) {
        Some(Ok(Some(checkpoint))) => share(checkpoint),
        Some(Err(why)) => remark(&format!("{task_id}: {why}")),
        _ => {}
    }
}

impl Attempt {
    fn facts(&self) -> Facts<'_> {
        Facts {
            task_id: &self.task_id,
            agent: &self.agent,
            task_type: &self.task_type,
            attempt: self.attempt,
            delivery: self.delivery,
            fence: self.fence,
            priority: self.priority,
            payload: &self.payload,
        }
    }

    fn env(&self, checkpoint: Option<&Path>, reply: &Path) -> Vec<(&'static str, Option<String>)> {
        let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        // What does not apply is taken out: a worker that runs within a traced task must not hand its own on.
        vec![
            ("LEDGERD_TASK_ID", given(&self.task_id)),
            ("LEDGERD_AGENT", given(&self.agent)),
            ("LEDGERD_TASK_TYPE", given(&self.task_type)),
            ("LEDGERD_ATTEMPT", Some(self.attempt.to_string())),
            ("LEDGERD_DELIVERY", Some(self.delivery.to_string())),
            ("LEDGERD_FENCE", Some(self.fence.to_string())),
            ("LEDGERD_PRIORITY", Some(self.priority.to_string())),
            ("LEDGERD_DEADLINE", self.deadline.clone()),
            ("LEDGERD_CHECKPOINT", checkpoint.map(|path| path.display().to_string())),
            ("LEDGERD_REPLY", Some(reply.display().to_string())),
            ("LEDGERD_QUESTION", given(&self.question).filter(|_| !self.answer.is_empty())),
            ("LEDGERD_ANSWER", given(&self.answer)),
            ("TRACEPARENT", given(&self.traceparent)),
            ("TRACESTATE", given(&self.tracestate)),
            ("BAGGAGE", given(&self.baggage)),
            // The worker's, and not the task's: what a task runs may be anybody's text.
            ("LEDGERD_TOKEN", None),
            ("LEDGERD_TOKEN_FILE", None),
        ]
    }
}

impl Codes {
    fn outcome<S>(&self, ended: Ended<S>) -> Result<Bytes, TaskError> {
        let cause = ended.cause();
        let (class, code, plain) = match cause {
            Cause::Code(0) => return Ok(ended.stdout.into_marked().into()),
            Cause::Code(code) => {
                (self.class(code), format!("EXIT_{code}"), format!("the program ended with exit code {code}"))
            }
            Cause::Signal(signal) => (
                ErrorClass::Unknown,
                format!("SIGNAL_{signal}"),
                format!("the program was ended by signal {signal}"),
            ),
        };
        let detail = detail(&ended.stderr);
        let message = match detail.lines().rev().map(str::trim).find(|line| !line.is_empty()) {
            Some(line) => text_head(line, MESSAGE_LIMIT).to_owned(),
            None => plain,
        };
        Err(TaskError::of(class, message).code(code).detail(detail))
    }

    fn class(&self, code: i32) -> ErrorClass {
        let is_in = |codes: &[u8]| codes.iter().any(|known| i32::from(*known) == code);
        if is_in(&self.permanent) {
            ErrorClass::Permanent
        } else if is_in(&self.retry) {
            ErrorClass::Transient
        } else {
            ErrorClass::Unknown
        }
    }

    /// Refuses codes that mean two things; the error is a sentence for people.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.retry.contains(&0) || self.permanent.contains(&0) {
            return Err("exit code 0 always means done".into());
        }
        match self.retry.iter().find(|code| self.permanent.contains(code)) {
            Some(code) => {
                Err(format!("exit code {code} cannot be both in --retry-codes and in --permanent-codes"))
            }
            None => Ok(()),
        }
    }
}

/// The end of standard error as text, within the ledger's limit whatever bytes it was.
fn detail(stderr: &Tail) -> String {
    let text = String::from_utf8_lossy(stderr.bytes());
    text_tail(&text, DETAIL_LIMIT).to_owned()
}

fn start_failure(error: &std::io::Error) -> TaskError {
    let message = format!("the program cannot be started: {error}");
    match error.kind() {
        std::io::ErrorKind::ArgumentListTooLong => TaskError::fatal(
            "the arguments are longer than the system allows; read the payload from standard input",
        )
        .code("BAD_PAYLOAD"),
        _ => TaskError::of(ErrorClass::Unknown, message).code("START"),
    }
}

/// How an attempt ended, in a line for who watches the worker.
pub(crate) fn line(attempt: &Attempt, outcome: &Result<Done, TaskError>, took: Duration) -> String {
    let what = match outcome {
        Ok(done) if done.follow_ups.is_empty() => format!("done, {} bytes", done.result.len()),
        Ok(done) => {
            format!("done, {} bytes and {} tasks to follow", done.result.len(), done.follow_ups.len())
        }
        Err(error) => one_line(&error.to_string()),
    };
    let took = show_duration(Duration::from_millis(u64::try_from(took.as_millis()).unwrap_or(u64::MAX)));
    format!("{} attempt {} after {took}: {what}", attempt.task_id, attempt.attempt)
}

#[cfg(test)]
#[path = "attempt_tests.rs"]
mod tests;

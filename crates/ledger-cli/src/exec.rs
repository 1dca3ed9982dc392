//! `ledgerd worker exec`: any program as a worker.
//!
//! The program and its arguments are checked before the daemon hears of the worker: what can never run should not
//! take tasks first. Then every task is one run of the program; see [`crate::attempt`].

use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use ledgerd_client::{Context, TaskError, Worker};
use tokio::time::Instant;

use crate::Global;
use crate::actor::host;
use crate::attempt::{Attempt, Codes, Plan, Signals, line};
use crate::checkpoint::parse_name;
use crate::connect::connect;
use crate::failure::{Exit, Failure};
use crate::guard::{self, Guard, MakeCommand};
use crate::output::remark;
use crate::policy::Span;
use crate::program;
use crate::tail::text_head;
use crate::template::{Template, has_place};
use crate::time::now;

/// Longest name of a worker: the ledger's limit.
const WORKER_ID_LIMIT: usize = 128;

/// `worker exec`. The command line's own help is at its name in [`crate::WorkerCommand`].
#[derive(Debug, Args)]
pub struct Exec {
    /// Take tasks of this agent; several may be given
    #[arg(long, required = true)]
    agent: Vec<String>,
    /// Take only tasks of this type; several may be given
    #[arg(long = "type", value_name = "TYPE")]
    task_types: Vec<String>,
    /// Programs at one time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    capacity: u32,
    /// Name of this worker, the same over restarts; else HOST/AGENT/INDEX
    #[arg(long, value_name = "ID")]
    worker_id: Option<String>,
    /// Tells workers of one agent on one host apart
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "worker_id")]
    index: u32,
    /// Longest run of the program; the task's own limits hold besides
    #[arg(long, value_name = "DUR")]
    timeout: Option<Span>,
    /// Time between TERM and KILL for a program that is to stop
    #[arg(long, value_name = "DUR", default_value = "10s")]
    grace: Span,
    /// Time that running programs get when the worker is told to end
    #[arg(long, value_name = "DUR", default_value = "30s")]
    drain: Span,
    /// Exit codes that mean: try again
    #[arg(long, value_name = "CODES", value_delimiter = ',', default_value = "75")]
    retry_codes: Vec<u8>,
    /// Exit codes that mean: never again
    #[arg(long, value_name = "CODES", value_delimiter = ',', default_value = "78")]
    permanent_codes: Vec<u8>,
    /// Name of a file the program may keep a checkpoint in; LEDGERD_CHECKPOINT is its path
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    checkpoint_file: Option<String>,
    /// Let a payload's text be an argument that begins with a dash
    #[arg(long)]
    allow_dashes: bool,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    command: Vec<String>,
}

impl Exec {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        self.run_guarded(global, Box::new(guard::command)).await
    }

    async fn run_guarded(self, global: &Global, guard: MakeCommand) -> Result<(), Failure> {
        let worker_id = self.worker_id();
        let (agents, task_types, capacity, drain) =
            (self.agent.clone(), self.task_types.clone(), self.capacity, self.drain.0);
        let make = self.check()?;
        let guard = Guard::start(guard).map_err(|error| {
            Failure::new(Exit::Failure, format!("cannot start the guard of the programs: {error}"))
        })?;
        let plan = Arc::new(make(guard));
        let client = connect(global).await?;
        let mut builder =
            Worker::builder(client).agents(&agents).worker_id(&worker_id).capacity(capacity).drain(drain);
        let handler = move |payload: Bytes, context: Context| {
            let plan = Arc::clone(&plan);
            async move { attempt(&plan, payload, context).await }
        };
        if task_types.is_empty() {
            builder = builder.any_bytes(handler);
        } else {
            for task_type in &task_types {
                builder = builder.task_bytes(task_type, handler.clone());
            }
        }
        let worker = builder.build()?;
        remark(&format!(
            "worker {worker_id} takes tasks of {} from {}, {capacity} at one time",
            agents.join(", "),
            global.address()
        ));
        worker.run_until_signal().await?;
        Ok(())
    }

    fn worker_id(&self) -> String {
        self.worker_id.clone().unwrap_or_else(|| {
            let host = host();
            let agents = self.agent.join("+");
            // A list too long for a name is told by its first.
            let agents = if agents.len() > 64 { &self.agent[0] } else { &agents };
            let tail = format!("/{agents}/{}", self.index);
            format!("{}{tail}", text_head(&host, WORKER_ID_LIMIT.saturating_sub(tail.len())))
        })
    }

    /// All that can be known to be wrong before there is a task. Gives the plan, but for the guard: a process is
    /// started only when nothing is wrong.
    fn check(self) -> Result<impl FnOnce(Guard) -> Plan, Failure> {
        let codes = Codes { retry: self.retry_codes, permanent: self.permanent_codes };
        codes.check().map_err(Failure::usage)?;
        let (name, args) = self.command.split_first().expect("clap requires a program");
        if has_place(name) {
            return Err(Failure::usage("the program itself cannot come from a task; name it"));
        }
        let template = Template::parse(args, self.allow_dashes).map_err(Failure::usage)?;
        let program = program::find(name, std::env::var_os("PATH").as_deref()).map_err(Failure::usage)?;
        Ok(move |guard| Plan {
            program,
            template,
            guard,
            timeout: self.timeout.map(|span| span.0),
            grace: self.grace.0,
            drain: self.drain.0,
            checkpoint_name: self.checkpoint_file,
            codes,
        })
    }
}

async fn attempt(plan: &Plan, payload: Bytes, context: Context) -> Result<Bytes, TaskError> {
    let deadline = context.time_left().and_then(|left| now().checked_add(left).ok());
    // The program's own spans belong under that of the attempt, where there is one.
    let (traceparent, tracestate) = context.onward_trace();
    let attempt = Attempt {
        task_id: context.task_id().into(),
        agent: context.agent().into(),
        task_type: context.task_type().into(),
        attempt: context.attempt(),
        delivery: context.delivery(),
        fence: context.fence(),
        priority: context.priority(),
        deadline: deadline.map(|at| at.to_string()),
        question: context.question().unwrap_or_default().into(),
        answer: context.answer().unwrap_or_default().into(),
        traceparent,
        tracestate,
        baggage: context.labels().get("baggage").cloned().unwrap_or_default(),
        checkpoint: context.last_checkpoint().cloned(),
        payload,
    };
    let signals = Signals { cancelled: context.cancelled().clone(), draining: context.draining().clone() };
    let start = Instant::now();
    let share = |checkpoint: Bytes| {
        if let Err(error) = context.checkpoint(checkpoint) {
            remark(&format!("{}: {error}", context.task_id()));
        }
    };
    let outcome = plan.run(attempt.clone(), &signals, share).await;
    remark(&line(&attempt, &outcome, start.elapsed()));
    let done = outcome?;
    for task in done.follow_ups {
        // Too many, or one that cannot be: the task has failed, rather than that some follow and some do not.
        context
            .follow_up(task.into())
            .map_err(|error| TaskError::fatal(error.to_string()).code("BAD_REPLY"))?;
    }
    Ok(done.result)
}

#[cfg(test)]
#[path = "exec_tests.rs"]
mod stream_tests;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        exec: Exec,
    }

    fn exec(args: &[&str]) -> Exec {
        Line::try_parse_from(std::iter::once(&"exec").chain(args)).expect("arguments").exec
    }

    #[test]
    fn the_worker_is_named_after_host_agents_and_index() {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        assert_eq!(exec(&["--agent", "a", "--", "sh"]).worker_id(), format!("{host}/a/0"));
        let two = exec(&["--agent", "a", "--agent", "b", "--index", "3", "--", "sh"]);
        assert_eq!(two.worker_id(), format!("{host}/a+b/3"));
        let agents: Vec<String> = (0..64).map(|n| format!("agent-{n}")).collect();
        let mut many = vec!["--index", "7"];
        many.extend(agents.iter().flat_map(|agent| ["--agent", agent]));
        many.extend(["--", "sh"]);
        assert_eq!(exec(&many).worker_id(), format!("{host}/agent-0/7"));
        assert_eq!(exec(&["--agent", "a", "--worker-id", "w", "--", "sh"]).worker_id(), "w");
    }

    #[test]
    fn what_can_never_work_is_a_usage_error() {
        for (args, reason) in [
            (&["--", "no-such-program"][..], "cannot find the program no-such-program"),
            (&["--", "{{payload.program}}"], "the program itself cannot come from a task"),
            (&["--", "sh", "{{paylod}}"], "names nothing"),
            (&["--retry-codes", "1,2", "--permanent-codes", "2", "--", "sh"], "exit code 2 cannot be both"),
            (&["--retry-codes", "0", "--", "sh"], "0 always means done"),
        ] {
            let args: Vec<&str> = ["--agent", "a"].iter().chain(args).copied().collect();
            let Err(Failure::Said(Exit::Usage, sentence)) = exec(&args).check().map(|_| ()) else {
                panic!("{args:?} was taken")
            };
            assert!(sentence.contains(reason), "{sentence}");
        }
    }

    #[test]
    fn dashes_belong_to_the_program() {
        let exec = exec(&["--agent", "a", "--", "sh", "-c", "--capacity", "9"]);
        assert_eq!((exec.capacity, exec.command.len()), (1, 4));
    }
}

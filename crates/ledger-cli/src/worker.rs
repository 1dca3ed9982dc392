//! `ledgerd worker`: workers that are connected, and `worker exec`, which is one.

use clap::{Args, Subcommand};
use ledgerd_client::v1::{ListWorkersRequest, ListWorkersResponse, Worker};

use crate::Global;
use crate::connect::connect;
use crate::exec::Exec;
use crate::failure::Failure;
use crate::output::{Format, Rows, cell, instant, pairs, print_json};

/// Commands on workers.
#[derive(Debug, Subcommand)]
pub enum WorkerCommand {
    /// List connected workers
    List(List),
    /// Run a program for each task
    ///
    /// The payload is on standard input. Standard output is the result (over 1 MiB: its end, under a line that says how
    /// much is missing), and the end of standard error is kept with a failure. Exit codes decide: 0 done, 75 try again,
    /// 78 never again, any other: try again.
    ///
    /// Arguments of the program may hold {{payload}}, {{payload.FIELD}}, {{task_id}}, {{agent}}, {{task_type}},
    /// {{attempt}}, {{delivery}}, {{fence}} and {{priority}}; no shell reads them. Its environment holds
    /// LEDGERD_TASK_ID, LEDGERD_AGENT, LEDGERD_TASK_TYPE, LEDGERD_ATTEMPT, LEDGERD_DELIVERY, LEDGERD_FENCE and
    /// LEDGERD_PRIORITY, and where there is one LEDGERD_DEADLINE, LEDGERD_CHECKPOINT (a path), TRACEPARENT,
    /// TRACESTATE and BAGGAGE (the label of that name); when a person answered what an earlier attempt asked,
    /// LEDGERD_QUESTION and LEDGERD_ANSWER.
    ///
    /// To stop, its process group gets SIGTERM, and SIGKILL after the grace. It never outlives the worker.
    Exec(Box<Exec>),
    /// Started by `worker exec` to end its programs when it is killed; of no use by hand
    #[command(hide = true)]
    ExecGuard,
}

impl WorkerCommand {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        match self {
            Self::List(command) => command.run(global).await,
            Self::Exec(command) => command.run(global).await,
            Self::ExecGuard => crate::guard::run().await,
        }
    }
}

/// `worker list`.
#[derive(Debug, Args)]
pub struct List {
    /// Only those of this agent
    #[arg(long)]
    agent: Option<String>,
}

impl List {
    async fn run(self, global: &Global) -> Result<(), Failure> {
        let client = connect(global).await?;
        let mut merged = ListWorkersResponse::default();
        let mut request =
            ListWorkersRequest { agent: self.agent.unwrap_or_default(), ..ListWorkersRequest::default() };
        loop {
            let page = client.admin().list_workers(request.clone()).await?.into_inner();
            merged.workers.extend(page.workers);
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
        }
        match global.output {
            Format::Json => print_json("ListWorkersResponse", &merged),
            Format::Table => rows(&merged.workers).print("no workers are connected"),
        }
    }
}

fn rows(workers: &[Worker]) -> Rows {
    let mut rows = Rows::new([
        "WORKER",
        "AGENTS",
        "TYPES",
        "HELD",
        "CAPACITY",
        "SDK",
        "CONNECTED",
        "LAST BEAT",
        "LABELS",
    ]);
    for worker in workers {
        let types = if worker.task_types.is_empty() { "all".into() } else { worker.task_types.join(",") };
        rows.push([
            cell(&worker.worker_id),
            cell(worker.agents.join(",")),
            cell(types),
            cell(worker.held),
            cell(worker.capacity),
            cell(&worker.sdk),
            cell(instant(worker.connect_time.as_ref())),
            cell(instant(worker.beat_time.as_ref())),
            cell(pairs(&worker.labels)),
        ]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_read_as_rows() {
        let worker = Worker {
            worker_id: "host/claude/0".into(),
            agents: vec!["claude".into(), "codex".into()],
            capacity: 2,
            held: 1,
            sdk: "rust/0.1.0".into(),
            ..Worker::default()
        };
        assert_eq!(
            rows(&[worker]).render(),
            "WORKER         AGENTS        TYPES  HELD  CAPACITY  SDK         CONNECTED  LAST BEAT  LABELS\n\
             host/claude/0  claude,codex  all    1     2         rust/0.1.0\n"
        );
    }
}

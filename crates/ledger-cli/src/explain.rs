//! `ledgerd task explain`: why a task is not running.

use clap::Args;
use ledgerd_client::v1::{ExplainTaskRequest, ExplainTaskResponse};

use crate::Global;
use crate::connect::connect;
use crate::failure::Failure;
use crate::output::{Facts, Format, instant, one_line, print, print_json, task_state, with_reason};

/// `task explain`.
#[derive(Debug, Args)]
pub struct Explain {
    /// Id of the task
    id: String,
}

impl Explain {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        let request = ExplainTaskRequest { task_id: self.id };
        let response = connect(global).await?.tasks().explain_task(request).await?.into_inner();
        match global.output {
            Format::Json => print_json("ExplainTaskResponse", &response),
            Format::Table => print(&paragraph(&response)),
        }
    }
}

/// Where the task is, the sentence, and a line for each gate that is shut.
fn paragraph(said: &ExplainTaskResponse) -> String {
    let state = with_reason(task_state(said.state), &said.reason);
    let head = format!("{} {state}: {}\n", said.task_id, one_line(&said.summary));
    let mut gates = Facts::default();
    for gate in &said.gates {
        let until = instant(gate.until.as_ref());
        let end = if until.is_empty() { String::new() } else { format!(" (until {until})") };
        gates.push(format!("  {}", gate.kind().word()), format!("{}{end}", one_line(&gate.detail)));
    }
    head + &gates.render()
}

#[cfg(test)]
mod tests {
    use ledgerd_client::v1::{Gate, GateKind, TaskState};

    use super::*;

    #[test]
    fn gates_read_as_lines_under_the_sentence() {
        let gate = |kind: GateKind, detail: &str| Gate {
            kind: kind.into(),
            detail: detail.into(),
            ..Gate::default()
        };
        let mut said = ExplainTaskResponse {
            task_id: "t1k3".into(),
            state: TaskState::Retry.into(),
            reason: "BACKOFF".into(),
            summary: "It is due in 5 s; 1 more gate is shut.".into(),
            gates: vec![gate(GateKind::NotDue, "Soon."), gate(GateKind::NoWorker, "Nobody\u{1b}[2J\nhere.")],
        };
        assert_eq!(
            paragraph(&said),
            "t1k3 RETRY (BACKOFF): It is due in 5 s; 1 more gate is shut.\n\
             \x20 NOT_DUE    Soon.\n\
             \x20 NO_WORKER  Nobody\\u{1b}[2J here.\n"
        );
        said.gates[0].until = Some(prost_types::Timestamp { seconds: 0, nanos: 0 });
        let line = format!("  NOT_DUE    Soon. (until {})\n", instant(said.gates[0].until.as_ref()));
        assert!(paragraph(&said).contains(&line), "{}", paragraph(&said));
        (said.state, said.reason) = (TaskState::Running.into(), String::new());
        (said.summary, said.gates) = ("It runs.".into(), Vec::new());
        assert_eq!(paragraph(&said), "t1k3 RUNNING: It runs.\n");
    }
}

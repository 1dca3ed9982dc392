//! `ledgerd task watch`: what happens to tasks, a line each.

use clap::Args;
use ledgerd_client::v1::{TaskEvent, WatchTasksRequest};

use crate::Global;
use crate::connect::connect;
use crate::failure::Failure;
use crate::output::{Format, moment, one_line, print, print_json_line, task_state, with_reason};
use crate::task::{Which, remarks};

/// `task watch`.
#[derive(Debug, Args)]
pub struct Watch {
    /// Only this task
    id: Option<String>,
    #[command(flatten)]
    which: Which,
    /// Begin behind a message of an earlier watch: its resumeToken
    #[arg(long, value_name = "TOKEN", default_value = "", hide_default_value = true)]
    resume: String,
    /// End after this many events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
}

/// Prints until it is interrupted, or until there were as many events as were asked for.
pub(crate) async fn run(watch: Watch, global: &Global) -> Result<(), Failure> {
    let (agent, states, task_type, labels) = watch.which.into_wire();
    let task_id = watch.id.unwrap_or_default();
    let request = WatchTasksRequest { agent, states, task_type, labels, task_id, resume_token: watch.resume };
    let mut happens = connect(global).await?.watch(request);
    let mut left = watch.limit;
    while left != Some(0) {
        let mut message = happens.next().await?;
        if let Some(left) = &mut left {
            message.events.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= message.events.len() as u64;
        }
        match global.output {
            // The token is worth a line where nothing happened, too.
            Format::Json => print_json_line("WatchTasksResponse", &message)?,
            Format::Table => print(&message.events.iter().map(line).collect::<String>())?,
        }
    }
    Ok(())
}

/// Words with spaces between: nobody knows how wide what comes later is.
fn line(happened: &TaskEvent) -> String {
    let event = happened.event.clone().unwrap_or_default();
    let words = [
        moment(event.time.as_ref()),
        happened.task_id.clone(),
        format!("{}/{}", happened.agent, happened.task_type),
        event.event.clone(),
        with_reason(task_state(event.to), &event.reason),
        event.worker_id.clone(),
        remarks(&event),
    ];
    let words: Vec<String> =
        words.iter().filter(|word| !word.is_empty()).map(|word| one_line(word)).collect();
    format!("{}\n", words.join("  "))
}

#[cfg(test)]
mod tests {
    use ledgerd_client::v1::{HistoryEvent, TaskState};

    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_is_in_it() {
        let event = HistoryEvent {
            event: "CANCELLED".into(),
            to: TaskState::Cancelled.into(),
            reason: "USER".into(),
            facts: [("note".into(), "two\nlines \u{1b}[31m".into())].into(),
            ..HistoryEvent::default()
        };
        let happened = TaskEvent {
            task_id: "t1".into(),
            agent: "claude".into(),
            task_type: "review".into(),
            event: Some(event),
        };
        let line = line(&happened);
        assert!(line.contains("t1  claude/review  CANCELLED  CANCELLED (USER)  note="), "{line}");
        assert!(line.ends_with('\n') && line.matches(|c: char| c.is_control()).count() == 1, "{line:?}");
    }
}

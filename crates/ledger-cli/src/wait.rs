//! Waiting for a task, by `task wait` and by `task enqueue --wait`.

use std::time::Duration;

use ledgerd_client::v1::{TaskState, WaitTaskRequest, WaitTaskResponse};
use tokio::time::Instant;

use crate::Global;
use crate::connect::{Client, connect};
use crate::failure::{Exit, Failure};
use crate::output::{Format, print, print_json, task_state, with_reason};
use crate::task::{Wait, describe};
use crate::time::{duration_to_wire, show_duration};

/// One poll. Below the daemon's bound of 60 s, so that the answer comes before any deadline on the way.
const POLL: Duration = Duration::from_secs(50);

pub(crate) async fn run(wait: &Wait, global: &Global) -> Result<(), Failure> {
    let client = connect(global).await?;
    for_end(&client, &wait.id, wait.timeout.map(|span| span.0), global.output).await
}

/// Waits for the end of a task, prints the task, and fails unless it is DONE.
pub(crate) async fn for_end(
    client: &Client,
    id: &str,
    timeout: Option<Duration>,
    format: Format,
) -> Result<(), Failure> {
    let end = timeout.map(|timeout| Instant::now() + timeout);
    let response = loop {
        let left = end.map_or(POLL, |end| end.saturating_duration_since(Instant::now()).min(POLL));
        let request =
            WaitTaskRequest { task_id: id.into(), timeout: Some(duration_to_wire(left)), include_data: true };
        let response = client.tasks().wait_task(request).await?.into_inner();
        let over = end.is_some_and(|end| Instant::now() >= end);
        if is_terminal(&response) || over {
            break response;
        }
    };
    match format {
        Format::Json => print_json("WaitTaskResponse", &response)?,
        Format::Table => print(&describe(&response.task.clone().unwrap_or_default()))?,
    }
    verdict(&response, timeout.unwrap_or_default())
}

fn is_terminal(response: &WaitTaskResponse) -> bool {
    let state = response.task.as_ref().map_or(0, |task| task.state);
    matches!(TaskState::try_from(state), Ok(TaskState::Done | TaskState::Failed | TaskState::Cancelled))
}

fn verdict(response: &WaitTaskResponse, waited: Duration) -> Result<(), Failure> {
    let Some(task) = &response.task else {
        return Err(Failure::new(Exit::Failure, "the daemon answered without the task"));
    };
    let state = with_reason(task_state(task.state), &task.reason);
    match task.state() {
        TaskState::Done => Ok(()),
        TaskState::Failed | TaskState::Cancelled => {
            Err(Failure::new(Exit::TaskFailed, format!("task {} ended as {state}", task.task_id)))
        }
        _ => Err(Failure::new(
            Exit::Timeout,
            format!("task {} is {state} after {}", task.task_id, show_duration(waited)),
        )),
    }
}

#[cfg(test)]
mod tests {
    use ledgerd_client::v1::Task;

    use super::*;

    #[test]
    fn the_end_of_a_task_decides_the_exit_code() {
        for (state, exit) in [
            (TaskState::Done, None),
            (TaskState::Failed, Some(Exit::TaskFailed)),
            (TaskState::Cancelled, Some(Exit::TaskFailed)),
            (TaskState::Running, Some(Exit::Timeout)),
            (TaskState::Queued, Some(Exit::Timeout)),
            (TaskState::Blocked, Some(Exit::Timeout)),
        ] {
            let task = Task { task_id: "t1".into(), state: state.into(), ..Task::default() };
            let response = WaitTaskResponse { task: Some(task) };
            let found = match verdict(&response, Duration::from_secs(3)) {
                Ok(()) => None,
                Err(Failure::Said(exit, _)) => Some(exit),
                Err(other) => panic!("{other:?}"),
            };
            assert_eq!(found, exit, "{state:?}");
            assert_eq!(is_terminal(&response), exit != Some(Exit::Timeout), "{state:?}");
        }
    }
}

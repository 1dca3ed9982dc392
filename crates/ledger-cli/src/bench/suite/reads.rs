//! How long lists and look-ups take on a large ledger that is at work.

use std::time::Duration;

use ledgerd_client::Client;
use ledgerd_client::v1::{
    EnqueueTasksRequest, GetTaskHistoryRequest, GetTaskRequest, ListDeadLettersRequest, ListTasksRequest,
    NewTask, TaskState,
};
use tokio::time::Instant;

use super::super::{Args as Load, Histogram, TASK_TYPE, count, stats};
use super::goal::rounded;
use super::stage::Stage;
use crate::daemon::Daemon;
use crate::failure::{Exit, Failure};
use crate::time::now;

/// Tasks that become dead letters.
const LETTERS: usize = 500;
const NAMES: [&str; 8] = [
    "GetTask",
    "GetTaskHistory",
    "ListTasks by agent",
    "ListTasks by state",
    "ListTasks by state and agent",
    "ListTasks by priority",
    "ListTasks by type",
    "ListDeadLetters",
];

/// Milliseconds at p50 and p99 of each call, one caller beside the load.
pub(super) async fn measure(
    stage: &Stage,
    daemon: &mut Daemon,
    load: Load,
) -> Result<Vec<(&'static str, f64, f64)>, Failure> {
    let client = Client::connect(&daemon.address).await?;
    letters(&client, &load.agent).await?;
    let (agent, duration) = (load.agent.clone(), load.duration.0);
    // They begin with the load and end before it does.
    let reading = read(&client, &agent, duration.mul_f64(0.9));
    let (loaded, times) = tokio::join!(stage.load(daemon, load), reading);
    loaded?;
    let times = times?;
    let times = NAMES.into_iter().zip(&times).map(|(name, times)| {
        let at = |share| times.percentile_ms(share).map_or(f64::NAN, rounded);
        (name, at(0.5), at(0.99))
    });
    Ok(times.collect())
}

/// Tasks that nobody takes before their deadline.
async fn letters(client: &Client, agent: &str) -> Result<(), Failure> {
    let deadline = prost_types::Timestamp { seconds: now().as_second() + 2, nanos: 0 };
    let task = NewTask {
        agent: agent.into(),
        task_type: "unserved".into(),
        deadline: Some(deadline),
        ..NewTask::default()
    };
    let request = EnqueueTasksRequest { tasks: vec![task; LETTERS], ..EnqueueTasksRequest::default() };
    client.tasks().enqueue_tasks(request).await?;
    let end = Instant::now() + Duration::from_secs(30);
    while count(&stats(client).await?, TaskState::Failed) < LETTERS as u64 {
        if Instant::now() > end {
            return Err(Failure::new(Exit::Failure, "tasks past their deadline did not fail"));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

async fn read(client: &Client, agent: &str, duration: Duration) -> Result<Vec<Histogram>, Failure> {
    let (mut tasks, mut admin) = (client.tasks(), client.admin());
    let list = |agent: &str| ListTasksRequest { agent: agent.into(), ..ListTasksRequest::default() };
    let done = || vec![TaskState::Done.into()];
    // Of all that is stored some in the middle and one of the newest.
    let newest = tasks.list_tasks(list("")).await?.into_inner().tasks;
    let id = newest
        .last()
        .map(|task| task.task_id.clone())
        .ok_or_else(|| Failure::new(Exit::Failure, "no task is stored"))?;
    let mut times = vec![Histogram::default(); NAMES.len()];
    let end = Instant::now() + duration;
    while Instant::now() < end {
        for (name, times) in NAMES.iter().zip(&mut times) {
            let filter = match *name {
                "ListTasks by agent" => Some(list(agent)),
                "ListTasks by state" => Some(ListTasksRequest { states: done(), ..list("") }),
                "ListTasks by state and agent" => Some(ListTasksRequest { states: done(), ..list(agent) }),
                "ListTasks by priority" => Some(ListTasksRequest { priority: Some(5), ..list("") }),
                "ListTasks by type" => Some(ListTasksRequest { task_type: TASK_TYPE.into(), ..list("") }),
                _ => None,
            };
            let began = Instant::now();
            if let Some(filter) = filter {
                tasks.list_tasks(filter).await?;
            } else if *name == "GetTask" {
                tasks.get_task(GetTaskRequest { task_id: id.clone(), ..GetTaskRequest::default() }).await?;
            } else if *name == "GetTaskHistory" {
                tasks.get_task_history(GetTaskHistoryRequest { task_id: id.clone() }).await?;
            } else {
                let agent = agent.into();
                admin
                    .list_dead_letters(ListDeadLettersRequest { agent, ..ListDeadLettersRequest::default() })
                    .await?;
            }
            times.record(began.elapsed());
        }
    }
    Ok(times)
}

//! One producer: a call, its answer, the next call.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use ledgerd_client::Client;
use ledgerd_client::Connection;
use ledgerd_client::v1::task_service_client::TaskServiceClient;
use ledgerd_client::v1::{EnqueueTaskRequest, EnqueueTasksRequest, ItemError, NewTask};
use tokio::time::{Instant, interval_at, sleep, timeout_at};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{Histogram, Run};

/// When a refusal does not say when to come again.
const RETRY: Duration = Duration::from_millis(50);
/// A producer whose calls all fail stops after so many.
const MOST_ERRORS: u64 = 20;

/// What a producer did.
#[derive(Debug, Default)]
pub(super) struct Produced {
    /// Tasks whose commit was reported.
    pub(super) tasks: u64,
    pub(super) calls: Histogram,
    pub(super) errors: u64,
    /// Calls that were refused with RESOURCE_EXHAUSTED, wholly or in part; what was refused was sent again.
    pub(super) refusals: u64,
}

impl Produced {
    pub(super) fn merge(&mut self, other: &Self) {
        self.tasks += other.tasks;
        self.calls.merge(&other.calls);
        self.errors += other.errors;
        self.refusals += other.refusals;
    }
}

pub(super) async fn produce(client: Client, run: Arc<Run>, caller: u32, end: Instant) -> Produced {
    let (mut tasks, mut produced) = (client.tasks(), Produced::default());
    let batch = run.args.batch;
    let mut number = 0_u64;
    let mut pace = run.args.rate.map(|rate| {
        let each = f64::from(run.args.callers) * f64::from(batch) / f64::from(rate);
        // Not all at once, which would be another load.
        let offset = each * f64::from(caller) / f64::from(run.args.callers);
        interval_at(Instant::now() + Duration::from_secs_f64(offset), Duration::from_secs_f64(each))
    });
    while Instant::now() < end && produced.errors < MOST_ERRORS {
        let take = |left: u64| left.checked_sub(batch.into());
        if run.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            break;
        }
        if let Some(pace) = &mut pace
            && timeout_at(end, pace.tick()).await.is_err()
        {
            break;
        }
        // Room comes back with the receipt of each task. It is closed at the end of the run.
        let Ok(room) = run.room.acquire_many(batch).await else { break };
        room.forget();
        let task = new_task(&run);
        let mut stored = 0;
        while stored < batch {
            let called = Instant::now();
            // What was refused of a call is another call: the same id would get the same answer.
            number += 1;
            let request_id = match run.args.request_ids {
                true => format!("bench-{}-{caller}-{number}", run.id),
                false => String::new(),
            };
            let keys = run.args.keys.then(|| format!("{}-{caller}-{number}", run.id));
            let answer = call(&mut tasks, &task, batch - stored, request_id, keys.as_deref()).await;
            let wait = match answer {
                Ok(answer) => {
                    produced.calls.record(called.elapsed());
                    stored += answer.stored;
                    match answer.refusal {
                        None => break,
                        Some(refusal) if Code::from_i32(refusal.code) == Code::ResourceExhausted => RETRY,
                        Some(refusal) => {
                            produced.errors += 1;
                            run.blame(|| format!("enqueue: {}: {}", refusal.reason, refusal.message));
                            break;
                        }
                    }
                }
                Err(status) if status.code() == Code::ResourceExhausted => {
                    let hint = status.get_details_retry_info().and_then(|retry| retry.retry_delay);
                    hint.unwrap_or(RETRY)
                }
                Err(status) => {
                    produced.errors += 1;
                    run.blame(|| format!("enqueue: {:?}: {}", status.code(), status.message()));
                    sleep(RETRY).await;
                    break;
                }
            };
            // What was refused is sent again, as a client would, as long as the run lasts.
            produced.refusals += 1;
            if Instant::now() + wait >= end {
                break;
            }
            sleep(wait).await;
        }
        produced.tasks += u64::from(stored);
        run.room.add_permits((batch - stored) as usize);
    }
    produced
}

/// The task of one call. All items share its bytes, as all have its time.
fn new_task(run: &Run) -> NewTask {
    let mut payload = vec![b'x'; run.args.payload as usize];
    payload[..8].copy_from_slice(&run.clock().to_be_bytes());
    NewTask {
        agent: run.args.agent.clone(),
        task_type: super::TASK_TYPE.into(),
        payload: Bytes::from(payload),
        ..NewTask::default()
    }
}

/// What came of a call: how many tasks were stored, and the first refusal of an item.
struct Answer {
    stored: u32,
    refusal: Option<ItemError>,
}

async fn call(
    tasks: &mut TaskServiceClient<Connection>,
    task: &NewTask,
    batch: u32,
    request_id: String,
    keys: Option<&str>,
) -> Result<Answer, Status> {
    let numbered = |number: u32| NewTask {
        idempotency_key: keys.map(|keys| format!("{keys}-{number}")).unwrap_or_default(),
        ..task.clone()
    };
    if batch == 1 {
        let request = EnqueueTaskRequest { task: Some(numbered(0)), request_id };
        tasks.enqueue_task(request).await?;
        return Ok(Answer { stored: 1, refusal: None });
    }
    let tasks_of_call = (0..batch).map(numbered).collect();
    let request = EnqueueTasksRequest { tasks: tasks_of_call, request_id, ..EnqueueTasksRequest::default() };
    let results = tasks.enqueue_tasks(request).await?.into_inner().results;
    let stored = results.iter().filter(|result| result.error.is_none()).count();
    let refusal = results.into_iter().find_map(|result| result.error);
    Ok(Answer { stored: u32::try_from(stored).unwrap_or(batch).min(batch), refusal })
}

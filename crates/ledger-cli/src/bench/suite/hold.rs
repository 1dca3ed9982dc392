//! Workers that do nothing: they hold what they are given, and beat for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ledgerd_client::Client;
use ledgerd_client::v1::work_request::Frame as Said;
use ledgerd_client::v1::work_response::Frame as Heard;
use ledgerd_client::v1::{Acks, Heartbeat, Held as Holding, Hello, Lease, WorkRequest, WorkResponse};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;

use super::super::TASK_TYPE;
use crate::failure::{Exit, Failure};
use crate::time::{duration_from_wire, now};

/// Streams that share a connection.
const STREAMS: u32 = 100;

/// The workers; they leave when this is dropped.
pub(super) struct Held {
    _workers: JoinSet<()>,
    tasks: Arc<Count>,
}

#[derive(Default)]
struct Count {
    tasks: AtomicU64,
    more: Notify,
}

impl Held {
    /// Returns when so many tasks are held.
    pub(super) async fn all(&self, tasks: u64) {
        loop {
            let more = self.tasks.more.notified();
            if self.tasks.tasks.load(Ordering::Acquire) >= tasks {
                return;
            }
            more.await;
        }
    }
}

/// Opens the streams of so many workers.
pub(super) async fn open(address: &str, agent: &str, workers: u32, capacity: u32) -> Result<Held, Failure> {
    let (mut all, tasks) = (JoinSet::new(), Arc::new(Count::default()));
    let incarnation = u64::try_from(now().as_millisecond()).unwrap_or(1);
    let mut client = Client::connect(address).await?;
    for number in 0..workers {
        if number > 0 && number.is_multiple_of(STREAMS) {
            client = Client::connect(address).await?;
        }
        let (out, rest) = unbounded_channel();
        let hello = Hello {
            worker_id: format!("held/{agent}/{number}"),
            incarnation,
            agents: vec![agent.into()],
            task_types: vec![TASK_TYPE.into()],
            capacity,
            sdk: concat!("bench/", env!("CARGO_PKG_VERSION")).into(),
            protocol_version: 1,
            ..Hello::default()
        };
        let _ = out.send(WorkRequest { frame: Some(Said::Hello(hello)) });
        let mut heard = client.workers().work(UnboundedReceiverStream::new(rest)).await?.into_inner();
        let Some(WorkResponse { frame: Some(Heard::Welcome(welcome)) }) = heard.message().await? else {
            return Err(Failure::new(Exit::Failure, "the daemon did not welcome a worker"));
        };
        let beat = welcome.heartbeat_interval.as_ref().map(duration_from_wire);
        all.spawn(hold(out, heard, beat.unwrap_or(Duration::from_secs(10)), Arc::clone(&tasks)));
    }
    Ok(Held { _workers: all, tasks })
}

async fn hold(
    out: UnboundedSender<WorkRequest>,
    mut heard: Streaming<WorkResponse>,
    beat: Duration,
    count: Arc<Count>,
) {
    let mut held: Vec<Holding> = Vec::new();
    let mut beats = tokio::time::interval(beat);
    let mut sequence = 0;
    loop {
        let said = tokio::select! {
            heard = heard.message() => match heard {
                Ok(Some(WorkResponse { frame: Some(Heard::Assignments(new)) })) => {
                    let leases: Vec<_> =
                        new.items.into_iter().map(|item| Lease { task_id: item.task_id, fence: item.fence }).collect();
                    let new = leases.iter().cloned();
                    held.extend(new.map(|lease| Holding { lease: Some(lease), ..Holding::default() }));
                    count.tasks.fetch_add(leases.len() as u64, Ordering::Release);
                    count.more.notify_waiters();
                    Said::Acks(Acks { items: leases })
                }
                Ok(Some(_)) => continue,
                Ok(None) | Err(_) => return,
            },
            _ = beats.tick() => {
                sequence += 1;
                Said::Heartbeat(Heartbeat { held: held.clone(), sequence })
            }
        };
        let _ = out.send(WorkRequest { frame: Some(said) });
    }
}

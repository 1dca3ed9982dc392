//! One worker stream that completes each task at once.
//!
//! An answer is as large as the frame it answers, so a load that makes the daemon's frames larger makes ours larger
//! too. Nothing is sent twice: a stream that breaks ends the worker, and the count of tasks tells.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use ledgerd_client::Client;
use ledgerd_client::v1::work_request::Frame as Said;
use ledgerd_client::v1::work_response::Frame as Heard;
use ledgerd_client::v1::{
    Acks, Assignments, Complete, Goodbye, Heartbeat, Hello, Lease, Outcome, Outcomes, ReceiptKind, Receipts,
    TaskState, WorkRequest, WorkResponse, outcome,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;

use super::{Histogram, Run};
use crate::failure::{Exit, Failure};
use crate::time::duration_from_wire;

/// What each task results in.
const RESULT: &[u8] = b"0123456789abcdef";
/// The most outcomes of a frame: the ledger's limit.
const FRAME_ITEMS: usize = 1_000;

/// What a worker did.
#[derive(Debug, Default)]
pub(super) struct Worked {
    /// From the call of the producer to the arrival of the task here.
    pub(super) starts: Histogram,
    pub(super) errors: u64,
    /// Frames heard: how many tasks share one says how well the load is batched.
    pub(super) frames: u64,
}

impl Worked {
    pub(super) fn merge(&mut self, other: &Self) {
        self.starts.merge(&other.starts);
        self.errors += other.errors;
        self.frames += other.frames;
    }
}

/// A stream that was welcomed.
pub(super) struct Stream {
    // Not bounded by itself: each frame answers one of the daemon's, and these are bounded by the capacity.
    out: UnboundedSender<WorkRequest>,
    heard: Streaming<WorkResponse>,
    beat: Duration,
    worked: Worked,
    sequence: u64,
}

impl Stream {
    pub(super) async fn open(client: Client, run: &Run, index: u32) -> Result<Self, Failure> {
        let (out, rest): (_, UnboundedReceiver<WorkRequest>) = unbounded_channel();
        let hello = Hello {
            worker_id: format!("bench/{}/{index}", run.id),
            incarnation: run.id,
            agents: vec![run.args.agent.clone()],
            task_types: vec![super::TASK_TYPE.into()],
            capacity: run.args.capacity,
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
        let beat = beat.filter(|beat| !beat.is_zero()).unwrap_or(Duration::from_secs(10));
        Ok(Self { out, heard, beat, worked: Worked::default(), sequence: 0 })
    }

    /// Works until it is told to stop or the stream ends.
    pub(super) async fn serve(mut self, run: Arc<Run>) -> Worked {
        run.streams.fetch_add(1, Ordering::Relaxed);
        let mut beat = tokio::time::interval(self.beat);
        loop {
            tokio::select! {
                heard = self.heard.message() => match heard {
                    Ok(Some(WorkResponse { frame: Some(frame) })) => {
                        self.worked.frames += 1;
                        self.hear(frame, &run);
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => return self.broken(&run, "the daemon ended it"),
                    Err(status) => return self.broken(&run, status.message()),
                },
                // What was assigned is answered at once, so there is never anything to hold on to.
                _ = beat.tick() => {
                    self.sequence += 1;
                    self.say(Said::Heartbeat(Heartbeat { held: Vec::new(), sequence: self.sequence }));
                }
                () = run.workers_stop.cancelled() => {
                    self.say(Said::Goodbye(Goodbye {}));
                    return self.worked;
                }
            }
        }
    }

    fn hear(&mut self, frame: Heard, run: &Run) {
        match frame {
            Heard::Assignments(assignments) => self.complete(assignments, run),
            Heard::Receipts(receipts) => self.count(receipts, run),
            Heard::Stop(stop) => {
                self.worked.errors += stop.items.len() as u64;
                run.blame(|| "a stop was asked of a task that had been completed".into());
            }
            Heard::Welcome(_) | Heard::HeartbeatAck(_) | Heard::Drain(_) | Heard::Idle(_) => {}
        }
    }

    fn complete(&mut self, assignments: Assignments, run: &Run) {
        let now = run.clock();
        let mut leases = Vec::with_capacity(assignments.items.len());
        for item in assignments.items {
            if let Some(sent) = item.payload.first_chunk::<8>() {
                let waited = now.saturating_sub(u64::from_be_bytes(*sent));
                self.worked.starts.record(Duration::from_nanos(waited));
            }
            leases.push(Lease { task_id: item.task_id, fence: item.fence });
        }
        if run.args.explicit_acks {
            self.say(Said::Acks(Acks { items: leases.clone() }));
        }
        let mut leases = leases.into_iter().peekable();
        while leases.peek().is_some() {
            let items = leases.by_ref().take(FRAME_ITEMS).map(|lease| Outcome {
                lease: Some(lease),
                outcome: Some(outcome::Outcome::Complete(Complete {
                    result: Bytes::from_static(RESULT),
                    follow_ups: Vec::new(),
                })),
            });
            let items = items.collect();
            self.say(Said::Outcomes(Outcomes { items }));
        }
    }

    fn count(&mut self, receipts: Receipts, run: &Run) {
        let mut done = 0;
        for receipt in receipts.items {
            if let Some(error) = &receipt.error {
                self.worked.errors += 1;
                run.blame(|| format!("receipt: {}: {}", error.reason, error.message));
            } else if receipt.kind() == ReceiptKind::Outcome && receipt.state() == TaskState::Done {
                done += 1;
            }
        }
        run.done.fetch_add(done, Ordering::Relaxed);
        run.room.add_permits(usize::try_from(done).expect("fewer than were assigned"));
    }

    fn say(&self, frame: Said) {
        // A stream that is gone is noticed where it is read.
        let _ = self.out.send(WorkRequest { frame: Some(frame) });
    }

    fn broken(mut self, run: &Run, why: &str) -> Worked {
        run.streams.fetch_sub(1, Ordering::Relaxed);
        self.worked.errors += 1;
        run.blame(|| format!("a worker's stream broke: {why}"));
        self.worked
    }
}

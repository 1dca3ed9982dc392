//! A worker that does exactly what a test says, frame by frame.

use super::{Daemon, PATIENCE, canary};
use ledgerd_client::v1::{self, work_request, work_response};
use std::collections::VecDeque;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

pub(crate) type Frame = work_response::Frame;

/// An open Work stream.
#[derive(Debug)]
pub(crate) struct Stream {
    sender: mpsc::Sender<v1::WorkRequest>,
    frames: tonic::Streaming<v1::WorkResponse>,
    pub(crate) welcome: v1::Welcome,
    assignments: VecDeque<v1::Assignment>,
    receipts: VecDeque<v1::Receipt>,
    others: VecDeque<Frame>,
}

/// A Hello of `worker` for `agent`.
pub(crate) fn hello(worker: &str, agent: &str, capacity: u32) -> v1::Hello {
    v1::Hello {
        worker_id: worker.to_owned(),
        incarnation: 1,
        agents: vec![agent.to_owned()],
        capacity,
        protocol_version: 1,
        sdk: "test".to_owned(),
        ..v1::Hello::default()
    }
}

/// The lease of an assignment.
pub(crate) fn lease(assignment: &v1::Assignment) -> v1::Lease {
    v1::Lease { task_id: assignment.task_id.clone(), fence: assignment.fence }
}

/// An outcome for an assignment.
pub(crate) fn outcome(lease: v1::Lease, outcome: v1::outcome::Outcome) -> v1::Outcome {
    v1::Outcome { lease: Some(lease), outcome: Some(outcome) }
}

/// Done, with this result.
pub(crate) fn complete(result: &str) -> v1::outcome::Outcome {
    v1::outcome::Outcome::Complete(v1::Complete {
        result: result.as_bytes().to_vec().into(),
        ..v1::Complete::default()
    })
}

/// Failed in a way that may pass.
pub(crate) fn fail(message: &str) -> v1::outcome::Outcome {
    fail_as(v1::ErrorClass::Transient, message)
}

/// Failed.
pub(crate) fn fail_as(class: v1::ErrorClass, message: &str) -> v1::outcome::Outcome {
    let error = v1::TaskError {
        class: class.into(),
        message: message.to_owned(),
        detail: canary::WORD.to_owned(),
        ..v1::TaskError::default()
    };
    v1::outcome::Outcome::Fail(v1::Fail { error: Some(error), retry_after: None })
}

impl Stream {
    pub(crate) async fn open(daemon: &Daemon, hello: v1::Hello) -> Self {
        Self::try_open(daemon, Some(work_request::Frame::Hello(hello))).await.expect("Hello is welcome")
    }

    /// Opens a stream with this first frame, and waits for the Welcome.
    pub(crate) async fn try_open(
        daemon: &Daemon,
        first: Option<work_request::Frame>,
    ) -> Result<Self, tonic::Status> {
        Self::open_over(&daemon.client().await, first).await
    }

    /// The same over a connection that there is.
    pub(crate) async fn open_over(
        client: &ledgerd_client::Client,
        first: Option<work_request::Frame>,
    ) -> Result<Self, tonic::Status> {
        let (sender, frames) = mpsc::channel(64);
        let _ = sender.send(v1::WorkRequest { frame: first }).await;
        let mut workers = client.workers();
        let opened = workers.work(ReceiverStream::new(frames));
        let opened = tokio::time::timeout(PATIENCE, opened).await.expect("the daemon answers");
        let mut frames = opened?.into_inner();
        let first = tokio::time::timeout(PATIENCE, frames.message()).await.expect("the daemon answers")?;
        match first.and_then(|response| response.frame) {
            Some(Frame::Welcome(welcome)) => Ok(Self {
                sender,
                frames,
                welcome,
                assignments: VecDeque::new(),
                receipts: VecDeque::new(),
                others: VecDeque::new(),
            }),
            other => panic!("expected Welcome, got {other:?}"),
        }
    }

    pub(crate) async fn send(&self, frame: work_request::Frame) {
        self.sender.send(v1::WorkRequest { frame: Some(frame) }).await.expect("the stream is open");
    }

    /// Sends a frame that says nothing.
    pub(crate) async fn send_empty(&self) {
        self.sender.send(v1::WorkRequest { frame: None }).await.expect("the stream is open");
    }

    pub(crate) async fn ack(&self, lease: v1::Lease) {
        self.send(work_request::Frame::Acks(v1::Acks { items: vec![lease] })).await;
    }

    pub(crate) async fn settle(&self, items: Vec<v1::Outcome>) {
        self.send(work_request::Frame::Outcomes(v1::Outcomes { items })).await;
    }

    pub(crate) async fn beat(&self, leases: Vec<v1::Lease>) {
        let held =
            leases.into_iter().map(|lease| v1::Held { lease: Some(lease), ..v1::Held::default() }).collect();
        self.send(work_request::Frame::Heartbeat(v1::Heartbeat { held, sequence: 1 })).await;
    }

    /// The next frame that is neither Idle nor kept for another question.
    pub(crate) async fn frame(&mut self) -> Result<Option<Frame>, tonic::Status> {
        let next = tokio::time::timeout(PATIENCE, self.frames.message()).await;
        let next = next.expect("a frame comes while one is waited for")?;
        Ok(next.and_then(|response| response.frame))
    }

    async fn sort(&mut self) {
        match self.frame().await.expect("the stream lives").expect("the stream goes on") {
            Frame::Assignments(frame) => self.assignments.extend(frame.items),
            Frame::Receipts(frame) => self.receipts.extend(frame.items),
            Frame::Idle(_) => {}
            other => self.others.push_back(other),
        }
    }

    pub(crate) async fn assignment(&mut self) -> v1::Assignment {
        loop {
            if let Some(assignment) = self.assignments.pop_front() {
                return assignment;
            }
            self.sort().await;
        }
    }

    /// An assignment, if one comes soon.
    pub(crate) async fn assignment_now(&mut self) -> Option<v1::Assignment> {
        let soon = std::time::Duration::from_millis(50);
        tokio::time::timeout(soon, self.assignment()).await.ok()
    }

    pub(crate) async fn receipt(&mut self) -> v1::Receipt {
        loop {
            if let Some(receipt) = self.receipts.pop_front() {
                return receipt;
            }
            self.sort().await;
        }
    }

    /// The next receipt of an outcome, acks passed over.
    pub(crate) async fn outcome_receipt(&mut self) -> v1::Receipt {
        loop {
            let receipt = self.receipt().await;
            if receipt.kind() == v1::ReceiptKind::Outcome {
                return receipt;
            }
        }
    }

    /// The next HeartbeatAck, Stop or Drain.
    pub(crate) async fn other(&mut self) -> Frame {
        loop {
            if let Some(frame) = self.others.pop_front() {
                return frame;
            }
            self.sort().await;
        }
    }

    pub(crate) async fn stop(&mut self) -> v1::LeaseVerdict {
        loop {
            if let Frame::Stop(stop) = self.other().await {
                return stop.items.into_iter().next().expect("a Stop names a task");
            }
        }
    }

    pub(crate) async fn heartbeat_ack(&mut self) -> v1::HeartbeatAck {
        loop {
            if let Frame::HeartbeatAck(ack) = self.other().await {
                return ack;
            }
        }
    }

    /// Runs into the end of the stream and returns its status.
    pub(crate) async fn end(mut self) -> tonic::Status {
        loop {
            match self.frame().await {
                Err(status) => return status,
                Ok(None) => return tonic::Status::ok(""),
                Ok(Some(_)) => {}
            }
        }
    }

    /// Takes an assignment, completes it, and waits for the receipt.
    pub(crate) async fn complete_next(&mut self, result: &str) -> v1::Receipt {
        let assignment = self.assignment().await;
        self.settle(vec![outcome(lease(&assignment), complete(result))]).await;
        self.outcome_receipt().await
    }

    /// Takes an assignment, fails it, and waits for the receipt.
    pub(crate) async fn fail_next(&mut self, message: &str) -> (v1::Assignment, v1::Receipt) {
        let assignment = self.assignment().await;
        self.settle(vec![outcome(lease(&assignment), fail(message))]).await;
        let receipt = self.outcome_receipt().await;
        (assignment, receipt)
    }
}

//! The writing half of a worker's stream.
//!
//! It takes what waits in the session's outbox when the transport asks for a frame, and not before: so what waits is
//! counted where it waits, and load makes frames larger, not more numerous.

use crate::grpc::convert;
use crate::grpc::status::{Refused, status};
use crate::grpc::wire::{self, work_response::Frame};
use crate::ledger::command::{Assignment, LedgerError, Opened, ToWorker};
use ledger_core::limits::{CHECKPOINT_BYTES, FRAME_BYTES, MESSAGE_BYTES, RESULT_BYTES, UNSENT_BYTES};
use ledger_core::session::Unsent;
use prost::Message;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_stream::Stream;
use tokio_util::sync::DropGuard;
use tonic::Status;

/// Messages taken from the outbox for one look; more stay for the next.
const LOOK_AHEAD: usize = 256;
/// Receipts of one frame: with the longest refusals still well below what a client takes.
const RECEIPTS: usize = 2_000;
/// A worker that is asked to move comes back no sooner.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// What the two halves of a stream know of each other.
#[derive(Debug)]
pub(super) struct Flow {
    started: Instant,
    /// Times the transport asked for a frame.
    taken: AtomicU64,
    /// Milliseconds after `started` when it last did.
    taken_at: AtomicU64,
    /// It asks for one now, and there is none.
    open: AtomicBool,
    /// The reading half waits for `taken` to rise.
    waits: AtomicBool,
    /// Unsent bytes fell below the limit.
    room: AtomicBool,
    inbound_ended: AtomicBool,
    moved: Notify,
}

impl Flow {
    pub(super) fn new() -> Self {
        Self {
            started: Instant::now(),
            taken: AtomicU64::new(0),
            taken_at: AtomicU64::new(0),
            open: AtomicBool::new(false),
            waits: AtomicBool::new(false),
            room: AtomicBool::new(false),
            inbound_ended: AtomicBool::new(false),
            moved: Notify::new(),
        }
    }

    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::SeqCst)
    }

    /// Everything was taken, and more would be.
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    /// Something waits, and nothing was taken for so long.
    pub(super) fn is_stalled(&self, limit: Duration) -> bool {
        let taken_at = Duration::from_millis(self.taken_at.load(Ordering::SeqCst));
        !self.is_open() && self.started.elapsed().saturating_sub(taken_at) >= limit
    }

    /// Asks to be told when more than `seen` was taken.
    pub(super) fn wait_for_a_take(&self, seen: u64) {
        self.waits.store(true, Ordering::SeqCst);
        // It happened in between: nobody would tell.
        if self.taken() != seen || self.is_open() {
            self.moved.notify_one();
        }
    }

    pub(super) async fn moved(&self) {
        self.moved.notified().await;
    }

    pub(super) fn has_room_again(&self) -> bool {
        self.room.load(Ordering::Relaxed) && self.room.swap(false, Ordering::SeqCst)
    }

    pub(super) fn inbound_ended(&self) {
        self.inbound_ended.store(true, Ordering::SeqCst);
    }

    fn take(&self, now: Instant) {
        let at = u64::try_from(now.saturating_duration_since(self.started).as_millis()).unwrap_or(u64::MAX);
        self.taken_at.store(at, Ordering::SeqCst);
        self.open.store(false, Ordering::SeqCst);
        self.taken.fetch_add(1, Ordering::SeqCst);
        self.tell();
    }

    fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
        self.tell();
    }

    fn tell(&self) {
        if self.waits.load(Ordering::SeqCst) && self.waits.swap(false, Ordering::SeqCst) {
            self.moved.notify_one();
        }
    }

    fn tell_room(&self) {
        self.room.store(true, Ordering::SeqCst);
        self.moved.notify_one();
    }
}

/// What the reading half has to say without the ledger.
#[derive(Debug)]
pub(super) enum Side {
    /// Items that cannot be right.
    Refused(Vec<wire::Receipt>),
    /// The stream ends with this.
    End(Status),
}

/// Frames for one worker.
pub(in crate::grpc) struct Outbound {
    outbox: mpsc::UnboundedReceiver<ToWorker>,
    side: mpsc::UnboundedReceiver<Side>,
    unsent: Unsent,
    flow: Arc<Flow>,
    /// The first frame.
    welcome: Option<wire::Welcome>,
    receipts: Vec<wire::Receipt>,
    assignments: VecDeque<Assignment>,
    /// What was found behind those, and goes out after them.
    next: Option<ToWorker>,
    idle_interval: Duration,
    idle: Pin<Box<Sleep>>,
    last: Instant,
    /// The daemon goes away then.
    drain: Option<Pin<Box<Sleep>>>,
    ended: bool,
    /// The reading half ends with this.
    _gone: DropGuard,
}

impl Outbound {
    pub(super) fn new(
        opened: Opened,
        flow: Arc<Flow>,
        side: mpsc::UnboundedReceiver<Side>,
        gone: DropGuard,
    ) -> Self {
        let welcome = wire::Welcome {
            session_id: opened.session.0,
            heartbeat_interval: Some(convert::span(opened.heartbeat_interval)),
            idle_interval: Some(convert::span(opened.idle_interval)),
            ack_delay_max: Some(convert::span(opened.ack_delay_max)),
            max_message_bytes: MESSAGE_BYTES as u64,
            max_result_bytes: RESULT_BYTES as u64,
            max_checkpoint_bytes: CHECKPOINT_BYTES as u64,
            leases: opened.verdicts.iter().map(convert::verdict).collect(),
            server_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let now = Instant::now();
        Self {
            outbox: opened.outbox,
            side,
            unsent: opened.unsent,
            flow,
            welcome: Some(welcome),
            receipts: Vec::new(),
            assignments: VecDeque::new(),
            next: None,
            idle_interval: opened.idle_interval,
            idle: Box::pin(sleep_until(now + opened.idle_interval)),
            last: now,
            drain: None,
            ended: false,
            _gone: gone,
        }
    }

    /// Takes what waits behind `first`. Receipts and assignments are gathered across each other: each has its fence.
    fn gather(&mut self, first: ToWorker) {
        let mut said = first;
        for _ in 0..LOOK_AHEAD {
            match said {
                ToWorker::Receipts(receipts) => self.receipts.extend(receipts.iter().map(convert::receipt)),
                ToWorker::Assignments(items) => self.assignments.extend(items),
                other => {
                    self.next = Some(other);
                    return;
                }
            }
            match self.outbox.try_recv() {
                Ok(more) => said = more,
                Err(_) => return,
            }
        }
        self.next = Some(said);
    }

    /// The next frame of what was gathered.
    fn frame(&mut self) -> Option<Result<Frame, Status>> {
        if let Some(welcome) = self.welcome.take() {
            return Some(Ok(Frame::Welcome(welcome)));
        }
        if !self.receipts.is_empty() {
            let rest = self.receipts.split_off(self.receipts.len().min(RECEIPTS));
            let items = std::mem::replace(&mut self.receipts, rest);
            return Some(Ok(Frame::Receipts(wire::Receipts { items })));
        }
        if !self.assignments.is_empty() {
            return Some(Ok(Frame::Assignments(self.cut())));
        }
        Some(match self.next.take()? {
            ToWorker::HeartbeatAck(leases, sequence) => {
                let leases = leases.iter().map(convert::verdict).collect();
                Ok(Frame::HeartbeatAck(wire::HeartbeatAck { leases, sequence }))
            }
            ToWorker::Stop(leases) => {
                Ok(Frame::Stop(wire::Stop { items: leases.iter().map(convert::verdict).collect() }))
            }
            ToWorker::Drain(grace) => {
                self.drain = Some(Box::pin(sleep_until(Instant::now() + grace)));
                Ok(Frame::Drain(wire::Drain {
                    deadline: Some(convert::span(grace)),
                    reconnect_after: Some(convert::span(RECONNECT_AFTER)),
                }))
            }
            ToWorker::End(LedgerError::WorkerSuperseded(_)) => Err(Refused::Superseded.into()),
            ToWorker::End(error) => Err(status(&error)),
            // The look ahead ended at one of these.
            more @ (ToWorker::Receipts(_) | ToWorker::Assignments(_)) => {
                self.gather(more);
                return self.frame();
            }
        })
    }

    /// As many assignments as one frame takes, at least one.
    fn cut(&mut self) -> wire::Assignments {
        let mut items = Vec::new();
        let (mut bytes, mut payload) = (0, 0);
        while let Some(first) = self.assignments.front() {
            let checkpoint = first.checkpoint.as_ref().map_or(0, bytes::Bytes::len);
            // Most of it; what is left is small beside the distance to what a client takes.
            let about = first.data.payload.len() + checkpoint;
            if !items.is_empty() && bytes + about > FRAME_BYTES {
                break;
            }
            let Some(assignment) = self.assignments.pop_front() else { break };
            payload += assignment.data.payload.len();
            let item = convert::assignment(assignment);
            bytes += item.encoded_len();
            items.push(item);
        }
        let before = self.unsent.bytes();
        self.unsent.sent(payload);
        if before > UNSENT_BYTES && self.unsent.bytes() <= UNSENT_BYTES {
            self.flow.tell_room();
        }
        wire::Assignments { items }
    }

    /// What to send now. Pending: nothing.
    fn poll_frame(&mut self, now: Instant, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, Status>>> {
        while let Poll::Ready(Some(side)) = self.side.poll_recv(cx) {
            match side {
                Side::Refused(receipts) => self.receipts.extend(receipts),
                Side::End(status) => return Poll::Ready(Some(Err(status))),
            }
        }
        if let Some(frame) = self.frame() {
            return Poll::Ready(Some(frame));
        }
        match self.outbox.poll_recv(cx) {
            Poll::Ready(Some(said)) => {
                self.gather(said);
                if let Some(frame) = self.frame() {
                    return Poll::Ready(Some(frame));
                }
            }
            // The ledger let go of the session: as it does when the worker's side has ended, or when it ends itself.
            Poll::Ready(None) if self.flow.inbound_ended.load(Ordering::SeqCst) => return Poll::Ready(None),
            Poll::Ready(None) => return Poll::Ready(Some(Err(status(&LedgerError::Draining)))),
            Poll::Pending => {}
        }
        if let Some(drain) = &mut self.drain
            && drain.as_mut().poll_elapsed(cx).is_ready()
        {
            return Poll::Ready(Some(Err(status(&LedgerError::Draining))));
        }
        loop {
            ready!(self.idle.as_mut().poll_elapsed(cx));
            // Armed anew only when it fires: other traffic moves `last` and costs nothing here.
            let due = self.last + self.idle_interval;
            if due <= now {
                return Poll::Ready(Some(Ok(Frame::Idle(wire::Idle {}))));
            }
            self.idle.as_mut().reset(due);
        }
    }
}

/// Polls a timer.
trait PollElapsed {
    fn poll_elapsed(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()>;
}

impl PollElapsed for Sleep {
    fn poll_elapsed(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Future::poll(self, cx)
    }
}

impl Stream for Outbound {
    type Item = Result<wire::WorkResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        let now = Instant::now();
        this.flow.take(now);
        let Poll::Ready(found) = this.poll_frame(now, cx) else {
            this.flow.open();
            return Poll::Pending;
        };
        this.last = now;
        this.ended = !matches!(found, Some(Ok(_)));
        Poll::Ready(found.map(|frame| frame.map(|frame| wire::WorkResponse { frame: Some(frame) })))
    }
}

#[cfg(test)]
mod tests;

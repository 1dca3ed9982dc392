//! WorkerService: the one stream between a worker and the ledger, from its first frame on.
//!
//! Two halves that never wait for each other. The reading half is a task: it checks frames and passes them on, and reads
//! more slowly while the ledger's lane is full or its answers are not taken. The writing half is [`Outbound`], driven by
//! the transport. The end of a stream means nothing; the ledger is told that it is gone, and leases go on.

mod outbound;
mod reach;

use super::access::Access;
use super::convert::{self, Check};
use super::status::{Refused, status};
use super::task::small;
use super::wire::{self, work_request, worker_service_server::WorkerService};
use crate::callers::Permission;
use crate::ledger::Handle;
use crate::ledger::command::{FromWorker, LedgerError};
use crate::room::Held;
use ledger_core::SessionId;
use ledger_core::limits::ITEMS;
use ledger_core::session::Hello;
use outbound::{Flow, Outbound, Side};
use reach::Reach;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// A stream begins with Hello within this time.
const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// The other side reads at least this often while something waits for it.
const STALLED_AFTER: Duration = Duration::from_secs(30);
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Frames read ahead of a transport that takes nothing: what bounds the answers that wait in memory.
const AHEAD: u32 = 16;

pub(super) struct Workers {
    handle: Handle,
}

impl Workers {
    pub(super) const fn new(handle: Handle) -> Self {
        Self { handle }
    }

    async fn settle(
        &self,
        access: &Access,
        said: wire::SettleTasksRequest,
    ) -> Result<wire::SettleTasksResponse, LedgerError> {
        let mut check = Check::default();
        let worker = access.worker(convert::worker_id(&mut check, said.worker_id));
        let count = said.outcomes.len();
        check.must((1..=ITEMS).contains(&count), convert::At::Root, "outcomes", "send 1 to 1,000 outcomes");
        check.done(())?;
        // Receipts in the order of the outcomes: those refused here keep their places.
        let mut places = Vec::with_capacity(count);
        let mut items = Vec::with_capacity(count);
        let mut reach = Reach::of(access);
        for settled in convert::settlements("outcomes", said.outcomes, self.handle.clock().now().wall()) {
            match settled {
                Ok(settlement) => match reach.refuses(&self.handle, &settlement).await? {
                    None => {
                        items.push(settlement);
                        places.push(None);
                    }
                    refused => places.push(refused),
                },
                Err(refused) => places.push(Some(*refused)),
            }
        }
        let receipts = if items.is_empty() { Vec::new() } else { self.handle.settle(worker, items).await? };
        let mut receipts = receipts.iter().map(convert::receipt);
        let receipts = places.into_iter().filter_map(|place| place.or_else(|| receipts.next())).collect();
        Ok(wire::SettleTasksResponse { receipts })
    }
}

#[tonic::async_trait]
impl WorkerService for Workers {
    type WorkStream = Outbound;

    async fn work(
        &self,
        request: Request<Streaming<wire::WorkRequest>>,
    ) -> Result<Response<Outbound>, Status> {
        let access = Access::of(request.extensions())?;
        let held = Held::of_this_call();
        let mut inbound = Inbound { frames: request.into_inner(), held };
        let first =
            timeout(HELLO_WITHIN, inbound.frames.message()).await.map_err(|_| Refused::HelloMissing)??;
        let mut hello = match first.and_then(|first| first.frame) {
            Some(work_request::Frame::Hello(hello)) => convert::hello(hello)?,
            _ => return Err(Refused::HelloExpected.into()),
        };
        for agent in &hello.agents {
            access.agent(agent).map_err(|error| status(&error))?;
        }
        hello.worker = access.worker(hello.worker);
        // On a task of its own: this handler may be dropped at any moment, and a session must not be left open then.
        let (reply, opened) = oneshot::channel();
        tokio::spawn(session(self.handle.clone(), access, hello, inbound, reply));
        opened.await.unwrap_or_else(|_| Err(Refused::Panic.into())).map(Response::new)
    }

    async fn settle_tasks(
        &self,
        request: Request<wire::SettleTasksRequest>,
    ) -> Result<Response<wire::SettleTasksResponse>, Status> {
        let access = Access::of(request.extensions())?;
        self.settle(&access, request.into_inner()).await.map(small).map_err(|error| status(&error))
    }
}

/// What a worker says, and the room that it takes.
struct Inbound {
    frames: Streaming<wire::WorkRequest>,
    held: Option<Held>,
}

/// Opens a session, reads its frames to the end, and tells the ledger that it is gone.
async fn session(
    handle: Handle,
    access: Access,
    hello: Hello,
    mut inbound: Inbound,
    reply: oneshot::Sender<Result<Outbound, Status>>,
) {
    let agents = hello.agents.clone();
    let opened = match handle.hello(hello).await {
        Ok(opened) => opened,
        Err(error) => {
            let _ = reply.send(Err(status(&error)));
            return;
        }
    };
    let id = opened.session;
    let flow = Arc::new(Flow::new());
    let gone = CancellationToken::new();
    let (side, refusals) = mpsc::unbounded_channel();
    let outbound = Outbound::new(opened, Arc::clone(&flow), refusals, gone.clone().drop_guard());
    // A caller that left takes `outbound` with it, which is what `gone` is for.
    let _ = reply.send(Ok(outbound));
    let end = tokio::select! {
        biased;
        status = access.lost(Permission::Work, &agents) => Some(status),
        end = read(&handle, &access, id, &mut inbound, &flow, &side, &gone) => end,
    };
    if let Some(status) = end {
        tracing::debug!(session = %id, %status, "a worker's stream was ended");
        let _ = side.send(Side::End(status));
    }
    flow.inbound_ended();
    let _ = handle.frame(id, FromWorker::Closed).await;
}

/// Passes frames on until the stream ends. Returns what it is to be ended with, when that is ours to say.
async fn read(
    handle: &Handle,
    access: &Access,
    session: SessionId,
    inbound: &mut Inbound,
    flow: &Flow,
    side: &mpsc::UnboundedSender<Side>,
    gone: &CancellationToken,
) -> Option<Status> {
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reach = Reach::of(access);
    let (mut seen, mut ahead) = (0, 0);
    loop {
        if flow.has_room_again() {
            // The ledger hears of room with any frame; this one says nothing else.
            handle.frame(session, FromWorker::Acks(Vec::new())).await.ok()?;
        }
        let taken = flow.taken();
        if taken != seen {
            (seen, ahead) = (taken, 0);
        }
        let may_read = ahead < AHEAD || flow.is_open();
        if !may_read {
            flow.wait_for_a_take(taken);
        }
        let said = tokio::select! {
            biased;
            () = gone.cancelled() => return None,
            () = flow.moved() => continue,
            said = inbound.frames.message(), if may_read => said,
            _ = look.tick() => {
                if flow.is_stalled(STALLED_AFTER) {
                    return Some(Refused::Stalled.into());
                }
                continue;
            }
        };
        let read = match said {
            Ok(Some(said)) => {
                let mut read = match convert::from_worker(said, handle.clock().now().wall()) {
                    Ok(read) => read,
                    Err(status) => return Some(status),
                };
                if let Err(error) = reach.cut(handle, &mut read).await {
                    return Some(status(&error));
                }
                read
            }
            Ok(None) => return None,
            Err(status) => return Some(status),
        };
        ahead += 1;
        if !read.refused.is_empty() {
            let _ = side.send(Side::Refused(read.refused));
        }
        if let Some(frame) = read.frame {
            // Only an ended ledger refuses; its outbox says so to the stream.
            let room = inbound.held.as_ref().and_then(Held::hand_on);
            handle.frame_with(session, frame, room).await.ok()?;
        }
    }
}

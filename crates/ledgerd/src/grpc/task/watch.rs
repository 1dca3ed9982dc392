//! WatchTasks: a place in the history that moves on as its caller reads.
//!
//! Invariant: the token of a message names the place behind its last event, and nothing that fits lies between two messages.

use crate::callers::Permission;
use crate::grpc::access::Access;
use crate::grpc::convert::{self, Check, Place, WatchFilter};
use crate::grpc::status::status;
use crate::grpc::wire;
use crate::ledger::command::LedgerError;
use crate::ledger::{Handle, Watch};
use futures_util::{Stream, stream};
use ledger_core::AgentId;
use ledger_core::store::HistoryView;
use ledger_core::watch::{Happening, Placed, Stretch};
use prost::Message as _;
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// A message ends after the event with which it has so many.
const MESSAGE_BYTES: usize = 1 << 20;
/// A message comes at least so often.
const IDLE: Duration = Duration::from_secs(15);

pub(super) type Answers = Pin<Box<dyn Stream<Item = Result<wire::WatchTasksResponse, Status>> + Send>>;

/// What is sent to one who watches. It ends when `drain` is cancelled, or when the caller may not see the agent any more.
pub(super) async fn watch(
    handle: &Handle,
    access: Access,
    drain: CancellationToken,
    said: wire::WatchTasksRequest,
) -> Result<Answers, LedgerError> {
    let mut check = Check::default();
    let resume = Place::read(&mut check, &said.resume_token);
    let agent = said.agent.clone();
    let filter = convert::watch_filter(&mut check, said);
    check.done(())?;
    access.filter(&agent)?;
    if let Some(task) = filter.task
        && handle.reader().task(task, false).await.map_err(LedgerError::Store)?.is_none()
    {
        return Err(LedgerError::UnknownTask(task));
    }
    let watch = handle.watch()?;
    let end = watch.end().await?;
    let place = match resume {
        Some(place) if place.is_within(&end) => place,
        Some(_) => return Err(LedgerError::ResumeTooOld),
        None => Place::at(&end),
    };
    let watching = Watching {
        handle: handle.clone(),
        watch,
        place,
        agent,
        filter,
        names: HashMap::new(),
        is_first: true,
    };
    let ends = Ends { access, drain };
    Ok(Box::pin(stream::try_unfold((watching, ends), |(mut watching, ends)| async {
        let agents = watching.agents();
        let answer = tokio::select! {
            biased;
            () = ends.drain.cancelled() => Err(status(&LedgerError::Draining)),
            lost = ends.access.lost(Permission::SeeTasks, &agents) => Err(lost),
            answer = watching.next() => answer.map_err(|error| status(&error)),
        };
        answer.map(|answer| Some((answer, (watching, ends))))
    })))
}

/// What ends a watch from outside.
struct Ends {
    access: Access,
    drain: CancellationToken,
}

struct Watching {
    handle: Handle,
    watch: Watch,
    place: Place,
    /// Only of this one; empty: of all.
    agent: String,
    filter: WatchFilter,
    names: HashMap<AgentId, Arc<str>>,
    /// Nothing was sent yet.
    is_first: bool,
}

impl Watching {
    fn agents(&self) -> Vec<Arc<str>> {
        if self.agent.is_empty() { Vec::new() } else { vec![self.agent.as_str().into()] }
    }

    /// The next message.
    async fn next(&mut self) -> Result<wire::WatchTasksResponse, LedgerError> {
        // The first comes at once, for its token.
        let events = if std::mem::take(&mut self.is_first) { Vec::new() } else { self.events().await? };
        Ok(wire::WatchTasksResponse { events, resume_token: self.place.token() })
    }

    /// The next events; none when there were none for a while.
    async fn events(&mut self) -> Result<Vec<wire::TaskEvent>, LedgerError> {
        let idle = Instant::now() + IDLE;
        loop {
            let Ok(stretch) = timeout_at(idle, self.watch.after(&self.place.cut)).await else {
                return Ok(Vec::new());
            };
            let events = self.told(&*stretch?).await;
            if !events.is_empty() || Instant::now() >= idle {
                return Ok(events);
            }
        }
    }

    /// What of a stretch fits and lies ahead, up to the size of a message; the place is behind it then.
    async fn told(&mut self, stretch: &Stretch) -> Vec<wire::TaskEvent> {
        let (mut events, mut bytes) = (Vec::new(), 0);
        let begin = self.place.cut.clone();
        for row in stretch.rows.iter().filter(|row| row.seq > begin.of(row.slot)) {
            if bytes >= MESSAGE_BYTES {
                return events;
            }
            self.place.cut.pass(row.slot, row.seq);
            if self.filter.fits(&row.what)
                && let Some(event) = self.event(row).await
            {
                bytes += event.encoded_len();
                events.push(event);
            }
        }
        self.place.cut.pass_all(&stretch.to);
        events
    }

    async fn event(&mut self, row: &Placed<Happening>) -> Option<wire::TaskEvent> {
        let Happening { record, agent, task_type, .. } = &row.what;
        let name = self.name(*agent).await;
        if !self.agent.is_empty() && self.agent != *name {
            return None;
        }
        Some(wire::TaskEvent {
            task_id: record.task.to_string(),
            agent: name.as_ref().to_owned(),
            task_type: task_type.as_ref().to_owned(),
            event: Some(convert::event(HistoryView { seq: row.seq, record: record.clone() })),
        })
    }

    async fn name(&mut self, agent: AgentId) -> Arc<str> {
        if let Some(known) = self.names.get(&agent) {
            return Arc::clone(known);
        }
        let mut name = self.handle.agent_name(agent);
        if name.is_none() {
            // Another daemon has made it a moment ago: whoever asks for agents makes the ledger look.
            let _ = self.handle.agents().await;
            name = self.handle.agent_name(agent);
        }
        let Some(name) = name else { return Arc::default() };
        self.names.insert(agent, Arc::clone(&name));
        name
    }
}

//! Workers, their streams, and how much room they have.
//!
//! Not their leases: those belong to tasks. A stream's end changes nothing here but its room.

use crate::by_id::TaskSet;
use crate::id::{AgentId, SessionId, TaskId};
use crate::limits::UNACKED_RUN;
use crate::time::Timestamp;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a worker says of itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    /// Its name.
    pub worker: Arc<str>,
    /// Its process.
    pub incarnation: u64,
    /// Agents it works for.
    pub agents: Vec<Arc<str>>,
    /// Task types it takes; none: all.
    pub types: Option<Arc<[Arc<str>]>>,
    /// How many tasks it may hold.
    pub capacity: u32,
    /// Shown to people.
    pub labels: Vec<(String, String)>,
    /// Name and version of its library.
    pub sdk: String,
    /// What it holds from an earlier stream.
    pub held: Vec<(TaskId, u64)>,
    /// What it has ended and has no receipt for.
    pub unreceipted: Vec<(TaskId, u64)>,
}

/// Bytes that wait to be sent on a stream; told by the stream, read by the ledger.
#[derive(Clone, Debug, Default)]
pub struct Unsent(Arc<AtomicUsize>);

/// Two are equal where as much waits.
impl PartialEq for Unsent {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl Unsent {
    /// More wait.
    pub fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }

    /// These were sent.
    pub fn sent(&self, bytes: usize) {
        let _ =
            self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| Some(now.saturating_sub(bytes)));
    }

    /// How many wait.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// An open stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Session {
    /// Its number.
    pub id: SessionId,
    /// The worker's name.
    pub worker: Arc<str>,
    /// Its process.
    pub incarnation: u64,
    /// Agents it works for.
    pub agents: Vec<AgentId>,
    /// Task types it takes; none: all.
    pub types: Option<Arc<[Arc<str>]>>,
    /// How many tasks it may hold.
    pub capacity: u32,
    /// Shown to people.
    pub labels: Vec<(String, String)>,
    /// Name and version of its library.
    pub sdk: String,
    /// When it was opened.
    pub connected_at: Timestamp,
    /// Its last beat, or Hello.
    pub beat_at: Timestamp,
    /// What it holds, lost tasks included until a beat omits them.
    pub held: TaskSet,
    /// Ack timeouts in a row.
    pub unacked_run: u32,
    /// Where the round over its agents goes on.
    pub cursor: usize,
    /// Bytes that wait to be sent to it.
    pub unsent: Unsent,
}

impl Session {
    /// How many more tasks it may be sent now.
    #[must_use]
    pub fn room(&self) -> usize {
        if self.unacked_run >= UNACKED_RUN || self.unsent.bytes() > crate::limits::UNSENT_BYTES {
            return 0;
        }
        (self.capacity as usize).saturating_sub(self.held.len())
    }

    /// Whether it takes tasks of this type.
    #[must_use]
    pub fn takes(&self, task_type: &str) -> bool {
        self.types.as_ref().is_none_or(|types| types.iter().any(|known| **known == *task_type))
    }
}

//! What may happen to a task: states, events, leases, sessions, and the choice of whom to assign.
//!
//! Pure: no async, no I/O, no clock, no dice. `now` and draws are arguments; identifiers are made at the rim and passed
//! in. [`Task::apply`] is the only way a task changes, and every change yields a history row.
//!
//! Not here: how a task is stored (behind [`store::Store`]), and how it is spoken of on the wire.

pub mod agent;
pub mod breakers;
mod by_id;
pub mod dispatch;
pub mod event;
pub mod explain;
pub mod fold;
pub mod id;
pub mod limits;
pub mod session;
pub mod settings;
pub mod store;
pub mod task;
pub mod time;
mod transition;
pub mod watch;

pub use agent::Agent;
pub use breakers::{Breakers, Guard};
pub use by_id::{ById, ByKey, ByName, ByTask, IdHasher, TaskSet};
pub use event::{
    Applied, Caller, Context, Effects, Event, Fact, LostWith, Outcome, Record, Redrive, Refusal, ReleaseCause,
};
pub use id::{AgentId, SessionId, TaskId};
pub use settings::{AgentOverrides, Overrides, Settings, Violation};
pub use task::{
    Class, EventKind, Holder, Lease, Reason, Sample, Spec, State, Stop, StopCause, Task, TaskError,
};
pub use time::{Now, Timestamp};

/// Compiles and runs the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

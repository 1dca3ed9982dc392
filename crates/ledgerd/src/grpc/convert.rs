//! Between the wire and the ledger's own words: everything that comes in is checked here, and nowhere after.

mod admin;
mod breaker;
mod check;
mod digest;
mod page;
mod task;
mod worker;

pub(super) use admin::{
    agent, agent_name, agent_settings, counts, dead_letter, dead_letter_filter, dead_letter_group,
    dead_letter_results, listed, pause_time, redriving, task_ids, tokens, worker_view,
};
pub(super) use breaker::{agent_event, breaker, breaker_named, forced, trip_time};
pub(super) use check::{At, Check};
pub(super) use page::{Page, Place};
pub(super) use task::{
    Names, WatchFilter, enqueued, event, new_task, note, request_key, span, state, task, task_filter,
    task_id, time, update, watch_filter,
};
pub(super) use worker::{FromWire, assignment, from_worker, hello, receipt, settlements, verdict, worker_id};

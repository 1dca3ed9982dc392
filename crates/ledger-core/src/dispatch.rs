//! The choice of whom to assign: sessions take turns, and so do the agents of a session.
//!
//! The store offered tasks in order; here each finds a session. Pure.

use crate::by_id::TaskSet;
use crate::id::{AgentId, SessionId};
use crate::session::Session;
use crate::task::Task;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Sessions that ask for the same tasks: one agent, the same types.
pub type Group = (AgentId, Option<Arc<[Arc<str>]>>);

/// Hands offered tasks to sessions with room: one task a turn, sessions in order, each going round its agents.
///
/// A task that was lost goes to another worker than the one that lost it, where another with room takes it. Cursors of
/// sessions move on; `held` is not touched: the caller does that with the claim. Returns pairs in the order made.
pub fn choose(
    sessions: &mut [&mut Session],
    offers: &mut HashMap<Group, VecDeque<Arc<Task>>>,
) -> Vec<(SessionId, Arc<Task>)> {
    let mut chosen = Vec::new();
    let mut taken = TaskSet::default();
    let mut room: Vec<usize> = sessions.iter().map(|session| session.room()).collect();
    let mut lost = Lost::PreferAnother;
    loop {
        let mut progress = false;
        for at in 0..sessions.len() {
            if room[at] == 0 {
                continue;
            }
            if let Some(task) = next_for(sessions, at, &room, offers, &mut taken, lost) {
                room[at] -= 1;
                progress = true;
                chosen.push((sessions[at].id, task));
            }
        }
        match (progress, lost) {
            (true, _) => {}
            // What is left was not offered to those it would rather go to: kept for them, it might wait for ever.
            (false, Lost::PreferAnother) => lost = Lost::ToAnybody,
            (false, Lost::ToAnybody) => return chosen,
        }
    }
}

/// To whom a lost task may go.
#[derive(Clone, Copy, PartialEq)]
enum Lost {
    PreferAnother,
    ToAnybody,
}

fn next_for(
    sessions: &mut [&mut Session],
    at: usize,
    room: &[usize],
    offers: &mut HashMap<Group, VecDeque<Arc<Task>>>,
    taken: &mut TaskSet,
    lost: Lost,
) -> Option<Arc<Task>> {
    let agents = sessions[at].agents.len();
    for turn in 0..agents {
        let index = (sessions[at].cursor + turn) % agents;
        let group = (sessions[at].agents[index], sessions[at].types.clone());
        let Some(queue) = offers.get_mut(&group) else { continue };
        // Two groups of one agent may have been offered the same task.
        while queue.front().is_some_and(|task| taken.contains(&task.id)) {
            queue.pop_front();
        }
        let found = queue.iter().position(|task| {
            !taken.contains(&task.id)
                && (lost == Lost::ToAnybody || !another_is_better(task, sessions, at, room))
        });
        if let Some(task) = found.and_then(|found| queue.remove(found)) {
            taken.insert(task.id);
            sessions[at].cursor = index + 1;
            return Some(task);
        }
    }
    None
}

/// Whether this task was lost by the worker at `at`, and another worker with room takes it.
fn another_is_better(task: &Task, sessions: &[&mut Session], at: usize, room: &[usize]) -> bool {
    // Its reason may say BREAKER_OPEN or nothing by now; that it had begun with whoever held it last does not change.
    let lost_by = match &task.holder {
        Some(holder) if task.acked() => &holder.worker,
        _ => return false,
    };
    *lost_by == sessions[at].worker
        && sessions.iter().zip(room).any(|(other, room)| {
            *room > 0
                && other.worker != *lost_by
                && other.agents.contains(&task.spec.agent)
                && other.takes(&task.spec.task_type)
        })
}

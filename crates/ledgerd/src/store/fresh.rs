//! What producers said of the newest tasks, kept for the workers that get them next.
//!
//! Knows nothing of SQL. Invariant: what is kept is durable and as it is stored; whoever changes it says so before.

use ledger_core::store::TaskData;
use ledger_core::{ByTask, TaskId};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Data of the newest tasks, for the workers that get them next: most tasks are handed out soon after they came.
#[derive(Debug)]
pub(super) struct Fresh {
    most: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    data: ByTask<Arc<TaskData>>,
    order: VecDeque<TaskId>,
    bytes: usize,
}

impl Fresh {
    pub(super) fn new(most: usize) -> Self {
        Self { most, kept: Mutex::default() }
    }

    pub(super) fn extend(&self, data: impl Iterator<Item = (TaskId, Arc<TaskData>)>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        for (id, data) in data {
            kept.bytes += weight(&data);
            kept.data.insert(id, data);
            kept.order.push_back(id);
        }
        while kept.bytes > self.most {
            let Some(oldest) = kept.order.pop_front() else { break };
            if let Some(data) = kept.data.remove(&oldest) {
                kept.bytes -= weight(&data);
            }
        }
    }

    /// Its data is about to change.
    pub(super) fn forget(&self, id: TaskId) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(data) = kept.data.remove(&id) {
            kept.bytes -= weight(&data);
        }
    }

    pub(super) fn get(&self, ids: impl Iterator<Item = TaskId>) -> Vec<Option<Arc<TaskData>>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        ids.map(|id| kept.data.get(&id).cloned()).collect()
    }
}

/// Bytes that a task's data takes in memory, about.
fn weight(data: &TaskData) -> usize {
    let labels: usize = data.labels.iter().map(|(key, value)| key.len() + value.len() + 48).sum();
    256 + data.payload.len() + labels + data.traceparent.len() + data.tracestate.len() + data.key.len()
}

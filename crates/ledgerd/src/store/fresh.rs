//! What producers said of the newest tasks that live, kept for the workers that get them next.
//!
//! Knows nothing of SQL. Invariant: what is kept is durable and as it is stored; whoever changes it says so before.

use ledger_core::TaskId;
use ledger_core::store::TaskData;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Data of the newest tasks, for the workers that get them next: most tasks are handed out soon after they came, and what
/// has ended is asked for by few.
#[derive(Debug)]
pub(super) struct Fresh {
    most: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// The lowest numbers are the oldest tasks.
    data: BTreeMap<TaskId, Arc<TaskData>>,
    bytes: usize,
}

impl Fresh {
    pub(super) fn new(most: usize) -> Self {
        Self { most, kept: Mutex::default() }
    }

    /// These are stored, and those have ended.
    pub(super) fn change(
        &self,
        new: impl Iterator<Item = (TaskId, Arc<TaskData>)>,
        ended: impl Iterator<Item = TaskId>,
    ) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        for (id, data) in new {
            kept.bytes += weight(&data);
            kept.data.insert(id, data);
        }
        for id in ended {
            kept.forget(id);
        }
        while kept.bytes > self.most {
            let Some((_, oldest)) = kept.data.pop_first() else { break };
            kept.bytes -= weight(&oldest);
        }
    }

    /// Its data is about to change.
    pub(super) fn forget(&self, id: TaskId) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).forget(id);
    }

    pub(super) fn get(&self, ids: impl Iterator<Item = TaskId>) -> Vec<Option<Arc<TaskData>>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        ids.map(|id| kept.data.get(&id).cloned()).collect()
    }
}

impl Kept {
    fn forget(&mut self, id: TaskId) {
        if let Some(data) = self.data.remove(&id) {
            self.bytes -= weight(&data);
        }
    }
}

/// Bytes that a task's data takes in memory, about.
fn weight(data: &TaskData) -> usize {
    let labels: usize = data.labels.iter().map(|(key, value)| key.len() + value.len() + 48).sum();
    256 + data.payload.len() + labels + data.traceparent.len() + data.tracestate.len() + data.key.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(payload: usize) -> Arc<TaskData> {
        Arc::new(TaskData { payload: vec![0; payload].into(), ..TaskData::default() })
    }

    fn known(fresh: &Fresh, ids: std::ops::Range<u64>) -> Vec<u64> {
        let found = fresh.get(ids.clone().map(TaskId));
        ids.zip(found).filter_map(|(id, data)| data.map(|_| id)).collect()
    }

    #[test]
    fn what_has_ended_leaves_and_takes_its_weight_along() {
        let fresh = Fresh::new(1 << 20);
        fresh.change([(TaskId(1), data(10))].into_iter(), std::iter::empty());
        // Tasks come and go; the first one waits.
        for id in 2..100 {
            fresh.change(
                [(TaskId(id), data(1_000))].into_iter(),
                [TaskId(id - 1)].into_iter().filter(|id| id.0 > 1),
            );
        }
        assert_eq!(known(&fresh, 0..101), [1, 99]);
        assert_eq!(fresh.kept.lock().unwrap().bytes, weight(&data(10)) + weight(&data(1_000)));
    }

    #[test]
    fn the_oldest_make_room_and_nothing_ended_comes_back() {
        let fresh = Fresh::new(3 * weight(&data(100)));
        let new = (1..=5).map(|id| (TaskId(id), data(100)));
        fresh.change(new, [TaskId(5)].into_iter());
        assert_eq!(known(&fresh, 0..9), [2, 3, 4]);
        fresh.forget(TaskId(3));
        fresh.change([6, 7].map(|id| (TaskId(id), data(100))).into_iter(), std::iter::empty());
        assert_eq!(known(&fresh, 0..9), [4, 6, 7]);
        assert_eq!(fresh.kept.lock().unwrap().bytes, fresh.most);
    }
}

//! What a worker says about tasks that are out of its caller's reach, answered as if those did not exist.
//!
//! A worker that reaches every agent pays nothing for it. For others each task is looked at once a stream.

use crate::grpc::access::Access;
use crate::grpc::convert::{self, FromWire};
use crate::grpc::wire;
use crate::ledger::Handle;
use crate::ledger::command::{FromWorker, LedgerError, Receipt, Settlement};
use ledger_core::TaskId;
use ledger_core::limits::CAPACITY;
use std::collections::HashSet;

/// Tasks that are remembered as within reach: twice what a worker may hold.
const REMEMBERED: usize = CAPACITY as usize * 2;

/// The reach of one worker.
pub(super) struct Reach<'a> {
    access: &'a Access,
    within: HashSet<TaskId>,
}

impl<'a> Reach<'a> {
    pub(super) fn of(access: &'a Access) -> Self {
        Self { access, within: HashSet::new() }
    }

    /// Takes acks and outcomes of tasks out of reach from a frame, and refuses them. Beats need no look: of what the worker
    /// does not hold they say nothing but that.
    ///
    /// # Errors
    /// Store when a task cannot be read.
    pub(super) async fn cut(&mut self, handle: &Handle, read: &mut FromWire) -> Result<(), LedgerError> {
        if !self.access.is_limited() {
            return Ok(());
        }
        match &mut read.frame {
            Some(FromWorker::Acks(acks)) => {
                for (task, fence) in std::mem::take(acks) {
                    match self.hides(handle, task).await? {
                        true => read.refused.push(refusal(task, fence, true, LedgerError::UnknownTask(task))),
                        false => acks.push((task, fence)),
                    }
                }
            }
            Some(FromWorker::Outcomes(outcomes)) => {
                for settlement in std::mem::take(outcomes) {
                    match self.refuses(handle, &settlement).await? {
                        Some(refused) => read.refused.push(refused),
                        None => outcomes.push(settlement),
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The refusal of an outcome: of a task that is out of reach, or that enqueues one which is.
    ///
    /// # Errors
    /// Store when the task cannot be read.
    pub(super) async fn refuses(
        &mut self,
        handle: &Handle,
        settlement: &Settlement,
    ) -> Result<Option<wire::Receipt>, LedgerError> {
        let follow_ups = settlement.follow_ups.iter();
        let error = match follow_ups.map(|task| self.access.agent(&task.agent)).find_map(Result::err) {
            _ if self.hides(handle, settlement.task).await? => LedgerError::UnknownTask(settlement.task),
            Some(error) => error,
            None => return Ok(None),
        };
        Ok(Some(refusal(settlement.task, settlement.fence, false, error)))
    }

    async fn hides(&mut self, handle: &Handle, task: TaskId) -> Result<bool, LedgerError> {
        if !self.access.is_limited() || self.within.contains(&task) {
            return Ok(false);
        }
        let hidden = !self.access.out_of_reach(handle, &[task]).await?.is_empty();
        if !hidden {
            if self.within.len() >= REMEMBERED {
                self.within.clear();
            }
            self.within.insert(task);
        }
        Ok(hidden)
    }
}

fn refusal(task: TaskId, fence: u64, is_ack: bool, error: LedgerError) -> wire::Receipt {
    convert::receipt(&Receipt { task, fence, is_ack, result: Err(error) })
}

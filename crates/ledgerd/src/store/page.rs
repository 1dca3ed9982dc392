//! Pages of a list that looks at a bounded number of rows, for either database.

use ledger_core::TaskId;

/// Where to go on after a page: `looked` at of at most `look`, of which `found` fit of at most `limit`.
pub(super) fn next(looked: &[TaskId], look: usize, found: Option<TaskId>, full: bool) -> Option<u64> {
    let last = *looked.last()?;
    match found {
        Some(found) if full && found != last => Some(found.0),
        _ => (looked.len() == look).then_some(last.0),
    }
}

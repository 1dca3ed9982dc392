//! History entries as they stand in a row with others, each a JSON array.
//!
//! Why: a row costs either database more than what it holds. The order of an array's elements is stored and never changes; what
//! reads it is SQL (the view `history` of each store), and in SQLite's store a moving ledger.

use super::text;
use ledger_core::Record;
use serde::ser::{Serialize, SerializeSeq as _, Serializer};

/// Entries of a row. More make a row that no page has room for beside others; fewer save less.
pub(super) const ENTRIES: usize = 16;
/// Elements that every entry has.
const ALWAYS: usize = 10;

/// One entry, as it stands in a row.
pub(super) struct Entry<'r, B> {
    /// Those of the row, which are its first entry's.
    pub(super) task: u64,
    pub(super) at: i64,
    /// Its task's entry before it, as the store names it.
    pub(super) before: B,
    pub(super) record: &'r Record,
}

impl<B: Serialize> Serialize for Entry<'_, B> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let record = self.record;
        let error = record.error.as_deref().map(text::error_text);
        let facts = (!record.facts.is_empty()).then(|| text::facts_text(&record.facts));
        // Up to the last that it has.
        let more = [
            record.worker.is_some(),
            record.until.is_some(),
            record.digest.is_some(),
            error.is_some(),
            facts.is_some(),
        ];
        let more = more.iter().rposition(|has| *has).map_or(0, |last| last + 1);
        let mut entry = serializer.serialize_seq(Some(ALWAYS + more))?;
        entry.serialize_element(&record.task.0.wrapping_sub(self.task).cast_signed())?;
        entry.serialize_element(&record.version)?;
        entry.serialize_element(&self.before)?;
        entry.serialize_element(&record.kind.code())?;
        entry.serialize_element(&record.from.map(|state| state.code()))?;
        entry.serialize_element(&record.to.code())?;
        entry.serialize_element(&record.reason.code())?;
        entry.serialize_element(&(record.at.millis() - self.at))?;
        entry.serialize_element(&record.fence)?;
        entry.serialize_element(&record.attempt)?;
        if more > 0 {
            entry.serialize_element(&record.worker.as_deref())?;
        }
        if more > 1 {
            entry.serialize_element(&record.until.map(|until| until.millis() - self.at))?;
        }
        if more > 2 {
            entry.serialize_element(&record.digest.map(u64::cast_signed))?;
        }
        if more > 3 {
            entry.serialize_element(&error)?;
        }
        if more > 4 {
            entry.serialize_element(&facts)?;
        }
        entry.end()
    }
}

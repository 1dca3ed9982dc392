//! History entries that share a row, where each stands, and what is known of a task beside its row.
//!
//! Not their form (`store/entries`), and not how they are read, which is for SQL (`unpacked` and `history_of`). Invariants: the
//! entries of a row follow one another in number and are of one day; each names the entry of its task before it, so that the
//! history of a task is found from its newest.

use super::recover::Columns;
use crate::store::entries::{ENTRIES, Entry};
use crate::store::text;
use ledger_core::store::StoreError;
use ledger_core::{Record, Task, Timestamp};
use serde::de::{Deserialize, Deserializer, IgnoredAny, SeqAccess, Visitor};
use std::sync::Arc;

/// Milliseconds in a day.
pub(super) const DAY: i64 = 86_400_000;

/// Where an entry stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryPlace {
    pub(super) slot: u16,
    pub(super) seq: u64,
    /// Its own time, which tells the day that it is found in.
    pub(super) at: Timestamp,
}

impl EntryPlace {
    /// Three columns: slot, number, time; NULL: there is none.
    pub(super) fn read(row: &mut Columns<'_>) -> Result<Option<Self>, StoreError> {
        let (slot, seq, at) = (row.maybe()?, row.maybe()?, row.maybe_time()?);
        let (Some(slot), Some(seq), Some(at)) = (slot, seq, at) else { return Ok(None) };
        let slot =
            u16::try_from(slot).map_err(|_| StoreError::Corrupt(format!("an entry of slot {slot}")))?;
        Ok(Some(Self { slot, seq: seq.cast_unsigned(), at }))
    }
}

/// A task as a batch found it.
#[derive(Clone)]
pub(super) struct Found {
    pub(super) task: Arc<Task>,
    /// Its newest entry. None: it has none, or had ended when places came to be told (migration 5).
    pub(super) newest: Option<EntryPlace>,
}

/// An entry on its way.
pub(super) struct Entered {
    pub(super) record: Record,
    /// The one of its task before it.
    pub(super) before: Option<EntryPlace>,
}

/// A row of `task_history`.
pub(super) struct Packed {
    pub(super) seq: u64,
    pub(super) task: u64,
    pub(super) at: i64,
    pub(super) entries: String,
}

/// Rows for entries whose numbers follow one another from `first` on.
pub(super) fn packed(entries: &[Entered], first: u64) -> impl Iterator<Item = Packed> {
    let day = |entry: &Entered| entry.record.at.millis().div_euclid(DAY);
    let days = entries.chunk_by(move |a, b| day(a) == day(b));
    let mut seq = first;
    days.flat_map(|of_day| of_day.chunks(ENTRIES)).map(move |row| {
        let (task, at) = (row[0].record.task.0, row[0].record.at.millis());
        let place = |place: &EntryPlace| (place.slot, place.seq, place.at.millis() - at);
        let packed: Vec<_> = row
            .iter()
            .map(|entry| Entry { task, at, before: entry.before.as_ref().map(place), record: &entry.record })
            .collect();
        let packed = Packed { seq, task, at, entries: text::written(&packed) };
        seq += row.len() as u64;
        packed
    })
}

/// The tasks of a row's entries, which are told from `task`.
pub(super) fn tasks_of(task: i64, entries: &str) -> Result<Vec<i64>, StoreError> {
    let entries: Vec<First> = text::read(entries)?;
    Ok(entries.into_iter().map(|entry| task.wrapping_add(entry.0)).collect())
}

/// The first element of an entry.
struct First(i64);

impl<'de> Deserialize<'de> for First {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements;
        impl<'de> Visitor<'de> for Elements {
            type Value = First;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an entry of the history")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut entry: A) -> Result<First, A::Error> {
                let first =
                    entry.next_element()?.ok_or_else(|| serde::de::Error::invalid_length(0, &self))?;
                while entry.next_element::<IgnoredAny>()?.is_some() {}
                Ok(First(first))
            }
        }
        deserializer.deserialize_seq(Elements)
    }
}

//! Rows of several values in one: what few tasks have, and history entries.
//!
//! Why: SQLite's writer pays for every row and for every column of a row, whether or not it has something; sixteen entries in
//! one text cost a tenth of sixteen rows. JSON, so that SQL reads it: the views `history` and `tasks_wide` show columns.
//! Invariants: an entry stands where its number says, `seq` of its row and its place after that; an entry that goes with its
//! task leaves a 0 behind; what is stored is read by the statements here alone, and by those views.

use super::failed;
use super::staged::Row;
use crate::store::bind::{self, Cell};
use crate::store::entries::{ENTRIES, Entry};
use crate::store::moving::Kind;
use crate::store::text;
use ledger_core::Task;
use ledger_core::store::StoreError;
use rusqlite::{Connection, OptionalExtension as _, Result, Statement};
use serde_json::value::RawValue;
use std::collections::{BTreeMap, BTreeSet};

/// Rows that are kept while entries are read one by one: 16 MB of them.
const ROWS_KEPT: usize = 4_096;

/// What a stored text says.
type Read<T> = std::result::Result<T, StoreError>;

/// The columns that [`Columns::task`](crate::store::rows::Columns::task) reads, of `tasks AS t` and `task_specs AS s`.
macro_rules! task_columns {
    () => {
        "t.id, t.state, t.reason, t.priority, t.run_at, t.calendar, t.deadline, t.queued_at, t.updated_at, t.version, \
         t.fence, t.delivery, t.attempt, t.idle_deliveries, t.held, t.rare, s.agent, s.task_type, s.policy, s.created_at, \
         s.frees_key"
    };
}
/// The row that has the entry of this number.
macro_rules! row_of {
    ($seq:literal) => {
        concat!(
            "CROSS JOIN task_history AS r ON r.seq = (SELECT MAX(seq) FROM task_history WHERE seq <= ",
            $seq,
            ")"
        )
    };
}
/// The columns that [`Columns::record`](crate::store::rows::Columns::record) reads, of an entry `e.value` of a row with `e.task`
/// and `e.at`.
macro_rules! record_columns {
    () => {
        "e.task + (e.value ->> 0), e.value ->> 1, e.value ->> 3, e.value ->> 4, e.value ->> 5, e.value ->> 6, \
         e.at + (e.value ->> 7), e.value ->> 8, e.value ->> 9, e.value ->> 10, e.at + (e.value ->> 11), e.value ->> 12, \
         NULLIF(e.value -> 13, 'null'), NULLIF(e.value -> 14, 'null')"
    };
}
pub(super) use {record_columns, row_of, task_columns};

const NEWEST: &str = "SELECT t.history FROM json_each(?) AS gone CROSS JOIN tasks AS t ON t.id = gone.value";
const ROW: &str = "SELECT seq, task, at, entries FROM task_history WHERE seq <= ? ORDER BY seq DESC LIMIT 1";
/// ?2: the places of entries that go.
const CLEAR: &str = "UPDATE task_history SET entries = ( \
        SELECT json_group_array(CASE WHEN e.key IN (SELECT value FROM json_each(?2)) THEN 0 ELSE json(e.value) END ORDER BY e.key) \
        FROM json_each(entries) AS e) \
    WHERE seq = ?1";
const DELETE: &str = "DELETE FROM task_history WHERE seq = ?";

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 4] = [NEWEST, ROW, CLEAR, DELETE];

/// The text of `tasks.held`.
pub(super) fn held(task: &Task) -> Option<String> {
    let worker = task.holder.as_ref().map(|holder| &*holder.worker);
    let [a, b, c, d, e, f, g, h] = bind::held_numbers(task);
    let has = worker.is_some() || task.lease.is_some() || task.sample.is_some();
    has.then(|| text::written(&(worker, a, b, c, d, e, f, g, h)))
}

/// The text of `tasks.rare`.
pub(super) fn rare(task: &Task) -> Option<String> {
    let rare = bind::rare(task);
    rare.iter().any(Option::is_some).then(|| text::written(&rare))
}

/// A row of `task_history`.
pub(super) struct Packed {
    pub(super) seq: u64,
    pub(super) task: u64,
    pub(super) at: i64,
    pub(super) entries: String,
}

/// Rows for entries whose numbers follow one another.
pub(super) fn packed(rows: &[Row]) -> impl Iterator<Item = Packed> {
    rows.chunks(ENTRIES).map(|rows| {
        let first = &rows[0];
        let (seq, task, at) = (first.seq, first.record.task.0, first.record.at.millis());
        let entries: Vec<_> = rows
            .iter()
            .map(|Row { seq, prev, record }| {
                let back = prev.map_or(0, |prev| seq - prev);
                Entry { task, at, before: back, record }
            })
            .collect();
        Packed { seq, task, at, entries: text::written(&entries) }
    })
}

/// One entry, read back.
pub(super) struct Kept {
    seq: i64,
    task: i64,
    at: i64,
    text: Box<RawValue>,
}

impl Kept {
    /// Its values, each as its text.
    pub(super) fn fields(&self) -> Read<Fields<'_>> {
        Ok(Fields { of: self, values: text::parts(self.text.get())? })
    }

    /// The number of its task's entry before it; 0: it is the first.
    pub(super) fn before(&self) -> Read<i64> {
        match self.fields()?.int(2)?.unwrap_or_default() {
            0 => Ok(0),
            back if (1..self.seq).contains(&back) => Ok(self.seq - back),
            back => {
                Err(StoreError::Corrupt(format!("entry {} of the history is {back} after another", self.seq)))
            }
        }
    }
}

/// See [`Kept::fields`].
pub(super) struct Fields<'k> {
    of: &'k Kept,
    values: Vec<&'k RawValue>,
}

impl Fields<'_> {
    /// A value in the order of a file's columns, which is that of an entry but for the third: there it is the number, here how far
    /// back the one before is.
    pub(super) fn cell(&self, at: usize, kind: Kind) -> Read<Cell<'_>> {
        let from = |base: i64| Ok(self.int(at)?.map(|value| base + value).into());
        match at {
            0 => from(self.of.task),
            2 => Ok(self.of.seq.into()),
            7 | 11 => from(self.of.at),
            _ if kind == Kind::Int => Ok(self.int(at)?.into()),
            10 => Ok(self.text(at).map(text::read::<String>).transpose()?.into()),
            _ => Ok(self.text(at).into()),
        }
    }

    fn text(&self, at: usize) -> Option<&str> {
        self.values.get(at).map(|value| value.get()).filter(|text| *text != "null")
    }

    fn int(&self, at: usize) -> Read<Option<i64>> {
        self.text(at).map(text::read).transpose()
    }
}

/// Entries by their numbers, for who asks for many that are near each other.
pub(super) struct Entries<'c> {
    row: Statement<'c>,
    kept: BTreeMap<i64, Texts>,
}

/// Of a row: its task and time, and its entries.
type Texts = (i64, i64, Vec<Box<RawValue>>);

impl<'c> Entries<'c> {
    pub(super) fn of(conn: &'c Connection) -> Result<Self> {
        Ok(Self { row: conn.prepare(ROW)?, kept: BTreeMap::new() })
    }

    /// # Errors
    /// SQLite's, and that it is not there.
    pub(super) fn entry(&mut self, seq: i64) -> Read<Kept> {
        let near = |kept: &BTreeMap<i64, Texts>| {
            let (first, (task, at, entries)) = kept.range(..=seq).next_back()?;
            let text = entries.get(usize::try_from(seq - first).ok()?)?;
            Some(Kept { seq, task: *task, at: *at, text: text.clone() })
        };
        if near(&self.kept).is_none() {
            let row = self.row.query_row([seq], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get::<_, String>(3)?))
            });
            if let Some((first, task, at, entries)) = row.optional().map_err(|error| failed(&error))? {
                // Whoever goes through the tasks does not come back to the oldest.
                if self.kept.len() >= ROWS_KEPT {
                    self.kept.pop_first();
                }
                self.kept.insert(first, (task, at, text::read(&entries)?));
            }
        }
        let found = near(&self.kept).filter(|entry| entry.text.get() != "0");
        found.ok_or_else(|| StoreError::Corrupt(format!("entry {seq} of the history is missing")))
    }
}

/// Takes the entries of tasks away, `tasks` being a JSON list of them whose rows are still there: along the chain from the newest
/// entry of each, the rows from the newest on, so that each is read and written once.
pub(super) fn remove(conn: &Connection, tasks: &str) -> Result<()> {
    let newest =
        conn.prepare_cached(NEWEST)?.query_map([tasks], |row| row.get(0))?.collect::<Result<BTreeSet<i64>>>();
    let mut going = newest?;
    let mut row_of = conn.prepare_cached(ROW)?;
    while let Some(seq) = going.last().copied() {
        let row = row_of.query_row([seq], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(3)?)));
        let Some((first, entries)) = row.optional()? else { return Ok(()) };
        let entries: Vec<serde_json::Value> = serde_json::from_str(&entries).map_err(|error| {
            rusqlite::Error::FromSqlConversionFailure(3, rusqlite::types::Type::Text, error.into())
        })?;
        let mut places = BTreeSet::new();
        while let Some(seq) = going.last().copied().filter(|seq| *seq >= first) {
            going.remove(&seq);
            let place = usize::try_from(seq - first).unwrap_or(usize::MAX);
            let back = entries.get(place).and_then(|entry| entry.get(2)?.as_i64());
            going.extend(back.filter(|back| *back > 0).map(|back| seq - back));
            places.insert(place);
        }
        let stays =
            |(place, entry): (usize, &serde_json::Value)| entry.is_array() && !places.contains(&place);
        if entries.iter().enumerate().any(stays) {
            conn.prepare_cached(CLEAR)?.execute((first, text::written(&places)))?;
        } else {
            conn.prepare_cached(DELETE)?.execute([first])?;
        }
    }
    Ok(())
}

//! Reading the history of all tasks on from a place, as watches do.
//!
//! Rows of a slot commit in order and without a gap, and one statement sees a batch whole or not at all: a cut, whatever other
//! slots do meanwhile. Tasks that are gone may have left rows, which are passed over.

use super::packed::EntryPlace;
use super::read::PgReader;
use super::recover::read_all;
use crate::store::rows::{Shared, placed_columns};
use ledger_core::TaskId;
use ledger_core::store::StoreError;
use ledger_core::watch::{Cut, End, Happening, Placed, Stretch, in_order};
use std::collections::HashSet;

const END: &str = "SELECT m.seed, s.slot, s.last_seq, COALESCE(r.seq, 0) FROM meta AS m CROSS JOIN slots AS s \
    LEFT JOIN removed_history AS r ON r.slot = s.slot WHERE m.id = 1";
/// Of each slot at most $3 entries after the one that slots $1 have at $2, with the places of those they build on. A row may begin 15
/// before the first that is asked for. Each task's spec is looked up by itself: a plain join may be planned to read all there are.
pub(super) const AFTER: &str = concat!(
    "SELECT h.before_slot, h.before_seq, h.before_at, h.slot, h.seq, ",
    placed_columns!(),
    " FROM slots AS o \
     LEFT JOIN unnest($1::bigint[], $2::bigint[]) AS c (slot, seq) ON c.slot = o.slot \
     CROSS JOIN LATERAL (SELECT * FROM ( \
        (SELECT e.* FROM task_history AS r CROSS JOIN LATERAL unpacked(r.slot, r.seq, r.task, r.at, r.entries) AS e \
            WHERE r.slot = o.slot AND r.seq > COALESCE(c.seq, 0) - 16 AND e.seq > COALESCE(c.seq, 0) ORDER BY r.seq, e.seq LIMIT $3) \
        UNION ALL \
        (SELECT k.* FROM task_history_kept AS k \
            WHERE k.slot = o.slot AND k.seq > COALESCE(c.seq, 0) ORDER BY k.seq LIMIT $3) \
     ) AS of_slot ORDER BY of_slot.seq LIMIT $3) AS h \
     LEFT JOIN LATERAL (SELECT * FROM task_specs AS of_task WHERE of_task.id = h.task_id OFFSET 0) AS s ON true \
     WHERE o.last_seq > COALESCE(c.seq, 0) ORDER BY h.slot, h.seq"
);
const REMOVED: &str = "SELECT slot, seq FROM removed_history";

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 3] = [END, AFTER, REMOVED];

impl PgReader {
    pub(super) async fn history_end(&self) -> Result<End, StoreError> {
        let mut end = End { seed: 0, cut: Cut::default(), removed: Cut::default() };
        read_all(&self.rows(sqlx::query(END)).await?, |row| {
            end.seed = row.bits()?;
            let slot = row.narrow()?;
            end.cut.pass(slot, row.number()?);
            end.removed.pass(slot, row.number()?);
            Ok(())
        })?;
        Ok(end)
    }

    pub(super) async fn history_after(&self, cut: &Cut, limit: usize) -> Result<Option<Stretch>, StoreError> {
        let (slots, seqs): (Vec<i64>, Vec<i64>) =
            cut.slots().map(|(slot, seq)| (i64::from(slot), seq.cast_signed())).unzip();
        let query = sqlx::query(AFTER).bind(slots).bind(seqs).bind(limit as i64);
        let mut shared = Shared::default();
        let mut builds_on = Vec::new();
        let rows = read_all(&self.rows(query).await?, |row| {
            let before = EntryPlace::read(row)?;
            let placed = row.placed(&mut shared)?;
            // What a task left that is gone is waited for by nobody.
            if let Some(before) = before.filter(|_| placed.what.is_some()) {
                builds_on.push((placed.task, placed.version - 1, before));
            }
            Ok(placed)
        })?;
        let more = rows.chunk_by(|a, b| a.slot == b.slot).any(|of_slot| of_slot.len() == limit);
        let untold = if more { untold(cut, &rows, builds_on) } else { Vec::new() };
        // After them: what was removed before they were read is known of.
        let removed =
            read_all(&self.rows(sqlx::query(REMOVED)).await?, |row| Ok((row.narrow()?, row.number()?)))?;
        if !cut.reaches(&removed.into_iter().collect()) {
            return Ok(None);
        }
        Ok(Some(Stretch::of(cut, in_order(rows, untold), more)))
    }
}

/// What these rows build on, of what follows a cut and is not among them: it is beyond the limit.
fn untold(
    cut: &Cut,
    rows: &[Placed<Option<Happening>>],
    builds_on: Vec<(TaskId, u64, EntryPlace)>,
) -> Vec<(TaskId, u64)> {
    let here: HashSet<(TaskId, u64)> = rows.iter().map(|row| (row.task, row.version)).collect();
    let follows = |(task, version, place): (TaskId, u64, EntryPlace)| {
        (place.seq > cut.of(place.slot)).then_some((task, version))
    };
    builds_on.into_iter().filter_map(follows).filter(|entry| !here.contains(entry)).collect()
}

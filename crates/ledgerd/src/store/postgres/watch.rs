//! Reading the history of all tasks on from a place, as watches do.
//!
//! Rows of a slot commit in order and without a gap, and one statement sees a batch whole or not at all: a cut, whatever other
//! slots do meanwhile. Tasks that are gone may have left rows, which are passed over.

use super::read::PgReader;
use super::recover::read_all;
use crate::store::rows::{Shared, placed_columns};
use ledger_core::TaskId;
use ledger_core::store::StoreError;
use ledger_core::watch::{Cut, End, Happening, Placed, Stretch, in_order};
use std::collections::HashSet;

const END: &str = "SELECT m.seed, s.slot, s.last_seq, COALESCE(r.seq, 0) FROM meta AS m CROSS JOIN slots AS s \
    LEFT JOIN removed_history AS r ON r.slot = s.slot WHERE m.id = 1";
/// Of each slot at most $3 rows after the one that slots $1 have at $2. Each task's spec is looked up by itself: a plain join may be
/// planned to read all there are.
pub(super) const AFTER: &str = concat!(
    "SELECT h.slot, h.seq, ",
    placed_columns!(),
    " FROM slots AS o LEFT JOIN unnest($1::bigint[], $2::bigint[]) AS c (slot, seq) ON c.slot = o.slot \
     CROSS JOIN LATERAL (SELECT * FROM history AS of_slot \
        WHERE of_slot.slot = o.slot AND of_slot.seq > COALESCE(c.seq, 0) ORDER BY of_slot.seq LIMIT $3) AS h \
     LEFT JOIN LATERAL (SELECT * FROM task_specs AS of_task WHERE of_task.id = h.task_id OFFSET 0) AS s ON true \
     WHERE o.last_seq > COALESCE(c.seq, 0) ORDER BY h.slot, h.seq"
);
/// Where rows stand: of tasks $1 the versions $2, written at $3 at the latest.
pub(super) const PLACES: &str = "SELECT p.task_id, p.version, p.slot, p.seq \
    FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS w (task_id, version, at) \
    CROSS JOIN LATERAL (SELECT created_at FROM task_specs AS of_task WHERE of_task.id = w.task_id OFFSET 0) AS s \
    CROSS JOIN LATERAL (SELECT * FROM history AS h \
        WHERE h.task_id = w.task_id AND h.version = w.version AND h.at BETWEEN s.created_at AND w.at OFFSET 0) AS p";
const REMOVED: &str = "SELECT slot, seq FROM removed_history";

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 4] = [END, AFTER, PLACES, REMOVED];

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
        let rows = read_all(&self.rows(query).await?, |row| row.placed(&mut shared))?;
        let more = rows.chunk_by(|a, b| a.slot == b.slot).any(|of_slot| of_slot.len() == limit);
        // What a row builds on is among them, or beyond the limit.
        let untold = if more { self.untold(cut, &rows).await? } else { Vec::new() };
        // After them: what was removed before they were read is known of.
        let removed =
            read_all(&self.rows(sqlx::query(REMOVED)).await?, |row| Ok((row.narrow()?, row.number()?)))?;
        if !cut.reaches(&removed.into_iter().collect()) {
            return Ok(None);
        }
        Ok(Some(Stretch::of(cut, in_order(rows, untold), more)))
    }

    /// What these rows build on, of what follows a cut and is not among them.
    async fn untold(
        &self,
        cut: &Cut,
        rows: &[Placed<Option<Happening>>],
    ) -> Result<Vec<(TaskId, u64)>, StoreError> {
        if rows.windows(2).all(|pair| pair[0].slot == pair[1].slot) {
            // All that a slot builds on of its own comes before.
            return Ok(Vec::new());
        }
        let here: HashSet<(TaskId, u64)> = rows.iter().map(|row| (row.task, row.version)).collect();
        let builds = |row: &&Placed<Option<Happening>>| {
            row.version > 1 && !here.contains(&(row.task, row.version - 1))
        };
        let (mut tasks, mut versions, mut times) = (Vec::new(), Vec::new(), Vec::new());
        for row in rows.iter().filter(builds) {
            let Some(what) = &row.what else { continue };
            tasks.push(row.task.0.cast_signed());
            versions.push((row.version - 1).cast_signed());
            times.push(what.record.at.millis());
        }
        if tasks.is_empty() {
            return Ok(Vec::new());
        }
        let query = sqlx::query(PLACES).bind(tasks).bind(versions).bind(times);
        let places = read_all(&self.rows(query).await?, |row| {
            let builds_on = (row.task_id()?, row.number()?);
            let (slot, seq): (u16, u64) = (row.narrow()?, row.number()?);
            Ok((builds_on, seq > cut.of(slot)))
        })?;
        Ok(places.into_iter().filter_map(|(row, follows)| follows.then_some(row)).collect())
    }
}

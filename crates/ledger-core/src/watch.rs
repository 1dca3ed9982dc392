//! Watching the history of all tasks: how far somebody has come, and in which order rows are told.
//!
//! Each daemon numbers the rows that it writes, in its own slot, without a gap. So a place in the history is a number for
//! each slot, and rows of different slots have no order but one: what happens to a task is told in the order in which it
//! happened. Invariant: a [`Cut`] never lies before a row of a task and behind a later one of the same task.

use crate::event::Record;
use crate::id::{AgentId, TaskId};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;

/// A place in the history: for each slot the newest row that lies behind it. A slot that is not named has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cut(BTreeMap<u16, u64>);

impl Cut {
    /// The newest row of this slot that lies behind it, 0 for none.
    #[must_use]
    pub fn of(&self, slot: u16) -> u64 {
        self.0.get(&slot).copied().unwrap_or(0)
    }

    /// Moves it behind this row, unless it is.
    pub fn pass(&mut self, slot: u16, seq: u64) {
        let known = self.0.entry(slot).or_insert(0);
        *known = seq.max(*known);
    }

    /// Moves it behind all that lies behind another.
    pub fn pass_all(&mut self, other: &Self) {
        other.slots().for_each(|(slot, seq)| self.pass(slot, seq));
    }

    /// Whether no row lies behind `other` and not behind this one.
    #[must_use]
    pub fn reaches(&self, other: &Self) -> bool {
        other.slots().all(|(slot, seq)| self.of(slot) >= seq)
    }

    /// Slots with their newest rows, by slot.
    pub fn slots(&self) -> impl ExactSizeIterator<Item = (u16, u64)> + '_ {
        self.0.iter().map(|(slot, seq)| (*slot, *seq))
    }
}

impl FromIterator<(u16, u64)> for Cut {
    fn from_iter<I: IntoIterator<Item = (u16, u64)>>(slots: I) -> Self {
        let mut cut = Self::default();
        slots.into_iter().for_each(|(slot, seq)| cut.pass(slot, seq));
        cut
    }
}

/// Where the history ends, and of which ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The ledger's seed. One that was restored from a backup has another, for its history went back.
    pub seed: u64,
    /// Behind the newest row.
    pub cut: Cut,
    /// Behind the newest row of any task that was removed: from before it not all is there any more.
    pub removed: Cut,
}

/// A row of the history of a task that is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Happening {
    /// The row.
    pub record: Record,
    /// The agent that the task has now.
    pub agent: AgentId,
    /// Its type.
    pub task_type: Arc<str>,
    /// Its labels.
    pub labels: Vec<(String, String)>,
}

/// Rows in the order in which they are told.
#[derive(Clone, Debug, PartialEq)]
pub struct Stretch {
    /// Where it begins.
    pub from: Cut,
    /// Rows of tasks that are stored.
    pub rows: Vec<Placed<Happening>>,
    /// Where it ends.
    pub to: Cut,
    /// There was more to read.
    pub more: bool,
}

impl Stretch {
    /// Of rows in their order; those without a happening are of tasks that are not stored any more.
    #[must_use]
    pub fn of(from: &Cut, told: Vec<Placed<Option<Happening>>>, more: bool) -> Self {
        let mut to = from.clone();
        let stored = |row: Placed<Option<Happening>>| {
            to.pass(row.slot, row.seq);
            let Placed { slot, seq, task, version, what } = row;
            Some(Placed { slot, seq, task, version, what: what? })
        };
        let rows = told.into_iter().filter_map(stored).collect();
        Self { from: from.clone(), rows, to, more }
    }
}

/// A row as it was read; `what` is nothing that matters for its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed<T> {
    /// Who wrote it.
    pub slot: u16,
    /// Its number there.
    pub seq: u64,
    /// Whose.
    pub task: TaskId,
    /// Position in the task's own history.
    pub version: u64,
    /// The rest of it.
    pub what: T,
}

/// Puts rows of several slots into one order in which those of each task rise.
///
/// They are rows that follow a cut, those of each slot in order and without a gap. `untold` are those that follow it too and are not
/// among them, as task and version: where a slot was read to a limit. What builds on them is left out, to be read again.
#[must_use]
pub fn in_order<T>(rows: Vec<Placed<T>>, untold: impl IntoIterator<Item = (TaskId, u64)>) -> Vec<Placed<T>> {
    let mut waits: HashSet<(TaskId, u64)> = untold.into_iter().collect();
    if waits.is_empty() && rows.windows(2).all(|pair| pair[0].slot == pair[1].slot) {
        // As on a ledger with one daemon.
        return rows;
    }
    waits.extend(rows.iter().map(|row| (row.task, row.version)));
    let mut told = Vec::with_capacity(rows.len());
    let mut lanes: BTreeMap<u16, VecDeque<Placed<T>>> = BTreeMap::new();
    for row in rows {
        lanes.entry(row.slot).or_default().push_back(row);
    }
    loop {
        let before = told.len();
        for lane in lanes.values_mut() {
            while let Some(row) = lane.pop_front_if(|row| !waits.contains(&(row.task, row.version - 1))) {
                waits.remove(&(row.task, row.version));
                told.push(row);
            }
        }
        if told.len() == before {
            return told;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(slot: u16, seq: u64, task: u64, version: u64) -> Placed<()> {
        Placed { slot, seq, task: TaskId(task), version, what: () }
    }

    fn told(rows: &[Vec<Placed<()>>], untold: &[(u64, u64)]) -> Vec<(u16, u64)> {
        let untold = untold.iter().map(|(task, version)| (TaskId(*task), *version));
        in_order(rows.concat(), untold).iter().map(|row| (row.slot, row.seq)).collect()
    }

    #[test]
    fn a_cut_only_moves_on() {
        let mut cut: Cut = [(0, 3), (2, 1)].into_iter().collect();
        cut.pass(0, 2);
        cut.pass(1, 5);
        assert_eq!(cut.slots().collect::<Vec<_>>(), [(0, 3), (1, 5), (2, 1)]);
        assert_eq!(cut.of(7), 0);
        let behind: Cut = [(0, 3)].into_iter().collect();
        assert!(cut.reaches(&behind) && !behind.reaches(&cut) && cut.reaches(&Cut::default()));
    }

    #[test]
    fn versions_of_a_task_rise_across_slots() {
        // Task 1 goes from slot 0 to slot 1 and back.
        let zero = vec![row(0, 1, 1, 1), row(0, 2, 2, 1), row(0, 3, 1, 3)];
        let one = vec![row(1, 1, 1, 2), row(1, 2, 1, 4)];
        assert_eq!(told(&[one, zero], &[]), [(0, 1), (0, 2), (1, 1), (0, 3), (1, 2)]);
    }

    #[test]
    fn what_builds_on_a_row_that_was_not_read_waits() {
        let one = || vec![row(1, 1, 5, 1), row(1, 2, 1, 4), row(1, 3, 5, 2)];
        assert_eq!(told(&[one()], &[(1, 3)]), [(1, 1)]);
        let two = vec![row(2, 8, 5, 3), row(2, 9, 6, 1)];
        assert_eq!(told(&[one(), two], &[(1, 3)]), [(1, 1)], "nor what builds on that");
        assert_eq!(told(&[one()], &[]).len(), 3, "what lies before the cut does not matter");
    }

    #[test]
    fn any_split_of_a_history_between_slots_keeps_each_task_in_order() {
        // Numbers of a linear congruential generator (Knuth's MMIX) decide who writes what.
        let mut dice = 1_u64;
        let mut draw = |sides: u64| {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (dice >> 33) % sides
        };
        for _ in 0..300 {
            let mut lanes: Vec<Vec<Placed<()>>> = vec![Vec::new(); 3];
            let mut versions = [0; 5];
            for _ in 0..60 {
                let (slot, task) = (draw(3) as usize, draw(5) as usize);
                versions[task] += 1;
                let seq = lanes[slot].len() as u64 + 1;
                lanes[slot].push(row(slot as u16, seq, task as u64, versions[task]));
            }
            // Read to a limit, one stretch after the other, as a watch does.
            let (mut cut, mut seen) = (Cut::default(), [0; 5]);
            let limit = 1 + draw(10) as usize;
            while (0..3).any(|slot| cut.of(slot) < lanes[usize::from(slot)].len() as u64) {
                let rest = |slot: usize| &lanes[slot][cut.of(slot as u16) as usize..];
                let read = (0..3).flat_map(|slot| rest(slot).iter().take(limit).cloned()).collect();
                let untold: Vec<_> = (0..3).flat_map(|slot| rest(slot).iter().skip(limit)).collect();
                let told = in_order(read, untold.iter().map(|row| (row.task, row.version)));
                assert!(!told.is_empty(), "it goes on");
                for row in told {
                    let seen = &mut seen[row.task.0 as usize];
                    assert_eq!(row.version, *seen + 1);
                    *seen = row.version;
                    assert_eq!(row.seq, cut.of(row.slot) + 1, "no row is left out");
                    cut.pass(row.slot, row.seq);
                }
            }
            assert_eq!(seen, versions);
        }
    }
}

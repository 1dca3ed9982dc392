//! Going through what lives, a piece at a time: what a start has to watch over, and what is looked at anew later.
//!
//! A million tasks may wait, and the server ends a statement after 5 s. Invariants: a statement looks into a bounded number of blocks
//! that have live tasks, into each by itself and by index, never at finished ones elsewhere; what is on its way hides what is stored.

use super::PgStore;
use super::packed::Found;
use super::recover::{all, found_columns};
use super::staged::BLOCK_BITS;
use crate::store::rows::Shared;
use ledger_core::store::{Piece, StoreError};
use ledger_core::{AgentId, ByTask, TaskId};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Blocks that have live tasks and how many, from $1 on: $2 at most.
const LIVE_BLOCKS: &str = "SELECT block, sum(n)::bigint FROM live_blocks WHERE block >= $1 \
    GROUP BY block HAVING sum(n) > 0 ORDER BY block LIMIT $2";
/// Blocks that one statement looks into: it must end long before the server ends it, however many tasks wait.
const BLOCKS_AT_ONCE: usize = 16;
/// Live tasks that one statement returns, but for those of the first block.
const LIVE_AT_ONCE: u64 = 1 << BLOCK_BITS;
/// Tasks of blocks $1, each block by itself: two ranges of two keys side by side.
macro_rules! in_blocks {
    ($condition:literal) => {
        concat!(
            "SELECT found.* FROM unnest($1::bigint[]) AS b (block) CROSS JOIN LATERAL (SELECT ",
            found_columns!(),
            " FROM tasks AS t JOIN task_specs AS s ON s.id = t.id \
              WHERE t.id BETWEEN b.block << 12 AND (b.block << 12) + 4095 \
                AND s.id BETWEEN b.block << 12 AND (b.block << 12) + 4095 AND (",
            $condition,
            ") OFFSET 0) AS found"
        )
    };
}
/// Those that have a timer or a holder; $2: agents whose tasks have a queue_timeout. RUNNING is 2, RETRY 3, BLOCKED 4;
/// $3 is the reason BUDGET.
const TIMED: &str = in_blocks!(
    "t.state IN (2, 4) OR t.state = 3 AND t.reason = $3 \
     OR t.state IN (1, 3) AND (t.deadline IS NOT NULL OR s.agent = ANY($2) OR s.policy LIKE '%queue_timeout%')"
);
/// Those of agents $2 that have not ended.
const LIVE: &str = in_blocks!("t.state <= 4 AND s.agent = ANY($2)");

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) const STATEMENTS: [&str; 3] = [LIVE_BLOCKS, TIMED, LIVE];

impl PgStore {
    /// Blocks with live tasks from this one on, the first few.
    async fn live_blocks(&mut self, from: u64) -> Result<Vec<(u64, u64)>, StoreError> {
        let query = sqlx::query(LIVE_BLOCKS).bind(from.cast_signed()).bind(BLOCKS_AT_ONCE as i64);
        all(self.connection()?, query, |row| Ok((row.number()?, row.number()?))).await
    }

    /// Tells the others before each piece but the first that this daemon lives.
    pub(super) async fn find_timed(
        &mut self,
        queues: &BTreeSet<AgentId>,
        from: TaskId,
    ) -> Result<Piece, StoreError> {
        if from.0 > 0 {
            self.show_life().await?;
        }
        let blocks = self.live_blocks(from.0 >> BLOCK_BITS).await?;
        let rest = blocks.get(BLOCKS_AT_ONCE - 1).map(|(last, _)| TaskId((last + 1) << BLOCK_BITS));
        let query = sqlx::query(TIMED)
            .bind(blocks.iter().map(|(block, _)| block.cast_signed()).collect::<Vec<_>>())
            .bind(agent_numbers(queues))
            .bind(i64::from(ledger_core::Reason::Budget.code()));
        let mut shared = Shared::default();
        let mut timed: Vec<_> =
            all(self.connection()?, query, |row| row.task(&mut shared).map(Arc::new)).await?;
        if self.watches_own {
            let slot = self.place.slot;
            timed.retain(|task| task.holder.as_ref().is_some_and(|holder| holder.session.slot() == slot));
        }
        Ok((timed, rest))
    }

    pub(super) async fn find_live(
        &mut self,
        agents: &BTreeSet<AgentId>,
        from: TaskId,
    ) -> Result<Piece, StoreError> {
        self.begin_once().await?;
        let blocks = self.live_blocks(from.0 >> BLOCK_BITS).await?;
        let mut live = 0;
        let few = blocks.iter().take_while(|(_, n)| {
            live += n;
            live == *n || live <= LIVE_AT_ONCE
        });
        let these: Vec<i64> = few.map(|(block, _)| block.cast_signed()).collect();
        let rest = match blocks.get(these.len()) {
            Some((next, _)) => Some(*next),
            None => blocks.get(BLOCKS_AT_ONCE - 1).map(|(last, _)| last + 1),
        };
        let query = sqlx::query(LIVE).bind(these).bind(agent_numbers(agents));
        let mut shared = Shared::default();
        let found = all(self.connection()?, query, |row| Found::read(row, &mut shared)).await?;
        // What is newer hides what is older: the open batch, the one before it, the database.
        let found = found.into_iter().filter(|found| found.task.id >= from);
        let mut live: ByTask<Found> = found.map(|found| (found.task.id, found)).collect();
        for staged in self.on_the_way().chain([&self.staged]) {
            for (id, image) in &staged.tasks {
                if agents.contains(&image.task.spec.agent) && !image.task.state.is_terminal() {
                    live.insert(*id, image.found());
                } else {
                    live.remove(id);
                }
            }
        }
        let tasks = self.remember(live.into_values().collect());
        Ok((tasks, rest.map(|block| TaskId(block << BLOCK_BITS))))
    }
}

fn agent_numbers(agents: &BTreeSet<AgentId>) -> Vec<i64> {
    agents.iter().map(|id| i64::from(id.0)).collect()
}

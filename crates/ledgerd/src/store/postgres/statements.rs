//! What a batch may write, as SQL: the tables of its rows, and the statements beside them.
//!
//! Texts alone: which of them a batch needs, and in which order, is said where they are written.

use super::table::Kind::{self, Int, Int2, Int4, Real, Text};
use super::table::Table;

/// The columns of a task's row that most need, as `bind` has them, where its newest entry stands, and more.
macro_rules! lean_row {
    ($($more:expr),*) => {
        &[
            ("id", Int), ("state", Int2), ("reason", Int2), ("priority", Int2), ("run_at", Int), ("calendar", Int2),
            ("deadline", Int), ("queued_at", Int), ("updated_at", Int), ("version", Int), ("fence", Int),
            ("delivery", Int4), ("attempt", Int4), ("idle_deliveries", Int4), ("worker", Text), ("incarnation", Int),
            ("session", Int), ("lease_until", Int), ("acked_at", Int), ("progress_at", Int), ("sample_epoch", Int),
            ("sample_probe", Int2), ("sample_told", Int2), ("history_slot", Int2), ("history_seq", Int),
            ("history_at", Int), $($more),*
        ]
    };
}
/// The same with what few have, and a result.
macro_rules! task_row {
    ($($more:expr),*) => {
        lean_row!(
            ("retry_count", Int4), ("losses", Int4), ("preemptions", Int4), ("redrives", Int4), ("probe_failures", Int4),
            ("tokens", Int4), ("previous_delay", Int), ("stop_cause", Int2), ("stop_until", Int), ("discarded", Int2),
            ("loss_weight", Int4), ("lost_at", Int), ("free_releases", Int4), ("blocks", Int4), ("result", Kind::Bytes)
            $(, $more)*
        )
    };
}

/// The columns of what a producer said, as `bind` has them, and more.
macro_rules! spec_row {
    ($($more:expr),*) => {
        &[
            ("id", Int), ("agent", Int4), ("task_type", Text), ("created_at", Int), ("payload", Kind::Bytes),
            ("labels", Text), ("policy", Text), ("traceparent", Text), ("tracestate", Text), ("key", Text),
            ("digest", Int), ("frees_key", Int2), ("parent", Int), $($more),*
        ]
    };
}

/// Each holds its key, if it has one: a unique index says who holds which.
pub(super) static SPECS: Table = Table::new("lean_task_specs", "INSERT INTO task_specs", spec_row!(), "");
/// Where one of them held its key no longer than this batch.
pub(super) static FREED_SPECS: Table =
    Table::new("freed_task_specs", "INSERT INTO task_specs", spec_row!(("key_freed", Int2)), "");
pub(super) static NEW_TASKS: Table = Table::new("new_tasks", "INSERT INTO tasks", task_row!(), "");
pub(super) static LEAN_NEW_TASKS: Table = Table::new("lean_tasks", "INSERT INTO tasks", lean_row!(), "");
macro_rules! update_tasks {
    ($rare:expr) => {
        concat!(
            "UPDATE tasks AS t SET state = new.state, reason = new.reason, priority = new.priority, run_at = new.run_at, \
             calendar = new.calendar, deadline = new.deadline, queued_at = new.queued_at, updated_at = new.updated_at, \
             version = new.version, fence = new.fence, delivery = new.delivery, attempt = new.attempt, \
             idle_deliveries = new.idle_deliveries, worker = new.worker, incarnation = new.incarnation, \
             session = new.session, lease_until = new.lease_until, acked_at = new.acked_at, \
             progress_at = new.progress_at, sample_epoch = new.sample_epoch, sample_probe = new.sample_probe, \
             sample_told = new.sample_told, history_slot = new.history_slot, history_seq = new.history_seq, \
             history_at = new.history_at, result = COALESCE(new.result, t.result), ",
            $rare
        )
    };
}
/// Only those that are as they were read; names them. A comparison with an array of one number is looked up by the index as one with
/// the number is, but has no join in the order of that index, which may be planned to walk through all of it.
const AS_READ: &str = "WHERE t.id = ANY (ARRAY[new.id]) AND t.version = new.expected AND t.session IS NOT DISTINCT FROM new.held \
    RETURNING t.id";
pub(super) static TASKS: Table = Table::new(
    "changed_tasks",
    update_tasks!(
        "retry_count = new.retry_count, losses = new.losses, preemptions = new.preemptions, redrives = new.redrives, \
         probe_failures = new.probe_failures, tokens = new.tokens, previous_delay = new.previous_delay, \
         stop_cause = new.stop_cause, stop_until = new.stop_until, discarded = new.discarded, \
         loss_weight = new.loss_weight, lost_at = new.lost_at, free_releases = new.free_releases, blocks = new.blocks"
    ),
    task_row!(("expected", Int), ("held", Int)),
    AS_READ,
);
/// For a task without what few have: whatever its row had of it goes.
macro_rules! nothing_rare {
    () => {
        "retry_count = NULL, losses = NULL, preemptions = NULL, redrives = NULL, probe_failures = NULL, tokens = NULL, \
         previous_delay = NULL, stop_cause = NULL, stop_until = NULL, discarded = NULL, loss_weight = NULL, \
         lost_at = NULL, free_releases = NULL, blocks = NULL"
    };
}
pub(super) static LEAN_TASKS: Table = Table::new(
    "lean_changed_tasks",
    update_tasks!(nothing_rare!()),
    lean_row!(("result", Kind::Bytes), ("expected", Int), ("held", Int)),
    AS_READ,
);
/// Where all of them end: what an end takes from a row is said by the statement, and what it leaves is not sent.
pub(super) static ENDED_TASKS: Table = Table::new(
    "lean_ended_tasks",
    concat!(
        "UPDATE tasks AS t SET state = new.state, reason = new.reason, updated_at = new.updated_at, version = new.version, \
         attempt = new.attempt, idle_deliveries = new.idle_deliveries, worker = NULL, incarnation = NULL, session = NULL, \
         lease_until = NULL, acked_at = NULL, progress_at = NULL, sample_epoch = NULL, sample_probe = NULL, \
         sample_told = NULL, history_slot = new.history_slot, history_seq = new.history_seq, \
         history_at = new.history_at, result = COALESCE(new.result, t.result), ",
        nothing_rare!()
    ),
    &[
        ("id", Int),
        ("state", Int2),
        ("reason", Int2),
        ("updated_at", Int),
        ("version", Int),
        ("attempt", Int4),
        ("idle_deliveries", Int4),
        ("history_slot", Int2),
        ("history_seq", Int),
        ("history_at", Int),
        ("result", Kind::Bytes),
        ("expected", Int),
        ("held", Int),
    ],
    AS_READ,
);
pub(super) static HISTORY: Table = Table::new(
    "packed_history",
    "INSERT INTO task_history",
    &[("slot", Int2), ("seq", Int), ("task", Int), ("at", Int), ("entries", Text)],
    "",
);
pub(super) static READY: Table = Table::new(
    "new_ready",
    "INSERT INTO ready",
    &[
        ("agent", Int),
        ("task_type", Text),
        ("gated", Int),
        ("urgency", Int),
        ("run_at", Int),
        ("calendar", Int),
        ("task_id", Int),
    ],
    "",
);
pub(super) static RESULTS: Table = Table::new(
    "new_results",
    "INSERT INTO results",
    &[("task_id", Int), ("result", Kind::Bytes)],
    "ON CONFLICT (task_id) DO UPDATE SET result = excluded.result",
);
pub(super) static SALVAGE: Table = Table::new(
    "new_salvage",
    "INSERT INTO salvage",
    &[("task_id", Int), ("fence", Int), ("result", Kind::Bytes)],
    "ON CONFLICT (task_id, fence) DO UPDATE SET result = excluded.result",
);
pub(super) static NOTES: Table = Table::new(
    "new_task_notes",
    "INSERT INTO task_notes AS n",
    &[
        ("task_id", Int),
        ("error", Text),
        ("checkpoint", Kind::Bytes),
        ("progress_fraction", Real),
        ("progress_note", Text),
        ("progress_at", Int),
        ("question", Text),
        ("answer", Text),
    ],
    "ON CONFLICT (task_id) DO UPDATE SET \
        error = COALESCE(excluded.error, n.error), \
        checkpoint = COALESCE(excluded.checkpoint, n.checkpoint), \
        progress_fraction = COALESCE(excluded.progress_fraction, n.progress_fraction), \
        progress_note = COALESCE(excluded.progress_note, n.progress_note), \
        progress_at = COALESCE(excluded.progress_at, n.progress_at), \
        question = COALESCE(excluded.question, n.question), \
        answer = COALESCE(excluded.answer, n.answer)",
);
pub(super) static LETTERS: Table = Table::new(
    "new_dead_letters",
    "INSERT INTO dead_letter_queue",
    &[
        ("task_id", Int),
        ("agent", Int),
        ("task_type", Text),
        ("reason", Int),
        ("error", Text),
        ("fingerprint", Int),
        ("failed_at", Int),
        ("attempt", Int),
        ("redrives", Int),
        ("discarded_at", Int),
        ("discard_reason", Text),
    ],
    "ON CONFLICT (task_id) DO UPDATE SET agent = excluded.agent, task_type = excluded.task_type, \
        reason = excluded.reason, error = excluded.error, fingerprint = excluded.fingerprint, \
        failed_at = excluded.failed_at, attempt = excluded.attempt, redrives = excluded.redrives, \
        discarded_at = excluded.discarded_at, discard_reason = excluded.discard_reason",
);
pub(super) static REQUESTS: Table = Table::new(
    "new_requests",
    "INSERT INTO requests",
    &[("id", Text), ("digest", Int), ("answer", Kind::Bytes), ("at", Int)],
    "",
);
pub(super) static EVENTS: Table = Table::new(
    "new_agent_events",
    "INSERT INTO agent_events",
    &[
        ("agent", Int),
        ("task_type", Text),
        ("at", Int),
        ("kind", Int),
        ("from_state", Text),
        ("to_state", Text),
        ("cause", Text),
        ("epoch", Int),
        ("actor", Text),
        ("reason", Text),
        ("until", Int),
    ],
    "",
);
/// One that is there is held until the commit, so that nobody takes it away meanwhile: see [`HOLD_BLOCKS`].
pub(super) static AGENT_BLOCKS: Table = Table::new(
    "new_agent_blocks",
    "INSERT INTO agent_blocks",
    &[("agent", Int4), ("block", Int)],
    "ON CONFLICT (agent, block) DO UPDATE SET block = excluded.block",
);
pub(super) static COUNTS: Table = Table::new(
    "new_counts",
    "INSERT INTO counts AS c",
    &[("slot", Int), ("agent", Int), ("state", Int), ("n", Int)],
    "ON CONFLICT (slot, agent, state) DO UPDATE SET n = c.n + excluded.n",
);
const BLOCK_ROW: &[(&str, Kind)] = &[("block", Int), ("slot", Int), ("n", Int)];
/// But for those that [`EMPTY_BLOCKS`] takes away, by the same statement.
pub(super) static LIVE_BLOCKS: Table = Table::new(
    "new_live_blocks",
    "INSERT INTO live_blocks AS b",
    BLOCK_ROW,
    "WHERE NOT EXISTS (SELECT FROM live_blocks AS own \
        WHERE own.block = new.block AND own.slot = new.slot AND own.n + new.n = 0) \
     ON CONFLICT (block, slot) DO UPDATE SET n = b.n + excluded.n",
);
pub(super) static EMPTY_BLOCKS: Table = Table::new(
    "new_live_blocks",
    "DELETE FROM live_blocks AS b",
    BLOCK_ROW,
    "WHERE b.block = new.block AND b.slot = new.slot AND b.n + new.n = 0",
);

pub(super) const LEAVE_READY: &str = "DELETE FROM ready WHERE task_id = ANY($1)";
/// The same, but for those that another daemon holds; names one of these.
pub(super) const LEAVE_READY_AT_ONCE: &str = "WITH gone AS ( \
    DELETE FROM ready AS r USING (SELECT ctid AS place FROM ready WHERE task_id = ANY($1) FOR UPDATE SKIP LOCKED) AS free \
    WHERE r.ctid = free.place RETURNING r.task_id) \
    SELECT r.task_id FROM ready AS r WHERE r.task_id = ANY($1) AND r.task_id NOT IN (SELECT task_id FROM gone) LIMIT 1";
pub(super) const FREE_KEYS: &str =
    "UPDATE task_specs SET key_freed = 1 WHERE id = ANY($1) AND key IS NOT NULL AND key_freed IS NULL";
/// Tasks and the agents they go to, with the keys that they hold.
pub(super) const MOVE_SPECS: &str = "UPDATE task_specs AS t SET agent = moved.agent \
    FROM unnest($1::bigint[], $2::bigint[]) AS moved (id, agent) WHERE t.id = ANY (ARRAY[moved.id])";
pub(super) const NEW_PAYLOAD: &str = "UPDATE task_specs SET payload = $1 WHERE id = ANY($2)";
pub(super) const REDRIVEN: &str = "DELETE FROM dead_letter_queue WHERE task_id = ANY($1)";
pub(super) const PRUNE_SALVAGE: &str = "DELETE FROM salvage AS s WHERE s.task_id = ANY($1) AND s.fence NOT IN ( \
    SELECT newest.fence FROM salvage AS newest WHERE newest.task_id = s.task_id ORDER BY newest.fence DESC LIMIT $2)";
/// The oldest alone, a bounded number; two daemons at this do not wait for each other. They are found once: as a subquery they
/// might be looked for again for each row of the table.
pub(super) const PURGE_REQUESTS: &str = "DELETE FROM requests WHERE id = ANY(ARRAY( \
    SELECT id FROM requests WHERE at < $1 ORDER BY at LIMIT $2 FOR UPDATE SKIP LOCKED))";
pub(super) const GONE_WORKERS: &str = "DELETE FROM sessions WHERE worker = ANY($1) AND open = 0";
pub(super) const OLD_EVENTS: &str = "DELETE FROM agent_events WHERE seq = ANY(ARRAY( \
    SELECT seq FROM (SELECT seq, at FROM agent_events ORDER BY seq LIMIT $1) AS oldest WHERE at < $2))";
/// First, so that the statement after it sees tasks of whoever held them.
pub(super) const HOLD_BLOCKS: &str = "SELECT count(*) FROM unnest($1::integer[], $2::bigint[]) AS w (agent, block) CROSS JOIN LATERAL ( \
    SELECT own.block FROM agent_blocks AS own WHERE own.agent = w.agent AND own.block = w.block FOR UPDATE) AS held";
/// Those without a task of their agent.
pub(super) const LEFT_BLOCKS: &str = "DELETE FROM agent_blocks AS b USING unnest($1::integer[], $2::bigint[]) AS w (agent, block) \
    CROSS JOIN LATERAL (SELECT own.ctid AS place FROM agent_blocks AS own \
        WHERE own.agent = w.agent AND own.block = w.block OFFSET 0) AS found \
    WHERE b.ctid = found.place AND (SELECT s.id FROM task_specs AS s \
        WHERE s.id BETWEEN w.block << 4 AND (w.block << 4) + 15 AND s.agent = w.agent LIMIT 1) IS NULL";
/// Before their rows go. In the order of slots, as another daemon that is at it.
pub(super) const REMOVED: &str = "INSERT INTO removed_history AS r (slot, seq) \
    SELECT newest.slot, max(newest.seq) FROM ( \
        SELECT history_slot AS slot, history_seq AS seq FROM tasks WHERE id = ANY($1) AND history_slot IS NOT NULL \
        UNION ALL SELECT slot, seq FROM task_history_kept WHERE task_id = ANY($1) \
    ) AS newest GROUP BY newest.slot ORDER BY newest.slot \
    ON CONFLICT (slot) DO UPDATE SET seq = excluded.seq WHERE r.seq < excluded.seq";
/// Those that are as they were judged; names them.
pub(super) const REMOVE_TASKS: &str = "DELETE FROM tasks AS t USING unnest($1::bigint[], $2::bigint[]) AS judged (id, version) \
    WHERE t.id = ANY (ARRAY[judged.id]) AND t.version = judged.version RETURNING t.id";
/// All that belongs to tasks, but history that goes with its day.
pub(super) const REMOVE: [&str; 6] = [
    "DELETE FROM task_history_kept WHERE task_id = ANY($1)",
    "DELETE FROM results WHERE task_id = ANY($1)",
    "DELETE FROM salvage WHERE task_id = ANY($1)",
    "DELETE FROM task_notes WHERE task_id = ANY($1)",
    "DELETE FROM dead_letter_queue WHERE task_id = ANY($1)",
    "DELETE FROM task_specs WHERE id = ANY($1)",
];

/// How all that a batch has is written.
#[cfg(test)]
pub(super) fn tables() -> impl Iterator<Item = &'static Table> {
    let here = [
        &SPECS,
        &FREED_SPECS,
        &NEW_TASKS,
        &LEAN_NEW_TASKS,
        &TASKS,
        &LEAN_TASKS,
        &ENDED_TASKS,
        &HISTORY,
        &READY,
        &RESULTS,
        &SALVAGE,
        &NOTES,
        &LETTERS,
        &REQUESTS,
        &EVENTS,
        &AGENT_BLOCKS,
        &COUNTS,
        &LIVE_BLOCKS,
        &EMPTY_BLOCKS,
    ];
    here.into_iter().chain(super::shared::TABLES)
}

/// Every statement here, for a test to prepare.
#[cfg(test)]
pub(super) fn statements() -> Vec<String> {
    use super::slots::slot_text;
    use super::table::Together;

    let fixed = [
        REMOVED,
        REMOVE_TASKS,
        LEAVE_READY,
        LEAVE_READY_AT_ONCE,
        FREE_KEYS,
        MOVE_SPECS,
        NEW_PAYLOAD,
        REDRIVEN,
        PRUNE_SALVAGE,
        PURGE_REQUESTS,
        GONE_WORKERS,
        OLD_EVENTS,
        HOLD_BLOCKS,
        LEFT_BLOCKS,
    ];
    let alone = tables().map(|table| table.text(1));
    let new: [&Table; 3] = [&SPECS, &LEAN_NEW_TASKS, &HISTORY];
    let changed: [&Table; 8] =
        [&READY, &RESULTS, &LETTERS, &NOTES, &SALVAGE, &REQUESTS, &EVENTS, &LEAN_TASKS];
    let tallies: [&Table; 4] = [&EMPTY_BLOCKS, &LIVE_BLOCKS, &AGENT_BLOCKS, &COUNTS];
    let together = [
        Together::text(&new),
        Together::text(&changed),
        Together::text(&[&new[..], &changed[..]].concat()),
        Together::text_before(&tallies, slot_text),
        Together::text_before(&[], slot_text),
    ];
    alone.chain(together).chain(fixed.into_iter().chain(REMOVE).map(str::to_owned)).collect()
}

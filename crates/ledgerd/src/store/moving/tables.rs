//! The durable tables of a ledger in the form that both stores share: the one place that names their columns.
//!
//! What can be derived is not here: `ready`, `counts`, `live_blocks` and `agent_blocks` are made anew by an import, and so
//! are `prev` and `history`, the chains of SQLite's history. Invariants: the rows of a table come in the order of a key that is
//! the same in both stores, texts by their bytes; a column means the same in both. A change here that a file shows is a new
//! format.

use Kind::{Bytes, Int, Rare, Real, Session, Text};

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Kind {
    /// A whole number of 64 bits with its sign.
    Int,
    /// One that is mostly 0, which PostgreSQL stores as NULL. Never NULL in a file.
    Rare,
    /// The number of a session, an Int. PostgreSQL may have a slot in its upper 16 bits; a file has one numbering.
    Session,
    /// A number of 64 bits with a point.
    Real,
    /// Text.
    Text,
    /// Bytes.
    Bytes,
}

/// One durable table.
#[derive(Debug)]
pub(in crate::store) struct Table {
    /// What it is called, in a file and in both stores.
    pub(in crate::store) name: &'static str,
    /// Its columns, in the order of a file's rows.
    pub(in crate::store) columns: &'static [(&'static str, Kind)],
    /// Where its rows come from in SQLite, in order.
    pub(in crate::store) sqlite: &'static str,
    /// The same in PostgreSQL.
    pub(in crate::store) postgres: &'static str,
    /// Columns that PostgreSQL alone has, with what they begin with: all that is imported belongs to slot 0.
    pub(in crate::store) of_postgres: &'static [(&'static str, &'static str)],
}

impl Table {
    /// Reads all of it from `source` in SQLite.
    pub(in crate::store) fn select(&self, source: &str) -> String {
        format!("SELECT {} FROM {source}", self.names())
    }

    /// Reads all of it from `source` in PostgreSQL.
    pub(in crate::store) fn select_of_slots(&self, source: &str) -> String {
        let column = |(name, kind): &(&str, Kind)| match kind {
            Session => ONE_SESSION.to_owned(),
            _ => format!("\"{name}\""),
        };
        let columns: Vec<_> = self.columns.iter().map(column).collect();
        format!("SELECT {} FROM {source}", columns.join(", "))
    }

    /// Its columns, quoted, with commas between.
    pub(in crate::store) fn names(&self) -> String {
        let names: Vec<_> = self.columns.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        names.join(", ")
    }

    /// Whether a new store has rows of it. Of budgets there may be, for they fill with time alone.
    pub(in crate::store) fn is_of_new_stores(&self) -> bool {
        matches!(self.name, "meta" | "budgets")
    }
}

/// Numbers of tasks that PostgreSQL takes at once; SQLite's last one is told as a block that is begun.
pub(in crate::store) const TASK_BLOCK: i64 = 1_000;

/// History where several slots have rows: one numbering for all of them, in which the rows of a task stay in their order, for
/// `at` is never below that of the row before. It ends where their numbers together do, as transitions are counted by it.
pub(in crate::store) const HISTORY_OF_SLOTS: &str = "( \
    SELECT task_id, version, row_number() OVER (ORDER BY at, task_id, version) \
        + (SELECT sum(last_seq) FROM slots)::bigint - count(*) OVER () AS seq, \
        kind, from_state, to_state, reason, at, fence, attempt, worker, until, digest, error, facts \
    FROM history WHERE task_id IN (SELECT id FROM tasks)) AS h ORDER BY task_id, version";

/// The sessions of a slot are numbered after those of the slots before it; those of slot 0 keep their numbers.
const ONE_SESSION: &str = "CASE WHEN session >> 48 = 0 THEN session ELSE (session & 281474976710655) \
    + (SELECT COALESCE(sum(s.last_session & 281474976710655), 0)::bigint FROM slots AS s WHERE s.slot < session >> 48) \
    END AS session";

/// In the order of a file.
pub(in crate::store) static TABLES: [Table; 15] = [
    // One row. `task_blocks`: every number below that many thousands may have been given to a task.
    Table {
        name: "meta",
        columns: &[
            ("seed", Int),
            ("created_at", Int),
            ("task_blocks", Int),
            ("last_seq", Int),
            ("last_session", Int),
        ],
        sqlite: "(SELECT seed, created_at, CASE last_task WHEN 0 THEN 0 ELSE last_task / 1000 + 1 END AS task_blocks, \
            last_seq, last_session FROM meta WHERE id = 1)",
        postgres: "(SELECT m.seed, m.created_at, \
            (SELECT CASE WHEN is_called THEN last_value + 1 ELSE last_value END FROM task_blocks) AS task_blocks, \
            (SELECT COALESCE(sum(last_seq), 0)::bigint FROM slots) AS last_seq, \
            (SELECT COALESCE(sum(last_session & 281474976710655), 0)::bigint FROM slots) AS last_session \
            FROM meta AS m WHERE m.id = 1) AS m",
        of_postgres: &[],
    },
    Table {
        name: "agents",
        columns: &[("id", Int), ("name", Text), ("settings", Text), ("created_at", Int), ("pause", Text)],
        sqlite: "agents ORDER BY id",
        postgres: "agents ORDER BY id",
        of_postgres: &[],
    },
    Table {
        name: "task_specs",
        columns: &[
            ("id", Int),
            ("agent", Int),
            ("task_type", Text),
            ("created_at", Int),
            ("payload", Bytes),
            ("labels", Text),
            ("policy", Text),
            ("traceparent", Text),
            ("tracestate", Text),
            ("key", Text),
            ("digest", Int),
            ("frees_key", Int),
            ("parent", Int),
        ],
        sqlite: "task_specs ORDER BY id",
        postgres: "task_specs ORDER BY id",
        of_postgres: &[],
    },
    Table {
        name: "tasks",
        columns: &[
            ("id", Int),
            ("state", Int),
            ("reason", Int),
            ("priority", Int),
            ("run_at", Int),
            ("calendar", Int),
            ("deadline", Int),
            ("queued_at", Int),
            ("updated_at", Int),
            ("version", Int),
            ("fence", Int),
            ("delivery", Int),
            ("attempt", Int),
            ("idle_deliveries", Int),
            ("worker", Text),
            ("incarnation", Int),
            ("session", Session),
            ("lease_until", Int),
            ("acked_at", Int),
            ("progress_at", Int),
            ("sample_epoch", Int),
            ("sample_probe", Int),
            ("sample_told", Int),
            ("retry_count", Rare),
            ("losses", Rare),
            ("preemptions", Rare),
            ("redrives", Rare),
            ("probe_failures", Rare),
            ("tokens", Rare),
            ("previous_delay", Rare),
            ("stop_cause", Int),
            ("stop_until", Int),
            ("discarded", Rare),
            ("loss_weight", Rare),
            ("lost_at", Int),
            ("free_releases", Rare),
            ("blocks", Rare),
        ],
        sqlite: "tasks_wide ORDER BY id",
        postgres: "tasks ORDER BY id",
        of_postgres: &[],
    },
    Table {
        name: "task_notes",
        columns: &[
            ("task_id", Int),
            ("error", Text),
            ("checkpoint", Bytes),
            ("progress_fraction", Real),
            ("progress_note", Text),
            ("progress_at", Int),
            ("question", Text),
            ("answer", Text),
        ],
        sqlite: "task_notes ORDER BY task_id",
        postgres: "task_notes ORDER BY task_id",
        of_postgres: &[],
    },
    // Small ones are in the rows of their tasks.
    Table {
        name: "results",
        columns: &[("task_id", Int), ("result", Bytes)],
        sqlite: "(SELECT t.id AS task_id, COALESCE(t.result, r.result) AS result \
            FROM tasks AS t LEFT JOIN results AS r ON r.task_id = t.id) \
            WHERE result IS NOT NULL ORDER BY task_id",
        postgres: "(SELECT t.id AS task_id, COALESCE(t.result, r.result) AS result \
            FROM tasks AS t LEFT JOIN results AS r ON r.task_id = t.id) AS kept \
            WHERE result IS NOT NULL ORDER BY task_id",
        of_postgres: &[],
    },
    Table {
        name: "salvage",
        columns: &[("task_id", Int), ("fence", Int), ("result", Bytes)],
        sqlite: "salvage ORDER BY task_id, fence",
        postgres: "salvage ORDER BY task_id, fence",
        of_postgres: &[],
    },
    // SQLite's are read entry by entry, which is sooner and gives the same (sqlite/moving).
    Table {
        name: "task_history",
        columns: &[
            ("task_id", Int),
            ("version", Int),
            ("seq", Int),
            ("kind", Int),
            ("from_state", Int),
            ("to_state", Int),
            ("reason", Int),
            ("at", Int),
            ("fence", Int),
            ("attempt", Int),
            ("worker", Text),
            ("until", Int),
            ("digest", Int),
            ("error", Text),
            ("facts", Text),
        ],
        sqlite: "history ORDER BY task_id, version",
        // Rows of tasks that were removed may still be there.
        postgres: "history WHERE task_id IN (SELECT id FROM tasks) ORDER BY task_id, version",
        of_postgres: &[("slot", "0")],
    },
    Table {
        name: "dead_letter_queue",
        columns: &[
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
        sqlite: "dead_letter_queue ORDER BY task_id",
        postgres: "dead_letter_queue ORDER BY task_id",
        of_postgres: &[],
    },
    Table {
        name: "idempotency_keys",
        columns: &[("agent", Int), ("key", Text), ("task_id", Int), ("digest", Int)],
        sqlite: "idempotency_keys ORDER BY agent, key",
        postgres: "idempotency_keys ORDER BY agent, key COLLATE \"C\"",
        of_postgres: &[],
    },
    // The oldest first, for that is how SQLite forgets them.
    Table {
        name: "requests",
        columns: &[("id", Text), ("digest", Int), ("answer", Bytes), ("at", Int)],
        sqlite: "requests ORDER BY at, id",
        postgres: "requests ORDER BY at, id COLLATE \"C\"",
        of_postgres: &[],
    },
    Table {
        name: "breakers",
        columns: &[
            ("agent", Int),
            ("task_type", Text),
            ("version", Int),
            ("state", Text),
            ("epoch", Int),
            ("run", Int),
            ("successes", Int),
            ("reopens", Int),
            ("since_ns", Int),
            ("until_ns", Int),
            ("cause", Text),
            ("ramp_until_ns", Int),
            ("probes", Text),
            ("window", Bytes),
            ("digest", Int),
            ("actor", Text),
            ("order_reason", Text),
            ("stats", Text),
            ("last_probe", Int),
        ],
        sqlite: "breakers ORDER BY agent, task_type",
        postgres: "breakers ORDER BY agent, task_type COLLATE \"C\"",
        of_postgres: &[],
    },
    // One row for an agent, whoever may hold parts of it.
    Table {
        name: "budgets",
        columns: &[("agent", Int), ("millitokens", Int), ("updated_at", Int)],
        sqlite: "budgets ORDER BY agent",
        postgres: "(SELECT agent, sum(millitokens)::bigint AS millitokens, max(updated_at) AS updated_at \
            FROM budgets GROUP BY agent) AS b ORDER BY agent",
        of_postgres: &[("slot", "0")],
    },
    Table {
        name: "sessions",
        columns: &[
            ("worker", Text),
            ("incarnation", Int),
            ("session", Session),
            ("connected_at", Int),
            ("beat_at", Int),
            ("open", Int),
        ],
        sqlite: "sessions ORDER BY worker",
        postgres: "sessions ORDER BY worker COLLATE \"C\"",
        of_postgres: &[],
    },
    Table {
        name: "agent_events",
        columns: &[
            ("seq", Int),
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
        sqlite: "agent_events ORDER BY seq",
        postgres: "agent_events ORDER BY seq",
        of_postgres: &[],
    },
];

//! The tables' insert statements, for the few numbers of rows that they are prepared for.
//!
//! Rows are written many at a time, for each statement is a hop to the connection's thread. A run of rows is cut into
//! pieces of 256 and one smaller power of two, which is filled up with rows of NULL that the statement leaves out: so
//! there are nine texts a table, and the cache of prepared statements always hits.

use std::sync::OnceLock;

/// Most rows of one statement: 38 columns stay far below SQLite's 32,766 variables, and the program of a statement
/// still fits the processor's cache.
pub(super) const MOST: usize = 256;
const SIZES: usize = 9;

/// One table's statement.
pub(super) struct Insert {
    verb: &'static str,
    columns: &'static [&'static str],
    tail: &'static str,
    texts: [OnceLock<String>; SIZES],
}

impl Insert {
    const fn new(verb: &'static str, columns: &'static [&'static str], tail: &'static str) -> Self {
        Self { verb, columns, tail, texts: [const { OnceLock::new() }; SIZES] }
    }

    /// Number of columns.
    pub(super) const fn width(&self) -> usize {
        self.columns.len()
    }

    /// The statement for `size` rows, a power of two up to [`MOST`].
    pub(super) fn text(&'static self, size: usize) -> &'static str {
        self.texts[size.ilog2() as usize].get_or_init(|| {
            let row = format!("({})", vec!["?"; self.columns.len()].join(", "));
            let rows = vec![row; size].join(", ");
            let names = self.columns.join(", ");
            if size == 1 {
                return format!("{} ({names}) VALUES {rows} {}", self.verb, self.tail);
            }
            let numbered: Vec<String> = (1..=self.columns.len()).map(|n| format!("column{n}")).collect();
            format!(
                "{} ({names}) SELECT {} FROM (VALUES {rows}) WHERE column1 IS NOT NULL {}",
                self.verb,
                numbered.join(", "),
                self.tail
            )
        })
    }
}

macro_rules! tables {
    ($($(#[$meta:meta])* $name:ident = $verb:literal [$($column:literal),+ $(,)?] $tail:literal;)+) => {
        /// What rows are written to.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Table { $($(#[$meta])* $name),+ }

        impl Table {
            /// All of them.
            #[cfg(test)]
            pub(super) const ALL: &'static [Self] = &[$(Self::$name),+];

            /// Its statement.
            pub(super) fn insert(self) -> &'static Insert {
                match self {
                    $(Self::$name => {
                        static INSERT: Insert = Insert::new($verb, &[$($column),+], $tail);
                        &INSERT
                    })+
                }
            }
        }
    };
}

tables! {
    Specs = "INSERT INTO task_specs" [
        "id", "agent", "task_type", "created_at", "payload", "labels", "policy", "traceparent", "tracestate", "key",
        "digest", "frees_key", "parent",
    ] "";
    /// Nobody holds it and nothing rare is set. REPLACE, so that every column not named takes its default: a row is
    /// always the whole image.
    TasksPlain = "REPLACE INTO tasks" [
        "id", "state", "reason", "priority", "run_at", "calendar", "deadline", "queued_at", "updated_at", "version",
        "fence", "delivery", "attempt", "idle_deliveries", "history",
    ] "";
    /// With a holder or a sample.
    TasksHeld = "REPLACE INTO tasks" [
        "id", "state", "reason", "priority", "run_at", "calendar", "deadline", "queued_at", "updated_at", "version",
        "fence", "delivery", "attempt", "idle_deliveries", "history", "worker", "incarnation", "session",
        "lease_until", "acked_at", "progress_at", "sample_epoch", "sample_probe", "sample_told",
    ] "";
    /// With everything.
    TasksFull = "REPLACE INTO tasks" [
        "id", "state", "reason", "priority", "run_at", "calendar", "deadline", "queued_at", "updated_at", "version",
        "fence", "delivery", "attempt", "idle_deliveries", "history", "worker", "incarnation", "session",
        "lease_until", "acked_at", "progress_at", "sample_epoch", "sample_probe", "sample_told", "retry_count",
        "losses", "preemptions", "redrives", "probe_failures", "tokens", "previous_delay", "stop_cause",
        "stop_until", "discarded", "loss_weight", "lost_at", "free_releases", "blocks",
    ] "";
    History = "INSERT INTO task_history" [
        "seq", "task_id", "version", "prev", "kind", "from_state", "to_state", "reason", "at", "fence", "attempt",
        "worker", "until", "digest", "error", "facts",
    ] "";
    Results = "REPLACE INTO results" ["task_id", "result"] "";
    Salvage = "REPLACE INTO salvage" ["task_id", "fence", "result"] "";
    Notes = "INSERT INTO task_notes" [
        "task_id", "error", "checkpoint", "progress_fraction", "progress_note", "progress_at", "question", "answer",
    ] "ON CONFLICT (task_id) DO UPDATE SET \
        error = COALESCE(excluded.error, error), \
        checkpoint = COALESCE(excluded.checkpoint, checkpoint), \
        progress_fraction = COALESCE(excluded.progress_fraction, progress_fraction), \
        progress_note = COALESCE(excluded.progress_note, progress_note), \
        progress_at = COALESCE(excluded.progress_at, progress_at), \
        question = COALESCE(excluded.question, question), \
        answer = COALESCE(excluded.answer, answer)";
    DeadLetters = "REPLACE INTO dead_letter_queue" [
        "task_id", "agent", "task_type", "reason", "error", "fingerprint", "failed_at", "attempt", "redrives",
        "discarded_at", "discard_reason",
    ] "";
    Keys = "INSERT INTO idempotency_keys" ["agent", "key", "task_id", "digest"] "";
    Requests = "INSERT INTO requests" ["hash", "id", "digest", "answer", "at"] "";
    Agents = "REPLACE INTO agents" ["id", "name", "settings", "created_at", "pause"] "";
    Breakers = "REPLACE INTO breakers" [
        "agent", "task_type", "version", "state", "epoch", "run", "successes", "reopens", "since_ns",
        "until_ns", "cause", "ramp_until_ns", "probes", "window", "digest", "actor", "order_reason", "stats", "last_probe",
    ] "";
    Budgets = "REPLACE INTO budgets" ["agent", "millitokens", "updated_at"] "";
    Sessions = "REPLACE INTO sessions" ["worker", "incarnation", "session", "connected_at", "beat_at", "open"] "";
    /// In order: `seq` is the number of the row.
    Events = "INSERT INTO agent_events" [
        "agent", "task_type", "at", "kind", "from_state", "to_state", "cause", "epoch", "actor", "reason", "until",
    ] "";
    Counts = "REPLACE INTO counts" ["agent", "state", "n"] "";
    LiveBlocks = "REPLACE INTO live_blocks" ["block", "live"] "";
}

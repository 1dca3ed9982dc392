//! The tables' insert statements.

use std::sync::OnceLock;

/// One table's statement.
pub(super) struct Insert {
    verb: &'static str,
    columns: &'static [&'static str],
    tail: &'static str,
    text: OnceLock<String>,
}

impl Insert {
    const fn new(verb: &'static str, columns: &'static [&'static str], tail: &'static str) -> Self {
        Self { verb, columns, tail, text: OnceLock::new() }
    }

    /// Number of columns.
    pub(super) const fn width(&self) -> usize {
        self.columns.len()
    }

    /// The statement for one row.
    pub(super) fn text(&'static self) -> &'static str {
        self.text.get_or_init(|| {
            let values = vec!["?"; self.columns.len()].join(", ");
            format!("{} ({}) VALUES ({values}) {}", self.verb, self.columns.join(", "), self.tail)
        })
    }
}

macro_rules! tables {
    ($($(#[$meta:meta])* $name:ident = $verb:literal [$($column:literal),+ $(,)?] $tail:literal;)+) => {
        /// What rows are written to.
        #[derive(Clone, Copy, Debug)]
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
    PayloadPlaces = "INSERT INTO payload_places" ["task_id", "file", "at", "length", "digest"] "";
    /// A row is always the whole image.
    Tasks = "REPLACE INTO tasks" [
        "id", "state", "reason", "priority", "run_at", "calendar", "deadline", "queued_at", "updated_at", "version",
        "fence", "delivery", "attempt", "idle_deliveries", "history", "held", "rare", "result",
    ] "";
    History = "INSERT INTO task_history" ["seq", "task", "at", "entries"] "";
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
    /// Those that are there stay.
    AgentBlocks = "INSERT OR IGNORE INTO agent_blocks" ["agent", "block"] "";
    Counts = "REPLACE INTO counts" ["agent", "state", "n"] "";
    LiveBlocks = "REPLACE INTO live_blocks" ["block", "live"] "";
}

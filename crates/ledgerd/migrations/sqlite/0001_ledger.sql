-- The ledger. Instants are wall time in milliseconds, states and reasons are the numbers of ledger-core, 64-bit digests
-- are stored with their bits as they are. No index on a mutable column of a hot table: those live in memory.

CREATE TABLE meta (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    seed INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    last_task INTEGER NOT NULL CHECK (last_task >= 0),
    last_seq INTEGER NOT NULL CHECK (last_seq >= 0),
    last_session INTEGER NOT NULL CHECK (last_session >= 0)
) STRICT;

INSERT INTO meta (id, seed, created_at, last_task, last_seq, last_session)
VALUES (1, random(), CAST(unixepoch('subsec') * 1000 AS INTEGER), 0, 0, 0);

-- What a producer said: written once.
CREATE TABLE task_specs (
    id INTEGER PRIMARY KEY,
    agent INTEGER NOT NULL,
    task_type TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    payload BLOB NOT NULL,
    labels TEXT,
    policy TEXT,
    traceparent TEXT,
    tracestate TEXT,
    key TEXT,
    digest INTEGER NOT NULL,
    frees_key INTEGER NOT NULL CHECK (frees_key IN (0, 1))
) STRICT;

CREATE INDEX task_specs_by_agent ON task_specs (agent, id);

-- Where a task is in its life: the narrow hot row, always written whole. What is rarely set comes last and has a default,
-- so that the common forms of a row name fewer columns.
CREATE TABLE tasks (
    id INTEGER PRIMARY KEY,
    state INTEGER NOT NULL CHECK (state BETWEEN 1 AND 7),
    reason INTEGER NOT NULL CHECK (reason BETWEEN 0 AND 255),
    priority INTEGER NOT NULL CHECK (priority BETWEEN 0 AND 9),
    run_at INTEGER NOT NULL,
    calendar INTEGER NOT NULL CHECK (calendar IN (0, 1)),
    deadline INTEGER,
    queued_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    version INTEGER NOT NULL CHECK (version > 0),
    fence INTEGER NOT NULL CHECK (fence >= 0),
    delivery INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    idle_deliveries INTEGER NOT NULL,
    history INTEGER NOT NULL,
    worker TEXT,
    incarnation INTEGER,
    session INTEGER,
    lease_until INTEGER,
    acked_at INTEGER,
    progress_at INTEGER,
    sample_epoch INTEGER,
    sample_probe INTEGER,
    sample_told INTEGER,
    retry_count INTEGER NOT NULL DEFAULT 0,
    losses INTEGER NOT NULL DEFAULT 0,
    preemptions INTEGER NOT NULL DEFAULT 0,
    redrives INTEGER NOT NULL DEFAULT 0,
    probe_failures INTEGER NOT NULL DEFAULT 0,
    tokens INTEGER NOT NULL DEFAULT 0,
    previous_delay INTEGER NOT NULL DEFAULT 0,
    stop_cause INTEGER,
    stop_until INTEGER,
    discarded INTEGER NOT NULL DEFAULT 0 CHECK (discarded IN (0, 1)),
    CHECK ((worker IS NULL) = (lease_until IS NULL)),
    CHECK ((stop_cause IS NULL) = (stop_until IS NULL))
) STRICT;

-- Append-only; seq has no gap. `prev` is the seq of the task's row before: a chain instead of an index.
CREATE TABLE task_history (
    seq INTEGER PRIMARY KEY,
    task_id INTEGER NOT NULL,
    version INTEGER NOT NULL CHECK (version > 0),
    prev INTEGER,
    kind INTEGER NOT NULL,
    from_state INTEGER CHECK (from_state BETWEEN 1 AND 7),
    to_state INTEGER NOT NULL CHECK (to_state BETWEEN 1 AND 7),
    reason INTEGER NOT NULL,
    at INTEGER NOT NULL,
    fence INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    worker TEXT,
    until INTEGER,
    digest INTEGER,
    error TEXT,
    facts TEXT,
    CHECK (prev < seq)
) STRICT;

CREATE TRIGGER task_history_is_append_only
BEFORE UPDATE ON task_history
BEGIN
    SELECT RAISE(ABORT, 'history is append-only');
END;

CREATE TABLE results (
    task_id INTEGER PRIMARY KEY,
    result BLOB NOT NULL
) STRICT;

CREATE TABLE salvage (
    task_id INTEGER NOT NULL,
    fence INTEGER NOT NULL,
    result BLOB NOT NULL,
    PRIMARY KEY (task_id, fence)
) STRICT;

CREATE TABLE task_notes (
    task_id INTEGER PRIMARY KEY,
    error TEXT,
    checkpoint BLOB,
    progress_fraction REAL,
    progress_note TEXT,
    progress_at INTEGER,
    question TEXT
) STRICT;

CREATE TABLE dead_letter_queue (
    task_id INTEGER PRIMARY KEY,
    agent INTEGER NOT NULL,
    task_type TEXT NOT NULL,
    reason INTEGER NOT NULL,
    error TEXT,
    fingerprint INTEGER NOT NULL,
    failed_at INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    redrives INTEGER NOT NULL,
    discarded_at INTEGER,
    discard_reason TEXT
) STRICT;

CREATE INDEX dead_letter_queue_by_agent ON dead_letter_queue (agent, task_id);
CREATE INDEX dead_letter_queue_by_time ON dead_letter_queue (failed_at, discarded_at);

CREATE TABLE idempotency_keys (
    agent INTEGER NOT NULL,
    key TEXT NOT NULL,
    task_id INTEGER NOT NULL,
    digest INTEGER NOT NULL,
    PRIMARY KEY (agent, key)
) STRICT, WITHOUT ROWID;

-- Found by a hash of the id: an index entry of a third of the size, so a third of the pages that random ids dirty.
CREATE TABLE requests (
    seq INTEGER PRIMARY KEY,
    hash INTEGER NOT NULL,
    id TEXT NOT NULL,
    digest INTEGER NOT NULL,
    answer BLOB NOT NULL,
    at INTEGER NOT NULL
) STRICT;

CREATE INDEX requests_by_hash ON requests (hash);

CREATE TABLE agents (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    settings TEXT NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;

-- Spans of a breaker are nanoseconds since the epoch: its periods are no whole milliseconds.
CREATE TABLE breakers (
    agent INTEGER PRIMARY KEY,
    version INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('CLOSED', 'OPEN', 'HALF_OPEN', 'FORCED_OPEN', 'DISABLED', 'OBSERVE')),
    epoch INTEGER NOT NULL,
    run INTEGER NOT NULL,
    successes INTEGER NOT NULL,
    probes_in_flight INTEGER NOT NULL,
    reopens INTEGER NOT NULL,
    since_ns INTEGER NOT NULL,
    until_ns INTEGER,
    actor TEXT,
    order_reason TEXT,
    stats TEXT NOT NULL,
    last_probe INTEGER
) STRICT;

-- The global budget is agent 0.
CREATE TABLE budgets (
    agent INTEGER PRIMARY KEY,
    millitokens INTEGER NOT NULL,
    updated_at INTEGER NOT NULL
) STRICT;

CREATE TABLE sessions (
    worker TEXT PRIMARY KEY,
    incarnation INTEGER NOT NULL,
    session INTEGER NOT NULL,
    connected_at INTEGER NOT NULL,
    beat_at INTEGER NOT NULL,
    open INTEGER NOT NULL CHECK (open IN (0, 1))
) STRICT, WITHOUT ROWID;

CREATE TABLE counts (
    agent INTEGER NOT NULL,
    state INTEGER NOT NULL CHECK (state BETWEEN 1 AND 7),
    n INTEGER NOT NULL CHECK (n >= 0),
    PRIMARY KEY (agent, state)
) STRICT, WITHOUT ROWID;

-- How many tasks that have not ended each block of 4,096 numbers has: a start looks into these blocks alone.
CREATE TABLE live_blocks (
    block INTEGER PRIMARY KEY,
    live INTEGER NOT NULL CHECK (live >= 0)
) STRICT;

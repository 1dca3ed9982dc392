-- The ledger. Instants are wall time in milliseconds, states and reasons are the numbers of ledger-core, 64-bit digests
-- are stored with their bits as they are; all as on SQLite, where the same names stand for the same things.
--
-- No column of `tasks` that a life changes is in an index, so that its updates stay within the page (HOT). What can be
-- claimed stands in `ready` instead, and is there only while it waits.

CREATE TABLE meta (
    id SMALLINT PRIMARY KEY CHECK (id = 1),
    seed BIGINT NOT NULL,
    created_at BIGINT NOT NULL
);

INSERT INTO meta (id, seed, created_at)
VALUES (
    1,
    ('x' || substr(md5(gen_random_uuid()::text), 1, 16))::bit(64)::bigint,
    (extract(epoch FROM clock_timestamp()) * 1000)::bigint
);

-- Numbers of tasks are taken in blocks: block b has b * 1,000 to b * 1,000 + 999, and 0 is no number.
CREATE SEQUENCE task_blocks MINVALUE 0 START 0;

-- Each daemon has one for as long as it lives: who writes which history rows, and how many. Whoever commits proves by this
-- row that the slot is still its own.
CREATE TABLE slots (
    slot SMALLINT PRIMARY KEY CHECK (slot >= 0),
    -- A number that the daemon drew when it took the slot; NULL: nobody has it.
    owner BIGINT,
    -- Where the owner runs: no two daemons that live have one name.
    name TEXT NOT NULL,
    -- When it was last heard of, on this server's clock.
    beat_at BIGINT NOT NULL,
    -- Who watches over what the last owner left.
    heir SMALLINT,
    last_seq BIGINT NOT NULL CHECK (last_seq >= 0),
    last_session BIGINT NOT NULL CHECK (last_session >= 0)
);

-- What one daemon has to tell another: a task of the other's sessions that it changed, or a worker that came over.
CREATE TABLE mail (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    slot SMALLINT NOT NULL,
    task_id BIGINT,
    worker TEXT,
    CHECK ((task_id IS NULL) <> (worker IS NULL))
) WITH (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000);

CREATE INDEX mail_by_slot ON mail (slot);

-- What a producer said: written once.
CREATE TABLE task_specs (
    id BIGINT PRIMARY KEY,
    agent INTEGER NOT NULL,
    task_type TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    payload BYTEA NOT NULL,
    labels TEXT,
    policy TEXT,
    traceparent TEXT,
    tracestate TEXT,
    key TEXT,
    digest BIGINT NOT NULL,
    frees_key SMALLINT NOT NULL CHECK (frees_key IN (0, 1)),
    parent BIGINT
);

CREATE INDEX task_specs_by_agent ON task_specs (agent, id);

-- Where a task is in its life: the narrow hot row, always written whole.
CREATE TABLE tasks (
    id BIGINT PRIMARY KEY,
    run_at BIGINT NOT NULL,
    deadline BIGINT,
    queued_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    version BIGINT NOT NULL CHECK (version > 0),
    fence BIGINT NOT NULL CHECK (fence >= 0),
    delivery INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    idle_deliveries INTEGER NOT NULL,
    state SMALLINT NOT NULL CHECK (state BETWEEN 1 AND 7),
    reason SMALLINT NOT NULL CHECK (reason BETWEEN 0 AND 255),
    priority SMALLINT NOT NULL CHECK (priority BETWEEN 0 AND 9),
    calendar SMALLINT NOT NULL CHECK (calendar IN (0, 1)),
    incarnation BIGINT,
    session BIGINT,
    lease_until BIGINT,
    acked_at BIGINT,
    progress_at BIGINT,
    sample_epoch BIGINT,
    sample_probe SMALLINT,
    sample_told SMALLINT,
    stop_cause SMALLINT,
    stop_until BIGINT,
    lost_at BIGINT,
    -- NULL where SQLite has 0: a NULL takes no room.
    retry_count INTEGER,
    losses INTEGER,
    preemptions INTEGER,
    redrives INTEGER,
    probe_failures INTEGER,
    tokens INTEGER,
    previous_delay BIGINT,
    loss_weight INTEGER,
    free_releases INTEGER,
    blocks INTEGER,
    discarded SMALLINT CHECK (discarded IN (0, 1)),
    worker TEXT,
    CHECK ((worker IS NULL) = (lease_until IS NULL)),
    CHECK ((stop_cause IS NULL) = (stop_until IS NULL))
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);

-- Tasks that wait for a claim, and those that their breaker holds back, in the order in which they are offered.
CREATE TABLE ready (
    agent INTEGER NOT NULL,
    task_type TEXT NOT NULL,
    gated SMALLINT NOT NULL CHECK (gated IN (0, 1)),
    urgency SMALLINT NOT NULL CHECK (urgency BETWEEN 0 AND 9),
    run_at BIGINT NOT NULL,
    calendar SMALLINT NOT NULL CHECK (calendar IN (0, 1)),
    task_id BIGINT NOT NULL PRIMARY KEY
) WITH (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000);

CREATE INDEX ready_in_order ON ready (agent, task_type, gated, urgency, run_at, task_id);
CREATE INDEX ready_by_time ON ready (calendar, run_at) WHERE gated = 0;
CREATE INDEX ready_gated ON ready (agent, task_type) WHERE gated = 1;

-- Append-only; seq rises without a gap in each slot. One partition for each day (UTC) of `at`, made ahead; a whole day is
-- dropped when its tasks have gone, so rows of tasks that were removed may still be here. Nobody but who writes names this
-- table: it is read through `history`.
-- That (task_id, version) is unique is not for an index to say, which cannot span partitions: a row is written with the
-- row of its task, which is written only where it has the version before.
CREATE TABLE task_history (
    task_id BIGINT NOT NULL,
    version BIGINT NOT NULL CHECK (version > 0),
    seq BIGINT NOT NULL,
    at BIGINT NOT NULL,
    fence BIGINT NOT NULL,
    until BIGINT,
    digest BIGINT,
    attempt INTEGER NOT NULL,
    slot SMALLINT NOT NULL,
    kind SMALLINT NOT NULL,
    from_state SMALLINT CHECK (from_state BETWEEN 1 AND 7),
    to_state SMALLINT NOT NULL CHECK (to_state BETWEEN 1 AND 7),
    reason SMALLINT NOT NULL,
    worker TEXT,
    error TEXT,
    facts TEXT
) PARTITION BY RANGE (at);

CREATE INDEX task_history_by_task ON task_history (task_id, version);

-- Rows of days without a partition, as a clock that was set may bring: on their way to those that are kept.
CREATE TABLE task_history_default PARTITION OF task_history DEFAULT;

-- Rows that stay until their task goes, for it outlives their day.
CREATE TABLE task_history_kept (LIKE task_history INCLUDING CONSTRAINTS, PRIMARY KEY (task_id, version));

-- The history of tasks that are stored, and remains of others. Who looks for a task asks for the time from its creation to
-- its last change too, which all its rows are of: then no other partition is touched.
CREATE VIEW history AS
SELECT task_id, version, seq, at, fence, until, digest, attempt, slot, kind, from_state, to_state, reason, worker, error,
    facts
FROM task_history
UNION ALL
SELECT task_id, version, seq, at, fence, until, digest, attempt, slot, kind, from_state, to_state, reason, worker, error,
    facts
FROM task_history_kept;

-- Days that have a partition, counted from 1970-01-01; and how far the walk through one has come whose tasks may have gone.
CREATE TABLE history_days (
    day INTEGER PRIMARY KEY,
    -- Not looked at before.
    look_at BIGINT NOT NULL DEFAULT 0,
    -- Few of its rows are of stored tasks, and these are moved to those that are kept. Rows of transactions before this one
    -- were there when that began.
    leaving xid8,
    -- The last task that was looked at since.
    walked BIGINT NOT NULL DEFAULT 0
);

CREATE FUNCTION history_is_append_only() RETURNS TRIGGER LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME;
END;
$$;

-- For each row, for such a trigger is in every partition too.
CREATE TRIGGER task_history_is_append_only BEFORE UPDATE ON task_history
FOR EACH ROW EXECUTE FUNCTION history_is_append_only();

CREATE TRIGGER task_history_kept_is_append_only BEFORE UPDATE ON task_history_kept
FOR EACH ROW EXECUTE FUNCTION history_is_append_only();

CREATE TABLE results (
    task_id BIGINT PRIMARY KEY,
    result BYTEA NOT NULL
);

CREATE TABLE salvage (
    task_id BIGINT NOT NULL,
    fence BIGINT NOT NULL,
    result BYTEA NOT NULL,
    PRIMARY KEY (task_id, fence)
);

CREATE TABLE task_notes (
    task_id BIGINT PRIMARY KEY,
    error TEXT,
    checkpoint BYTEA,
    progress_fraction DOUBLE PRECISION,
    progress_note TEXT,
    progress_at BIGINT,
    question TEXT,
    answer TEXT
);

CREATE TABLE dead_letter_queue (
    task_id BIGINT PRIMARY KEY,
    agent INTEGER NOT NULL,
    task_type TEXT NOT NULL,
    reason SMALLINT NOT NULL,
    error TEXT,
    fingerprint BIGINT NOT NULL,
    failed_at BIGINT NOT NULL,
    attempt INTEGER NOT NULL,
    redrives INTEGER NOT NULL,
    discarded_at BIGINT,
    discard_reason TEXT
);

CREATE INDEX dead_letter_queue_by_agent ON dead_letter_queue (agent, task_id);
CREATE INDEX dead_letter_queue_by_time ON dead_letter_queue (failed_at, discarded_at);

CREATE TABLE idempotency_keys (
    agent INTEGER NOT NULL,
    key TEXT NOT NULL,
    task_id BIGINT NOT NULL,
    digest BIGINT NOT NULL,
    PRIMARY KEY (agent, key)
);

CREATE TABLE requests (
    id TEXT PRIMARY KEY,
    digest BIGINT NOT NULL,
    answer BYTEA NOT NULL,
    at BIGINT NOT NULL
);

CREATE INDEX requests_by_time ON requests (at);

CREATE TABLE agents (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    settings TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    pause TEXT,
    -- Rises with each change; and the transaction that made the last.
    revision BIGINT NOT NULL DEFAULT 1,
    changed xid8 NOT NULL DEFAULT pg_current_xact_id()
);

-- Spans of a breaker are nanoseconds since the epoch: its periods are no whole milliseconds.
CREATE TABLE breakers (
    agent INTEGER NOT NULL,
    task_type TEXT NOT NULL,
    version INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('CLOSED', 'OPEN', 'HALF_OPEN', 'FORCED_OPEN', 'DISABLED', 'OBSERVE')),
    epoch BIGINT NOT NULL,
    run BIGINT NOT NULL,
    successes BIGINT NOT NULL,
    reopens BIGINT NOT NULL,
    since_ns BIGINT NOT NULL,
    until_ns BIGINT,
    cause TEXT,
    ramp_until_ns BIGINT,
    probes TEXT NOT NULL,
    "window" BYTEA NOT NULL,
    digest BIGINT NOT NULL,
    actor TEXT,
    order_reason TEXT,
    stats TEXT NOT NULL,
    last_probe BIGINT,
    -- As of agents.
    revision BIGINT NOT NULL DEFAULT 1,
    changed xid8 NOT NULL DEFAULT pg_current_xact_id(),
    PRIMARY KEY (agent, task_type)
);

-- The global budget is agent 0. Each slot has a part of its own of every budget, so that no two daemons write one.
CREATE TABLE budgets (
    agent INTEGER NOT NULL,
    slot SMALLINT NOT NULL,
    millitokens BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    PRIMARY KEY (agent, slot)
);

CREATE TABLE sessions (
    worker TEXT PRIMARY KEY,
    incarnation BIGINT NOT NULL,
    session BIGINT NOT NULL,
    connected_at BIGINT NOT NULL,
    beat_at BIGINT NOT NULL,
    open SMALLINT NOT NULL CHECK (open IN (0, 1)),
    -- What it takes and holds, as of its last beat, for other daemons to see.
    shown TEXT,
    -- The session that this one took the place of; 0: the worker had none.
    replaces BIGINT NOT NULL DEFAULT 0
);

-- Each slot has rows of its own, so that no two daemons write one; their sum counts, and one alone may be below zero.
CREATE TABLE counts (
    slot SMALLINT NOT NULL,
    agent INTEGER NOT NULL,
    state SMALLINT NOT NULL CHECK (state BETWEEN 1 AND 7),
    n BIGINT NOT NULL,
    PRIMARY KEY (slot, agent, state)
) WITH (fillfactor = 50);

-- How many tasks that have not ended each block of 4,096 numbers has; each slot adds what it did, as above. A start and lists
-- of what lives look into blocks with a sum above zero alone.
CREATE TABLE live_blocks (
    block BIGINT NOT NULL,
    slot SMALLINT NOT NULL,
    n BIGINT NOT NULL,
    PRIMARY KEY (block, slot)
) WITH (fillfactor = 50);

-- `kind` is the number of ledger-core's AgentEventKind.
CREATE TABLE agent_events (
    seq BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    agent INTEGER NOT NULL,
    task_type TEXT NOT NULL,
    at BIGINT NOT NULL,
    kind SMALLINT NOT NULL,
    from_state TEXT,
    to_state TEXT,
    cause TEXT,
    epoch BIGINT,
    actor TEXT NOT NULL,
    reason TEXT NOT NULL,
    until BIGINT
);

CREATE INDEX agent_events_by_agent ON agent_events (agent, seq);

CREATE TRIGGER agent_events_are_append_only BEFORE UPDATE ON agent_events
FOR EACH STATEMENT EXECUTE FUNCTION history_is_append_only();

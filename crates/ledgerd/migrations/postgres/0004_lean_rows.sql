-- What is written for every task, as wide as its columns, so that no value is turned into another type on its way; rows of
-- `tasks` without what few have, too. The types of before stay, for daemons that know no others.

CREATE TYPE lean_task_specs AS (
    id BIGINT, agent INTEGER, task_type TEXT, created_at BIGINT, payload BYTEA, labels TEXT, policy TEXT, traceparent TEXT,
    tracestate TEXT, key TEXT, digest BIGINT, frees_key SMALLINT, parent BIGINT
);

CREATE TYPE lean_tasks AS (
    id BIGINT, state SMALLINT, reason SMALLINT, priority SMALLINT, run_at BIGINT, calendar SMALLINT, deadline BIGINT,
    queued_at BIGINT, updated_at BIGINT, version BIGINT, fence BIGINT, delivery INTEGER, attempt INTEGER,
    idle_deliveries INTEGER, worker TEXT, incarnation BIGINT, session BIGINT, lease_until BIGINT, acked_at BIGINT,
    progress_at BIGINT, sample_epoch BIGINT, sample_probe SMALLINT, sample_told SMALLINT
);

CREATE TYPE lean_changed_tasks AS (
    id BIGINT, state SMALLINT, reason SMALLINT, priority SMALLINT, run_at BIGINT, calendar SMALLINT, deadline BIGINT,
    queued_at BIGINT, updated_at BIGINT, version BIGINT, fence BIGINT, delivery INTEGER, attempt INTEGER,
    idle_deliveries INTEGER, worker TEXT, incarnation BIGINT, session BIGINT, lease_until BIGINT, acked_at BIGINT,
    progress_at BIGINT, sample_epoch BIGINT, sample_probe SMALLINT, sample_told SMALLINT, result BYTEA, expected BIGINT,
    held BIGINT
);

CREATE TYPE lean_task_history AS (
    slot SMALLINT, seq BIGINT, task_id BIGINT, version BIGINT, kind SMALLINT, from_state SMALLINT, to_state SMALLINT,
    reason SMALLINT, at BIGINT, fence BIGINT, attempt INTEGER, worker TEXT, until BIGINT, digest BIGINT, error TEXT, facts TEXT
);

CREATE TYPE lean_idempotency_keys AS (
    agent INTEGER, key TEXT, task_id BIGINT, digest BIGINT
);

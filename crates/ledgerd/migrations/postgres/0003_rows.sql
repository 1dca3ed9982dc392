-- A small result of a task that is DONE: its row is not written again.
ALTER TABLE tasks ADD COLUMN result BYTEA;

-- A row of a batch on its way into a table: a batch sends those of a table as one array of such a type. Wider than columns are, for
-- numbers travel as 64 bits. Never changed: daemons of two releases may write at one time, each with the types that it knows.

CREATE TYPE new_task_specs AS (
    id BIGINT, agent BIGINT, task_type TEXT, created_at BIGINT, payload BYTEA, labels TEXT, policy TEXT, traceparent TEXT,
    tracestate TEXT, key TEXT, digest BIGINT, frees_key BIGINT, parent BIGINT
);

CREATE TYPE new_tasks AS (
    id BIGINT, state BIGINT, reason BIGINT, priority BIGINT, run_at BIGINT, calendar BIGINT, deadline BIGINT,
    queued_at BIGINT, updated_at BIGINT, version BIGINT, fence BIGINT, delivery BIGINT, attempt BIGINT,
    idle_deliveries BIGINT, worker TEXT, incarnation BIGINT, session BIGINT, lease_until BIGINT, acked_at BIGINT,
    progress_at BIGINT, sample_epoch BIGINT, sample_probe BIGINT, sample_told BIGINT, retry_count BIGINT, losses BIGINT,
    preemptions BIGINT, redrives BIGINT, probe_failures BIGINT, tokens BIGINT, previous_delay BIGINT, stop_cause BIGINT,
    stop_until BIGINT, discarded BIGINT, loss_weight BIGINT, lost_at BIGINT, free_releases BIGINT, blocks BIGINT, result BYTEA
);

CREATE TYPE changed_tasks AS (
    id BIGINT, state BIGINT, reason BIGINT, priority BIGINT, run_at BIGINT, calendar BIGINT, deadline BIGINT,
    queued_at BIGINT, updated_at BIGINT, version BIGINT, fence BIGINT, delivery BIGINT, attempt BIGINT,
    idle_deliveries BIGINT, worker TEXT, incarnation BIGINT, session BIGINT, lease_until BIGINT, acked_at BIGINT,
    progress_at BIGINT, sample_epoch BIGINT, sample_probe BIGINT, sample_told BIGINT, retry_count BIGINT, losses BIGINT,
    preemptions BIGINT, redrives BIGINT, probe_failures BIGINT, tokens BIGINT, previous_delay BIGINT, stop_cause BIGINT,
    stop_until BIGINT, discarded BIGINT, loss_weight BIGINT, lost_at BIGINT, free_releases BIGINT, blocks BIGINT, result BYTEA,
    expected BIGINT, held BIGINT
);

CREATE TYPE new_task_history AS (
    slot BIGINT, seq BIGINT, task_id BIGINT, version BIGINT, kind BIGINT, from_state BIGINT, to_state BIGINT, reason BIGINT,
    at BIGINT, fence BIGINT, attempt BIGINT, worker TEXT, until BIGINT, digest BIGINT, error TEXT, facts TEXT
);

CREATE TYPE new_ready AS (
    agent BIGINT, task_type TEXT, gated BIGINT, urgency BIGINT, run_at BIGINT, calendar BIGINT, task_id BIGINT
);

CREATE TYPE new_results AS (
    task_id BIGINT, result BYTEA
);

CREATE TYPE new_salvage AS (
    task_id BIGINT, fence BIGINT, result BYTEA
);

CREATE TYPE new_task_notes AS (
    task_id BIGINT, error TEXT, checkpoint BYTEA, progress_fraction DOUBLE PRECISION, progress_note TEXT, progress_at BIGINT,
    question TEXT, answer TEXT
);

CREATE TYPE new_dead_letters AS (
    task_id BIGINT, agent BIGINT, task_type TEXT, reason BIGINT, error TEXT, fingerprint BIGINT, failed_at BIGINT,
    attempt BIGINT, redrives BIGINT, discarded_at BIGINT, discard_reason TEXT
);

CREATE TYPE new_idempotency_keys AS (
    agent BIGINT, key TEXT, task_id BIGINT, digest BIGINT
);

CREATE TYPE new_requests AS (
    id TEXT, digest BIGINT, answer BYTEA, at BIGINT
);

CREATE TYPE new_agent_events AS (
    agent BIGINT, task_type TEXT, at BIGINT, kind BIGINT, from_state TEXT, to_state TEXT, cause TEXT, epoch BIGINT,
    actor TEXT, reason TEXT, until BIGINT
);

CREATE TYPE new_counts AS (
    slot BIGINT, agent BIGINT, state BIGINT, n BIGINT
);

CREATE TYPE new_live_blocks AS (
    block BIGINT, slot BIGINT, n BIGINT
);

CREATE TYPE new_agents AS (
    id BIGINT, name TEXT, settings TEXT, created_at BIGINT, pause TEXT
);

CREATE TYPE changed_agents AS (
    id BIGINT, name TEXT, settings TEXT, created_at BIGINT, pause TEXT, known BIGINT
);

CREATE TYPE new_breakers AS (
    agent BIGINT, task_type TEXT, version BIGINT, state TEXT, epoch BIGINT, run BIGINT, successes BIGINT, reopens BIGINT,
    since_ns BIGINT, until_ns BIGINT, cause TEXT, ramp_until_ns BIGINT, probes TEXT, "window" BYTEA, digest BIGINT,
    actor TEXT, order_reason TEXT, stats TEXT, last_probe BIGINT
);

CREATE TYPE changed_breakers AS (
    agent BIGINT, task_type TEXT, version BIGINT, state TEXT, epoch BIGINT, run BIGINT, successes BIGINT, reopens BIGINT,
    since_ns BIGINT, until_ns BIGINT, cause TEXT, ramp_until_ns BIGINT, probes TEXT, "window" BYTEA, digest BIGINT,
    actor TEXT, order_reason TEXT, stats TEXT, last_probe BIGINT, known BIGINT, known_epoch BIGINT, exact BIGINT
);

CREATE TYPE new_budgets AS (
    agent BIGINT, millitokens BIGINT, updated_at BIGINT, slot BIGINT
);

CREATE TYPE new_sessions AS (
    worker TEXT, incarnation BIGINT, session BIGINT, connected_at BIGINT, beat_at BIGINT, open BIGINT, shown TEXT,
    replaces BIGINT
);

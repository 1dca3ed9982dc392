-- Breakers of task types, with their windows, probes and ramps; what happened to agents.

-- Append-only; seq has no gap. `kind` is the number of ledger-core's AgentEventKind.
CREATE TABLE agent_events (
    seq INTEGER PRIMARY KEY,
    agent INTEGER NOT NULL,
    task_type TEXT NOT NULL DEFAULT '',
    at INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    from_state TEXT,
    to_state TEXT,
    cause TEXT,
    epoch INTEGER,
    actor TEXT NOT NULL DEFAULT '',
    reason TEXT NOT NULL DEFAULT '',
    until INTEGER
) STRICT;

CREATE INDEX agent_events_by_agent ON agent_events (agent, seq);

CREATE TRIGGER agent_events_are_append_only
BEFORE UPDATE ON agent_events
BEGIN
    SELECT RAISE(ABORT, 'events are append-only');
END;

-- As before, and: the empty task type is the agent's own breaker; `probes` has the slots in use with the ends of their
-- leases, `window` the counts of the window that `digest` tells the shape of.
CREATE TABLE breakers_by_type (
    agent INTEGER NOT NULL,
    task_type TEXT NOT NULL DEFAULT '',
    version INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('CLOSED', 'OPEN', 'HALF_OPEN', 'FORCED_OPEN', 'DISABLED', 'OBSERVE')),
    epoch INTEGER NOT NULL,
    run INTEGER NOT NULL,
    successes INTEGER NOT NULL,
    reopens INTEGER NOT NULL,
    since_ns INTEGER NOT NULL,
    until_ns INTEGER,
    cause TEXT,
    ramp_until_ns INTEGER,
    probes TEXT NOT NULL,
    window BLOB NOT NULL,
    digest INTEGER NOT NULL DEFAULT 0,
    actor TEXT,
    order_reason TEXT,
    stats TEXT NOT NULL,
    last_probe INTEGER,
    PRIMARY KEY (agent, task_type)
) STRICT, WITHOUT ROWID;

-- Probes had no slots: those in flight are told from each other by the order in which they end.
INSERT INTO breakers_by_type (
    agent, task_type, version, state, epoch, run, successes, reopens, since_ns, until_ns, probes, window, actor,
    order_reason, stats, last_probe
)
SELECT
    agent, '', version, state, epoch, run, successes, reopens, since_ns, until_ns,
    (
        WITH RECURSIVE slots (n) AS (
            SELECT 0 UNION ALL SELECT n + 1 FROM slots WHERE n + 1 < probes_in_flight
        )
        SELECT json_group_array(json_array(n, NULL)) FROM slots WHERE probes_in_flight > 0
    ),
    x'', actor, order_reason, stats, last_probe
FROM breakers;

-- A permit's slot is stored with its probe: 0 for none, else the slot and one. Those of before get slots in turn.
UPDATE tasks SET sample_probe = (
    SELECT count(*) FROM tasks AS before
    JOIN task_specs AS b ON b.id = before.id
    WHERE before.sample_probe = 1 AND before.state = 2 AND before.id <= tasks.id
        AND b.agent = (SELECT agent FROM task_specs WHERE id = tasks.id)
)
WHERE sample_probe = 1 AND state = 2;

DROP TABLE breakers;
ALTER TABLE breakers_by_type RENAME TO breakers;

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

-- As before, and: the empty task type is the agent's own breaker; `probes` has the probes in flight with the ends of their
-- leases, `window` the counts of the window that `digest` tells the shape of.
CREATE TABLE breakers_by_type (
    agent INTEGER NOT NULL,
    task_type TEXT NOT NULL DEFAULT '',
    version INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('CLOSED', 'OPEN', 'HALF_OPEN', 'FORCED_OPEN', 'DISABLED', 'OBSERVE')),
    epoch INTEGER NOT NULL,
    run INTEGER NOT NULL,
    successes INTEGER NOT NULL,
    probes_in_flight INTEGER NOT NULL,
    reopens INTEGER NOT NULL,
    since_ns INTEGER NOT NULL,
    until_ns INTEGER,
    ramp_until_ns INTEGER,
    probes BLOB,
    window BLOB,
    digest INTEGER NOT NULL DEFAULT 0,
    actor TEXT,
    order_reason TEXT,
    stats TEXT NOT NULL,
    last_probe INTEGER,
    PRIMARY KEY (agent, task_type)
) STRICT, WITHOUT ROWID;

INSERT INTO breakers_by_type (
    agent, task_type, version, state, epoch, run, successes, probes_in_flight, reopens, since_ns, until_ns, actor,
    order_reason, stats, last_probe
)
SELECT
    agent, '', version, state, epoch, run, successes, probes_in_flight, reopens, since_ns, until_ns, actor,
    order_reason, stats, last_probe
FROM breakers;

DROP TABLE breakers;
ALTER TABLE breakers_by_type RENAME TO breakers;

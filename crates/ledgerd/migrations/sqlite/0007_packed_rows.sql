-- Fewer and narrower rows: a column costs the writer time in every row, whether or not it has something, and so does a row.
--
-- A task's row keeps what every task has. What it has only while somebody holds it is one text, and what few ever have another:
-- JSON arrays, NULL where there is nothing. `tasks_wide` shows them as columns.

CREATE TABLE narrow_tasks (
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
    -- Its newest history entry.
    history INTEGER NOT NULL,
    -- [worker, incarnation, session, lease_until, acked_at, progress_at, sample_epoch, sample_probe, sample_told]
    held TEXT,
    -- [retry_count, losses, preemptions, redrives, probe_failures, tokens, previous_delay, stop_cause, stop_until, discarded,
    -- loss_weight, lost_at, free_releases, blocks]
    rare TEXT,
    -- Of a task that is DONE, when it is small; others are in `results`.
    result BLOB
) STRICT;

INSERT INTO narrow_tasks
SELECT
    id, state, reason, priority, run_at, calendar, deadline, queued_at, updated_at, version, fence, delivery, attempt,
    idle_deliveries, history,
    CASE WHEN worker IS NOT NULL OR sample_epoch IS NOT NULL THEN json_array(
        worker, incarnation, session, lease_until, acked_at, progress_at, sample_epoch, sample_probe, sample_told
    ) END,
    CASE WHEN
        retry_count | losses | preemptions | redrives | probe_failures | tokens | previous_delay | discarded
            | loss_weight | free_releases | blocks <> 0
        OR stop_cause IS NOT NULL OR lost_at IS NOT NULL
    THEN json_array(
        retry_count, losses, preemptions, redrives, probe_failures, tokens, previous_delay, stop_cause, stop_until, discarded,
        loss_weight, lost_at, free_releases, blocks
    ) END,
    result
FROM tasks ORDER BY id;

DROP TABLE tasks;
ALTER TABLE narrow_tasks RENAME TO tasks;

CREATE VIEW tasks_wide AS SELECT
    id, state, reason, priority, run_at, calendar, deadline, queued_at, updated_at, version, fence, delivery, attempt,
    idle_deliveries, history,
    held ->> 0 AS worker,
    held ->> 1 AS incarnation,
    held ->> 2 AS session,
    held ->> 3 AS lease_until,
    held ->> 4 AS acked_at,
    held ->> 5 AS progress_at,
    held ->> 6 AS sample_epoch,
    held ->> 7 AS sample_probe,
    held ->> 8 AS sample_told,
    COALESCE(rare ->> 0, 0) AS retry_count,
    COALESCE(rare ->> 1, 0) AS losses,
    COALESCE(rare ->> 2, 0) AS preemptions,
    COALESCE(rare ->> 3, 0) AS redrives,
    COALESCE(rare ->> 4, 0) AS probe_failures,
    COALESCE(rare ->> 5, 0) AS tokens,
    COALESCE(rare ->> 6, 0) AS previous_delay,
    rare ->> 7 AS stop_cause,
    rare ->> 8 AS stop_until,
    COALESCE(rare ->> 9, 0) AS discarded,
    COALESCE(rare ->> 10, 0) AS loss_weight,
    rare ->> 11 AS lost_at,
    COALESCE(rare ->> 12, 0) AS free_releases,
    COALESCE(rare ->> 13, 0) AS blocks,
    result
FROM tasks;

-- A row has up to 16 entries that follow one another, the first with the number `seq`: a JSON array of
-- [task - row's task, version, entries back to the task's one before or 0, kind, from, to, reason, at - row's at, fence, attempt,
-- worker, until - row's at, digest, error, facts]
-- each, nulls at its end left out, and 0 in the place of one whose task was removed. `history` shows them as columns.

CREATE TABLE packed_history (
    seq INTEGER PRIMARY KEY,
    task INTEGER NOT NULL,
    at INTEGER NOT NULL,
    entries TEXT NOT NULL
) STRICT;

INSERT INTO packed_history
SELECT
    MIN(seq), 0, 0,
    json_group_array(json_array(
        task_id, version, COALESCE(seq - prev, 0), kind, from_state, to_state, reason, at, fence, attempt, worker, until, digest,
        json(error), json(facts)
    ) ORDER BY seq)
FROM (SELECT *, seq - row_number() OVER (ORDER BY seq) AS run FROM task_history)
GROUP BY run, seq >> 4
ORDER BY run, seq >> 4;

DROP TABLE task_history;
ALTER TABLE packed_history RENAME TO task_history;

-- An entry may go with its task; none changes.
CREATE TRIGGER task_history_is_append_only
BEFORE UPDATE ON task_history
WHEN NEW.seq <> OLD.seq OR NEW.task <> OLD.task OR NEW.at <> OLD.at
    OR json_array_length(NEW.entries) <> json_array_length(OLD.entries)
    OR EXISTS (SELECT 1 FROM json_each(NEW.entries) AS e WHERE e.value IS NOT 0 AND e.value IS NOT (OLD.entries -> e.key))
BEGIN
    SELECT RAISE(ABORT, 'history is append-only');
END;

CREATE VIEW history AS SELECT
    r.seq + e.key AS seq,
    r.task + (e.value ->> 0) AS task_id,
    e.value ->> 1 AS version,
    r.seq + e.key - NULLIF(e.value ->> 2, 0) AS prev,
    e.value ->> 3 AS kind,
    e.value ->> 4 AS from_state,
    e.value ->> 5 AS to_state,
    e.value ->> 6 AS reason,
    r.at + (e.value ->> 7) AS at,
    e.value ->> 8 AS fence,
    e.value ->> 9 AS attempt,
    e.value ->> 10 AS worker,
    r.at + (e.value ->> 11) AS until,
    e.value ->> 12 AS digest,
    NULLIF(e.value -> 13, 'null') AS error,
    NULLIF(e.value -> 14, 'null') AS facts
FROM task_history AS r CROSS JOIN json_each(r.entries) AS e
WHERE e.type = 'array';

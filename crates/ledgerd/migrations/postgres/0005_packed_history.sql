-- History entries share rows, sixteen at most, as on SQLite: a row costs the server time whatever it holds, and so does each
-- entry of an index. Each entry names the one of its task before it, and a task's row its newest, so that no index on tasks has
-- to grow with history. Daemons of before cannot write past this, for what they send rows as is no more: where one was heard of in the
-- last 10 s, everything stays as it is.

DO $$
BEGIN
    IF EXISTS (
        SELECT 1 FROM slots
        WHERE owner IS NOT NULL AND beat_at > (extract(epoch FROM clock_timestamp()) * 1000)::bigint - 10000
    ) THEN
        RAISE EXCEPTION 'a daemon of a release before serves this ledger, or was killed within the last 10 s: stop all of them first';
    END IF;
END;
$$;

DROP TYPE new_task_history;
DROP TYPE lean_task_history;
DROP TYPE new_tasks;
DROP TYPE lean_tasks;
DROP TYPE changed_tasks;
DROP TYPE lean_changed_tasks;
DROP VIEW history;

-- Where an entry stands: the slot that wrote it, its number, and its time.
ALTER TABLE tasks
    -- The newest of the task. NULL: it was DONE or CANCELLED when this column came.
    ADD COLUMN history_slot SMALLINT,
    ADD COLUMN history_seq BIGINT,
    ADD COLUMN history_at BIGINT;

-- The same of the one before. NULL: there is none, or it is in this table too.
ALTER TABLE task_history_kept
    ADD COLUMN before_slot SMALLINT,
    ADD COLUMN before_seq BIGINT,
    ADD COLUMN before_at BIGINT;

-- What there is of tasks that are stored is kept until they go, a row for each entry, as what outlives its day.
INSERT INTO task_history_kept
SELECT h.* FROM (
    SELECT task_id, version, seq, at, fence, until, digest, attempt, slot, kind, from_state, to_state, reason, worker, error, facts
    FROM task_history
) AS h
WHERE EXISTS (SELECT 1 FROM tasks AS t WHERE t.id = h.task_id);

UPDATE tasks AS t SET history_slot = h.slot, history_seq = h.seq, history_at = h.at
FROM task_history_kept AS h WHERE h.task_id = t.id AND h.version = t.version AND t.state NOT IN (5, 7);

DROP TABLE task_history;
DELETE FROM history_days;
ALTER TABLE history_days
    DROP COLUMN walked,
    -- The last row that was looked at since.
    ADD COLUMN walked_slot SMALLINT NOT NULL DEFAULT -1,
    ADD COLUMN walked_seq BIGINT NOT NULL DEFAULT 0;

-- Append-only. One partition for each day (UTC) of `at`, made ahead; a whole day is dropped when its tasks have gone, so entries of
-- tasks that were removed may still be here. All entries of a row are of one day.
CREATE TABLE task_history (
    -- The number of its first entry; the others follow it.
    seq BIGINT NOT NULL,
    -- Of the first entry too.
    task BIGINT NOT NULL,
    at BIGINT NOT NULL,
    slot SMALLINT NOT NULL,
    -- A JSON array of at most 16, each an array: see `unpacked`.
    entries TEXT NOT NULL
) PARTITION BY RANGE (at);

CREATE INDEX task_history_by_seq ON task_history (slot, seq);

-- Rows of days without a partition, as a clock that was set may bring: on their way to those that are kept.
CREATE TABLE task_history_default PARTITION OF task_history DEFAULT;

CREATE TRIGGER task_history_is_append_only BEFORE UPDATE ON task_history
FOR EACH ROW EXECUTE FUNCTION history_is_append_only();

-- The entries of a row. Each is an array of
-- [task - row's task, version, the one of its task before it or null, kind, from, to, reason, at - row's at, fence, attempt,
-- worker, until - row's at, digest, error, facts],
-- nulls at its end left out; the one before is [slot, seq, at - row's at]. JSONB is read in a quarter of the time; error and facts are
-- told as they were written.
CREATE FUNCTION unpacked(of_slot SMALLINT, of_seq BIGINT, of_task BIGINT, of_at BIGINT, entries TEXT) RETURNS TABLE (
    task_id BIGINT, version BIGINT, seq BIGINT, at BIGINT, fence BIGINT, until BIGINT, digest BIGINT, attempt INTEGER, slot SMALLINT,
    kind SMALLINT, from_state SMALLINT, to_state SMALLINT, reason SMALLINT, worker TEXT, error TEXT, facts TEXT,
    before_slot SMALLINT, before_seq BIGINT, before_at BIGINT
) LANGUAGE sql IMMUTABLE AS $$
    SELECT
        $3 + (e.value ->> 0)::bigint,
        (e.value ->> 1)::bigint,
        $2 + e.place - 1,
        $4 + (e.value ->> 7)::bigint,
        (e.value ->> 8)::bigint,
        $4 + (e.value ->> 11)::bigint,
        (e.value ->> 12)::bigint,
        (e.value ->> 9)::integer,
        $1,
        (e.value ->> 3)::smallint,
        (e.value ->> 4)::smallint,
        (e.value ->> 5)::smallint,
        (e.value ->> 6)::smallint,
        e.value ->> 10,
        CASE WHEN jsonb_array_length(e.value) > 13 THEN
            NULLIF(($5::json -> (e.place - 1)::integer -> 13)::text, 'null')
        END,
        CASE WHEN jsonb_array_length(e.value) > 14 THEN
            NULLIF(($5::json -> (e.place - 1)::integer -> 14)::text, 'null')
        END,
        (e.value -> 2 ->> 0)::smallint,
        (e.value -> 2 ->> 1)::bigint,
        $4 + (e.value -> 2 ->> 2)::bigint
    FROM jsonb_array_elements($5::jsonb) WITH ORDINALITY AS e (value, place)
$$;

-- The history of tasks that are stored, and remains of others. Who asks for the history of one task asks `history_of`.
CREATE VIEW history AS
SELECT h.* FROM task_history AS r CROSS JOIN LATERAL unpacked(r.slot, r.seq, r.task, r.at, r.entries) AS h
UNION ALL
SELECT * FROM task_history_kept;

-- The entry of this number, where it shares a row: it is found in the rows of its day, 16 numbers at most after that of its row.
CREATE FUNCTION packed_entry(slot SMALLINT, seq BIGINT, at BIGINT) RETURNS SETOF history LANGUAGE sql STABLE AS $$
    SELECT h.* FROM (
        SELECT * FROM task_history AS of_slot
        WHERE of_slot.slot = $1 AND of_slot.seq BETWEEN $2 - 15 AND $2
            AND of_slot.at >= $3 - $3 % 86400000 AND of_slot.at < $3 - $3 % 86400000 + 86400000
        ORDER BY of_slot.seq DESC LIMIT 1
    ) AS r CROSS JOIN LATERAL unpacked(r.slot, r.seq, r.task, r.at, r.entries) AS h
    WHERE h.seq = $2
$$;

-- All of a stored task: what is kept; and what shares rows, one after the other, from the newest and from before what is kept.
CREATE FUNCTION history_of(task BIGINT) RETURNS SETOF history LANGUAGE sql STABLE AS $$
    WITH RECURSIVE packed AS (
        SELECT h.* FROM (
            SELECT history_slot, history_seq, history_at FROM tasks WHERE id = $1
            UNION ALL
            SELECT before_slot, before_seq, before_at FROM task_history_kept WHERE task_id = $1
        ) AS p (slot, seq, at) CROSS JOIN LATERAL packed_entry(p.slot, p.seq, p.at) AS h
        WHERE p.slot IS NOT NULL
        UNION ALL
        SELECT h.* FROM packed AS p CROSS JOIN LATERAL packed_entry(p.before_slot, p.before_seq, p.before_at) AS h
        WHERE p.before_slot IS NOT NULL
    )
    SELECT * FROM packed
    UNION ALL
    SELECT * FROM task_history_kept WHERE task_id = $1
$$;

-- Rows of `tasks` on their way, as wide as the columns: whole, and without what few have.
CREATE TYPE new_tasks AS (
    id BIGINT, state SMALLINT, reason SMALLINT, priority SMALLINT, run_at BIGINT, calendar SMALLINT, deadline BIGINT,
    queued_at BIGINT, updated_at BIGINT, version BIGINT, fence BIGINT, delivery INTEGER, attempt INTEGER,
    idle_deliveries INTEGER, worker TEXT, incarnation BIGINT, session BIGINT, lease_until BIGINT, acked_at BIGINT,
    progress_at BIGINT, sample_epoch BIGINT, sample_probe SMALLINT, sample_told SMALLINT, history_slot SMALLINT,
    history_seq BIGINT, history_at BIGINT, retry_count INTEGER, losses INTEGER, preemptions INTEGER, redrives INTEGER,
    probe_failures INTEGER, tokens INTEGER, previous_delay BIGINT, stop_cause SMALLINT, stop_until BIGINT,
    discarded SMALLINT, loss_weight INTEGER, lost_at BIGINT, free_releases INTEGER, blocks INTEGER, result BYTEA
);

CREATE TYPE lean_tasks AS (
    id BIGINT, state SMALLINT, reason SMALLINT, priority SMALLINT, run_at BIGINT, calendar SMALLINT, deadline BIGINT,
    queued_at BIGINT, updated_at BIGINT, version BIGINT, fence BIGINT, delivery INTEGER, attempt INTEGER,
    idle_deliveries INTEGER, worker TEXT, incarnation BIGINT, session BIGINT, lease_until BIGINT, acked_at BIGINT,
    progress_at BIGINT, sample_epoch BIGINT, sample_probe SMALLINT, sample_told SMALLINT, history_slot SMALLINT,
    history_seq BIGINT, history_at BIGINT
);

CREATE TYPE changed_tasks AS (
    id BIGINT, state SMALLINT, reason SMALLINT, priority SMALLINT, run_at BIGINT, calendar SMALLINT, deadline BIGINT,
    queued_at BIGINT, updated_at BIGINT, version BIGINT, fence BIGINT, delivery INTEGER, attempt INTEGER,
    idle_deliveries INTEGER, worker TEXT, incarnation BIGINT, session BIGINT, lease_until BIGINT, acked_at BIGINT,
    progress_at BIGINT, sample_epoch BIGINT, sample_probe SMALLINT, sample_told SMALLINT, history_slot SMALLINT,
    history_seq BIGINT, history_at BIGINT, retry_count INTEGER, losses INTEGER, preemptions INTEGER, redrives INTEGER,
    probe_failures INTEGER, tokens INTEGER, previous_delay BIGINT, stop_cause SMALLINT, stop_until BIGINT,
    discarded SMALLINT, loss_weight INTEGER, lost_at BIGINT, free_releases INTEGER, blocks INTEGER, result BYTEA,
    expected BIGINT, held BIGINT
);

CREATE TYPE lean_changed_tasks AS (
    id BIGINT, state SMALLINT, reason SMALLINT, priority SMALLINT, run_at BIGINT, calendar SMALLINT, deadline BIGINT,
    queued_at BIGINT, updated_at BIGINT, version BIGINT, fence BIGINT, delivery INTEGER, attempt INTEGER,
    idle_deliveries INTEGER, worker TEXT, incarnation BIGINT, session BIGINT, lease_until BIGINT, acked_at BIGINT,
    progress_at BIGINT, sample_epoch BIGINT, sample_probe SMALLINT, sample_told SMALLINT, history_slot SMALLINT,
    history_seq BIGINT, history_at BIGINT, result BYTEA, expected BIGINT, held BIGINT
);

CREATE TYPE packed_history AS (
    slot SMALLINT, seq BIGINT, task BIGINT, at BIGINT, entries TEXT
);

-- What is known of the columns of `tasks` as one check: each of the nine had an evaluation of its own for every row that was written, some
-- 0.5 µs more for an insert and an update. First, while nothing else is locked. What is stored was checked when it was written.
DO $$
DECLARE
    known NAME;
BEGIN
    FOR known IN SELECT conname FROM pg_constraint WHERE conrelid = 'tasks'::regclass AND contype = 'c' LOOP
        EXECUTE format('ALTER TABLE tasks DROP CONSTRAINT %I', known);
    END LOOP;
END $$;
ALTER TABLE tasks ADD CONSTRAINT tasks_check CHECK (
    state BETWEEN 1 AND 7
    AND reason BETWEEN 0 AND 255
    AND priority BETWEEN 0 AND 9
    AND calendar BETWEEN 0 AND 1
    AND version > 0
    AND fence >= 0
    AND (worker IS NULL) = (lease_until IS NULL)
    AND (stop_cause IS NULL) = (stop_until IS NULL)
    AND (discarded IS NULL OR discarded BETWEEN 0 AND 1)
) NOT VALID;

-- Tasks that end, with what an end changes: it takes holder, lease and sample, and leaves what the task waited by as it was.
CREATE TYPE lean_ended_tasks AS (
    id BIGINT, state SMALLINT, reason SMALLINT, updated_at BIGINT, version BIGINT, attempt INTEGER, idle_deliveries INTEGER,
    history_slot SMALLINT, history_seq BIGINT, history_at BIGINT, result BYTEA, expected BIGINT, held BIGINT
);

-- All is looked up by indexes, whatever statistics say, so the large tables need none: to take them of a table that grows cost the
-- server as much as 1,500 lifecycles each minute, for 100,000 of them. The number of rows is still counted.
DO $$
DECLARE
    known RECORD;
BEGIN
    FOR known IN
        SELECT a.attrelid::regclass AS large, string_agg(format('ALTER COLUMN %I SET STATISTICS 0', a.attname), ', ') AS columns
        FROM pg_attribute AS a
        WHERE a.attnum > 0 AND NOT a.attisdropped AND (
            a.attrelid IN (
                'tasks'::regclass, 'task_specs'::regclass, 'task_history_kept'::regclass, 'idempotency_keys'::regclass,
                'requests'::regclass, 'ready'::regclass, 'results'::regclass, 'salvage'::regclass, 'task_notes'::regclass,
                'agent_blocks'::regclass
            )
            OR a.attrelid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'task_history'::regclass)
        )
        GROUP BY a.attrelid
        ORDER BY a.attrelid
    LOOP
        EXECUTE format('ALTER TABLE %s %s', known.large, known.columns);
    END LOOP;
END $$;

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

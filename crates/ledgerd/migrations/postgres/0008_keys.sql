-- Keys are held by the rows of what producers said, under a unique index: a row in a table of their own said once more what stands
-- there, and cost the server as much as any other. The index compares keys by their bytes, whatever the database's collation is.
-- Daemons of before cannot write past this, for what they send keys as is no more: where one was heard of in the last 10 s,
-- everything stays as it is.

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

DROP TYPE new_idempotency_keys;
DROP TYPE lean_idempotency_keys;

-- 1: the task holds its key no more. A NULL takes no room.
ALTER TABLE task_specs ADD COLUMN key_freed SMALLINT;
ALTER TABLE task_specs ALTER COLUMN key_freed SET STATISTICS 0;

UPDATE task_specs AS s SET key_freed = 1
WHERE s.key IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM idempotency_keys AS k WHERE k.agent = s.agent AND k.key = s.key AND k.task_id = s.id);

DROP TABLE idempotency_keys;

CREATE UNIQUE INDEX task_specs_by_key ON task_specs (agent, key COLLATE "C") WHERE key IS NOT NULL AND key_freed IS NULL;

-- Keys that are held.
CREATE VIEW idempotency_keys AS
SELECT agent, key, id AS task_id, digest FROM task_specs WHERE key IS NOT NULL AND key_freed IS NULL;

-- Rows on their way of which some hold no key any more when they are made.
CREATE TYPE freed_task_specs AS (
    id BIGINT, agent INTEGER, task_type TEXT, created_at BIGINT, payload BYTEA, labels TEXT, policy TEXT, traceparent TEXT,
    tracestate TEXT, key TEXT, digest BIGINT, frees_key SMALLINT, parent BIGINT, key_freed SMALLINT
);

-- Whoever watches reads on from a row of each slot.
CREATE INDEX task_history_by_seq ON task_history (slot, seq);
CREATE INDEX task_history_kept_by_seq ON task_history_kept (slot, seq);

-- The newest row of each slot that was the newest of a task that was removed: whoever watches from before it would miss some.
CREATE TABLE removed_history (
    slot SMALLINT PRIMARY KEY,
    seq BIGINT NOT NULL CHECK (seq > 0)
);

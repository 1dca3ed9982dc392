-- The newest history row of any task that was removed: whoever watches from before it would miss some.
ALTER TABLE meta ADD COLUMN removed_seq INTEGER NOT NULL DEFAULT 0 CHECK (removed_seq >= 0);

-- What losses weigh and how often a task was given back or blocked in a row, pauses, answers, and whose follow-up it is.

ALTER TABLE tasks ADD COLUMN loss_weight INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tasks ADD COLUMN lost_at INTEGER;
ALTER TABLE tasks ADD COLUMN free_releases INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tasks ADD COLUMN blocks INTEGER NOT NULL DEFAULT 0;

-- Until now every loss weighed whole.
UPDATE tasks SET loss_weight = 1000 * losses, lost_at = updated_at WHERE losses > 0;

ALTER TABLE task_specs ADD COLUMN parent INTEGER;
ALTER TABLE task_notes ADD COLUMN answer TEXT;
ALTER TABLE agents ADD COLUMN pause TEXT;

-- A small result is written with the row that says DONE: one row less for most tasks. Large ones stay in `results`.

ALTER TABLE tasks ADD COLUMN result BLOB;

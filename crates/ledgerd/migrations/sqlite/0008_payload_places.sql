-- Large payloads are in files of their own, where each is written once: in here it would be written to the log and then again to its
-- page. `task_specs.payload` is empty for those.
CREATE TABLE payload_places (
    task_id INTEGER PRIMARY KEY,
    -- The number that the file is named by, in `ledger.payloads`.
    file INTEGER NOT NULL CHECK (file > 0),
    -- Where it begins, in bytes.
    at INTEGER NOT NULL CHECK (at >= 0),
    length INTEGER NOT NULL CHECK (length > 0),
    -- XXH3 of its bytes.
    digest INTEGER NOT NULL
) STRICT;

-- What of a file is still somebody's.
CREATE INDEX payload_places_by_file ON payload_places (file, at, length);

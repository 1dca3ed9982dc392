-- Which agents have tasks among each 16 numbers, in place of an index of all tasks by agent: tasks mostly come in runs, so
-- there is one entry for many, and a list by agent looks at 16 rows for each entry.

CREATE TABLE agent_blocks (
    agent INTEGER NOT NULL,
    block INTEGER NOT NULL,
    PRIMARY KEY (agent, block)
) STRICT, WITHOUT ROWID;

INSERT OR IGNORE INTO agent_blocks (agent, block) SELECT agent, id >> 4 FROM task_specs ORDER BY agent, id;

DROP INDEX task_specs_by_agent;

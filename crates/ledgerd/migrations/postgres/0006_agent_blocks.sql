-- Which agents have tasks among each 16 numbers, in place of an index of all tasks by agent, as on SQLite: tasks mostly come in
-- runs, so there is one entry for many, and a list by agent looks at 16 rows for each entry.

CREATE TABLE agent_blocks (
    agent INTEGER NOT NULL,
    block BIGINT NOT NULL,
    PRIMARY KEY (agent, block)
);

INSERT INTO agent_blocks (agent, block) SELECT DISTINCT agent, id >> 4 FROM task_specs;

DROP INDEX task_specs_by_agent;

CREATE TYPE new_agent_blocks AS (agent INTEGER, block BIGINT);

#!/bin/sh
# A worker for the agent `codex`: each task is one run of the Codex command line.
exec ledgerd worker exec --agent codex --capacity 2 -- \
    codex exec '{{payload.prompt}}'

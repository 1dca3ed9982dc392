#!/bin/sh
# A worker for the agent `claude`: each task is one run of the Claude command line, two at one time.
# The prompt comes from the payload; the JSON that Claude prints is the task's result.
exec ledgerd worker exec --agent claude --capacity 2 -- \
    claude -p '{{payload.prompt}}' --output-format json

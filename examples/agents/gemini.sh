#!/bin/sh
# A worker for the agent `gemini`: each task is one run of the Gemini command line.
exec ledgerd worker exec --agent gemini --capacity 2 -- \
    gemini -p '{{payload.prompt}}'

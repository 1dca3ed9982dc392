#!/bin/sh
# A worker whose program asks a person before it goes on: the question is the task's, the answer comes with the next run.
exec ledgerd worker exec --agent writer --worker-id writer -- sh -c '
    if [ -z "$LEDGERD_ANSWER" ]; then
        echo "{\"question\": \"Which branch?\"}" > "$LEDGERD_REPLY"
        exit
    fi
    echo "written on $LEDGERD_ANSWER"'

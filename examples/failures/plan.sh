#!/bin/sh
# A worker whose result is more work: its two tasks are enqueued in the transaction that records that it is done.
exec ledgerd worker exec --agent planner --worker-id planner -- sh -c '
    cat > "$LEDGERD_REPLY" <<END
    {"follow_ups": [
        {"agent": "builder", "task_type": "build", "payload": "linux", "key": "build-linux"},
        {"agent": "builder", "task_type": "build", "payload": "mac", "key": "build-mac"}]}
END
    echo planned'

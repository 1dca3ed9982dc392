#!/bin/sh
# A worker that fails for good until there is paper: what has failed meanwhile is put back afterwards.
paper="${TMPDIR:-/tmp}/ledgerd-example-paper"
exec ledgerd worker exec --agent printer --worker-id printer -- sh -c '
    if [ ! -e "$1" ]; then
        echo "no paper for $LEDGERD_TASK_ID" >&2
        exit 78
    fi
    cat' sh "$paper"

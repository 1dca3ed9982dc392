#!/bin/sh
# A worker that is told to come back later, once: the time it was told goes before the back-off.
exec ledgerd worker exec --agent limited --worker-id limited -- sh -c '
    if [ "$LEDGERD_ATTEMPT" = 1 ]; then
        echo "{\"retry_after\": \"2s\", \"class\": \"OVERLOADED\", \"code\": \"HTTP_429\"}" > "$LEDGERD_REPLY"
        echo "too many requests" >&2
        exit 75
    fi
    echo "served"'

#!/bin/sh
# A worker whose backend is down until it is up: enough failures in a row open its agent's breaker.
up="${TMPDIR:-/tmp}/ledgerd-example-model"
exec ledgerd worker exec --agent model --worker-id model -- sh -c '
    if [ ! -e "$1" ]; then
        echo "connection refused" >&2
        exit 75
    fi
    cat' sh "$up"

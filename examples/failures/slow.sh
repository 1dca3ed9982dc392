#!/bin/sh
# A worker that takes its time, and says where it can be killed.
echo $$ > "${TMPDIR:-/tmp}/ledgerd-example-slow"
exec ledgerd worker exec --agent slow --worker-id slow -- sleep 600

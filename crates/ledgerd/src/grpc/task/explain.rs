//! Why a task is not running.

use crate::grpc::wire;
use crate::ledger::Handle;
use crate::ledger::command::LedgerError;

pub(super) async fn explain(
    _handle: &Handle,
    _said: wire::ExplainTaskRequest,
) -> Result<wire::ExplainTaskResponse, LedgerError> {
    todo!()
}

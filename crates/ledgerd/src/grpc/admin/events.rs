//! What happened to agents and their breakers.

use super::Admin;
use crate::grpc::wire;
use crate::ledger::command::LedgerError;

impl Admin {
    pub(super) async fn events(
        &self,
        _said: wire::ListAgentEventsRequest,
    ) -> Result<wire::ListAgentEventsResponse, LedgerError> {
        todo!()
    }
}

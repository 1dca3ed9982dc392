//! Breakers: looked at and ordered about.

use super::Admin;
use crate::grpc::wire;
use crate::ledger::command::LedgerError;

impl Admin {
    pub(super) async fn trip(
        &self,
        _said: wire::TripBreakerRequest,
    ) -> Result<wire::TripBreakerResponse, LedgerError> {
        todo!()
    }

    pub(super) async fn force(
        &self,
        _said: wire::ForceBreakerRequest,
    ) -> Result<wire::ForceBreakerResponse, LedgerError> {
        todo!()
    }
}

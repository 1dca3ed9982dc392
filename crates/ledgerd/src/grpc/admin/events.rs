//! What happened to agents and their breakers.

use super::Admin;
use crate::grpc::access::Access;
use crate::grpc::convert::{self, At, Check, Page};
use crate::grpc::wire;
use crate::ledger::command::LedgerError;
use std::mem::take;

impl Admin {
    pub(super) async fn events(
        &self,
        access: &Access,
        mut said: wire::ListAgentEventsRequest,
    ) -> Result<wire::ListAgentEventsResponse, LedgerError> {
        let mut check = Check::default();
        let (size, token) = (take(&mut said.page_size), take(&mut said.page_token));
        let page = Page::read(&mut check, (size, 50), &token, &said, "agent events");
        if !said.agent.is_empty() {
            check.agent(At::Root, "agent", &said.agent);
        }
        check.done(())?;
        access.filter(&said.agent)?;
        let before = page.before()?;
        let agent = match said.agent.as_str() {
            "" => None,
            name => {
                Some(self.handle.agent_id(name).await.ok_or_else(|| LedgerError::UnknownAgent(name.into()))?)
            }
        };
        let found = self.handle.reader().agent_events(agent, before, page.limit).await;
        let found = found.map_err(LedgerError::Store)?;
        let events = found
            .items
            .into_iter()
            .map(|(seq, event)| convert::agent_event(seq, &event, self.name(event.agent)));
        Ok(wire::ListAgentEventsResponse {
            events: events.collect(),
            next_page_token: page.token_before(found.before),
        })
    }
}

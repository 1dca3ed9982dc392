//! Breakers: looked at and ordered about.

use super::Admin;
use crate::grpc::access::Access;
use crate::grpc::convert::{self, At, Check, Page};
use crate::grpc::wire;
use crate::ledger::command::{AgentView, BreakerOrder, LedgerError};
use std::sync::Arc;

/// A breaker in a list of all: by agent, then by type.
struct Listed {
    place: Arc<str>,
    breaker: wire::Breaker,
}

impl Admin {
    pub(super) async fn breakers(
        &self,
        access: &Access,
        said: wire::ListBreakersRequest,
    ) -> Result<wire::ListBreakersResponse, LedgerError> {
        let mut check = Check::default();
        let filter = wire::ListBreakersRequest::default();
        let page = Page::read(&mut check, (said.page_size, 1_000), &said.page_token, &filter, "breakers");
        check.done(())?;
        let agents = self.handle.agents().await?;
        let mut all: Vec<Listed> = agents
            .iter()
            .filter(|agent| access.sees(&agent.name))
            .flat_map(|agent| agent.breakers.iter().map(move |breaker| (agent, breaker)))
            .map(|(agent, breaker)| Listed {
                place: format!("{}/{}", agent.name, breaker.task_type).into(),
                breaker: convert::breaker(agent, breaker),
            })
            .collect();
        all.sort_by(|a, b| a.place.cmp(&b.place));
        let (listed, next_page_token) = page.cut(all, |listed| &listed.place);
        let breakers = listed.into_iter().map(|listed| listed.breaker).collect();
        Ok(wire::ListBreakersResponse { breakers, next_page_token })
    }

    /// A breaker as it is now. A type that has none yet goes by one that is as new.
    pub(super) async fn breaker(
        &self,
        access: &Access,
        agent: &str,
        task_type: &str,
    ) -> Result<wire::Breaker, LedgerError> {
        let mut check = Check::default();
        convert::breaker_named(&mut check, agent, task_type);
        check.done(())?;
        access.agent(agent)?;
        let view = self.view(agent).await?;
        found(&view, task_type)
    }

    pub(super) async fn reset(
        &self,
        access: &Access,
        said: wire::ResetBreakerRequest,
    ) -> Result<wire::ResetBreakerResponse, LedgerError> {
        let mut check = Check::default();
        let reason = convert::note(&mut check, "reason", said.reason);
        let breaker = self
            .order(access, check, said.agent, said.task_type, BreakerOrder::Reset, said.actor, reason)
            .await?;
        Ok(wire::ResetBreakerResponse { breaker: Some(breaker) })
    }

    pub(super) async fn trip(
        &self,
        access: &Access,
        said: wire::TripBreakerRequest,
    ) -> Result<wire::TripBreakerResponse, LedgerError> {
        let mut check = Check::default();
        check.must(!said.reason.is_empty(), At::Root, "reason", "say why it is opened");
        let order = convert::trip_time(&mut check, said.duration);
        let reason = convert::note(&mut check, "reason", said.reason);
        let breaker =
            self.order(access, check, said.agent, said.task_type, order, said.actor, reason).await?;
        Ok(wire::TripBreakerResponse { breaker: Some(breaker) })
    }

    pub(super) async fn force(
        &self,
        access: &Access,
        said: wire::ForceBreakerRequest,
    ) -> Result<wire::ForceBreakerResponse, LedgerError> {
        let mut check = Check::default();
        check.must(!said.reason.is_empty(), At::Root, "reason", "say why it is forced");
        let order = convert::forced(&mut check, &said);
        let reason = convert::note(&mut check, "reason", said.reason);
        let breaker =
            self.order(access, check, said.agent, said.task_type, order, said.actor, reason).await?;
        Ok(wire::ForceBreakerResponse { breaker: Some(breaker) })
    }

    #[expect(clippy::too_many_arguments, reason = "each is a field of the requests that come here")]
    async fn order(
        &self,
        access: &Access,
        mut check: Check,
        agent: String,
        task_type: String,
        order: BreakerOrder,
        actor: String,
        reason: Arc<str>,
    ) -> Result<wire::Breaker, LedgerError> {
        convert::breaker_named(&mut check, &agent, &task_type);
        let actor = access.actor(&mut check, actor);
        check.done(())?;
        access.agent(&agent)?;
        let (name, of): (Arc<str>, Arc<str>) = (agent.as_str().into(), task_type.as_str().into());
        self.handle.order_breaker(name, of, order, actor, reason).await?;
        let view = self.view(&agent).await?;
        found(&view, &task_type)
    }
}

fn found(view: &AgentView, task_type: &str) -> Result<wire::Breaker, LedgerError> {
    if !task_type.is_empty() && !view.settings.per_task_type {
        let rule = "leave it out: the agent has one breaker for all of its types";
        return Err(LedgerError::Invalid(vec![ledger_core::Violation::new("task_type", rule)]));
    }
    let of_type = view.breakers.iter().find(|breaker| *breaker.task_type == *task_type);
    // Its first task makes it: until then it is as new, unless too many types have one.
    let new = breaker_core::Breaker::new(view.settings.breaker).ok().map(|breaker| {
        crate::ledger::command::BreakerView { task_type: task_type.into(), breaker, gated: 0 }
    });
    let full = view.breakers.len() > ledger_core::limits::AGENT_BREAKERS;
    let shared = view.breakers.first().filter(|_| full);
    match of_type.or(shared).or(new.as_ref()) {
        Some(breaker) => Ok(convert::breaker(view, breaker)),
        None => Err(LedgerError::UnknownAgent(Arc::clone(&view.name))),
    }
}

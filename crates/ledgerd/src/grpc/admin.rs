//! AdminService: what operators call.

mod breakers;
mod events;
mod letters;

use super::access::Access;
use super::convert::{self, At, Check, Page};
use super::status::status;
use super::task::small;
use super::wire::{self, admin_service_server::AdminService};
use crate::ledger::Handle;
use crate::ledger::command::{AgentView, LedgerError};
use crate::process;
use ledger_core::{AgentId, State};
use prost::Message;
use std::mem::take;
use tonic::{Request, Response, Status};

pub(super) struct Admin {
    handle: Handle,
}

impl Admin {
    pub(super) const fn new(handle: Handle) -> Self {
        Self { handle }
    }

    /// One agent as it is now.
    async fn view(&self, name: &str) -> Result<AgentView, LedgerError> {
        let agents = self.handle.agents().await?;
        agents
            .into_iter()
            .find(|agent| *agent.name == *name)
            .ok_or_else(|| LedgerError::UnknownAgent(name.into()))
    }

    /// A page of the agents within reach.
    async fn views(
        &self,
        access: &Access,
        (size, token): (i32, &str),
        filter: &impl Message,
        list: &str,
    ) -> Result<(Vec<AgentView>, String), LedgerError> {
        let mut check = Check::default();
        let page = Page::read(&mut check, (size, 1_000), token, filter, list);
        check.done(())?;
        let mut agents = self.handle.agents().await?;
        agents.retain(|agent| access.sees(&agent.name));
        Ok(page.cut(agents, |agent| &agent.name))
    }

    pub(super) fn name(&self, agent: AgentId) -> String {
        self.handle.agent_name(agent).map(|name| name.as_ref().to_owned()).unwrap_or_default()
    }

    async fn pause(
        &self,
        access: &Access,
        said: wire::PauseAgentRequest,
    ) -> Result<wire::PauseAgentResponse, LedgerError> {
        let mut check = Check::default();
        check.agent(At::Root, "agent", &said.agent);
        check.must(!said.reason.is_empty(), At::Root, "reason", "say why it is paused");
        let reason = convert::note(&mut check, "reason", said.reason);
        let actor = access.actor(&mut check, said.actor);
        let duration = convert::pause_time(&mut check, said.duration);
        check.done(())?;
        access.agent(&said.agent)?;
        self.handle.pause(said.agent.as_str().into(), reason, actor, duration).await?;
        let view = self.view(&said.agent).await?;
        Ok(wire::PauseAgentResponse { agent: Some(convert::agent(&view)) })
    }

    async fn configure(
        &self,
        access: &Access,
        said: wire::ConfigureAgentRequest,
    ) -> Result<wire::ConfigureAgentResponse, LedgerError> {
        let change = convert::agent_settings(&said.agent, said.settings)?;
        let mut check = Check::default();
        let reason = convert::note(&mut check, "reason", said.reason);
        let actor = access.actor(&mut check, said.actor);
        check.done(())?;
        access.agent(&said.agent)?;
        self.handle.configure(said.agent.as_str().into(), change, actor, reason).await?;
        let view = self.view(&said.agent).await?;
        Ok(wire::ConfigureAgentResponse { agent: Some(convert::agent(&view)) })
    }

    async fn resume(
        &self,
        access: &Access,
        said: wire::ResumeAgentRequest,
    ) -> Result<wire::ResumeAgentResponse, LedgerError> {
        let mut check = Check::default();
        check.agent(At::Root, "agent", &said.agent);
        let reason = convert::note(&mut check, "reason", said.reason);
        let actor = access.actor(&mut check, said.actor);
        check.done(())?;
        access.agent(&said.agent)?;
        self.handle.resume(said.agent.as_str().into(), reason, actor).await?;
        let view = self.view(&said.agent).await?;
        Ok(wire::ResumeAgentResponse { agent: Some(convert::agent(&view)) })
    }

    async fn workers(
        &self,
        access: &Access,
        mut said: wire::ListWorkersRequest,
    ) -> Result<wire::ListWorkersResponse, LedgerError> {
        let mut check = Check::default();
        let (size, token) = (take(&mut said.page_size), take(&mut said.page_token));
        let page = Page::read(&mut check, (size, 1_000), &token, &said, "workers");
        if !said.agent.is_empty() {
            check.agent(At::Root, "agent", &said.agent);
        }
        check.done(())?;
        if !said.agent.is_empty() {
            access.agent(&said.agent)?;
        }
        let mut workers = self.handle.workers().await?;
        for worker in &mut workers {
            worker.agents.retain(|agent| access.sees(agent));
        }
        workers.retain(|worker| !worker.agents.is_empty());
        workers.retain(|view| said.agent.is_empty() || view.agents.iter().any(|name| **name == *said.agent));
        let (workers, next_page_token) = page.cut(workers, |view| &view.worker);
        let workers = workers.into_iter().map(convert::worker_view).collect();
        Ok(wire::ListWorkersResponse { workers, next_page_token })
    }

    async fn stats(&self) -> Result<wire::GetStatsResponse, LedgerError> {
        let stats = self.handle.stats().await?;
        let sizes = self.handle.reader().sizes().await.map_err(LedgerError::Store)?;
        let retention = self.handle.retention();
        let kept = |span: Option<std::time::Duration>| span.map(convert::span);
        Ok(wire::GetStatsResponse {
            counts: convert::counts(&stats.counts, State::ALL),
            dead_letters: sizes.dead_letters,
            sessions: stats.sessions,
            agents: stats.agents,
            transitions: stats.transitions,
            budget_tokens: convert::tokens(stats.budget_millitokens),
            commits: stats.commits,
            uptime: Some(convert::span(self.handle.clock().uptime())),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            store_bytes: sizes.bytes,
            store_free_bytes: sizes.free_bytes,
            log_bytes: sizes.log_bytes,
            retention_done: kept(retention.and_then(|retention| retention.done)),
            retention_failed: kept(retention.and_then(|retention| retention.failed)),
            removed_tasks: self.handle.removed(),
            cpu_time: Some(convert::span(process::cpu_time())),
            written_bytes: process::written_bytes(),
        })
    }
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn list_agents(
        &self,
        request: Request<wire::ListAgentsRequest>,
    ) -> Result<Response<wire::ListAgentsResponse>, Status> {
        let access = Access::of(request.extensions())?;
        let said = request.into_inner();
        let page = (said.page_size, said.page_token.as_str());
        let filter = wire::ListAgentsRequest::default();
        let (views, next_page_token) =
            self.views(&access, page, &filter, "agents").await.map_err(|error| status(&error))?;
        let agents = views.iter().map(convert::agent).collect();
        Ok(Response::new(wire::ListAgentsResponse { agents, next_page_token }))
    }

    async fn get_agent(
        &self,
        request: Request<wire::GetAgentRequest>,
    ) -> Result<Response<wire::GetAgentResponse>, Status> {
        let name = &request.get_ref().agent;
        convert::agent_name(name).map_err(|error| status(&error))?;
        Access::of(request.extensions())?.agent(name).map_err(|error| status(&error))?;
        let view = self.view(name).await.map_err(|error| status(&error))?;
        Ok(small(wire::GetAgentResponse { agent: Some(convert::agent(&view)) }))
    }

    async fn configure_agent(
        &self,
        request: Request<wire::ConfigureAgentRequest>,
    ) -> Result<Response<wire::ConfigureAgentResponse>, Status> {
        self.configure(&Access::of(request.extensions())?, request.into_inner())
            .await
            .map(small)
            .map_err(|error| status(&error))
    }

    async fn pause_agent(
        &self,
        request: Request<wire::PauseAgentRequest>,
    ) -> Result<Response<wire::PauseAgentResponse>, Status> {
        self.pause(&Access::of(request.extensions())?, request.into_inner())
            .await
            .map(small)
            .map_err(|error| status(&error))
    }

    async fn resume_agent(
        &self,
        request: Request<wire::ResumeAgentRequest>,
    ) -> Result<Response<wire::ResumeAgentResponse>, Status> {
        self.resume(&Access::of(request.extensions())?, request.into_inner())
            .await
            .map(small)
            .map_err(|error| status(&error))
    }

    async fn list_breakers(
        &self,
        request: Request<wire::ListBreakersRequest>,
    ) -> Result<Response<wire::ListBreakersResponse>, Status> {
        self.breakers(&Access::of(request.extensions())?, request.into_inner())
            .await
            .map(Response::new)
            .map_err(|error| status(&error))
    }

    async fn get_breaker(
        &self,
        request: Request<wire::GetBreakerRequest>,
    ) -> Result<Response<wire::GetBreakerResponse>, Status> {
        let access = Access::of(request.extensions())?;
        let said = request.into_inner();
        let breaker =
            self.breaker(&access, &said.agent, &said.task_type).await.map_err(|error| status(&error))?;
        Ok(small(wire::GetBreakerResponse { breaker: Some(breaker) }))
    }

    async fn reset_breaker(
        &self,
        request: Request<wire::ResetBreakerRequest>,
    ) -> Result<Response<wire::ResetBreakerResponse>, Status> {
        self.reset(&Access::of(request.extensions())?, request.into_inner())
            .await
            .map(small)
            .map_err(|error| status(&error))
    }

    async fn trip_breaker(
        &self,
        request: Request<wire::TripBreakerRequest>,
    ) -> Result<Response<wire::TripBreakerResponse>, Status> {
        self.trip(&Access::of(request.extensions())?, request.into_inner())
            .await
            .map(small)
            .map_err(|error| status(&error))
    }

    async fn force_breaker(
        &self,
        request: Request<wire::ForceBreakerRequest>,
    ) -> Result<Response<wire::ForceBreakerResponse>, Status> {
        self.force(&Access::of(request.extensions())?, request.into_inner())
            .await
            .map(small)
            .map_err(|error| status(&error))
    }

    async fn list_agent_events(
        &self,
        request: Request<wire::ListAgentEventsRequest>,
    ) -> Result<Response<wire::ListAgentEventsResponse>, Status> {
        self.events(&Access::of(request.extensions())?, request.into_inner())
            .await
            .map(Response::new)
            .map_err(|error| status(&error))
    }

    async fn group_dead_letters(
        &self,
        request: Request<wire::GroupDeadLettersRequest>,
    ) -> Result<Response<wire::GroupDeadLettersResponse>, Status> {
        self.group(&Access::of(request.extensions())?, request.into_inner())
            .await
            .map(Response::new)
            .map_err(|error| status(&error))
    }

    async fn list_dead_letters(
        &self,
        request: Request<wire::ListDeadLettersRequest>,
    ) -> Result<Response<wire::ListDeadLettersResponse>, Status> {
        self.dead_letters(&Access::of(request.extensions())?, request.into_inner())
            .await
            .map(Response::new)
            .map_err(|error| status(&error))
    }

    async fn get_dead_letter(
        &self,
        request: Request<wire::GetDeadLetterRequest>,
    ) -> Result<Response<wire::GetDeadLetterResponse>, Status> {
        let letter = self.dead_letter(&Access::of(request.extensions())?, &request.get_ref().task_id).await?;
        Ok(small(wire::GetDeadLetterResponse { dead_letter: Some(letter) }))
    }

    async fn redrive_dead_letters(
        &self,
        request: Request<wire::RedriveDeadLettersRequest>,
    ) -> Result<Response<wire::RedriveDeadLettersResponse>, Status> {
        self.redrive(&Access::of(request.extensions())?, request.into_inner())
            .await
            .map(small)
            .map_err(|error| status(&error))
    }

    async fn discard_dead_letters(
        &self,
        request: Request<wire::DiscardDeadLettersRequest>,
    ) -> Result<Response<wire::DiscardDeadLettersResponse>, Status> {
        self.discard(&Access::of(request.extensions())?, request.into_inner())
            .await
            .map(small)
            .map_err(|error| status(&error))
    }

    async fn list_workers(
        &self,
        request: Request<wire::ListWorkersRequest>,
    ) -> Result<Response<wire::ListWorkersResponse>, Status> {
        self.workers(&Access::of(request.extensions())?, request.into_inner())
            .await
            .map(Response::new)
            .map_err(|error| status(&error))
    }

    async fn get_stats(
        &self,
        _request: Request<wire::GetStatsRequest>,
    ) -> Result<Response<wire::GetStatsResponse>, Status> {
        self.stats().await.map(small).map_err(|error| status(&error))
    }
}

//! What each method takes, and what the one who calls it may do.
//!
//! One layer of the server asks [`Access::of_call`] before any handler runs: who is it, and does a role of theirs allow the
//! method? What only a handler can know, which agent a call is about, it asks the [`Access`] it was given. A task of an
//! agent that is not theirs is answered exactly as one that does not exist.

use super::convert::{self, At, Check};
use super::status::Refused;
use crate::callers::{Caller, Callers, Credential, Permission};
use crate::ledger::Handle;
use crate::ledger::command::LedgerError;
use crate::trust::Trusted;
use http::{Extensions, HeaderMap, header};
use ledger_core::TaskId;
use ledger_core::limits::ACTOR_BYTES;
use std::collections::HashSet;
use std::sync::Arc;
use tonic::Status;

include!(concat!(env!("OUT_DIR"), "/methods.rs"));

/// Longer than any token, and than what other daemons make of it.
const TOKEN_BYTES: usize = 8 << 10;

impl Method {
    /// What a call takes. A method that is not here does not compile.
    pub(crate) const fn permission(self) -> Permission {
        match self {
            Self::EnqueueTask | Self::EnqueueTasks => Permission::Enqueue,
            Self::GetTask
            | Self::ListTasks
            | Self::GetTaskHistory
            | Self::WaitTask
            | Self::WatchTasks
            | Self::ExplainTask => Permission::SeeTasks,
            Self::CancelTask | Self::UpdateTask | Self::UnblockTask => Permission::ChangeTasks,
            Self::Work | Self::SettleTasks => Permission::Work,
            Self::ListAgents
            | Self::GetAgent
            | Self::ListAgentEvents
            | Self::ListBreakers
            | Self::GetBreaker
            | Self::ListDeadLetters
            | Self::GetDeadLetter
            | Self::GroupDeadLetters
            | Self::ListWorkers
            | Self::GetStats
            | Self::IsActive
            | Self::StreamIsActive
            | Self::GetMetricSpec
            | Self::GetMetrics
            | Self::StreamMetricSpec => Permission::SeeFleet,
            Self::ConfigureAgent
            | Self::PauseAgent
            | Self::ResumeAgent
            | Self::ResetBreaker
            | Self::TripBreaker
            | Self::ForceBreaker
            | Self::RedriveDeadLetters
            | Self::DiscardDeadLetters => Permission::Operate,
        }
    }
}

/// What the one who calls may do.
#[derive(Clone, Debug)]
pub(crate) struct Access(Option<Known>);

/// A caller who is known, and by what.
#[derive(Clone, Debug)]
struct Known {
    caller: Arc<Caller>,
    credential: Credential,
    trusted: Trusted,
}

impl Access {
    /// Who makes a call with these headers, over a connection whose certificate has these names, when they may.
    ///
    /// A token that is sent decides, whatever the certificate says: it is what the caller chose for this call.
    ///
    /// # Errors
    /// Nobody who is known, or somebody whose roles do not reach so far.
    pub(crate) fn of_call(
        trusted: &Trusted,
        headers: &HeaderMap,
        names: &[Box<str>],
        permission: Permission,
    ) -> Result<Self, Refused> {
        let trust = trusted.borrow();
        let Some(callers) = &trust.callers else { return Ok(Self(None)) };
        let (credential, caller) = match token(headers)? {
            Some(token) => {
                let credential = Credential::of_token(token);
                let caller = callers.find(&credential).ok_or(Refused::CallerUnknown)?;
                (credential, caller)
            }
            None if names.is_empty() => return Err(Refused::CredentialsMissing),
            None => names
                .iter()
                .map(|name| Credential::San(name.clone()))
                .find_map(|credential| callers.find(&credential).map(|caller| (credential, caller)))
                .ok_or(Refused::CallerUnknown)?,
        };
        if !caller.may(permission) {
            return Err(Refused::RoleMissing(permission));
        }
        let caller = Arc::clone(caller);
        Ok(Self(Some(Known { caller, credential, trusted: trusted.clone() })))
    }

    /// What the layer found out about this call.
    ///
    /// # Errors
    /// UNAUTHENTICATED for a call that did not pass the layer: none does.
    pub(super) fn of(extensions: &Extensions) -> Result<Self, Status> {
        extensions.get::<Self>().cloned().ok_or_else(|| Refused::CredentialsMissing.into())
    }

    fn caller(&self) -> Option<&Caller> {
        self.0.as_ref().map(|known| &*known.caller)
    }

    /// Whether somebody was asked who they are.
    pub(crate) const fn is_known(&self) -> bool {
        self.0.is_some()
    }

    /// Whether there are agents that are out of reach.
    pub(super) fn is_limited(&self) -> bool {
        self.caller().is_some_and(|caller| !caller.covers_all())
    }

    /// Whether an agent is within reach.
    pub(super) fn sees(&self, agent: &str) -> bool {
        self.caller().is_none_or(|caller| caller.covers(agent))
    }

    /// Whether payloads and results are shown.
    pub(super) fn reads_payloads(&self) -> bool {
        self.caller().is_none_or(|caller| caller.reads_payloads)
    }

    /// Asks for an agent that a call names. Whether there is one of that name makes no difference.
    ///
    /// # Errors
    /// AgentForbidden.
    pub(super) fn agent(&self, agent: &str) -> Result<(), LedgerError> {
        if self.sees(agent) { Ok(()) } else { Err(LedgerError::AgentForbidden(agent.into())) }
    }

    /// Asks for the agent of a filter. Without one the filter means every agent, which not everybody may see.
    ///
    /// # Errors
    /// AgentForbidden, AgentRequired.
    pub(super) fn filter(&self, agent: &str) -> Result<(), LedgerError> {
        match agent {
            "" if self.is_limited() => Err(LedgerError::AgentRequired),
            "" => Ok(()),
            agent => self.agent(agent),
        }
    }

    /// Asks for a task by its agent. Nothing is read for those who reach every agent.
    ///
    /// # Errors
    /// UnknownTask for one that is out of reach, as for one that does not exist; Store when it cannot be read.
    pub(super) async fn task(&self, handle: &Handle, task: TaskId) -> Result<(), LedgerError> {
        match self.out_of_reach(handle, &[task]).await?.is_empty() {
            true => Ok(()),
            false => Err(LedgerError::UnknownTask(task)),
        }
    }

    /// Those of these tasks that are out of reach or do not exist.
    ///
    /// # Errors
    /// Store when they cannot be read.
    pub(super) async fn out_of_reach(
        &self,
        handle: &Handle,
        tasks: &[TaskId],
    ) -> Result<HashSet<TaskId>, LedgerError> {
        let mut out = HashSet::new();
        if self.is_limited() {
            for task in tasks {
                let view = handle.reader().task(*task, false).await.map_err(LedgerError::Store)?;
                if !view.is_some_and(|view| self.sees(&view.agent)) {
                    out.insert(*task);
                }
            }
        }
        Ok(out)
    }

    /// Who does it, for the audit trail. A name that somebody gives stands behind the one that is known.
    pub(super) fn actor(&self, check: &mut Check, given: String) -> Arc<str> {
        check.plain(At::Root, "actor", &given, 0..=ACTOR_BYTES);
        let Some(caller) = self.caller() else { return given.into() };
        if given.is_empty() {
            return Arc::clone(&caller.name);
        }
        let mut actor = format!("{} ({given}", caller.name);
        actor.truncate(actor.floor_char_boundary(ACTOR_BYTES - 1));
        actor.push(')');
        actor.into()
    }

    /// Who and why, as history keeps it: `ada: the bug is mended`.
    pub(super) fn told(&self, check: &mut Check, given: String, why: String) -> Arc<str> {
        let actor = self.actor(check, given);
        let reason = convert::note(check, "reason", why);
        match (actor.is_empty(), reason.is_empty()) {
            (true, _) => reason,
            (false, true) => actor,
            (false, false) => format!("{actor}: {reason}").into(),
        }
    }

    /// The id under which a worker is kept. It begins with the caller's name: so nobody takes over what another's worker
    /// holds by using its id.
    pub(super) fn worker(&self, given: Arc<str>) -> Arc<str> {
        match self.caller() {
            Some(caller) => format!("{}/{given}", caller.name).into(),
            None => given,
        }
    }

    /// Returns when the caller may not do this for these agents any more, with what to end the stream with.
    pub(super) async fn lost(&self, permission: Permission, agents: &[Arc<str>]) -> Status {
        let Some(known) = &self.0 else { return std::future::pending().await };
        let mut trusted = known.trusted.clone();
        loop {
            if let Err(refused) =
                known.still(trusted.borrow_and_update().callers.as_ref(), permission, agents)
            {
                return refused.into();
            }
            if trusted.changed().await.is_err() {
                // The daemon is going away, and says so itself.
                return std::future::pending().await;
            }
        }
    }
}

impl Known {
    fn still(
        &self,
        callers: Option<&Callers>,
        permission: Permission,
        agents: &[Arc<str>],
    ) -> Result<(), Refused> {
        let caller = callers.and_then(|callers| callers.find(&self.credential));
        // Under another name it is somebody else.
        let caller = caller.filter(|caller| caller.name == self.caller.name).ok_or(Refused::CallerRevoked)?;
        if !caller.may(permission) {
            return Err(Refused::RoleMissing(permission));
        }
        if agents.iter().all(|agent| caller.covers(agent)) { Ok(()) } else { Err(Refused::AgentsRevoked) }
    }
}

/// The token that a call was sent with.
fn token(headers: &HeaderMap) -> Result<Option<&str>, Refused> {
    let mut all = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = all.next() else { return Ok(None) };
    if all.next().is_some() || value.len() > TOKEN_BYTES {
        return Err(Refused::CredentialsMalformed);
    }
    let text = value.to_str().map_err(|_| Refused::CredentialsMalformed)?;
    match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty() => {
            Ok(Some(token.trim()))
        }
        _ => Err(Refused::CredentialsMalformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::callers::Role;

    #[test]
    fn the_table_in_the_manual_is_this_one() {
        let manual = include_str!("../../../../docs/security.md");
        for method in Method::ALL {
            let may = |role: Role| if role.may(method.permission()) { "yes" } else { "" };
            let row = Role::ALL.iter().fold(format!("| {method:?} |"), |row, role| match may(*role) {
                "" => row + " |",
                yes => format!("{row} {yes} |"),
            });
            assert!(manual.lines().any(|line| line == row), "docs/security.md lacks this row:\n{row}");
        }
    }

    #[test]
    fn the_name_that_is_known_comes_first_and_fits() {
        let text = "[[caller]]\nname = 'ci'\nroles = ['operator']\nagents = ['*']\nsan = 'x'\n";
        let callers = Callers::read(text).expect("a file");
        let credential = Credential::San("x".into());
        let caller = Arc::clone(callers.find(&credential).expect("known"));
        let trust = crate::trust::Trust { tls: None, callers: Some(callers) };
        let (_keep, trusted) = tokio::sync::watch::channel(Arc::new(trust));
        let known = Access(Some(Known { caller, credential, trusted }));
        let mut check = Check::default();
        assert_eq!(&*known.actor(&mut check, String::new()), "ci");
        assert_eq!(&*known.actor(&mut check, "ada@box".into()), "ci (ada@box)");
        assert_eq!(&*known.told(&mut check, String::new(), "mended".into()), "ci: mended");
        let long = known.actor(&mut check, "é".repeat(64));
        assert!(long.len() <= ACTOR_BYTES && long.starts_with("ci (é") && long.ends_with("é)"), "{long}");
        assert_eq!(&*Access(None).actor(&mut check, "ada".into()), "ada");
        assert_eq!(&*Access(None).told(&mut check, "ada".into(), String::new()), "ada");
        assert!(check.done(()).is_ok());
    }
}

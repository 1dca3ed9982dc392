//! Dead letters: looked at, counted, put back, hidden.

use super::Admin;
use crate::grpc::access::Access;
use crate::grpc::convert::{self, At, Check, Page};
use crate::grpc::status::{Refused, status};
use crate::grpc::task::PAGE_BYTES;
use crate::grpc::wire;
use crate::ledger::command::LedgerError;
use ledger_core::TaskId;
use ledger_core::limits::ITEMS;
use ledger_core::store::DeadLetterFilter;
use prost::Message;
use std::collections::HashMap;
use std::mem::take;
use tonic::Status;

impl Admin {
    pub(super) async fn dead_letters(
        &self,
        access: &Access,
        mut said: wire::ListDeadLettersRequest,
    ) -> Result<wire::ListDeadLettersResponse, LedgerError> {
        let mut check = Check::default();
        let (size, token) = (take(&mut said.page_size), take(&mut said.page_token));
        let page = Page::read(&mut check, (size, 50), &token, &said, "dead letters");
        let mut filter = convert::dead_letter_filter(&mut check, At::Root, convert::listed(&said));
        filter.discarded = said.include_discarded;
        check.done(())?;
        access.filter(&said.agent)?;
        let before = page.before()?;
        if !said.agent.is_empty() {
            filter.agent = self.handle.agent_id(&said.agent).await;
            if filter.agent.is_none() {
                return Ok(wire::ListDeadLettersResponse::default());
            }
        }
        let found = self
            .handle
            .reader()
            .dead_letters(&filter, before, page.limit)
            .await
            .map_err(LedgerError::Store)?;
        let (mut dead_letters, mut bytes, mut next) =
            (Vec::with_capacity(found.items.len()), 0, found.before);
        let mut last = before;
        let mut names = HashMap::new();
        for letter in found.items {
            let id = letter.task.0;
            let agent = names.entry(letter.agent).or_insert_with(|| self.name(letter.agent)).clone();
            let letter = convert::dead_letter(letter, agent);
            bytes += letter.encoded_len();
            if bytes > PAGE_BYTES && !dead_letters.is_empty() {
                next = last;
                break;
            }
            last = Some(id);
            dead_letters.push(letter);
        }
        Ok(wire::ListDeadLettersResponse { dead_letters, next_page_token: page.token_before(next) })
    }

    pub(super) async fn dead_letter(&self, access: &Access, text: &str) -> Result<wire::DeadLetter, Status> {
        let id = convert::task_id(text).map_err(|error| status(&error))?;
        access.task(&self.handle, id).await.map_err(|error| status(&error))?;
        let store = |error| status(&LedgerError::Store(error));
        if let Some(letter) = self.handle.reader().dead_letter(id).await.map_err(store)? {
            let agent = self.name(letter.agent);
            return Ok(convert::dead_letter(letter, agent));
        }
        match self.handle.reader().task(id, false).await.map_err(store)? {
            Some(_) => Err(Refused::NoDeadLetter(id).into()),
            None => Err(status(&LedgerError::UnknownTask(id))),
        }
    }

    pub(super) async fn redrive(
        &self,
        access: &Access,
        mut said: wire::RedriveDeadLettersRequest,
    ) -> Result<wire::RedriveDeadLettersResponse, LedgerError> {
        let mut check = Check::default();
        let key = convert::request_key(&mut check, take(&mut said.request_id), &said);
        let filter = said.filter.take();
        let note = access.told(&mut check, take(&mut said.actor), take(&mut said.reason));
        let how = convert::redriving(&mut check, &said, filter.is_some(), note);
        let chosen = Chosen::of(&mut check, &said.task_ids, filter);
        check.done(())?;
        if let Some(agent) = &how.agent {
            access.agent(agent)?;
        }
        let (gap, start) = (how.gap, how.start);
        let now = self.handle.clock().now();
        let Some(picked) = self.pick(access, chosen, said.dry_run).await? else {
            return Ok(wire::RedriveDeadLettersResponse::default());
        };
        let results = match picked.tasks.is_empty() || said.dry_run {
            true => Vec::new(),
            false => self.handle.redrive(picked.tasks, how, key).await?,
        };
        let done =
            u32::try_from(results.iter().filter(|(_, result)| result.is_ok()).count()).unwrap_or(u32::MAX);
        let results = if said.dry_run { results } else { with_hidden(results, picked.hidden) };
        let next = start.unwrap_or_else(|| now.wall()).max(now.wall()).after(gap.saturating_mul(done));
        Ok(wire::RedriveDeadLettersResponse {
            results: convert::dead_letter_results(results),
            matched: picked.matched,
            more: picked.more,
            next_start_time: convert::time(next),
        })
    }

    pub(super) async fn discard(
        &self,
        access: &Access,
        mut said: wire::DiscardDeadLettersRequest,
    ) -> Result<wire::DiscardDeadLettersResponse, LedgerError> {
        let mut check = Check::default();
        let key = convert::request_key(&mut check, take(&mut said.request_id), &said);
        let chosen = Chosen::of(&mut check, &said.task_ids, said.filter.take());
        let note = access.told(&mut check, said.actor, said.reason);
        check.done(())?;
        let Some(picked) = self.pick(access, chosen, said.dry_run).await? else {
            return Ok(wire::DiscardDeadLettersResponse::default());
        };
        let results = match picked.tasks.is_empty() || said.dry_run {
            true => Vec::new(),
            false => self.handle.discard(picked.tasks, note, key).await?,
        };
        let results = if said.dry_run { results } else { with_hidden(results, picked.hidden) };
        Ok(wire::DiscardDeadLettersResponse {
            results: convert::dead_letter_results(results),
            matched: picked.matched,
            more: picked.more,
        })
    }

    pub(super) async fn group(
        &self,
        access: &Access,
        said: wire::GroupDeadLettersRequest,
    ) -> Result<wire::GroupDeadLettersResponse, LedgerError> {
        let mut check = Check::default();
        let limit = match usize::try_from(said.limit) {
            Ok(0) => 100,
            Ok(limit @ 1..=1_000) => limit,
            _ => {
                check.refuse(At::Root, "limit", "ask for 1 to 1,000, or 0 for the default");
                0
            }
        };
        let given = said.filter.unwrap_or_default();
        let agent = given.agent.clone();
        let mut filter = convert::dead_letter_filter(&mut check, At::In("filter"), given);
        check.done(())?;
        access.filter(&agent)?;
        if !agent.is_empty() {
            filter.agent = self.handle.agent_id(&agent).await;
            if filter.agent.is_none() {
                return Ok(wire::GroupDeadLettersResponse::default());
            }
        }
        let found = self.handle.reader().letter_groups(&filter, limit).await.map_err(LedgerError::Store)?;
        let groups = found.groups.into_iter().map(|group| {
            let agent = self.name(group.newest.agent);
            convert::dead_letter_group(group, agent)
        });
        Ok(wire::GroupDeadLettersResponse {
            groups: groups.collect(),
            dead_letters: found.letters,
            total_groups: found.total,
            more: found.more,
        })
    }

    /// The tasks that a call means; none for a filter that names an agent nobody knows. Counts first where nothing is
    /// to be done.
    async fn pick(
        &self,
        access: &Access,
        chosen: Chosen,
        dry_run: bool,
    ) -> Result<Option<Picked>, LedgerError> {
        let reader = self.handle.reader();
        match chosen {
            Chosen::Tasks(mut tasks) => {
                let out = access.out_of_reach(&self.handle, &tasks).await?;
                let hidden =
                    tasks.iter().enumerate().filter(|(_, task)| out.contains(task)).map(|(at, id)| (at, *id));
                let hidden = hidden.collect();
                tasks.retain(|task| !out.contains(task));
                let mut matched = 0;
                for task in &tasks {
                    let letter = reader.dead_letter(*task).await.map_err(LedgerError::Store)?;
                    matched += u64::from(letter.is_some_and(|letter| letter.discarded.is_none()));
                }
                Ok(Some(Picked { tasks, hidden, matched, more: false }))
            }
            Chosen::Fitting(agent, mut filter) => {
                access.filter(&agent)?;
                if !agent.is_empty() {
                    filter.agent = self.handle.agent_id(&agent).await;
                    if filter.agent.is_none() {
                        return Ok(None);
                    }
                }
                let (matched, uncounted) = reader.count_letters(&filter).await.map_err(LedgerError::Store)?;
                if dry_run {
                    return Ok(Some(Picked {
                        tasks: Vec::new(),
                        hidden: Vec::new(),
                        matched,
                        more: uncounted,
                    }));
                }
                let (tasks, more) =
                    reader.oldest_letters(&filter, ITEMS).await.map_err(LedgerError::Store)?;
                Ok(Some(Picked { tasks, hidden: Vec::new(), matched, more }))
            }
        }
    }
}

/// Which dead letters a call means.
enum Chosen {
    Tasks(Vec<TaskId>),
    /// Name of the agent, and the rest of the filter.
    Fitting(String, Box<DeadLetterFilter>),
}

struct Picked {
    tasks: Vec<TaskId>,
    /// Those that the call named and are out of reach, with their places in it.
    hidden: Vec<(usize, TaskId)>,
    /// How many fit before the call.
    matched: u64,
    /// There are others.
    more: bool,
}

/// Puts those that are out of reach back in their places, as if they did not exist. What comes first in a call comes first
/// here, so that each place is right when it is reached.
fn with_hidden(
    mut results: Vec<(TaskId, Result<(), LedgerError>)>,
    hidden: Vec<(usize, TaskId)>,
) -> Vec<(TaskId, Result<(), LedgerError>)> {
    for (place, task) in hidden {
        results.insert(place.min(results.len()), (task, Err(LedgerError::UnknownTask(task))));
    }
    results
}

impl Chosen {
    fn of(check: &mut Check, ids: &[String], filter: Option<wire::DeadLetterFilter>) -> Self {
        let Some(given) = filter else { return Self::Tasks(convert::task_ids(check, ids)) };
        check.must(ids.is_empty(), At::Root, "task_ids", "name tasks or give a filter, not both");
        let rule = "set at least one of its fields: an empty filter would mean every dead letter";
        check.must(given != wire::DeadLetterFilter::default(), At::Root, "filter", rule);
        let agent = given.agent.clone();
        Self::Fitting(agent, Box::new(convert::dead_letter_filter(check, At::In("filter"), given)))
    }
}

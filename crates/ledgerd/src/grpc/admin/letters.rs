//! Dead letters: looked at, counted, put back, hidden.

use super::Admin;
use crate::grpc::convert::{self, At, Check, Page};
use crate::grpc::status::{Refused, status};
use crate::grpc::task::PAGE_BYTES;
use crate::grpc::wire;
use crate::ledger::command::LedgerError;
use prost::Message;
use std::collections::HashMap;
use std::mem::take;
use tonic::Status;

impl Admin {
    pub(super) async fn dead_letters(
        &self,
        mut said: wire::ListDeadLettersRequest,
    ) -> Result<wire::ListDeadLettersResponse, LedgerError> {
        let mut check = Check::default();
        let (size, token) = (take(&mut said.page_size), take(&mut said.page_token));
        let page = Page::read(&mut check, (size, 50), &token, &said, "dead letters");
        let agent = said.agent.clone();
        let mut filter = convert::dead_letter_filter(&mut check, said);
        check.done(())?;
        let before = page.before()?;
        if !agent.is_empty() {
            filter.agent = self.handle.agent_id(&agent);
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

    pub(super) async fn dead_letter(&self, text: &str) -> Result<wire::DeadLetter, Status> {
        let id = convert::task_id(text).map_err(|error| status(&error))?;
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
        mut said: wire::RedriveDeadLettersRequest,
    ) -> Result<wire::RedriveDeadLettersResponse, LedgerError> {
        let mut check = Check::default();
        let key = convert::request_key(&mut check, take(&mut said.request_id), &said);
        let tasks = convert::task_ids(&mut check, &said.task_ids);
        let deadline = check.time(At::Root, "deadline", said.deadline);
        check.done(())?;
        let results = self.handle.redrive(tasks, deadline, key).await?;
        Ok(wire::RedriveDeadLettersResponse {
            results: convert::dead_letter_results(said.task_ids, results),
            ..wire::RedriveDeadLettersResponse::default()
        })
    }

    pub(super) async fn discard(
        &self,
        mut said: wire::DiscardDeadLettersRequest,
    ) -> Result<wire::DiscardDeadLettersResponse, LedgerError> {
        let mut check = Check::default();
        let key = convert::request_key(&mut check, take(&mut said.request_id), &said);
        let tasks = convert::task_ids(&mut check, &said.task_ids);
        let note = convert::note(&mut check, "reason", said.reason);
        check.done(())?;
        let results = self.handle.discard(tasks, note, key).await?;
        Ok(wire::DiscardDeadLettersResponse {
            results: convert::dead_letter_results(said.task_ids, results),
            ..wire::DiscardDeadLettersResponse::default()
        })
    }

    pub(super) async fn group(
        &self,
        _said: wire::GroupDeadLettersRequest,
    ) -> Result<wire::GroupDeadLettersResponse, LedgerError> {
        todo!()
    }
}

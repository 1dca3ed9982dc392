//! TaskService: what producers call.

mod explain;
mod watch;

use super::access::Access;
use super::convert::{self, At, Check, Names, Page};
use super::status::status;
use super::wire::{self, task_service_server::TaskService};
use super::{ANSWER_BYTES, TimeLeft};
use crate::callers::Permission;
use crate::ledger::Handle;
use crate::ledger::command::{BatchMode, Enqueued, LedgerError, NewTask};
use crate::telemetry;
use ledger_core::TaskId;
use ledger_core::limits::{self, ITEMS, WAIT};
use prost::Message;
use std::mem::take;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

/// What a page of a list may take, well below what a client accepts.
pub(super) const PAGE_BYTES: usize = ANSWER_BYTES / 4 * 3;

/// A long poll answers so long before its caller's own deadline: an answer is worth more than an error.
const BEFORE_DEADLINE: Duration = Duration::from_millis(250);

pub(super) struct Tasks {
    handle: Handle,
    drain: CancellationToken,
}

impl Tasks {
    pub(super) const fn new(handle: Handle, drain: CancellationToken) -> Self {
        Self { handle, drain }
    }

    /// A task as stored, when it is within reach; with its payload and result, when they may be read.
    async fn read(&self, access: &Access, id: TaskId, with_data: bool) -> Result<wire::Task, LedgerError> {
        let with_data = with_data && access.reads_payloads();
        let view = self.handle.reader().task(id, with_data).await.map_err(LedgerError::Store)?;
        let view = view.filter(|view| access.sees(&view.agent));
        view.map(convert::task).ok_or(LedgerError::UnknownTask(id))
    }

    async fn one(
        &self,
        access: &Access,
        mut said: wire::EnqueueTaskRequest,
    ) -> Result<wire::EnqueueTaskResponse, LedgerError> {
        let mut check = Check::default();
        let key = convert::request_key(&mut check, take(&mut said.request_id), &said);
        let Some(mut task) = said.task else {
            check.refuse(At::Root, "task", "send a task");
            return check.done(wire::EnqueueTaskResponse::default());
        };
        originate(std::slice::from_mut(&mut task));
        let wall = self.handle.clock().now().wall();
        let task = convert::new_task(&mut check, At::In("task"), task, wall, &mut Names::default());
        let task = check.done(task)?;
        access.agent(&task.agent)?;
        let answers = self.handle.enqueue(vec![Ok(task)], BatchMode::Atomic, key).await?;
        match answers.into_iter().next() {
            Some(Enqueued::Created(id)) => {
                Ok(wire::EnqueueTaskResponse { task_id: id.to_string(), created: true })
            }
            Some(Enqueued::Existing(id)) => {
                Ok(wire::EnqueueTaskResponse { task_id: id.to_string(), created: false })
            }
            Some(Enqueued::Refused(error)) => Err(error),
            None => Err(LedgerError::SessionEnded),
        }
    }

    async fn many(
        &self,
        access: &Access,
        mut said: wire::EnqueueTasksRequest,
    ) -> Result<wire::EnqueueTasksResponse, LedgerError> {
        let mut call = Check::default();
        call.must((1..=ITEMS).contains(&said.tasks.len()), At::Root, "tasks", "send 1 to 1,000 tasks");
        let key = convert::request_key(&mut call, take(&mut said.request_id), &said);
        let mode = match call.word::<wire::BatchMode>(At::Root, "mode", said.mode) {
            Some(wire::BatchMode::Atomic) => BatchMode::Atomic,
            Some(wire::BatchMode::PerItem | wire::BatchMode::Unspecified) | None => BatchMode::PerItem,
        };
        // Before the tasks are looked at: there may be far too many of them.
        call.done(())?;
        originate(&mut said.tasks);
        let wall = self.handle.clock().now().wall();
        let (mut all, mut names) = (Check::default(), Names::default());
        let items = said.tasks.into_iter().enumerate();
        let tasks = items.map(|(index, task)| {
            let at = At::Item("tasks", index);
            if mode == BatchMode::Atomic {
                return Ok(convert::new_task(&mut all, at, task, wall, &mut names));
            }
            let mut check = Check::default();
            let task = convert::new_task(&mut check, at, task, wall, &mut names);
            let task = check.done(task)?;
            access.agent(&task.agent)?;
            Ok(task)
        });
        let tasks: Vec<Result<NewTask, LedgerError>> = tasks.collect();
        all.done(())?;
        if mode == BatchMode::Atomic {
            tasks.iter().flatten().try_for_each(|task| access.agent(&task.agent))?;
        }
        let answers = self.handle.enqueue(tasks, mode, key).await?;
        Ok(wire::EnqueueTasksResponse { results: answers.iter().map(convert::enqueued).collect() })
    }

    async fn list(
        &self,
        access: &Access,
        mut said: wire::ListTasksRequest,
    ) -> Result<wire::ListTasksResponse, LedgerError> {
        let mut check = Check::default();
        let (size, token) = (take(&mut said.page_size), take(&mut said.page_token));
        let page = Page::read(&mut check, (size, 50), &token, &said, "tasks");
        let agent = said.agent.clone();
        let mut filter = convert::task_filter(&mut check, said);
        check.done(())?;
        access.filter(&agent)?;
        let before = page.before()?;
        if !agent.is_empty() {
            filter.agent = self.handle.agent_id(&agent).await;
            if filter.agent.is_none() {
                return Ok(wire::ListTasksResponse::default());
            }
        }
        let found =
            self.handle.reader().tasks(&filter, before, page.limit).await.map_err(LedgerError::Store)?;
        let (mut tasks, mut bytes, mut next) = (Vec::with_capacity(found.items.len()), 0, found.before);
        let mut last = before;
        for view in found.items {
            let id = view.task.id.0;
            let task = convert::task(view);
            bytes += task.encoded_len();
            if bytes > PAGE_BYTES && !tasks.is_empty() {
                next = last;
                break;
            }
            last = Some(id);
            tasks.push(task);
        }
        Ok(wire::ListTasksResponse { tasks, next_page_token: page.token_before(next) })
    }

    async fn history(
        &self,
        access: &Access,
        id: TaskId,
    ) -> Result<wire::GetTaskHistoryResponse, LedgerError> {
        access.task(&self.handle, id).await?;
        let rows = self.handle.reader().history(id).await.map_err(LedgerError::Store)?;
        let rows = rows.ok_or(LedgerError::UnknownTask(id))?;
        let mut answer =
            wire::GetTaskHistoryResponse { events: rows.into_iter().map(convert::event).collect() };
        // A thousand failures with long details do not fit into one message. What they say goes first, oldest first.
        let mut bytes = answer.encoded_len();
        let long: [fn(&mut wire::TaskError) -> &mut String; 2] =
            [|error| &mut error.detail, |error| &mut error.message];
        for long in long {
            for error in answer.events.iter_mut().filter_map(|event| event.error.as_mut()) {
                if bytes <= PAGE_BYTES {
                    return Ok(answer);
                }
                bytes -= take(long(error)).len();
            }
        }
        Ok(answer)
    }

    async fn wait(
        &self,
        access: &Access,
        said: wire::WaitTaskRequest,
        left: Option<TimeLeft>,
    ) -> Result<wire::WaitTaskResponse, LedgerError> {
        let mut check = Check::default();
        let id = check.task(At::Root, "task_id", &said.task_id);
        let timeout = check.span(At::Root, "timeout", said.timeout).unwrap_or(WAIT).min(WAIT);
        let id = check.done(id)?;
        access.task(&self.handle, id).await?;
        let timeout =
            left.map_or(timeout, |TimeLeft(left)| timeout.min(left.saturating_sub(BEFORE_DEADLINE)));
        tokio::select! {
            biased;
            waited = self.handle.wait(id, timeout) => waited?,
            // The caller asks again, elsewhere or after the restart.
            () = self.drain.cancelled() => return Err(LedgerError::Draining),
        }
        Ok(wire::WaitTaskResponse { task: Some(self.read(access, id, said.include_data).await?) })
    }

    async fn cancel(
        &self,
        access: &Access,
        mut said: wire::CancelTaskRequest,
    ) -> Result<wire::CancelTaskResponse, LedgerError> {
        let mut check = Check::default();
        let key = convert::request_key(&mut check, take(&mut said.request_id), &said);
        let id = check.task(At::Root, "task_id", &said.task_id);
        let note = access.told(&mut check, String::new(), said.reason);
        let id = check.done(id)?;
        access.task(&self.handle, id).await?;
        self.handle.cancel(id, note, key).await?;
        Ok(wire::CancelTaskResponse { task: Some(self.read(access, id, false).await?) })
    }

    async fn update(
        &self,
        access: &Access,
        mut said: wire::UpdateTaskRequest,
    ) -> Result<wire::UpdateTaskResponse, LedgerError> {
        let mut check = Check::default();
        let key = convert::request_key(&mut check, take(&mut said.request_id), &said);
        let id = check.task(At::Root, "task_id", &said.task_id);
        let (priority, run_at) = convert::update(&mut check, &said, self.handle.clock().now().wall());
        let note = access.told(&mut check, String::new(), said.reason);
        let id = check.done(id)?;
        access.task(&self.handle, id).await?;
        self.handle.update(id, priority, run_at, note, key).await?;
        Ok(wire::UpdateTaskResponse { task: Some(self.read(access, id, false).await?) })
    }

    async fn unblock(
        &self,
        access: &Access,
        mut said: wire::UnblockTaskRequest,
    ) -> Result<wire::UnblockTaskResponse, LedgerError> {
        let mut check = Check::default();
        let key = convert::request_key(&mut check, take(&mut said.request_id), &said);
        let id = check.task(At::Root, "task_id", &said.task_id);
        let answer = check.free(At::Root, "answer", said.answer, limits::ANSWER_BYTES);
        let actor = access.actor(&mut check, said.actor);
        let id = check.done(id)?;
        access.task(&self.handle, id).await?;
        self.handle.unblock(id, answer.into(), actor, key).await?;
        Ok(wire::UnblockTaskResponse { task: Some(self.read(access, id, false).await?) })
    }
}

/// An answer that is too small for compression to be worth its time.
pub(super) fn small<T>(answer: T) -> Response<T> {
    let mut response = Response::new(answer);
    response.disable_compression();
    response
}

/// The call is where tasks come from whose producer names no trace.
fn originate(tasks: &mut [wire::NewTask]) {
    if tasks.iter().all(|task| !task.traceparent.is_empty()) {
        return;
    }
    let Some(context) = telemetry::current() else { return };
    let (traceparent, tracestate) = (telemetry::traceparent(&context), context.trace_state().header());
    for task in tasks.iter_mut().filter(|task| task.traceparent.is_empty()) {
        task.traceparent.clone_from(&traceparent);
        task.tracestate.clone_from(&tracestate);
    }
}

#[tonic::async_trait]
impl TaskService for Tasks {
    async fn enqueue_task(
        &self,
        request: Request<wire::EnqueueTaskRequest>,
    ) -> Result<Response<wire::EnqueueTaskResponse>, Status> {
        let access = Access::of(request.extensions())?;
        self.one(&access, request.into_inner()).await.map(small).map_err(|error| status(&error))
    }

    async fn enqueue_tasks(
        &self,
        request: Request<wire::EnqueueTasksRequest>,
    ) -> Result<Response<wire::EnqueueTasksResponse>, Status> {
        let access = Access::of(request.extensions())?;
        self.many(&access, request.into_inner()).await.map(small).map_err(|error| status(&error))
    }

    async fn get_task(
        &self,
        request: Request<wire::GetTaskRequest>,
    ) -> Result<Response<wire::GetTaskResponse>, Status> {
        let access = Access::of(request.extensions())?;
        let said = request.into_inner();
        let id = convert::task_id(&said.task_id).map_err(|error| status(&error))?;
        let task = self.read(&access, id, said.include_data).await.map_err(|error| status(&error))?;
        Ok(Response::new(wire::GetTaskResponse { task: Some(task) }))
    }

    async fn list_tasks(
        &self,
        request: Request<wire::ListTasksRequest>,
    ) -> Result<Response<wire::ListTasksResponse>, Status> {
        let access = Access::of(request.extensions())?;
        self.list(&access, request.into_inner()).await.map(Response::new).map_err(|error| status(&error))
    }

    async fn get_task_history(
        &self,
        request: Request<wire::GetTaskHistoryRequest>,
    ) -> Result<Response<wire::GetTaskHistoryResponse>, Status> {
        let access = Access::of(request.extensions())?;
        let id = convert::task_id(&request.get_ref().task_id).map_err(|error| status(&error))?;
        self.history(&access, id).await.map(Response::new).map_err(|error| status(&error))
    }

    async fn wait_task(
        &self,
        request: Request<wire::WaitTaskRequest>,
    ) -> Result<Response<wire::WaitTaskResponse>, Status> {
        let access = Access::of(request.extensions())?;
        let left = request.extensions().get::<TimeLeft>().copied();
        tokio::select! {
            biased;
            // What was taken back ends what waits, too.
            status = access.lost(Permission::SeeTasks, &[]) => Err(status),
            waited = self.wait(&access, request.into_inner(), left) => {
                waited.map(Response::new).map_err(|error| status(&error))
            }
        }
    }

    type WatchTasksStream = watch::Answers;

    async fn watch_tasks(
        &self,
        request: Request<wire::WatchTasksRequest>,
    ) -> Result<Response<watch::Answers>, Status> {
        let access = Access::of(request.extensions())?;
        watch::watch(&self.handle, access, self.drain.clone(), request.into_inner())
            .await
            .map(Response::new)
            .map_err(|error| status(&error))
    }

    async fn update_task(
        &self,
        request: Request<wire::UpdateTaskRequest>,
    ) -> Result<Response<wire::UpdateTaskResponse>, Status> {
        let access = Access::of(request.extensions())?;
        self.update(&access, request.into_inner()).await.map(small).map_err(|error| status(&error))
    }

    async fn unblock_task(
        &self,
        request: Request<wire::UnblockTaskRequest>,
    ) -> Result<Response<wire::UnblockTaskResponse>, Status> {
        let access = Access::of(request.extensions())?;
        self.unblock(&access, request.into_inner()).await.map(small).map_err(|error| status(&error))
    }

    async fn explain_task(
        &self,
        request: Request<wire::ExplainTaskRequest>,
    ) -> Result<Response<wire::ExplainTaskResponse>, Status> {
        let access = Access::of(request.extensions())?;
        explain::explain(&self.handle, &access, request.into_inner())
            .await
            .map(Response::new)
            .map_err(|error| status(&error))
    }

    async fn cancel_task(
        &self,
        request: Request<wire::CancelTaskRequest>,
    ) -> Result<Response<wire::CancelTaskResponse>, Status> {
        let access = Access::of(request.extensions())?;
        self.cancel(&access, request.into_inner()).await.map(small).map_err(|error| status(&error))
    }
}

//! Tasks that are stored: to look at, wait for, change, answer, cancel and list.

use std::future::IntoFuture;
use std::marker::PhantomData;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use futures_util::{Stream, StreamExt as _, TryStreamExt as _, stream};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::client::Client;
use crate::error::{self, Error};
use crate::explain::Explanation;
use crate::{clock, retry, v1};

/// The longest a daemon lets one call wait.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// How long a daemon may be gone before a wait gives up: a restart is no reason to lose a result.
const PATIENCE: Duration = Duration::from_secs(60);

/// A stored task. Clones are cheap.
#[derive(Clone, Debug)]
pub struct TaskHandle {
    client: Client,
    id: String,
    created: bool,
}

impl TaskHandle {
    pub(crate) fn new(client: Client, id: String, created: bool) -> Self {
        Self { client, id, created }
    }

    /// Its id, for instance `t1k3`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether the call that gave this handle stored the task: false when its key was known.
    pub fn created(&self) -> bool {
        self.created
    }

    /// The task as it is now, with payload and result.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`]; those of any call.
    pub async fn get(&self) -> Result<v1::Task, Error> {
        self.client.get(&self.id, true).await
    }

    /// The task as it is now, without payload and result.
    ///
    /// # Errors
    ///
    /// As [`TaskHandle::get`].
    pub async fn status(&self) -> Result<v1::Task, Error> {
        self.client.get(&self.id, false).await
    }

    /// Everything that happened to the task, oldest first.
    ///
    /// # Errors
    ///
    /// As [`TaskHandle::get`].
    pub async fn history(&self) -> Result<Vec<v1::HistoryEvent>, Error> {
        self.client.history(&self.id).await
    }

    /// Why the task is where it is: what keeps it from running, in the order in which gates are passed.
    ///
    /// # Errors
    ///
    /// As [`TaskHandle::get`].
    pub async fn explain(&self) -> Result<Explanation, Error> {
        self.client.explain(&self.id).await
    }

    /// Cancels the task: at once when it waits; when it runs, its worker is asked to stop and the task returned is
    /// still RUNNING.
    pub fn cancel(&self) -> Cancel {
        let request = v1::CancelTaskRequest { task_id: self.id.clone(), ..Default::default() };
        Cancel { client: self.client.clone(), request }
    }

    /// Changes priority or start of a task that waits (QUEUED, RETRY, BLOCKED): set one of them or both on it.
    pub fn update(&self) -> Update {
        let request = v1::UpdateTaskRequest { task_id: self.id.clone(), ..Default::default() };
        Update { client: self.client.clone(), request }
    }

    /// Answers the question of a task that its worker blocked; its next attempt gets the answer, at most 16 KiB. `actor`
    /// says who, at most 128 bytes, for the audit trail.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`]; [`Error::FailedPrecondition`] with `WRONG_STATE` when it asks nothing, with
    /// `BLOCKED_BY_BREAKER` when it waits for its agent's breaker; those of any call.
    pub async fn unblock(
        &self,
        answer: impl Into<String>,
        actor: impl Into<String>,
    ) -> Result<v1::Task, Error> {
        let request = v1::UnblockTaskRequest {
            task_id: self.id.clone(),
            answer: answer.into(),
            actor: actor.into(),
            request_id: clock::request_id(),
        };
        self.client.unblock(request).await
    }

    /// Waits until the task has ended, however it ended, and returns it with payload and result.
    pub fn wait(&self) -> Wait {
        Wait { client: self.client.clone(), id: self.id.clone(), timeout: None }
    }

    /// Waits until the task has ended and reads its result as JSON.
    pub fn result<T: DeserializeOwned>(&self) -> ResultOf<T> {
        ResultOf { wait: self.wait(), read: PhantomData }
    }
}

/// A cancellation: await it to send it. Made by [`TaskHandle::cancel`].
#[derive(Debug)]
#[must_use = "a task is cancelled when this is awaited"]
pub struct Cancel {
    client: Client,
    request: v1::CancelTaskRequest,
}

impl Cancel {
    /// Why, for the audit trail, at most 1 KiB.
    pub fn reason(mut self, reason: impl Into<String>) -> Self {
        self.request.reason = reason.into();
        self
    }

    /// Names this call, as [`crate::Enqueue::request_id`].
    pub fn request_id(mut self, id: impl Into<String>) -> Self {
        self.request.request_id = id.into();
        self
    }

    /// Cancels the task and returns it as it is after the commit.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`]; [`Error::FailedPrecondition`] with `TASK_TERMINAL` when it has ended; those of any call.
    pub async fn send(mut self) -> Result<v1::Task, Error> {
        if self.request.request_id.is_empty() {
            self.request.request_id = clock::request_id();
        }
        self.client.cancel(self.request).await
    }
}

impl IntoFuture for Cancel {
    type Output = Result<v1::Task, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

/// A change of a waiting task: await it to send it. Made by [`TaskHandle::update`].
#[derive(Debug)]
#[must_use = "a task is changed when this is awaited"]
pub struct Update {
    client: Client,
    request: v1::UpdateTaskRequest,
}

impl Update {
    /// 0 to 9, higher sooner.
    pub fn priority(mut self, priority: u8) -> Self {
        self.request.priority = Some(i32::from(priority));
        self
    }

    /// Not to be started before this time, at most 366 days ahead; a time that is past means now.
    pub fn run_at(mut self, at: SystemTime) -> Self {
        self.request.run_at = Some(at.into());
        self
    }

    /// Why, for the audit trail, at most 1 KiB.
    pub fn reason(mut self, reason: impl Into<String>) -> Self {
        self.request.reason = reason.into();
        self
    }

    /// Names this call, as [`crate::Enqueue::request_id`].
    pub fn request_id(mut self, id: impl Into<String>) -> Self {
        self.request.request_id = id.into();
        self
    }

    /// Changes the task and returns it as it is after the commit.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] before anything is sent, for instance when nothing is to change; [`Error::NotFound`];
    /// [`Error::FailedPrecondition`] with `WRONG_STATE` when it runs or has ended; those of any call.
    pub async fn send(mut self) -> Result<v1::Task, Error> {
        if self.request.request_id.is_empty() {
            self.request.request_id = clock::request_id();
        }
        self.client.update(self.request).await
    }
}

impl IntoFuture for Update {
    type Output = Result<v1::Task, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

/// A wait for the end of a task. Made by [`TaskHandle::wait`].
#[derive(Debug)]
#[must_use = "waiting happens when this is awaited"]
pub struct Wait {
    client: Client,
    id: String,
    timeout: Option<Duration>,
}

impl Wait {
    /// Waits at most so long. Default: without limit.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Waits. A daemon that is gone for less than 60 s does not end the wait.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] when the task has not ended in time; [`Error::NotFound`]; those of any call.
    pub async fn ended(self) -> Result<v1::Task, Error> {
        let polls = self.poll();
        match self.timeout {
            None => polls.await,
            Some(timeout) => match tokio::time::timeout(timeout, polls).await {
                Ok(answer) => answer,
                Err(_) => Err(self.late()),
            },
        }
    }

    async fn poll(&self) -> Result<v1::Task, Error> {
        let mut failures = 0;
        let mut gone_since = None;
        loop {
            let status = match self.client.wait_once(&self.id, LONGEST_WAIT).await {
                Ok(task) if task.state().is_terminal() => return Ok(task),
                Ok(_) => {
                    (failures, gone_since) = (0, None);
                    continue;
                }
                Err(status) => status,
            };
            let since = *gone_since.get_or_insert_with(Instant::now);
            if !error::is_repeatable(&status) || since.elapsed() > PATIENCE {
                return Err(status.into());
            }
            failures += 1;
            tokio::time::sleep(retry::BACKOFF.delay(failures, clock::draw())).await;
        }
    }

    fn late(&self) -> Error {
        Error::Timeout { message: format!("task {} has not ended in time", self.id) }
    }
}

impl IntoFuture for Wait {
    type Output = Result<v1::Task, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.ended())
    }
}

/// A wait for the result of a task, as JSON of type `T`. Made by [`TaskHandle::result`].
#[must_use = "waiting happens when this is awaited"]
pub struct ResultOf<T> {
    wait: Wait,
    read: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> ResultOf<T> {
    /// Waits at most so long. Default: without limit.
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { wait: self.wait.timeout(timeout), ..self }
    }

    /// Waits and reads.
    ///
    /// # Errors
    ///
    /// [`Error::TaskFailed`] and [`Error::TaskCancelled`] when the task ended so; [`Error::Codec`] when its result is no
    /// `T`; those of [`Wait::ended`].
    pub async fn read(self) -> Result<T, Error> {
        let result = self.wait.ended().await?.into_result()?;
        serde_json::from_slice(&result).map_err(|source| Error::Codec { what: "result", source })
    }
}

impl<T: DeserializeOwned + 'static> IntoFuture for ResultOf<T> {
    type Output = Result<T, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.read())
    }
}

/// Tasks page by page. Made by [`Client::list`].
#[derive(Debug)]
pub struct TaskPages {
    client: Client,
    filter: v1::ListTasksRequest,
    ended: bool,
}

impl TaskPages {
    pub(crate) fn new(client: Client, filter: v1::ListTasksRequest) -> Self {
        Self { client, filter, ended: false }
    }

    /// The next page, or `None` after the last. A page may be empty: the daemon looks at a bounded number of rows a call.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] for a bad filter; those of any call. The same page is asked for again after an error.
    pub async fn next_page(&mut self) -> Result<Option<Vec<v1::Task>>, Error> {
        if self.ended {
            return Ok(None);
        }
        let page = self.client.page(&self.filter).await?;
        self.ended = page.next_page_token.is_empty();
        self.filter.page_token = page.next_page_token;
        Ok(Some(page.tasks))
    }

    /// Where the next page starts, to go on in another process; empty at the start and after the end.
    pub fn page_token(&self) -> &str {
        &self.filter.page_token
    }

    /// The tasks one by one. The stream ends after an error.
    pub fn into_stream(self) -> impl Stream<Item = Result<v1::Task, Error>> + Send {
        let pages = stream::try_unfold(self, |mut pages| async move {
            Ok::<_, Error>(pages.next_page().await?.map(|page| (page, pages)))
        });
        pages.map_ok(|page| stream::iter(page).map(Ok)).try_flatten()
    }
}

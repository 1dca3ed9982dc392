//! The connection to a daemon and the calls of a producer.

use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::connection::{Bearer, ClientBuilder, Connection};
use crate::enqueue::{Enqueue, NewTask};
use crate::error::Error;
use crate::explain::Explanation;
use crate::handle::{TaskHandle, TaskPages};
use crate::spans::Sending;
use crate::v1::admin_service_client::AdminServiceClient;
use crate::v1::task_service_client::TaskServiceClient;
use crate::v1::worker_service_client::WorkerServiceClient;
use crate::watch::Watch;
use crate::{clock, limits, retry, v1};

/// Where a daemon listens when nothing else is said.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:7420";
/// The environment variable that [`Client::from_env`] reads.
pub const ADDRESS_VARIABLE: &str = "LEDGERD_ADDRESS";

/// What the daemon allows a call without a wait of its own, and a little more.
const CALL_TIMEOUT: Duration = Duration::from_secs(11);
const NO_TASK: &str = "the daemon answered without a task";

/// A connection to a daemon. Clones share it and cost next to nothing.
///
/// A lost connection is made anew by the next call.
#[derive(Clone, Debug)]
pub struct Client {
    connection: Connection,
}

impl Client {
    /// Connects to `host:port`, `http://host:port` or `https://host:port`, within 5 s. Of several with commas between them,
    /// which serve one ledger, to one that answers; when that is gone, to the next. With `https` the certificates of all
    /// of them must have the name of the first.
    ///
    /// # Errors
    ///
    /// [`Error::Address`] when `address` is none, [`Error::Unavailable`] when nobody answers there.
    pub async fn connect(address: impl AsRef<str>) -> Result<Self, Error> {
        Self::builder(address).connect().await
    }

    /// As [`Client::connect`], but the first call connects, and a daemon that is down is that call's trouble.
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`Error::Address`] when `address` is none.
    pub fn lazy(address: impl AsRef<str>) -> Result<Self, Error> {
        Self::builder(address).lazy()
    }

    /// To connect with certificates or a token.
    pub fn builder(address: impl AsRef<str>) -> ClientBuilder {
        ClientBuilder::new(address.as_ref())
    }

    /// As [`Client::lazy`] with what the environment says: `LEDGERD_ADDRESS`, 127.0.0.1:7420 when that is not set or empty,
    /// and credentials as in [`ClientBuilder::from_env`].
    ///
    /// # Errors
    ///
    /// [`Error::Address`] when the variable holds no address, [`Error::Credentials`] when a file cannot be used.
    pub fn from_env() -> Result<Self, Error> {
        ClientBuilder::from_env()?.lazy()
    }

    /// A client over a channel that the caller has built, which sends no token.
    pub fn from_channel(channel: Channel) -> Self {
        Self::over(Connection::new(channel, Bearer::default()))
    }

    pub(crate) const fn over(connection: Connection) -> Self {
        Self { connection }
    }

    /// The connection, for what else a daemon serves: health, reflection.
    pub fn connection(&self) -> Connection {
        self.connection.clone()
    }

    /// The generated client of producers, without retries and request ids.
    pub fn tasks(&self) -> TaskServiceClient<Connection> {
        TaskServiceClient::new(self.connection.clone())
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
    }

    /// The generated client of workers, without retries.
    pub fn workers(&self) -> WorkerServiceClient<Connection> {
        WorkerServiceClient::new(self.connection.clone())
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
    }

    /// The generated client of operators, without retries and request ids.
    pub fn admin(&self) -> AdminServiceClient<Connection> {
        AdminServiceClient::new(self.connection.clone())
            .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_MESSAGE_BYTES)
    }

    /// A task for `agent` with `payload` as JSON. Await it to enqueue; set more on it before.
    pub fn enqueue<P: Serialize + ?Sized>(&self, agent: &str, task_type: &str, payload: &P) -> Enqueue {
        Enqueue::new(self.clone(), NewTask::new(agent, task_type, payload))
    }

    /// As [`Client::enqueue`] with a payload that is sent as it is, at most 1 MiB.
    pub fn enqueue_bytes(&self, agent: &str, task_type: &str, payload: impl Into<Bytes>) -> Enqueue {
        Enqueue::new(self.clone(), NewTask::from_bytes(agent, task_type, payload))
    }

    /// Enqueues 1 to 1,000 tasks of together at most 4 MiB in one commit. With [`v1::BatchMode::Atomic`] any refusal
    /// fails the call and nothing is stored; else each task succeeds or fails by itself. The results are in the order
    /// of `tasks`.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] and [`Error::PayloadTooLarge`], checked for the whole batch before it is sent; those
    /// of the call otherwise. After an error other than these two, parts of the batch may have been stored: use
    /// [idempotency keys](NewTask::key) where that matters.
    pub async fn enqueue_many(
        &self,
        tasks: Vec<NewTask>,
        mode: v1::BatchMode,
    ) -> Result<Vec<Result<TaskHandle, Error>>, Error> {
        let now = clock::now();
        let tasks = tasks.into_iter().enumerate();
        let tasks = tasks.map(|(index, task)| task.into_wire(now).map_err(|error| error.in_item(index)));
        let mut request = v1::EnqueueTasksRequest {
            tasks: tasks.collect::<Result<_, _>>()?,
            mode: mode as i32,
            request_id: clock::request_id(),
        };
        limits::batch(&request, now)?;
        let sending = Sending::many(&mut request.tasks);
        let response = retry::call(|| {
            let (mut tasks, mut request) = (self.tasks(), timed(request.clone(), CALL_TIMEOUT));
            sending.inject(&mut request);
            async move { tasks.enqueue_tasks(request).await }
        })
        .await
        .inspect_err(|error| sending.failed(error))?;
        let results = response.results.into_iter().map(|result| match result.error {
            Some(error) => Err(Error::from(error)),
            None => Ok(TaskHandle::new(self.clone(), result.task_id, result.created)),
        });
        Ok(results.collect())
    }

    /// A handle to a task enqueued earlier. Asks nobody: whether the task is there shows at the first call.
    pub fn task(&self, task_id: impl Into<String>) -> TaskHandle {
        TaskHandle::new(self.clone(), task_id.into(), false)
    }

    /// The tasks that match `filter`, newest first, page by page. They come without payload and result.
    pub fn list(&self, filter: v1::ListTasksRequest) -> TaskPages {
        TaskPages::new(self.clone(), filter)
    }

    /// What happens to the tasks that match `filter`, as it happens: in order for each task, and each event once. With the
    /// `resume_token` of an earlier message it begins behind that one.
    pub fn watch(&self, filter: v1::WatchTasksRequest) -> Watch {
        Watch::new(self.clone(), filter)
    }

    pub(crate) async fn enqueue_one(
        &self,
        mut task: v1::NewTask,
        request_id: String,
    ) -> Result<TaskHandle, Error> {
        let sending = Sending::one(&mut task);
        let request = v1::EnqueueTaskRequest { task: Some(task), request_id };
        let response = retry::call(|| {
            let (mut tasks, mut request) = (self.tasks(), timed(request.clone(), CALL_TIMEOUT));
            sending.inject(&mut request);
            async move { tasks.enqueue_task(request).await }
        })
        .await
        .inspect_err(|error| sending.failed(error))?;
        sending.stored(&response.task_id);
        Ok(TaskHandle::new(self.clone(), response.task_id, response.created))
    }

    pub(crate) async fn get(&self, task_id: &str, include_data: bool) -> Result<v1::Task, Error> {
        let request = v1::GetTaskRequest { task_id: task_id.to_owned(), include_data };
        let response = retry::call(|| {
            let (mut tasks, request) = (self.tasks(), timed(request.clone(), CALL_TIMEOUT));
            async move { tasks.get_task(request).await }
        })
        .await?;
        present(response.task)
    }

    pub(crate) async fn history(&self, task_id: &str) -> Result<Vec<v1::HistoryEvent>, Error> {
        let request = v1::GetTaskHistoryRequest { task_id: task_id.to_owned() };
        let response = retry::call(|| {
            let (mut tasks, request) = (self.tasks(), timed(request.clone(), CALL_TIMEOUT));
            async move { tasks.get_task_history(request).await }
        })
        .await?;
        Ok(response.events)
    }

    pub(crate) async fn explain(&self, task_id: &str) -> Result<Explanation, Error> {
        let request = v1::ExplainTaskRequest { task_id: task_id.to_owned() };
        let response = retry::call(|| {
            let (mut tasks, request) = (self.tasks(), timed(request.clone(), CALL_TIMEOUT));
            async move { tasks.explain_task(request).await }
        })
        .await?;
        Ok(response.into())
    }

    pub(crate) async fn cancel(&self, request: v1::CancelTaskRequest) -> Result<v1::Task, Error> {
        limits::reason(&request.reason)?;
        limits::request_id(&request.request_id)?;
        let response = retry::call(|| {
            let (mut tasks, request) = (self.tasks(), timed(request.clone(), CALL_TIMEOUT));
            async move { tasks.cancel_task(request).await }
        })
        .await?;
        present(response.task)
    }

    pub(crate) async fn update(&self, request: v1::UpdateTaskRequest) -> Result<v1::Task, Error> {
        limits::update(&request, clock::now())?;
        let response = retry::call(|| {
            let (mut tasks, request) = (self.tasks(), timed(request.clone(), CALL_TIMEOUT));
            async move { tasks.update_task(request).await }
        })
        .await?;
        present(response.task)
    }

    pub(crate) async fn unblock(&self, request: v1::UnblockTaskRequest) -> Result<v1::Task, Error> {
        limits::unblock(&request)?;
        let response = retry::call(|| {
            let (mut tasks, request) = (self.tasks(), timed(request.clone(), CALL_TIMEOUT));
            async move { tasks.unblock_task(request).await }
        })
        .await?;
        present(response.task)
    }

    /// One long poll: the task when it ended or when `wait`, at most 60 s, is over. The caller repeats it.
    pub(crate) async fn wait_once(&self, task_id: &str, wait: Duration) -> Result<v1::Task, Status> {
        let request = v1::WaitTaskRequest {
            task_id: task_id.to_owned(),
            timeout: Some(crate::words::wire_span(wait)),
            include_data: true,
        };
        let response = self.tasks().wait_task(timed(request, wait + CALL_TIMEOUT)).await?;
        response.into_inner().task.ok_or_else(|| Status::internal(NO_TASK))
    }

    pub(crate) async fn page(&self, filter: &v1::ListTasksRequest) -> Result<v1::ListTasksResponse, Error> {
        retry::call(|| {
            let (mut tasks, request) = (self.tasks(), timed(filter.clone(), CALL_TIMEOUT));
            async move { tasks.list_tasks(request).await }
        })
        .await
    }

    pub(crate) async fn settle(&self, request: v1::SettleTasksRequest) -> Result<Vec<v1::Receipt>, Error> {
        let response = retry::call(|| {
            let (mut workers, request) = (self.workers(), timed(request.clone(), CALL_TIMEOUT));
            async move { workers.settle_tasks(request).await }
        })
        .await?;
        Ok(response.receipts)
    }
}

fn timed<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

fn present(task: Option<v1::Task>) -> Result<v1::Task, Error> {
    task.ok_or_else(|| Status::internal(NO_TASK).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nobody_listening_is_unavailable() {
        let error = Client::connect("127.0.0.1:1").await.unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");
        let error = Client::lazy("127.0.0.1:1").unwrap().task("t1").get().await.unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    }
}

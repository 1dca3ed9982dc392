//! Watching what happens to tasks, over lost connections and restarts of the daemon.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use tonic::{Status, Streaming};

use crate::client::Client;
use crate::error::{self, Error};
use crate::{clock, retry, v1};

/// A daemon sends something every 15 s; this is twice that and a little.
const SILENCE: Duration = Duration::from_secs(35);
/// How long a daemon may be gone before a watch gives up.
const PATIENCE: Duration = Duration::from_secs(60);

/// What happens to tasks. Made by [`Client::watch`].
#[derive(Debug)]
pub struct Watch {
    client: Client,
    request: v1::WatchTasksRequest,
    stream: Option<Streaming<v1::WatchTasksResponse>>,
    failures: u32,
    gone_since: Option<Instant>,
}

impl Watch {
    pub(crate) fn new(client: Client, request: v1::WatchTasksRequest) -> Self {
        Self { client, request, stream: None, failures: 0, gone_since: None }
    }

    /// The next message: what happened since the one before, possibly nothing. The first comes at once and has no events, and
    /// after that at least one comes every 15 s. Whoever is done with its events keeps its `resume_token`.
    ///
    /// A lost connection is made anew, at another address where several were given, and goes on behind the last message. May be
    /// dropped before it is ready, at no loss.
    ///
    /// # Errors
    ///
    /// One with the [reason](Error::reason) `RESUME_TOO_OLD` when not all that happened since the token is stored any more: list
    /// the tasks, and watch anew without it; [`Error::Unavailable`] when no daemon was there for 60 s; those of any call.
    pub async fn next(&mut self) -> Result<v1::WatchTasksResponse, Error> {
        loop {
            let status = match self.listen().await {
                Ok(message) => {
                    (self.failures, self.gone_since) = (0, None);
                    self.request.resume_token.clone_from(&message.resume_token);
                    return Ok(message);
                }
                Err(status) => status,
            };
            self.stream = None;
            let gone_for = self.gone_since.get_or_insert_with(Instant::now).elapsed();
            let repeatable = error::is_repeatable(&status);
            let error = Error::from(status);
            if !repeatable || gone_for >= PATIENCE {
                return Err(error);
            }
            self.failures += 1;
            let hint = error.retry_after().unwrap_or_default().min(retry::BACKOFF.longest);
            tokio::time::sleep(retry::BACKOFF.delay(self.failures, clock::draw()).max(hint)).await;
        }
    }

    async fn listen(&mut self) -> Result<v1::WatchTasksResponse, Status> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => {
                let opened = timeout(SILENCE, self.client.tasks().watch_tasks(self.request.clone())).await;
                none.insert(opened.map_err(|_| silent())??.into_inner())
            }
        };
        let message = timeout(SILENCE, stream.message()).await.map_err(|_| silent())??;
        message.ok_or_else(|| Status::unavailable("the daemon ended the stream"))
    }
}

fn silent() -> Status {
    Status::unavailable("nothing was heard of the daemon for 35 s")
}

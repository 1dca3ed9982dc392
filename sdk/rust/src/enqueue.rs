//! Tasks before they are stored: what a producer sets on them.

use std::future::IntoFuture;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::Serialize;

use crate::client::Client;
use crate::error::Error;
use crate::handle::TaskHandle;
use crate::{clock, limits, v1};

/// A task to enqueue, by itself ([`Client::enqueue`]) or with others ([`Client::enqueue_many`]).
///
/// Nothing is refused before it is sent: the call reports every fault at once.
#[derive(Debug)]
#[must_use = "a task is stored by Client::enqueue_many"]
pub struct NewTask {
    wire: v1::NewTask,
    delay: Option<Duration>,
    unfit: Option<serde_json::Error>,
}

impl NewTask {
    /// A task for `agent` with `payload` as JSON, at most 1 MiB of it.
    pub fn new<P: Serialize + ?Sized>(
        agent: impl Into<String>,
        task_type: impl Into<String>,
        payload: &P,
    ) -> Self {
        match serde_json::to_vec(payload) {
            Ok(json) => Self::from_bytes(agent, task_type, json),
            Err(unfit) => Self { unfit: Some(unfit), ..Self::from_bytes(agent, task_type, Bytes::new()) },
        }
    }

    /// A task for `agent` with a payload that is sent as it is, at most 1 MiB.
    pub fn from_bytes(
        agent: impl Into<String>,
        task_type: impl Into<String>,
        payload: impl Into<Bytes>,
    ) -> Self {
        let wire = v1::NewTask {
            agent: agent.into(),
            task_type: task_type.into(),
            payload: payload.into(),
            ..Default::default()
        };
        wire.into()
    }

    /// What is sent, with its start counted from `now` when it was given as a delay.
    pub(crate) fn into_wire(self, now: SystemTime) -> Result<v1::NewTask, Error> {
        if let Some(source) = self.unfit {
            return Err(Error::Codec { what: "payload", source });
        }
        let mut wire = self.wire;
        if let Some(delay) = self.delay {
            if delay > limits::MAX_AHEAD {
                return Err(Error::invalid("delay", "must be at most 366 days"));
            }
            wire.run_at = Some((now + delay).into());
        }
        Ok(wire)
    }

    fn edit(mut self, edit: impl FnOnce(&mut v1::NewTask)) -> Self {
        edit(&mut self.wire);
        self
    }

    fn late(self, delay: Option<Duration>) -> Self {
        Self { delay, ..self }
    }
}

impl From<v1::NewTask> for NewTask {
    /// A task whose every field the caller has set.
    fn from(wire: v1::NewTask) -> Self {
        Self { wire, delay: None, unfit: None }
    }
}

/// One task on its way: await it to store it. Made by [`Client::enqueue`].
#[derive(Debug)]
#[must_use = "a task is stored when this is awaited"]
pub struct Enqueue {
    client: Client,
    task: NewTask,
    request_id: Option<String>,
}

impl Enqueue {
    pub(crate) fn new(client: Client, task: NewTask) -> Self {
        Self { client, task, request_id: None }
    }

    /// Names this call, at most 256 bytes, remembered 24 h: another call with the same id gets the first one's answer.
    /// Made up when not given.
    pub fn request_id(mut self, id: impl Into<String>) -> Self {
        self.request_id = Some(id.into());
        self
    }

    fn edit(self, edit: impl FnOnce(&mut v1::NewTask)) -> Self {
        Self { task: self.task.edit(edit), ..self }
    }

    fn late(self, delay: Option<Duration>) -> Self {
        Self { task: self.task.late(delay), ..self }
    }

    /// Stores the task.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`], [`Error::PayloadTooLarge`] and [`Error::Codec`] before anything is sent;
    /// [`Error::AlreadyExists`] when the key is taken by a task with other content; [`Error::ResourceExhausted`] when
    /// the queue is full; [`Error::Unavailable`] and [`Error::OutcomeUnknown`] when it did not work out in four tries.
    pub async fn send(self) -> Result<TaskHandle, Error> {
        let now = clock::now();
        let task = self.task.into_wire(now)?;
        limits::new_task(&task, now)?;
        let request_id = self.request_id.unwrap_or_else(clock::request_id);
        limits::request_id(&request_id)?;
        self.client.enqueue_one(task, request_id).await
    }
}

impl IntoFuture for Enqueue {
    type Output = Result<TaskHandle, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

macro_rules! settings {
    ($($builder:ty),*) => {$(
        impl $builder {
            /// 0 to 9, higher sooner. Default 5.
            pub fn priority(self, priority: u8) -> Self {
                self.edit(|task| task.priority = Some(i32::from(priority)))
            }

            /// Not to be started before this time, at most 366 days ahead.
            pub fn run_at(self, at: SystemTime) -> Self {
                self.late(None).edit(|task| task.run_at = Some(at.into()))
            }

            /// Not to be started before so much time has passed since it was sent, at most 366 days.
            pub fn delay(self, delay: Duration) -> Self {
                self.late(Some(delay))
            }

            /// Fails with reason DEADLINE when it has not ended by this time.
            pub fn deadline(self, at: SystemTime) -> Self {
                self.edit(|task| task.deadline = Some(at.into()))
            }

            /// The caller's own key, unique per agent, at most 256 bytes: a second task with it is the first one.
            pub fn key(self, key: impl Into<String>) -> Self {
                self.edit(|task| task.idempotency_key = key.into())
            }

            /// How long the key stays taken. Default: as long as the task is stored.
            pub fn unique(self, scope: v1::UniqueScope) -> Self {
                self.edit(|task| task.set_unique(scope))
            }

            /// Adds a label for filters: at most 64, keys of 1 to 63 bytes, values up to 255 bytes.
            pub fn label(self, key: impl Into<String>, value: impl Into<String>) -> Self {
                self.edit(|task| {
                    task.labels.insert(key.into(), value.into());
                })
            }

            /// Failures that may lead to another attempt, 0 to 1,000. Default: the agent's.
            pub fn max_retries(self, retries: u16) -> Self {
                self.edit(|task| {
                    task.policy.get_or_insert_default().max_retries = Some(i32::from(retries));
                })
            }

            /// All settings that differ from the agent's. Replaces those given before.
            pub fn policy(self, policy: v1::TaskPolicy) -> Self {
                self.edit(|task| task.policy = Some(policy))
            }

            /// The W3C trace context of the caller, handed to every attempt.
            pub fn trace(self, traceparent: impl Into<String>, tracestate: impl Into<String>) -> Self {
                self.edit(|task| {
                    task.traceparent = traceparent.into();
                    task.tracestate = tracestate.into();
                })
            }
        }
    )*};
}

settings!(NewTask, Enqueue);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_reach_the_wire() {
        let now = clock::now();
        let task = NewTask::new("claude", "review", &["a"])
            .priority(9)
            .delay(Duration::from_secs(60))
            .deadline(now + Duration::from_secs(600))
            .key("k")
            .unique(v1::UniqueScope::WhileActive)
            .label("team", "core")
            .max_retries(7)
            .trace("00-1-2-01", "x=y")
            .into_wire(now)
            .unwrap();
        assert_eq!(task.payload, br#"["a"]"#[..]);
        assert_eq!(task.priority, Some(9));
        assert_eq!(task.run_at, Some((now + Duration::from_secs(60)).into()));
        assert_eq!(task.idempotency_key, "k");
        assert_eq!(task.unique(), v1::UniqueScope::WhileActive);
        assert_eq!(task.labels["team"], "core");
        assert_eq!(task.policy.unwrap().max_retries, Some(7));
        assert_eq!(task.traceparent, "00-1-2-01");
        assert!(limits::new_task(&NewTask::new("a", "t", &()).into_wire(now).unwrap(), now).is_ok());
    }

    #[test]
    fn the_last_of_delay_and_run_at_counts() {
        let now = clock::now();
        let at = now + Duration::from_secs(5);
        let task = NewTask::new("a", "t", &()).delay(Duration::from_secs(60)).run_at(at);
        assert_eq!(task.into_wire(now).unwrap().run_at, Some(at.into()));
        let task = NewTask::new("a", "t", &()).delay(Duration::MAX);
        assert!(matches!(task.into_wire(now), Err(Error::InvalidArgument { .. })));
    }

    #[test]
    fn a_payload_that_is_no_json_is_reported_when_sent() {
        let odd: std::collections::BTreeMap<Vec<u8>, u8> = [(vec![1], 1)].into();
        let error = NewTask::new("a", "t", &odd).into_wire(clock::now()).unwrap_err();
        assert!(matches!(error, Error::Codec { what: "payload", .. }));
    }
}

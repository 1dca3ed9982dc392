//! Handlers of any type behind one form: bytes in, bytes out.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::context::Context;
use super::task_error::TaskError;

pub(crate) type Run = Pin<Box<dyn Future<Output = Result<Bytes, TaskError>> + Send>>;
pub(crate) type Handler = Arc<dyn Fn(Bytes, Context) -> Run + Send + Sync>;

/// The code of a failure whose payload is not what the handler takes.
const BAD_PAYLOAD: &str = "BAD_PAYLOAD";
/// The code of a failure whose result cannot be written as JSON.
const BAD_RESULT: &str = "BAD_RESULT";

/// A handler of JSON. It reads the payload within the task, so that a slow or panicking reader hurts this task alone.
pub(crate) fn json<T, R, F, Fut>(handler: F) -> Handler
where
    T: DeserializeOwned,
    R: Serialize,
    F: Fn(T, Context) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<R, TaskError>> + Send + 'static,
{
    let handler = Arc::new(handler);
    Arc::new(move |payload, context| {
        let handler = Arc::clone(&handler);
        Box::pin(async move {
            let running = {
                let input = serde_json::from_slice(&payload).map_err(|error| {
                    TaskError::fatal(format!("the payload does not parse: {error}")).code(BAD_PAYLOAD)
                })?;
                drop(payload);
                handler(input, context)
            };
            let output = running.await?;
            let json = serde_json::to_vec(&output).map_err(|error| {
                TaskError::fatal(format!("the result is no JSON: {error}")).code(BAD_RESULT)
            })?;
            Ok(json.into())
        })
    })
}

/// A handler of bytes.
pub(crate) fn bytes<F, Fut>(handler: F) -> Handler
where
    F: Fn(Bytes, Context) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Bytes, TaskError>> + Send + 'static,
{
    Arc::new(move |payload, context| Box::pin(handler(payload, context)))
}

/// Which handler takes which type.
#[derive(Clone, Default)]
pub(crate) struct Handlers {
    pub(crate) by_type: BTreeMap<String, Handler>,
    pub(crate) any: Option<Handler>,
}

impl Handlers {
    pub(crate) fn find(&self, task_type: &str) -> Option<&Handler> {
        self.by_type.get(task_type).or(self.any.as_ref())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_type.is_empty() && self.any.is_none()
    }

    /// What Hello says: nothing means all types.
    pub(crate) fn task_types(&self) -> Vec<String> {
        if self.any.is_some() { Vec::new() } else { self.by_type.keys().cloned().collect() }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;
    use tokio::time::Instant;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::v1;

    fn context() -> Context {
        let (touched, _) = mpsc::unbounded_channel();
        Context::new(v1::Assignment::default(), Instant::now(), CancellationToken::new(), touched, 0)
    }

    #[tokio::test]
    async fn json_goes_in_and_out() {
        let handler = json(|n: u32, _: Context| async move { Ok(n + 1) });
        assert_eq!(handler(Bytes::from_static(b"41"), context()).await.unwrap(), "42");
    }

    #[tokio::test]
    async fn a_payload_that_does_not_parse_is_a_permanent_failure() {
        let handler = json(|n: u32, _: Context| async move { Ok(n) });
        let error = handler(Bytes::from_static(b"{"), context()).await.unwrap_err();
        let v1::outcome::Outcome::Fail(fail) = error.into_outcome(None) else { panic!("no failure") };
        let error = fail.error.unwrap();
        assert_eq!((error.class(), error.code.as_str()), (v1::ErrorClass::Permanent, BAD_PAYLOAD));
    }

    #[tokio::test]
    async fn the_handler_of_a_type_goes_before_the_one_for_all() {
        let mut handlers = Handlers::default();
        assert!(handlers.is_empty() && handlers.find("a").is_none());
        handlers.by_type.insert("a".into(), bytes(|_, _| async { Ok(Bytes::from_static(b"a")) }));
        assert_eq!(handlers.task_types(), ["a"]);
        assert!(handlers.find("b").is_none());
        handlers.any = Some(bytes(|_, _| async { Ok(Bytes::from_static(b"any")) }));
        assert!(handlers.task_types().is_empty());
        for (task_type, answer) in [("a", "a"), ("b", "any")] {
            let handler = handlers.find(task_type).unwrap();
            assert_eq!(handler(Bytes::new(), context()).await.unwrap(), answer);
        }
    }
}

//! What every call passes: is it gRPC, how much time has it, what if its handler panics, and what if it is taken back.
//!
//! tonic takes any content type, ignores a malformed `grpc-timeout`, and reports its own timeout as CANCELLED; here they
//! are answered as the protocol says.

use super::conduct::Conduct;
use super::tls::Peer;
use crate::grpc::status::Refused;
use crate::grpc::{STREAMS, TimeLeft, WAIT_TASK, WORK};
use futures_util::FutureExt;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

/// Longest unary call.
const CALL: Duration = Duration::from_secs(10);
/// Longest long poll: what it may wait, and a call.
const LONG_CALL: Duration = Duration::from_secs(70);
/// tonic keeps the caller's deadline too, and says it wrongly; ours is first.
const FIRST: Duration = Duration::from_millis(2);

/// Puts a [`Gate`] before a service.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GateLayer;

impl<S> Layer<S> for GateLayer {
    type Service = Gate<S>;

    fn layer(&self, inner: S) -> Gate<S> {
        Gate { inner }
    }
}

/// Passes on what is gRPC.
#[derive(Clone, Debug)]
pub(crate) struct Gate<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for Gate<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if let Err(code) = is_grpc(request.method(), request.headers()) {
            return Box::pin(async move { Ok(refusal(code)) });
        }
        let given = match time_given(request.headers()) {
            Ok(given) => given,
            Err(refused) => return Box::pin(async move { Ok(Status::from(refused).into_http()) }),
        };
        let most = longest(request.uri().path());
        let left = match (given, most) {
            // The deadline of a stream is the client's to keep: it says when it has enough.
            (_, None) => None,
            (Some(given), Some(most)) => Some(given.saturating_sub(FIRST).min(most)),
            (None, Some(most)) => Some(most),
        };
        if let Some(left) = left {
            if left.is_zero() {
                return Box::pin(async { Ok(Status::from(Refused::Deadline).into_http()) });
            }
            request.extensions_mut().insert(TimeLeft(left));
        }
        let conduct = request.extensions().get::<Peer>().map(|peer| peer.conduct.clone());
        let mut call = conduct.as_ref().map(Conduct::call);
        let answer = AssertUnwindSafe(self.inner.call(request)).catch_unwind();
        Box::pin(async move {
            let answer = match left {
                // Dropping a handler undoes nothing: what it asked for is in the ledger's hands.
                Some(left) => match tokio::time::timeout(left, answer).await {
                    Ok(answer) => answer,
                    Err(_) => Ok(Ok(Status::from(Refused::Deadline).into_http())),
                },
                None => answer.await,
            };
            if let Some(call) = &mut call {
                call.answered();
            }
            // The panic itself was logged where it happened.
            answer.unwrap_or_else(|_| Ok(Status::from(Refused::Panic).into_http()))
        })
    }
}

fn is_grpc(method: &Method, headers: &HeaderMap) -> Result<(), StatusCode> {
    if method != Method::POST {
        return Err(StatusCode::METHOD_NOT_ALLOWED);
    }
    let content = headers.get(header::CONTENT_TYPE).map_or(&[][..], HeaderValue::as_bytes);
    match content.strip_prefix(b"application/grpc") {
        Some([] | [b'+' | b';', ..]) => Ok(()),
        _ => Err(StatusCode::UNSUPPORTED_MEDIA_TYPE),
    }
}

fn refusal(code: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = code;
    if code == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
    }
    response
}

/// How long a call may take; none for streams, which have timers of their own.
fn longest(path: &str) -> Option<Duration> {
    match path {
        WAIT_TASK => Some(LONG_CALL),
        WORK | "/grpc.health.v1.Health/Watch" => None,
        path if path.starts_with("/grpc.reflection.") || STREAMS.contains(&path) => None,
        _ => Some(CALL),
    }
}

/// The caller's deadline: up to 8 digits and a unit.
fn time_given(headers: &HeaderMap) -> Result<Option<Duration>, Refused> {
    let Some(text) = headers.get("grpc-timeout") else { return Ok(None) };
    let Some((unit, digits)) = text.as_bytes().split_last() else { return Err(Refused::Timeout) };
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return Err(Refused::Timeout);
    }
    let number = digits.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0'));
    Ok(Some(match unit {
        b'H' => Duration::from_secs(number * 3_600),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return Err(Refused::Timeout),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use tonic::Code;

    async fn ask(path: &str, headers: &[(&'static str, &str)]) -> Response<Body> {
        let service = tower::service_fn(|request: Request<Body>| async move {
            match request.uri().path() {
                "/slow" => tokio::time::sleep(Duration::from_secs(60)).await,
                "/panic" => panic!("on purpose"),
                _ => {}
            }
            Ok::<_, Infallible>(Response::new(Body::empty()))
        });
        let mut request = Request::post(path).body(Body::empty()).expect("a request");
        for (name, value) in headers {
            request.headers_mut().insert(*name, HeaderValue::from_str(value).expect("a header"));
        }
        let Ok(response) = GateLayer.layer(service).call(request).await;
        response
    }

    fn code(response: &Response<Body>) -> Option<Code> {
        Status::from_header_map(response.headers()).map(|status| status.code())
    }

    #[tokio::test(start_paused = true)]
    async fn only_grpc_passes() {
        for (content, status) in [
            ("text/plain", 415),
            ("application/json", 415),
            ("application/grpc-web", 415),
            ("application/grpc", 200),
            ("application/grpc+proto", 200),
            ("application/grpc;charset=utf-8", 200),
        ] {
            assert_eq!(
                ask("/fast", &[("content-type", content)]).await.status().as_u16(),
                status,
                "{content}"
            );
        }
        assert_eq!(ask("/fast", &[]).await.status().as_u16(), 415);
        assert_eq!(is_grpc(&Method::GET, &HeaderMap::new()), Err(StatusCode::METHOD_NOT_ALLOWED));
    }

    #[tokio::test(start_paused = true)]
    async fn deadlines_are_kept_and_read_as_the_protocol_says() {
        let with = |timeout: &'static str| [("content-type", "application/grpc"), ("grpc-timeout", timeout)];
        for timeout in ["abc", "", "1", "S", "-1S", "1.5S", "123456789S", "1 S", "1h"] {
            assert_eq!(code(&ask("/fast", &with(timeout)).await), Some(Code::InvalidArgument), "{timeout:?}");
        }
        assert_eq!(code(&ask("/fast", &with("0n")).await), Some(Code::DeadlineExceeded));
        assert_eq!(code(&ask("/fast", &with("99999999H")).await), None);
        let start = tokio::time::Instant::now();
        assert_eq!(code(&ask("/slow", &with("50m")).await), Some(Code::DeadlineExceeded));
        assert!(start.elapsed() <= Duration::from_millis(50), "before tonic says it wrongly");
        let start = tokio::time::Instant::now();
        assert_eq!(code(&ask("/slow", &with("1H")).await), Some(Code::DeadlineExceeded));
        assert_eq!(start.elapsed().as_secs(), 10, "no call is longer");
    }

    #[tokio::test]
    async fn a_panic_is_answered() {
        let response = ask("/panic", &[("content-type", "application/grpc")]).await;
        assert_eq!(code(&response), Some(Code::Internal));
    }
}

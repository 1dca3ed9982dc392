//! Whether the daemon lives, has started, and takes work: over gRPC and over HTTP from one source.

use crate::grpc::SERVICES;
use crate::ledger::Handle;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_health::pb::health_check_response::ServingStatus as Wire;
use tonic_health::pb::health_server::{Health as Protocol, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_health::server::{HealthReporter, HealthService};

/// How often the ledger is asked whether it can commit, and how long it may take.
const ASK_EVERY: Duration = Duration::from_secs(2);
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// Names of what says no while no work is taken. `liveness` never does: it says that the process answers.
const READINESS: [&str; 2] = ["", "readiness"];

/// The state of health, as its reporters and probes share it.
#[derive(Clone)]
pub(crate) struct Health {
    reporter: HealthReporter,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    commits: AtomicBool,
    draining: AtomicBool,
}

impl std::fmt::Debug for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Health").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Health {
    /// Of a daemon that has started and can commit.
    pub(crate) async fn started() -> Self {
        let health = Self { reporter: HealthReporter::new(), state: Arc::default() };
        health.state.commits.store(true, Ordering::SeqCst);
        for name in ["liveness", "startup"] {
            health.reporter.set_service_status(name, ServingStatus::Serving).await;
        }
        health.report().await;
        health
    }

    /// No more work is taken from now on.
    pub(crate) async fn drain(&self) {
        self.state.draining.store(true, Ordering::SeqCst);
        self.report().await;
    }

    /// Whether work is taken.
    #[must_use]
    pub(crate) fn is_ready(&self) -> bool {
        self.checks().iter().all(|(_, good)| *good)
    }

    /// What readiness consists of.
    #[must_use]
    pub(crate) fn checks(&self) -> [(&'static str, bool); 2] {
        [
            ("ledger commits", self.state.commits.load(Ordering::SeqCst)),
            ("not draining", !self.state.draining.load(Ordering::SeqCst)),
        ]
    }

    /// Asks the ledger now and then whether it can commit, for ever.
    pub(crate) async fn watch(self, handle: Handle) {
        let mut tick = interval(ASK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let commits = matches!(timeout(ANSWERS_WITHIN, handle.flush()).await, Ok(Ok(())));
            if self.state.commits.swap(commits, Ordering::SeqCst) != commits {
                tracing::warn!(commits, "whether the ledger commits has changed");
                self.report().await;
            }
        }
    }

    async fn report(&self) {
        let status = if self.is_ready() { ServingStatus::Serving } else { ServingStatus::NotServing };
        for name in READINESS.into_iter().chain(SERVICES) {
            self.reporter.set_service_status(name, status).await;
        }
    }

    /// The service. Watches end with `stop`: a client's load balancer holds one for as long as it lives.
    pub(super) fn service(&self, stop: &CancellationToken) -> HealthServer<impl Protocol> {
        HealthServer::new(Ending {
            inner: HealthService::from_health_reporter(self.reporter.clone()),
            stop: stop.clone(),
        })
    }
}

struct Ending {
    inner: HealthService,
    stop: CancellationToken,
}

#[tonic::async_trait]
impl Protocol for Ending {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        self.inner.check(request).await
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        use futures_util::StreamExt;
        let watch = self.inner.watch(request).await?.into_inner();
        // Whoever watches hears of the end even if the stop came first.
        let mut last = HealthCheckResponse::default();
        last.set_status(Wire::NotServing);
        let watch = watch.take_until(self.stop.clone().cancelled_owned());
        Ok(Response::new(Box::pin(watch.chain(futures_util::stream::iter([Ok(last)])))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;

    #[tokio::test]
    async fn readiness_follows_the_drain_and_liveness_does_not() {
        let health = Health::started().await;
        let stop = CancellationToken::new();
        let service = Ending {
            inner: HealthService::from_health_reporter(health.reporter.clone()),
            stop: stop.clone(),
        };
        let ask = async |name: &str| {
            let request = HealthCheckRequest { service: name.to_owned() };
            service.check(Request::new(request)).await.map(|answer| answer.into_inner().status())
        };
        for name in ["", "liveness", "readiness", "startup", "ledger.v1.WorkerService"] {
            assert_eq!(ask(name).await.expect("known"), Wire::Serving, "{name}");
        }
        assert_eq!(ask("other").await.expect_err("unknown").code(), tonic::Code::NotFound);
        let request = HealthCheckRequest { service: "readiness".to_owned() };
        let mut watch = service.watch(Request::new(request)).await.expect("a watch").into_inner();
        assert_eq!(watch.next().await.expect("one").expect("one").status(), Wire::Serving);
        health.drain().await;
        assert_eq!(watch.next().await.expect("one").expect("one").status(), Wire::NotServing);
        stop.cancel();
        assert_eq!(watch.next().await.expect("one").expect("one").status(), Wire::NotServing);
        assert!(watch.next().await.is_none(), "a watch holds nothing up");
        assert_eq!(ask("liveness").await.expect("known"), Wire::Serving);
        assert_eq!(ask("ledger.v1.TaskService").await.expect("known"), Wire::NotServing);
    }
}

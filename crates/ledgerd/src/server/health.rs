//! Whether the daemon lives, has started, and takes work: over gRPC and over HTTP from one source.

use super::gate::{Gate, GateLayer};
use crate::grpc::SERVICES;
use crate::ledger::{Beat, Handle};
use crate::systemd::Watchdog;
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
use tower::Layer;

/// How often the ledger is asked whether it can commit, and how long it may take.
const ASK_EVERY: Duration = Duration::from_secs(2);
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// How often the loop is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Looks at a loop that rests and does not turn, before it is taken for stuck. It is woken every [`ASK_EVERY`], so this is
/// fifteen times what it needs; a process that stood still as a whole has not looked either, and is not killed for it.
const STUCK_AFTER: u32 = 30;
/// The same for one that may wait for its store. A restart mends no disk and no database, and readiness has said no all the
/// while; this ends what would otherwise never end.
const STUCK_IN_THE_STORE_AFTER: u32 = 600;

/// A request of this protocol is a name.
const REQUEST_BYTES: usize = 4 << 10;

/// Names of what says no while no work is taken. `liveness` is another thing: that this process must be replaced.
const READINESS: [&str; 2] = ["", "readiness"];

/// The state of health, as its reporters and probes share it.
#[derive(Clone)]
pub(crate) struct Health {
    reporter: HealthReporter,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    stuck: AtomicBool,
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

    /// Whether threads and ledger loop go on. Asks nobody.
    #[must_use]
    pub(crate) fn is_alive(&self) -> bool {
        !self.state.stuck.load(Ordering::SeqCst)
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

    /// Looks now and then whether the loop goes on, for ever, and tells the service manager while it does.
    pub(crate) async fn live(self, handle: Handle) {
        let watchdog = Watchdog::start();
        let mut still = Still::new(handle.beat());
        let (mut look, mut ping) =
            (interval(LOOK_EVERY), interval(watchdog.interval().unwrap_or(LOOK_EVERY)));
        for tick in [&mut look, &mut ping] {
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        loop {
            tokio::select! {
                _ = look.tick() => self.alive(!still.is_stuck(handle.beat())).await,
                _ = ping.tick() => if self.is_alive() {
                    watchdog.ping();
                },
            }
        }
    }

    /// Takes note whether the loop goes on, and tells when that changes.
    pub(crate) async fn alive(&self, alive: bool) {
        if self.state.stuck.swap(!alive, Ordering::SeqCst) == alive {
            if alive {
                tracing::warn!("the ledger loop goes on");
            } else {
                tracing::error!("the ledger loop is stuck; this process should be replaced");
            }
            let status = if alive { ServingStatus::Serving } else { ServingStatus::NotServing };
            self.reporter.set_service_status("liveness", status).await;
        }
    }

    async fn report(&self) {
        let status = if self.is_ready() { ServingStatus::Serving } else { ServingStatus::NotServing };
        for name in READINESS.into_iter().chain(SERVICES) {
            self.reporter.set_service_status(name, status).await;
        }
    }

    /// The service. Watches end with `stop`: a client's load balancer holds one for as long as it lives.
    pub(super) fn service(&self, stop: &CancellationToken) -> HealthServer<impl Protocol + use<>> {
        HealthServer::new(Ending {
            inner: HealthService::from_health_reporter(self.reporter.clone()),
            stop: stop.clone(),
        })
        .max_decoding_message_size(REQUEST_BYTES)
    }

    /// The same behind a gate of its own, for ports that serve nothing else of gRPC.
    pub(crate) fn gated_service(
        &self,
        stop: &CancellationToken,
    ) -> Gate<HealthServer<impl Protocol + use<>>> {
        GateLayer.layer(self.service(stop))
    }
}

/// How long a loop has not turned, in looks at it.
#[derive(Debug)]
struct Still {
    last: Beat,
    looks: u32,
}

impl Still {
    const fn new(last: Beat) -> Self {
        Self { last, looks: 0 }
    }

    fn is_stuck(&mut self, seen: Beat) -> bool {
        self.looks = if seen == self.last { self.looks.saturating_add(1) } else { 0 };
        self.last = seen;
        let limit = if seen.may_wait_for_the_store() { STUCK_IN_THE_STORE_AFTER } else { STUCK_AFTER };
        self.looks >= limit
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

    #[test]
    fn a_loop_that_rests_is_stuck_soon_and_one_that_writes_is_given_time() {
        for (waits, limit) in [(false, STUCK_AFTER), (true, STUCK_IN_THE_STORE_AFTER)] {
            let pulse = crate::ledger::Pulse::default();
            let mut still = Still::new(pulse.seen());
            for _ in 0..3 {
                pulse.beat(waits);
                assert!(!still.is_stuck(pulse.seen()), "it has turned");
                for look in 1..limit {
                    assert!(!still.is_stuck(pulse.seen()), "{look}");
                }
            }
            assert!(still.is_stuck(pulse.seen()) && still.is_stuck(pulse.seen()));
            pulse.beat(waits);
            assert!(!still.is_stuck(pulse.seen()), "it goes on");
        }
    }

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
        health.alive(false).await;
        assert_eq!(ask("liveness").await.expect("known"), Wire::NotServing);
        health.alive(true).await;
        assert_eq!(ask("liveness").await.expect("known"), Wire::Serving);
        assert_eq!(ask("ledger.v1.TaskService").await.expect("known"), Wire::NotServing);
    }
}

//! The instruments: one set, read by OTLP and by `/metrics`.
//!
//! Names, units and labels stand in [`METRICS`], from which the reference is written. Nothing here asks the ledger: gauges
//! show the last [`Look`] that somebody took.

use crate::lately::Lately;
use crate::ledger::Handle;
use crate::ledger::command::LedgerError;
use breaker_core::State as BreakerState;
use ledger_core::State;
use ledger_core::store::Counts;
use opentelemetry::metrics::{Counter, Histogram, Meter, MeterProvider};
use opentelemetry::{KeyValue, StringValue, Value};
use opentelemetry_sdk::metrics::SdkMeterProvider;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How an instrument is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// As it is now.
    Gauge,
    /// Counts by size; times in seconds, with the upper bounds of its buckets.
    Histogram(&'static [f64]),
}

/// What is known of an instrument before anything is measured.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name in OpenTelemetry.
    pub name: &'static str,
    /// How it is read.
    pub kind: Kind,
    /// Its unit, as UCUM writes it.
    pub unit: &'static str,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// One sentence.
    pub what: &'static str,
}

/// Upper bounds for calls and commits, in seconds.
const QUICK: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// For what agents do: from a moment to hours.
const SLOW: &[f64] =
    &[0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1_800.0, 3_600.0, 7_200.0, 21_600.0];

const RPC: Metric = Metric {
    name: "rpc.server.call.duration",
    kind: Kind::Histogram(QUICK),
    unit: "s",
    labels: &["rpc.method", "rpc.status_code"],
    what: "Time a unary call took, as the daemon sees it. Streams and health checks are not in it.",
};
const WAIT: Metric = Metric {
    name: "ledgerd.task.wait.duration",
    kind: Kind::Histogram(SLOW),
    unit: "s",
    labels: &["agent"],
    what: "From when a task could have been handed out until it was assigned.",
};
const ATTEMPT: Metric = Metric {
    name: "ledgerd.attempt.duration",
    kind: Kind::Histogram(SLOW),
    unit: "s",
    labels: &["agent", "outcome"],
    what: "From ack (or assignment, where there was none) to the end: completed, failed, blocked, released, stopped, lost, \
           ack_timeout or abandoned.",
};
const RETRIES: Metric = Metric {
    name: "ledgerd.task.retries",
    kind: Kind::Counter,
    unit: "{task}",
    labels: &["agent", "reason"],
    what: "Attempts after which a task is tried again, by the class of the failure or LOST.",
};
const DEAD: Metric = Metric {
    name: "ledgerd.task.dead_lettered",
    kind: Kind::Counter,
    unit: "{task}",
    labels: &["agent", "reason"],
    what: "Tasks that became FAILED, by the reason.",
};
const EXPIRED: Metric = Metric {
    name: "ledgerd.lease.expired",
    kind: Kind::Counter,
    unit: "{lease}",
    labels: &["agent"],
    what: "Leases of acknowledged tasks that ran out.",
};
const MOVED: Metric = Metric {
    name: "ledgerd.breaker.transitions",
    kind: Kind::Counter,
    unit: "{transition}",
    labels: &["agent", "from", "to"],
    what: "Moves of breakers from one state to another.",
};
const COMMIT: Metric = Metric {
    name: "ledgerd.store.operation.duration",
    kind: Kind::Histogram(QUICK),
    unit: "s",
    labels: &["op", "backend"],
    what: "From the hand-over of a batch to the store until it is durable (op: commit).",
};
const DEPTH: Metric = Metric {
    name: "ledgerd.agent.depth",
    kind: Kind::Gauge,
    unit: "{task}",
    labels: &["agent", "state"],
    what: "Tasks that have not ended, and FAILED ones, by agent and state.",
};
const OLDEST: Metric = Metric {
    name: "ledgerd.agent.oldest_age",
    kind: Kind::Gauge,
    unit: "s",
    labels: &["agent"],
    what: "How long the task that is due longest has been waiting for a worker; 0 where none is due.",
};
const BREAKER: Metric = Metric {
    name: "ledgerd.breaker.state",
    kind: Kind::Gauge,
    unit: "{breaker}",
    labels: &["agent", "task_type", "state"],
    what: "1 for the state a breaker is in, 0 for the others. An empty task_type is the agent's own.",
};
const SLOTS: Metric = Metric {
    name: "ledgerd.worker.slots",
    kind: Kind::Gauge,
    unit: "{slot}",
    labels: &["state"],
    what: "Room of all connected workers: used and free.",
};
const SESSIONS: Metric = Metric {
    name: "ledgerd.worker.sessions",
    kind: Kind::Gauge,
    unit: "{session}",
    labels: &[],
    what: "Workers that are connected.",
};
const SIZE: Metric = Metric {
    name: "ledgerd.store.size",
    kind: Kind::Gauge,
    unit: "By",
    labels: &[],
    what: "Bytes of the ledger in its store.",
};
const DROPPED: Metric = Metric {
    name: "ledgerd.telemetry.dropped",
    kind: Kind::Counter,
    unit: "{item}",
    labels: &["signal"],
    what: "Spans and records of the log that were not exported and transitions that were not counted, because an exporter or \
           the observer was too slow or failed.",
};

/// Every instrument, in the order of the reference.
pub const METRICS: [Metric; 15] = [
    RPC, WAIT, ATTEMPT, RETRIES, DEAD, EXPIRED, MOVED, COMMIT, DEPTH, OLDEST, BREAKER, SLOTS, SESSIONS, SIZE,
    DROPPED,
];

impl Metric {
    /// Its name on `/metrics`, where histograms have `_bucket`, `_sum` and `_count` after it.
    #[must_use]
    pub fn prometheus(&self) -> String {
        let mut name = self.name.replace('.', "_");
        name.push_str(match self.unit {
            "s" => "_seconds",
            "By" => "_bytes",
            _ => "",
        });
        if self.kind == Kind::Counter {
            name.push_str("_total");
        }
        name
    }
}

/// The reference of metrics, as `docs/reference/metrics.md` has it.
#[must_use]
pub fn reference() -> String {
    let mut text = String::from(
        "# Metrics\n\nGenerated from the code; a test holds that it is so. The same instruments are pushed over OTLP and shown \
         at `/metrics` of the HTTP port.\n\n| OpenTelemetry | `/metrics` | kind | labels | what |\n| --- | --- | --- | --- | --- |\n",
    );
    for metric in METRICS {
        let kind = match metric.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        };
        let labels: Vec<_> =
            metric.labels.iter().map(|label| format!("`{}`", label.replace('.', "_"))).collect();
        let _ = writeln!(
            text,
            "| `{}` | `{}` | {kind} | {} | {} |",
            metric.name,
            metric.prometheus(),
            labels.join(", "),
            metric.what
        );
    }
    text
}

/// What gauges show.
#[derive(Debug, Default)]
struct Look {
    depth: Vec<(Arc<str>, State, u64)>,
    oldest: Vec<(Arc<str>, f64)>,
    breakers: Vec<(Arc<str>, Arc<str>, BreakerState)>,
    used: u64,
    free: u64,
    sessions: u64,
    bytes: u64,
}

/// Figures are as old as this at most, however many scrape.
const FRESH: Duration = Duration::from_millis(500);
/// How long the ledger may take to be looked at.
const LOOK_WITHIN: Duration = Duration::from_secs(2);
/// Agents that have labels of their own; the tasks of others are summed under `_other`.
const AGENTS: usize = 1_000;
/// Breakers that are shown, each with all of its states.
const BREAKERS: usize = 1_500;
/// Series of one gauge. Beyond it the library mixes them into one, whose value means nothing.
pub(super) const SERIES: usize = 10_000;

/// The instruments.
#[derive(Debug)]
pub struct Meters {
    pub(super) wait: Histogram<f64>,
    pub(super) attempt: Histogram<f64>,
    pub(super) retries: Counter<u64>,
    pub(super) dead: Counter<u64>,
    pub(super) expired: Counter<u64>,
    pub(super) moved: Counter<u64>,
    pub(super) commit: Histogram<f64>,
    rpc: Histogram<f64>,
    look: Arc<Mutex<Arc<Look>>>,
    lately: Lately<Look>,
    /// What was dropped and missed.
    pub(super) dropped: Arc<Dropped>,
    registry: prometheus::Registry,
}

/// What was not told to anybody.
#[derive(Debug, Default)]
pub(super) struct Dropped {
    pub(super) spans: AtomicU64,
    pub(super) logs: AtomicU64,
    pub(super) transitions: AtomicU64,
}

impl Meters {
    pub(super) fn new(
        provider: &SdkMeterProvider,
        registry: prometheus::Registry,
        dropped: Arc<Dropped>,
    ) -> Self {
        let meter = provider.meter("ledgerd");
        let look = Arc::new(Mutex::new(Arc::default()));
        gauges(&meter, &look);
        let counts = Arc::clone(&dropped);
        meter
            .u64_observable_counter(DROPPED.name)
            .with_unit(DROPPED.unit)
            .with_description(DROPPED.what)
            .with_callback(move |seen| {
                let each =
                    [("spans", &counts.spans), ("logs", &counts.logs), ("transitions", &counts.transitions)];
                for (signal, count) in each {
                    seen.observe(count.load(Ordering::Relaxed), &[KeyValue::new("signal", signal)]);
                }
            })
            .build();
        Self {
            wait: histogram(&meter, WAIT),
            attempt: histogram(&meter, ATTEMPT),
            retries: counter(&meter, RETRIES),
            dead: counter(&meter, DEAD),
            expired: counter(&meter, EXPIRED),
            moved: counter(&meter, MOVED),
            commit: histogram(&meter, COMMIT),
            rpc: histogram(&meter, RPC),
            look,
            lately: Lately::new(FRESH),
            dropped,
            registry,
        }
    }

    /// A call was answered; with the labels of [`RPC`].
    pub(crate) fn called(&self, labels: &[KeyValue; 2], took: Duration) {
        self.rpc.record(took.as_secs_f64(), labels);
    }

    /// Takes a look at the ledger for the gauges. Without an answer in time they stay as they are.
    pub(crate) async fn look_at(&self, handle: &Handle) {
        match tokio::time::timeout(LOOK_WITHIN, self.lately.seen(taken(handle))).await {
            Ok(Ok(look)) => *self.look.lock().unwrap_or_else(PoisonError::into_inner) = look,
            Ok(Err(error)) => tracing::debug!(%error, "the ledger could not be looked at for metrics"),
            Err(_) => tracing::debug!("the ledger took too long to be looked at for metrics"),
        }
    }

    /// All of it, in Prometheus' text format.
    ///
    /// # Errors
    /// What the encoder says.
    pub(crate) fn text(&self) -> Result<String, prometheus::Error> {
        prometheus::TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

async fn taken(handle: &Handle) -> Result<Look, LedgerError> {
    let mut look = Look::default();
    let ages: HashMap<_, _> = handle.oldest().await?.into_iter().collect();
    let mut others = Counts::default();
    for (nth, agent) in handle.agents().await?.into_iter().enumerate() {
        for state in [State::Queued, State::Running, State::Retry, State::Blocked, State::Failed] {
            let count = agent.counts[usize::from(state.code())];
            if nth < AGENTS {
                look.depth.push((Arc::clone(&agent.name), state, count));
            } else {
                others[usize::from(state.code())] += count;
            }
        }
        if nth >= AGENTS {
            continue;
        }
        let age = ages.get(&agent.name).map_or(0.0, Duration::as_secs_f64);
        look.oldest.push((Arc::clone(&agent.name), age));
        for view in &agent.breakers {
            look.breakers.push((Arc::clone(&agent.name), Arc::clone(&view.task_type), view.breaker.state()));
        }
    }
    let states = State::ALL.iter().filter(|state| others[usize::from(state.code())] != 0);
    look.breakers.truncate(BREAKERS);
    look.depth.extend(states.map(|state| ("_other".into(), *state, others[usize::from(state.code())])));
    for worker in handle.workers().await? {
        look.sessions += 1;
        look.used += u64::from(worker.held);
        look.free += u64::from(worker.capacity.saturating_sub(worker.held));
    }
    look.bytes = handle.reader().sizes().await.map_err(LedgerError::Store)?.bytes;
    Ok(look)
}

fn gauges(meter: &Meter, look: &Arc<Mutex<Arc<Look>>>) {
    let shared = Arc::clone(look);
    meter
        .u64_observable_gauge(DEPTH.name)
        .with_unit(DEPTH.unit)
        .with_description(DEPTH.what)
        .with_callback(move |seen| {
            let look = shared.lock().unwrap_or_else(PoisonError::into_inner);
            for (agent, state, count) in &look.depth {
                seen.observe(*count, &[label("agent", agent), KeyValue::new("state", state.as_str())]);
            }
        })
        .build();
    let shared = Arc::clone(look);
    meter
        .f64_observable_gauge(OLDEST.name)
        .with_unit(OLDEST.unit)
        .with_description(OLDEST.what)
        .with_callback(move |seen| {
            let look = shared.lock().unwrap_or_else(PoisonError::into_inner);
            for (agent, age) in &look.oldest {
                seen.observe(*age, &[label("agent", agent)]);
            }
        })
        .build();
    let shared = Arc::clone(look);
    meter
        .u64_observable_gauge(BREAKER.name)
        .with_unit(BREAKER.unit)
        .with_description(BREAKER.what)
        .with_callback(move |seen| {
            let look = shared.lock().unwrap_or_else(PoisonError::into_inner);
            for (agent, task_type, is) in &look.breakers {
                for state in BreakerState::ALL {
                    let labels = [
                        label("agent", agent),
                        label("task_type", task_type),
                        KeyValue::new("state", state.as_str()),
                    ];
                    seen.observe(u64::from(state == *is), &labels);
                }
            }
        })
        .build();
    let shared = Arc::clone(look);
    meter
        .u64_observable_gauge(SLOTS.name)
        .with_unit(SLOTS.unit)
        .with_description(SLOTS.what)
        .with_callback(move |seen| {
            let look = shared.lock().unwrap_or_else(PoisonError::into_inner);
            seen.observe(look.used, &[KeyValue::new("state", "used")]);
            seen.observe(look.free, &[KeyValue::new("state", "free")]);
        })
        .build();
    for (metric, value) in
        [(SESSIONS, (|look: &Look| look.sessions) as fn(&Look) -> u64), (SIZE, |look| look.bytes)]
    {
        let shared = Arc::clone(look);
        meter
            .u64_observable_gauge(metric.name)
            .with_unit(metric.unit)
            .with_description(metric.what)
            .with_callback(move |seen| {
                seen.observe(value(&shared.lock().unwrap_or_else(PoisonError::into_inner)), &[]);
            })
            .build();
    }
}

pub(super) fn label(key: &'static str, value: &Arc<str>) -> KeyValue {
    KeyValue::new(key, Value::String(StringValue::from(Arc::clone(value))))
}

fn histogram(meter: &Meter, metric: Metric) -> Histogram<f64> {
    let Kind::Histogram(bounds) = metric.kind else { unreachable!("{} is a histogram", metric.name) };
    let builder = meter.f64_histogram(metric.name).with_unit(metric.unit).with_description(metric.what);
    builder.with_boundaries(bounds.to_vec()).build()
}

fn counter(meter: &Meter, metric: Metric) -> Counter<u64> {
    meter.u64_counter(metric.name).with_unit(metric.unit).with_description(metric.what).build()
}

#[cfg(test)]
mod tests {
    use super::super::asked::Exporters;
    use super::*;

    #[test]
    fn as_many_series_as_there_may_be_are_shown_each_by_itself() {
        let (provider, registry) = super::super::export::meter_provider(
            opentelemetry_sdk::Resource::builder().build(),
            Exporters::default(),
        )
        .expect("nothing is exported");
        let meters = Meters::new(&provider, registry, Arc::default());
        let names: Vec<Arc<str>> = (0..BREAKERS).map(|nth| format!("agent-{nth}").into()).collect();
        let live = [State::Queued, State::Running, State::Retry, State::Blocked, State::Failed];
        let agents = names[..AGENTS].iter().cloned().chain(["_other".into()]);
        let look = Look {
            depth: agents.flat_map(|name| live.map(|state| (Arc::clone(&name), state, 7))).collect(),
            oldest: names[..AGENTS].iter().map(|name| (Arc::clone(name), 1.0)).collect(),
            breakers: names.iter().map(|name| (Arc::clone(name), "".into(), BreakerState::Open)).collect(),
            ..Look::default()
        };
        *meters.look.lock().expect("not poisoned") = Arc::new(look);
        let text = meters.text().expect("it can be said");
        let series = |name: &str| text.lines().filter(|line| line.starts_with(&format!("{name}{{"))).count();
        assert_eq!(series("ledgerd_agent_depth"), (AGENTS + 1) * live.len());
        assert_eq!(series("ledgerd_agent_oldest_age_seconds"), AGENTS);
        assert_eq!(series("ledgerd_breaker_state"), BREAKERS * BreakerState::ALL.len());
        assert!(!text.contains("overflow"));
    }

    #[test]
    fn the_reference_is_as_the_code_says() {
        crate::reference::is_kept("metrics.md", &reference());
    }
}

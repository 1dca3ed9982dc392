//! Hears what the ledger did, and makes counts and spans of it, beside the ledger's own thread.

use super::Telemetry;
use super::meters::label;
use super::traces::creation;
use crate::ledger::observed::{Observed, Observer, Told, Transition};
use ledger_core::store::Reader;
use ledger_core::{ByTask, EventKind, State, TaskId};
use opentelemetry::KeyValue;
use opentelemetry::trace::SpanContext;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Tasks with workers whose origin is kept. Those of others are read again when their delivery ends.
const KEPT: usize = 100_000;

/// Where tasks that are with workers came from; none: their producers named no trace.
type Origins = ByTask<Option<SpanContext>>;

/// Observes until `over`, and then what was told until then.
pub(crate) async fn observe(
    telemetry: Arc<Telemetry>,
    observer: Observer,
    mut told: mpsc::Receiver<Told>,
    reader: Arc<dyn Reader>,
    backend: &'static str,
    over: CancellationToken,
) {
    let mut origins = Origins::default();
    let commit = [KeyValue::new("op", "commit"), KeyValue::new("backend", backend)];
    loop {
        let next = tokio::select! {
            biased;
            next = told.recv() => next,
            () = over.cancelled(), if !told.is_closed() => {
                told.close();
                continue;
            }
        };
        let Some(Told { seen, origins: new, took }) = next else { return };
        let meters = &telemetry.meters;
        meters.commit.record(took.as_secs_f64(), &commit);
        meters.dropped.transitions.store(observer.missed(), Ordering::Relaxed);
        if origins.len() + new.len() > KEPT {
            origins.clear();
        }
        origins.extend(new.into_iter().map(|(task, data)| (task, creation(&data))));
        for seen in seen {
            match seen {
                Observed::Task(seen) => {
                    count(&telemetry, &seen);
                    trace(&telemetry, &seen, &mut origins, &reader).await;
                }
                Observed::Breaker { agent, from, to, .. } => {
                    let labels =
                        [label("agent", &agent), KeyValue::new("from", from), KeyValue::new("to", to)];
                    meters.moved.add(1, &labels);
                }
            }
        }
    }
}

fn count(telemetry: &Telemetry, seen: &Transition) {
    let meters = &telemetry.meters;
    let agent = label("agent", &seen.agent);
    let took = seen.at.since(seen.since).as_secs_f64();
    let labels = |key: &'static str, value: &'static str| [agent.clone(), KeyValue::new(key, value)];
    match outcome(seen.kind) {
        _ if seen.kind == EventKind::Assigned => meters.wait.record(took, std::slice::from_ref(&agent)),
        Some(outcome) => meters.attempt.record(took, &labels("outcome", outcome)),
        None => {}
    }
    if seen.kind == EventKind::Lost {
        meters.expired.add(1, std::slice::from_ref(&agent));
    }
    if seen.to == State::Retry {
        let reason = match (seen.kind, seen.class) {
            (EventKind::Lost, _) => "LOST",
            (_, Some(class)) => class.as_str(),
            _ => "_OTHER",
        };
        meters.retries.add(1, &labels("reason", reason));
    }
    if seen.to == State::Failed && seen.from != Some(State::Failed) {
        meters.dead.add(1, &labels("reason", seen.reason.as_str()));
    }
}

/// How a delivery ended, as a label; none: it did not.
const fn outcome(kind: EventKind) -> Option<&'static str> {
    Some(match kind {
        EventKind::Completed => "completed",
        EventKind::Failed => "failed",
        EventKind::Blocked => "blocked",
        EventKind::Released => "released",
        EventKind::Stopped => "stopped",
        EventKind::Lost => "lost",
        EventKind::AckTimeout => "ack_timeout",
        EventKind::Abandoned => "abandoned",
        _ => return None,
    })
}

async fn trace(telemetry: &Telemetry, seen: &Transition, origins: &mut Origins, reader: &Arc<dyn Reader>) {
    let Some(traces) = &telemetry.traces else { return };
    if seen.kind == EventKind::Assigned {
        if let Some(Some(creation)) = origins.get(&seen.task) {
            traces.waited(seen, creation);
        }
    } else if outcome(seen.kind).is_some() {
        // A daemon that was started meanwhile did not hear of the assignment.
        let origin = match origins.remove(&seen.task) {
            Some(origin) => origin,
            None => read(reader, seen.task).await,
        };
        if let Some(creation) = origin {
            traces.attempted(seen, &creation);
        }
    }
}

async fn read(reader: &Arc<dyn Reader>, task: TaskId) -> Option<SpanContext> {
    match reader.for_workers(&[(task, false)]).await {
        Ok(found) => found.first().and_then(|(data, _)| creation(data)),
        Err(error) => {
            tracing::debug!(%task, %error, "where a task came from could not be read, so a span of it is missing");
            None
        }
    }
}

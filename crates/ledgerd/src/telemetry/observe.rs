//! Hears what the ledger did, and makes counts and spans of it, beside the ledger's own thread.

use super::Telemetry;
use super::meters::label;
use super::traces::{Delivery, creation};
use crate::ledger::Handle;
use crate::ledger::observed::{Observed, Observer, Told, Transition};
use ledger_core::store::TaskData;
use ledger_core::{AgentId, ById, ByTask, EventKind, State, TaskId};
use opentelemetry::KeyValue;
use opentelemetry::trace::SpanContext;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Tasks with workers whose origin is kept. Those of others are read again when their delivery ends.
const KEPT: usize = 100_000;

/// Where tasks that are with workers came from; none: their producers named no trace.
#[derive(Default)]
struct Origins {
    known: ByTask<Option<SpanContext>>,
    /// What was read last: tasks of one call came from one place.
    last: Option<(Arc<TaskData>, Option<SpanContext>)>,
}

impl Origins {
    fn learn(&mut self, new: Vec<(TaskId, Arc<TaskData>)>) {
        if self.known.len() + new.len() > KEPT {
            self.known.clear();
        }
        for (task, data) in new {
            let is_same = |last: &TaskData| {
                (&last.traceparent, &last.tracestate) == (&data.traceparent, &data.tracestate)
            };
            let origin = match &self.last {
                Some((last, origin)) if is_same(last) => origin.clone(),
                _ => {
                    let origin = creation(&data);
                    self.last = Some((data, origin.clone()));
                    origin
                }
            };
            self.known.insert(task, origin);
        }
    }

    /// Of the task of a delivery that begins or ends with this.
    async fn of(&mut self, seen: &Transition, handle: &Handle) -> Option<SpanContext> {
        if seen.kind == EventKind::Assigned {
            return self.known.get(&seen.task)?.clone();
        }
        outcome(seen.kind)?;
        // A daemon that was started meanwhile did not hear of the assignment.
        match self.known.remove(&seen.task) {
            Some(origin) => origin,
            None => read(handle, seen.task).await,
        }
    }
}

/// Observes until `over`, and then what was told until then.
pub(crate) async fn observe(
    telemetry: Arc<Telemetry>,
    observer: Observer,
    mut told: mpsc::Receiver<Told>,
    handle: Handle,
    backend: &'static str,
    over: CancellationToken,
) {
    let mut origins = Origins::default();
    let mut agents = Agents { handle, known: ById::default() };
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
        origins.learn(new);
        let mut deliveries = Vec::with_capacity(if telemetry.is_traced() { seen.len() } else { 0 });
        for seen in seen {
            match seen {
                Observed::Task(seen) => {
                    let labels = agents.known(seen.agent);
                    count(&telemetry, labels, &seen);
                    if telemetry.is_traced() {
                        let agent = Arc::clone(&labels.name);
                        let creation = origins.of(&seen, &agents.handle).await;
                        deliveries.extend(creation.map(|creation| Delivery { agent, seen, creation }));
                    }
                }
                Observed::Breaker { agent, from, to, .. } => {
                    let labels =
                        [label("agent", &agent), KeyValue::new("from", from), KeyValue::new("to", to)];
                    meters.moved.add(1, &labels);
                }
            }
        }
        if let Some(spans) = &telemetry.spans {
            spans.delivered(deliveries);
        }
    }
}

/// Labels of agents, made once for each: an agent may have a hundred thousand transitions a second.
struct Agents {
    handle: Handle,
    known: ById<AgentId, Labels>,
}

struct Labels {
    /// A copy, whose count the ledger's thread does not touch.
    name: Arc<str>,
    agent: KeyValue,
    /// With each outcome that there was.
    outcomes: Vec<(&'static str, [KeyValue; 2])>,
}

impl Agents {
    fn known(&mut self, id: AgentId) -> &mut Labels {
        let Self { handle, known } = self;
        known.entry(id).or_insert_with(|| {
            let name: Arc<str> =
                handle.agent_name(id).map_or_else(|| "_other".into(), |name| (&*name).into());
            Labels { agent: label("agent", &name), name, outcomes: Vec::new() }
        })
    }
}

impl Labels {
    fn with(&self, key: &'static str, value: &'static str) -> [KeyValue; 2] {
        [self.agent.clone(), KeyValue::new(key, value)]
    }

    fn outcome(&mut self, outcome: &'static str) -> &[KeyValue; 2] {
        let place = self.outcomes.iter().position(|(known, _)| *known == outcome);
        let place = place.unwrap_or_else(|| {
            self.outcomes.push((outcome, self.with("outcome", outcome)));
            self.outcomes.len() - 1
        });
        &self.outcomes[place].1
    }
}

fn count(telemetry: &Telemetry, labels: &mut Labels, seen: &Transition) {
    let meters = &telemetry.meters;
    let took = seen.at.since(seen.since).as_secs_f64();
    match outcome(seen.kind) {
        _ if seen.kind == EventKind::Assigned => {
            meters.wait.record(took, std::slice::from_ref(&labels.agent));
        }
        Some(outcome) => meters.attempt.record(took, labels.outcome(outcome)),
        None => {}
    }
    if seen.kind == EventKind::Lost {
        meters.expired.add(1, std::slice::from_ref(&labels.agent));
    }
    if seen.to == State::Retry {
        let reason = match (seen.kind, seen.class) {
            (EventKind::Lost, _) => "LOST",
            (_, Some(class)) => class.as_str(),
            _ => "_OTHER",
        };
        meters.retries.add(1, &labels.with("reason", reason));
    }
    if seen.to == State::Failed && seen.from != Some(State::Failed) {
        meters.dead.add(1, &labels.with("reason", seen.reason.as_str()));
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

async fn read(handle: &Handle, task: TaskId) -> Option<SpanContext> {
    match handle.reader().for_workers(&[(task, false)]).await {
        Ok(found) => found.first().and_then(|(data, _)| creation(data)),
        Err(error) => {
            tracing::debug!(%task, %error, "where a task came from could not be read, so a span of it is missing");
            None
        }
    }
}

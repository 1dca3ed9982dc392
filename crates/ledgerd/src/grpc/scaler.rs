//! KEDA's ExternalScaler: how many workers an agent's tasks are worth.
//!
//! A trigger's metadata names the agent. The metric `tasks` is what waits for a worker and what one has in hand. The second
//! matters: were it left out, a queue that is drained into busy workers would look empty, and they would be scaled away
//! with their tasks in hand. The metric `wait`, where the trigger has a `maxWait`, is how long the oldest task has waited,
//! once for each busy worker: the autoscaler divides by what one worker is for, and so gets the busy workers times by how
//! much the wait is too long. Figures come from the ledger, at most twice a second however many ask.

use super::access::Access;
use super::status::status;
use super::{Handle, convert};
use crate::callers::Permission;
use crate::lately::Lately;
use crate::ledger::command::{AgentView, LedgerError};
use futures_util::{Stream, StreamExt, stream};
use ledger_core::State;
use ledger_core::settings::Violation;
use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use wire::external_scaler_server::{ExternalScaler, ExternalScalerServer};

/// Generated from `proto/externalscaler`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub(super) mod wire {
    tonic::include_proto!("externalscaler");
}

/// Name of the metric that counts tasks.
const TASKS: &str = "tasks";
/// Name of the one that tells how long they wait, in seconds.
const WAIT: &str = "wait";
/// Figures are as old as this at most.
const FRESH: Duration = Duration::from_millis(500);
/// How often a stream looks whether something has changed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A request is a name and a few short texts.
const REQUEST_BYTES: usize = 64 << 10;

/// The service. Streams end when `stop` is cancelled.
pub(super) fn service(
    handle: &Handle,
    stop: &CancellationToken,
) -> ExternalScalerServer<impl ExternalScaler + use<>> {
    let depths = Depths { handle: handle.clone(), last: Lately::new(FRESH), ages: Lately::new(FRESH) };
    let depths = Arc::new(depths);
    ExternalScalerServer::new(Scaler { depths, stop: stop.clone() }).max_decoding_message_size(REQUEST_BYTES)
}

struct Scaler {
    depths: Arc<Depths>,
    stop: CancellationToken,
}

/// Tasks of one agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Depth {
    waiting: u64,
    running: u64,
    /// How long the oldest that is due has waited; known where a trigger asks for it.
    oldest: Duration,
}

impl Depth {
    /// What is BLOCKED waits for a breaker or a person, and no worker more would help; the same holds for a paused agent.
    fn of(agent: &AgentView) -> Self {
        let count = |state: State| agent.counts[usize::from(state.code())];
        let waiting = count(State::Queued) + count(State::Retry);
        let waiting = if agent.pause.is_some() { 0 } else { waiting };
        Self { waiting, running: count(State::Running), oldest: Duration::ZERO }
    }
}

/// Figures of all agents, asked for once for all who want them.
struct Depths {
    handle: Handle,
    last: Lately<HashMap<Arc<str>, Depth>>,
    ages: Lately<HashMap<Arc<str>, Duration>>,
}

impl Depths {
    /// Of a trigger's agent. One that is not known has no tasks yet.
    async fn of(&self, trigger: &Trigger) -> Result<Depth, LedgerError> {
        let agents = self.last.seen(async {
            let views = self.handle.agents().await?;
            Ok::<_, LedgerError>(views.iter().map(|view| (Arc::clone(&view.name), Depth::of(view))).collect())
        });
        let mut depth = agents.await?.get(&*trigger.agent).copied().unwrap_or_default();
        if trigger.max_wait.is_some() && depth.waiting > 0 {
            let ages = self.ages.seen(async {
                Ok::<_, LedgerError>(self.handle.oldest().await?.into_iter().collect::<HashMap<_, _>>())
            });
            depth.oldest = ages.await?.get(&*trigger.agent).copied().unwrap_or_default();
        }
        Ok(depth)
    }
}

/// What a trigger wants.
#[derive(Clone, Debug, PartialEq)]
struct Trigger {
    agent: String,
    target: f64,
    activation: f64,
    counts_running: bool,
    /// No task is to wait longer than this.
    max_wait: Option<Duration>,
}

impl Trigger {
    /// Keys that are not ours are left alone: KEDA sends its own along.
    fn read(said: &BTreeMap<String, String>) -> Result<Self, LedgerError> {
        let mut violations = Vec::new();
        let agent = said.get("agent").cloned().unwrap_or_default();
        if let Err(LedgerError::Invalid(found)) = convert::agent_name(&agent) {
            let rule = |violation: Violation| Violation::new(key("agent"), violation.rule);
            violations.extend(found.into_iter().map(rule));
        }
        let target = number(said, "targetPerReplica", 1.0, &mut violations);
        if target <= 0.0 {
            violations.push(Violation::new(key("targetPerReplica"), "write a number above 0"));
        }
        let activation = number(said, "activation", 0.0, &mut violations);
        let counts_running = match said.get("count").map(String::as_str) {
            None | Some("waiting+running") => true,
            Some("waiting") => false,
            Some(_) => {
                violations.push(Violation::new(key("count"), "write waiting or waiting+running"));
                true
            }
        };
        let max_wait = said.get("maxWait").and_then(|text| {
            let span = crate::config::span(text).filter(|span| !span.is_zero());
            if span.is_none() {
                violations
                    .push(Violation::new(key("maxWait"), "write a time above 0, for instance 30s or 5m"));
            }
            span
        });
        let trigger = Self { agent, target, activation, counts_running, max_wait };
        if violations.is_empty() { Ok(trigger) } else { Err(LedgerError::Invalid(violations)) }
    }

    const fn tasks(&self, depth: Depth) -> u64 {
        if self.counts_running { depth.waiting + depth.running } else { depth.waiting }
    }

    fn is_active(&self, depth: Depth) -> bool {
        // A task that has waited too long is worth a worker, be there ever so few.
        self.tasks(depth) as f64 > self.activation || self.max_wait.is_some_and(|most| depth.oldest > most)
    }

    /// Seconds that the oldest task has waited, for each worker that is busy: as many as there are tasks in hand for.
    /// Never for more workers than there are tasks; and where none is busy, the first one has yet to begin, and a second
    /// would not make it begin sooner.
    fn wait(&self, depth: Depth, most: Duration) -> f64 {
        let (oldest, most) = (depth.oldest.as_secs_f64(), most.as_secs_f64());
        if depth.running == 0 {
            return oldest.min(most);
        }
        let busy = (depth.running as f64 / self.target).max(1.0);
        (oldest * busy).min(most * (depth.waiting + depth.running) as f64)
    }

    fn spec(&self) -> wire::GetMetricSpecResponse {
        let spec = |name: &str, target: f64| wire::MetricSpec {
            metric_name: name.to_owned(),
            // Rounded up, as 0 would mean none to those who read no fractions.
            target_size: target.ceil() as i64,
            target_size_float: target,
        };
        let wait = self.max_wait.map(|most| spec(WAIT, most.as_secs_f64()));
        let metric_specs = [spec(TASKS, self.target)].into_iter().chain(wait).collect();
        wire::GetMetricSpecResponse { metric_specs }
    }

    /// The metric that is asked for: KEDA takes whatever it is given for that one.
    fn value(&self, name: &str, depth: Depth) -> wire::MetricValue {
        let (name, value) = match self.max_wait {
            Some(most) if name == WAIT => (WAIT, self.wait(depth, most)),
            _ => (TASKS, self.tasks(depth) as f64),
        };
        wire::MetricValue {
            metric_name: name.to_owned(),
            metric_value: value.ceil() as i64,
            metric_value_float: value,
        }
    }
}

/// Where a key stands in a request.
fn key(name: &str) -> String {
    format!("scalerMetadata.{name}")
}

/// A number that is at least 0.
fn number(said: &BTreeMap<String, String>, name: &str, default: f64, violations: &mut Vec<Violation>) -> f64 {
    let Some(text) = said.get(name) else { return default };
    match f64::from_str(text) {
        Ok(number) if number.is_finite() && number >= 0.0 => number,
        _ => {
            violations.push(Violation::new(key(name), "write a number that is not below 0"));
            default
        }
    }
}

/// What the trigger of a call wants, of an agent within the caller's reach.
fn trigger(access: &Access, of: &wire::ScaledObjectRef) -> Result<Trigger, Status> {
    let trigger = Trigger::read(&of.scaler_metadata).map_err(|error| status(&error))?;
    access.agent(&trigger.agent).map_err(|error| status(&error))?;
    Ok(trigger)
}

impl Scaler {
    /// A stream that ends with the daemon, or when its caller may not see the agent any more.
    fn ending<T: Send + 'static>(
        &self,
        answers: impl Stream<Item = Result<T, Status>> + Send + 'static,
        access: Access,
        agent: String,
    ) -> Answers<T> {
        let lost = async move { Err(access.lost(Permission::SeeFleet, &[agent.into()]).await) };
        // Whichever ends first ends it.
        let end = || stream::iter([None]);
        let answers = answers.map(Some).chain(end());
        let lost = stream::once(lost).map(Some).chain(end());
        let said = stream::select(answers, lost).take_while(|answer| std::future::ready(answer.is_some()));
        let answers = said.filter_map(std::future::ready);
        Box::pin(answers.take_until(self.stop.clone().cancelled_owned()))
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl ExternalScaler for Scaler {
    type StreamIsActiveStream = Answers<wire::IsActiveResponse>;
    type StreamMetricSpecStream = Answers<wire::GetMetricSpecResponse>;

    async fn is_active(
        &self,
        request: Request<wire::ScaledObjectRef>,
    ) -> Result<Response<wire::IsActiveResponse>, Status> {
        let access = Access::of(request.extensions())?;
        let trigger = trigger(&access, request.get_ref())?;
        let depth = self.depths.of(&trigger).await.map_err(|error| status(&error))?;
        Ok(Response::new(wire::IsActiveResponse { result: trigger.is_active(depth) }))
    }

    async fn stream_is_active(
        &self,
        request: Request<wire::ScaledObjectRef>,
    ) -> Result<Response<Self::StreamIsActiveStream>, Status> {
        let access = Access::of(request.extensions())?;
        let trigger = trigger(&access, request.get_ref())?;
        let depths = Arc::clone(&self.depths);
        let mut tick = interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let agent = trigger.agent.clone();
        let changes = stream::unfold((tick, None), move |(mut tick, last)| {
            let (depths, trigger) = (Arc::clone(&depths), trigger.clone());
            async move {
                loop {
                    tick.tick().await;
                    let active = match depths.of(&trigger).await {
                        Ok(depth) => trigger.is_active(depth),
                        // A full lane has room again soon.
                        Err(LedgerError::Exhausted { .. }) => continue,
                        Err(_) => return None,
                    };
                    if last != Some(active) {
                        let answer = wire::IsActiveResponse { result: active };
                        return Some((Ok(answer), (tick, Some(active))));
                    }
                }
            }
        });
        Ok(Response::new(self.ending(changes, access, agent)))
    }

    async fn get_metric_spec(
        &self,
        request: Request<wire::ScaledObjectRef>,
    ) -> Result<Response<wire::GetMetricSpecResponse>, Status> {
        Ok(Response::new(trigger(&Access::of(request.extensions())?, request.get_ref())?.spec()))
    }

    async fn get_metrics(
        &self,
        request: Request<wire::GetMetricsRequest>,
    ) -> Result<Response<wire::GetMetricsResponse>, Status> {
        let access = Access::of(request.extensions())?;
        let wire::GetMetricsRequest { scaled_object_ref, metric_name } = request.into_inner();
        let trigger = trigger(&access, &scaled_object_ref.unwrap_or_default())?;
        let depth = self.depths.of(&trigger).await.map_err(|error| status(&error))?;
        let value = trigger.value(&metric_name, depth);
        Ok(Response::new(wire::GetMetricsResponse { metric_values: vec![value] }))
    }

    /// What is wanted for one replica stands in the trigger, so it is said once, and the stream stays open: KEDA opens a
    /// new one when it ends.
    async fn stream_metric_spec(
        &self,
        request: Request<wire::ScaledObjectRef>,
    ) -> Result<Response<Self::StreamMetricSpecStream>, Status> {
        let access = Access::of(request.extensions())?;
        let trigger = trigger(&access, request.get_ref())?;
        let said = stream::iter([Ok(trigger.spec())]).chain(stream::pending());
        Ok(Response::new(self.ending(said, access, trigger.agent)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(said: &[(&str, &str)]) -> Result<Trigger, LedgerError> {
        Trigger::read(&said.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn a_trigger_needs_an_agent_and_keeps_busy_workers() {
        let trigger = read(&[("agent", "claude"), ("scalerAddress", "ledgerd:7420")]).expect("enough");
        let depth = |waiting, running| Depth { waiting, running, oldest: Duration::ZERO };
        assert!(!trigger.is_active(depth(0, 0)) && trigger.is_active(depth(0, 1)));
        assert_eq!(trigger.tasks(depth(3, 2)), 5);
        let given = [("agent", "a"), ("count", "waiting"), ("activation", "2"), ("targetPerReplica", "0.5")];
        let trigger = read(&given).expect("all keys");
        assert!(!trigger.is_active(depth(2, 9)) && trigger.is_active(depth(3, 0)));
        let spec = &trigger.spec().metric_specs[0];
        assert_eq!((spec.target_size, spec.target_size_float), (1, 0.5));
    }

    #[test]
    fn a_wait_that_is_too_long_is_worth_busy_workers_times_by_how_much() {
        let given = [("agent", "a"), ("targetPerReplica", "2"), ("activation", "5"), ("maxWait", "30s")];
        let trigger = read(&given).expect("all keys");
        let [tasks, wait] = &trigger.spec().metric_specs[..] else { panic!("there are two") };
        assert_eq!((&*tasks.metric_name, tasks.target_size_float), ("tasks", 2.0));
        assert_eq!((&*wait.metric_name, wait.target_size_float), ("wait", 30.0));
        let replicas = |waiting, running, oldest| {
            let depth = Depth { waiting, running, oldest: Duration::from_secs(oldest) };
            assert_eq!(trigger.value("tasks", depth).metric_value, waiting as i64 + running as i64);
            trigger.value("wait", depth).metric_value_float / 30.0
        };
        for (waiting, running, oldest, expected) in [
            (0, 4, 0, 0.0),
            (9, 4, 15, 1.0),  // two workers, half of the time: the count of tasks keeps them
            (9, 4, 90, 6.0),  // two workers, three times as long
            (1, 1, 90, 2.0),  // no more than there are tasks
            (9, 0, 300, 1.0), // the first has yet to begin
        ] {
            assert_eq!(replicas(waiting, running, oldest), expected, "{waiting} {running} {oldest}");
        }
        let few = |oldest| Depth { waiting: 1, running: 0, oldest: Duration::from_secs(oldest) };
        assert!(!trigger.is_active(few(30)) && trigger.is_active(few(31)));
    }

    #[test]
    fn bad_metadata_is_refused_by_key() {
        for (name, value) in [
            ("agent", "No Agent"),
            ("targetPerReplica", "0"),
            ("targetPerReplica", "-1"),
            ("targetPerReplica", "many"),
            ("activation", "NaN"),
            ("activation", "inf"),
            ("count", "leased"),
            ("maxWait", "0s"),
            ("maxWait", "30"),
        ] {
            let mut said = vec![("agent", "a")];
            said.retain(|(key, _)| *key != name);
            said.push((name, value));
            match read(&said) {
                Err(LedgerError::Invalid(found)) => {
                    assert!(found.iter().all(|one| one.field == key(name)), "{name}: {found:?}");
                }
                other => panic!("{name}={value}: {other:?}"),
            }
        }
        assert!(matches!(read(&[]), Err(LedgerError::Invalid(_))));
    }
}

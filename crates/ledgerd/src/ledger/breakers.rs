//! What breakers are told, how they move, and what operators order.
//!
//! Every move is an event of its agent, written in the batch that made it.

use super::batch::Batch;
use super::command::{Answer, BreakerOrder, LedgerError};
use super::observed::Observed;
use breaker_core::{Permit, Sample, State, Tally, Transition};
use ledger_core::store::{AgentEvent, AgentEventKind};
use ledger_core::{AgentId, Effects, Timestamp, Violation};
use std::sync::Arc;
use std::time::Duration;

/// Who ordered something, and why; both empty where nobody did.
#[derive(Clone, Copy)]
pub(super) struct By<'a> {
    pub(super) actor: &'a Arc<str>,
    pub(super) reason: &'a Arc<str>,
}

impl Batch<'_> {
    /// Tells a breaker how a permitted delivery ended, and notes what that changed.
    pub(super) fn tell_breaker(
        &mut self,
        id: AgentId,
        task_type: &Arc<str>,
        (permit, sample): (Permit, Sample),
        effects: &Effects,
        draw: u64,
    ) {
        let now = self.now.at.since_epoch();
        let Some(agent) = self.memory.agents.get_mut(&id) else { return };
        let hint = effects.hint.filter(|_| agent.settings.hint_opens && sample == Sample::Failure);
        let windowed = agent.settings.breaker.window.is_some();
        let breaker = &mut agent.breakers.of_mut(task_type).breaker;
        let before = (breaker.run(), breaker.successes(), breaker.probes_in_flight());
        let recorded = match (hint, effects.took) {
            (Some(until), _) => breaker.record_hint(permit, until.since_epoch(), now, draw),
            (None, Some(took)) => breaker.record_timed(permit, sample, took, now, draw),
            (None, None) => breaker.record(permit, sample, now, draw),
        };
        self.counted_failure |= sample == Sample::Failure && recorded.tally == Tally::Counted;
        let after = (breaker.run(), breaker.successes(), breaker.probes_in_flight());
        let key = agent.breakers.key(task_type);
        if recorded.would_open {
            tracing::warn!(agent = %agent.name, task_type = %key, "the breaker would have opened");
            self.happened(id, &key, AgentEventKind::WouldOpen, None, None);
        }
        if let Some(transition) = recorded.transition {
            self.breaker_moved(id, &key, transition, None);
        } else if before != after || (windowed && recorded.tally == Tally::Counted) {
            // A clean success in a closed breaker without a window changes nothing and writes nothing.
            self.breaker_changed(id, &key);
        } else if permit.probe {
            // It was no probe of this one.
            let left =
                self.memory.agents.get_mut(&id).and_then(|agent| agent.breakers.give_back(task_type, permit));
            self.breakers.extend(left.map(|left| (id, left)));
        }
    }

    /// Notes a move: an event, the row, and what was held back.
    pub(super) fn claim_moved(&mut self, id: AgentId, key: &Arc<str>, transition: Transition) {
        self.breaker_moved(id, key, transition, None);
    }

    fn breaker_moved(&mut self, id: AgentId, key: &Arc<str>, transition: Transition, by: Option<By<'_>>) {
        let Some(agent) = self.memory.agents.get(&id) else { return };
        let until = agent.breakers.of(key).and_then(|guard| guard.breaker.next_deadline());
        tracing::info!(
            agent = %agent.name,
            task_type = %key,
            from = %transition.from,
            to = %transition.to,
            cause = transition.cause.as_str(),
            epoch = transition.epoch,
            actor = by.map_or("", |by| by.actor),
            "breaker"
        );
        if self.memory.is_observed {
            self.said.observed.push(Observed::Breaker {
                agent: Arc::clone(&agent.name),
                task_type: Arc::clone(key),
                from: transition.from.as_str(),
                to: transition.to.as_str(),
            });
        }
        let until = until.map(Timestamp::from_epoch);
        self.happened(id, key, AgentEventKind::Breaker(transition), by, until);
        if !matches!(transition.to, State::Open | State::HalfOpen | State::ForcedOpen) {
            self.ungate.insert((id, Some(Arc::clone(key))));
        }
        self.breaker_changed(id, key);
    }

    /// Keeps what happened to an agent, or to its breaker for tasks of the type `key`.
    pub(super) fn happened(
        &mut self,
        id: AgentId,
        key: &Arc<str>,
        kind: AgentEventKind,
        by: Option<By<'_>>,
        until: Option<Timestamp>,
    ) {
        self.changes.events.push(AgentEvent {
            agent: id,
            task_type: Arc::clone(key),
            at: self.now.at,
            kind,
            actor: by.map_or_else(|| "".into(), |by| Arc::clone(by.actor)),
            reason: by.map_or_else(|| "".into(), |by| Arc::clone(by.reason)),
            until,
        });
    }

    /// Marks a breaker's row as changed, and whether time has to be watched for it.
    pub(super) fn breaker_changed(&mut self, id: AgentId, key: &Arc<str>) {
        self.look_after(id, key);
        if self.memory.agents.contains_key(&id) {
            self.breakers.insert((id, Arc::clone(key)));
        }
    }

    /// Notes whether time has to be watched for a breaker.
    pub(super) fn look_after(&mut self, id: AgentId, key: &Arc<str>) {
        let Some(agent) = self.memory.agents.get(&id) else { return };
        let restless = agent.breakers.of(key).is_some_and(ledger_core::Guard::is_restless);
        let place = (id, Arc::clone(key));
        if restless {
            self.memory.restless.insert(place);
        } else {
            self.memory.restless.remove(&place);
        }
    }

    /// Moves the breakers that time moves: the end of an order, of half-open, of a ramp.
    pub(super) fn tick_breakers(&mut self) {
        let now = self.now.at.since_epoch();
        for (id, key) in self.memory.restless.clone() {
            let draw = self.breaker_draw(id);
            let Some(agent) = self.memory.agents.get_mut(&id) else { continue };
            if !agent.settings.breaker_enabled {
                continue;
            }
            let guard = agent.breakers.of_mut(&key);
            let ramped = guard.breaker.ramp_until().is_some();
            let moved = guard.breaker.tick(now, draw);
            let ramp_over = ramped && guard.breaker.ramp_until().is_none();
            if let Some(transition) = moved {
                self.breaker_moved(id, &key, transition, None);
            } else if ramp_over {
                self.breaker_changed(id, &key);
            }
        }
    }

    fn breaker_draw(&self, id: AgentId) -> u64 {
        retry_core::draw(self.memory.seed, u64::from(id.0), self.memory.transitions)
    }

    /// Does what an operator ordered.
    pub(super) fn order_breaker(
        &mut self,
        name: &Arc<str>,
        task_type: &Arc<str>,
        order: &BreakerOrder,
        (actor, reason): (&Arc<str>, &Arc<str>),
    ) -> Result<Answer, LedgerError> {
        let id = self.known_agent(name)?;
        let draw = self.breaker_draw(id);
        let now = self.now.at.since_epoch();
        let Some(agent) = self.memory.agents.get_mut(&id) else { return Ok(Answer::Done) };
        let refuse = |field: &str, rule: &str| Err(LedgerError::Invalid(vec![Violation::new(field, rule)]));
        if !task_type.is_empty() && !agent.breakers.per_type() {
            return refuse("task_type", "leave it out: the agent has one breaker for all of its types");
        }
        if !task_type.is_empty() && agent.breakers.key(task_type).is_empty() {
            return refuse(
                "task_type",
                "leave it out: 1,000 types have a breaker, this one goes by the agent's",
            );
        }
        if !agent.settings.breaker_enabled && !matches!(order, BreakerOrder::Reset) {
            return refuse("agent", "switch its breaker on first: the agent goes by none");
        }
        let keys: Vec<Arc<str>> = match order {
            BreakerOrder::Reset if task_type.is_empty() => {
                agent.breakers.iter().map(|(key, _)| Arc::clone(key)).collect()
            }
            _ => vec![Arc::clone(task_type)],
        };
        let until = |span: &Option<Duration>| span.map(|span| now.saturating_add(span));
        let (who, why) = (&**actor, &**reason);
        let mut moved = Vec::new();
        for key in keys {
            let guard = agent.breakers.of_mut(&key);
            let breaker = &mut guard.breaker;
            let transition = match order {
                BreakerOrder::Trip(period) => Some(breaker.trip(*period, now, draw)),
                BreakerOrder::ForceOpen(span) => Some(breaker.force_open(who, why, until(span), now)),
                BreakerOrder::Disable(span) => Some(breaker.disable(who, why, until(span), now)),
                BreakerOrder::Observe(span) => Some(breaker.observe(who, why, until(span), now)),
                BreakerOrder::Auto => breaker.auto(now),
                BreakerOrder::Reset => {
                    guard.last_probe = None;
                    Some(breaker.reset(now))
                }
            };
            moved.extend(transition.map(|transition| (key, transition)));
        }
        for (key, transition) in moved {
            self.breaker_moved(id, &key, transition, Some(By { actor, reason }));
        }
        Ok(Answer::Done)
    }
}

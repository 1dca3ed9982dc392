//! The breakers of one agent: its own, or one for each of its task types.
//!
//! A type's breaker comes into being when its first task is handed out; nothing is stored of it before it differs from a
//! new one. An agent has at most [`AGENT_BREAKERS`] of them; further types share its own, whose type is the empty text.

use crate::id::{AgentId, TaskId};
use crate::limits::AGENT_BREAKERS;
use crate::store::BreakerRow;
use crate::time::Now;
use breaker_core::{Breaker, Config, Permit, State};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// A breaker with what the ledger counts beside it.
#[derive(Clone, Debug)]
pub struct Guard {
    /// Whether its tasks are tried at all.
    pub breaker: Breaker,
    /// Task that was its last probe: the next is another, so that one bad task cannot hold an agent down.
    pub last_probe: Option<TaskId>,
    /// Tasks that it holds back, BLOCKED.
    pub gated: u64,
    /// Its tasks that are RUNNING.
    pub running: u64,
}

impl Guard {
    fn new(config: Arc<Config>) -> Self {
        let breaker =
            Breaker::new(config).expect("settings are made by Settings::of, which validates the breaker's");
        Self { breaker, last_probe: None, gated: 0, running: 0 }
    }

    /// Whether it holds tasks back.
    fn is_shut(&self) -> bool {
        matches!(self.breaker.state(), State::Open | State::HalfOpen | State::ForcedOpen)
    }

    /// Whether time alone may change what it lets through.
    #[must_use]
    pub fn is_restless(&self) -> bool {
        self.breaker.state() != State::Closed || self.breaker.ramp_until().is_some()
    }

    /// When the ramp lets one more task run than now, `usual` being the number that runs when all is well; none unless
    /// as many run as it lets. On the breaker's clock.
    #[must_use]
    pub fn next_step(&self, usual: u32, now: Duration) -> Option<Duration> {
        let until = self.breaker.ramp_until()?;
        let limit = self.breaker.ramp_limit(usual, now);
        if u64::from(limit) > self.running || limit >= usual {
            return None;
        }
        let config = self.breaker.config();
        let share = (f64::from(limit) / f64::from(usual) - config.ramp_start) / (1.0 - config.ramp_start);
        let begun = until.saturating_sub(config.ramp_for);
        let step = begun.saturating_add(config.ramp_for.mul_f64(share.clamp(0.0, 1.0)));
        // Past the point where the limit is whole, or it would be the same again.
        Some(step.max(now).saturating_add(Duration::from_millis(1)))
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Breakers {
    own: Guard,
    types: BTreeMap<Arc<str>, Guard>,
    per_type: bool,
    /// All of them share it.
    config: Arc<Config>,
    own_key: Arc<str>,
}

impl Breakers {
    /// All closed.
    #[must_use]
    pub fn new(config: Config, per_type: bool) -> Self {
        let config = Arc::new(config);
        let own = Guard::new(Arc::clone(&config));
        Self { own, types: BTreeMap::new(), per_type, config, own_key: "".into() }
    }

    /// As stored.
    #[must_use]
    pub fn restore(rows: Vec<BreakerRow>, config: Config, per_type: bool, now: Now) -> Self {
        let mut all = Self::new(config, per_type);
        for row in rows {
            let mut guard = Guard::new(Arc::clone(&all.config));
            guard.last_probe = row.last_probe;
            if let Ok(breaker) = Breaker::restore(row.snapshot, Arc::clone(&all.config), now.at.since_epoch())
            {
                guard.breaker = breaker;
            }
            if row.task_type.is_empty() {
                all.own = guard;
            } else {
                all.types.insert(row.task_type, guard);
            }
        }
        all
    }

    /// Takes over what another daemon stored. Whether the breaker was shut before and is not any more: what it held back
    /// can go.
    pub fn follow(&mut self, row: BreakerRow, now: Now) -> bool {
        let config = Arc::clone(&self.config);
        let guard = match &*row.task_type {
            "" => &mut self.own,
            _ => self.types.entry(row.task_type).or_insert_with(|| Guard::new(Arc::clone(&config))),
        };
        let was_shut = guard.is_shut();
        guard.last_probe = row.last_probe;
        if let Ok(breaker) = Breaker::restore(row.snapshot, config, now.at.since_epoch()) {
            guard.breaker = breaker;
        }
        was_shut && !guard.is_shut()
    }

    /// How many tasks each holds back, by type; those that are not named hold back none.
    pub fn count_gated<'a>(&mut self, counts: impl IntoIterator<Item = (&'a Arc<str>, u64)>) {
        for guard in self.types.values_mut().chain([&mut self.own]) {
            guard.gated = 0;
        }
        for (task_type, n) in counts {
            self.of_mut(task_type).gated += n;
        }
    }

    /// New settings. Where breakers are no longer, or from now on, per task type, what was counted of gated and running
    /// tasks starts at nothing: gated ones are let go by the caller, and running ones end under the new order.
    pub fn configure(&mut self, config: Config, per_type: bool, now: Now) {
        self.config = Arc::new(config);
        for guard in self.types.values_mut().chain([&mut self.own]) {
            // Settings::of validated it: an error here could only be the same one again.
            let _ = guard.breaker.set_config(Arc::clone(&self.config), now.at.since_epoch());
            if self.per_type != per_type {
                guard.gated = 0;
                guard.running = 0;
            }
        }
        self.per_type = per_type;
    }

    /// Whether there is one for each task type.
    #[must_use]
    pub const fn per_type(&self) -> bool {
        self.per_type
    }

    /// Whether types that have none yet share the agent's own.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.types.len() >= AGENT_BREAKERS
    }

    /// The type whose breaker tasks of `task_type` go by; empty: the agent's own.
    #[must_use]
    pub fn key(&self, task_type: &Arc<str>) -> Arc<str> {
        let own =
            !self.per_type || task_type.is_empty() || (self.is_full() && !self.types.contains_key(task_type));
        Arc::clone(if own { &self.own_key } else { task_type })
    }

    /// What tasks of this type go by; none where nothing was handed out yet, so that it is as good as closed.
    #[must_use]
    pub fn of(&self, task_type: &str) -> Option<&Guard> {
        if !self.per_type || task_type.is_empty() {
            return Some(&self.own);
        }
        self.types.get(task_type).or_else(|| self.is_full().then_some(&self.own))
    }

    /// What tasks of this type go by, made if there is none.
    pub fn of_mut(&mut self, task_type: &Arc<str>) -> &mut Guard {
        if !self.per_type
            || task_type.is_empty()
            || (self.types.len() >= AGENT_BREAKERS && !self.types.contains_key(task_type))
        {
            return &mut self.own;
        }
        let config = &self.config;
        self.types.entry(Arc::clone(task_type)).or_insert_with(|| Guard::new(Arc::clone(config)))
    }

    /// Frees the slot of a probe whose task goes by another breaker than the one that let it through, since breakers became, or
    /// are no longer, per task type while it was tried. The type of that breaker; none where no other lacks it. What came of
    /// the probe decides nothing.
    pub fn give_back(&mut self, task_type: &Arc<str>, permit: Permit) -> Option<Arc<str>> {
        let left =
            if self.key(task_type).is_empty() { Arc::clone(task_type) } else { Arc::clone(&self.own_key) };
        let guard = if left.is_empty() { &mut self.own } else { self.types.get_mut(&left)? };
        let before = guard.breaker.probes_in_flight();
        guard.breaker.release(permit);
        (guard.breaker.probes_in_flight() < before).then_some(left)
    }

    /// Those in use: the agent's own first, then by type.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &Guard)> {
        let types = self.per_type.then_some(&self.types).into_iter().flatten();
        std::iter::once((&self.own_key, &self.own)).chain(types)
    }

    /// The row of one that is in use.
    #[must_use]
    pub fn row(&self, agent: AgentId, key: &Arc<str>) -> Option<BreakerRow> {
        let guard = if key.is_empty() { Some(&self.own) } else { self.types.get(key) };
        guard.map(|guard| BreakerRow {
            agent,
            task_type: Arc::clone(key),
            snapshot: guard.breaker.snapshot(),
            last_probe: guard.last_probe,
        })
    }

    /// Those that hold tasks back although they let through what comes, as when they were given other settings; `enabled`:
    /// whether they are asked at all.
    pub fn idle(&self, enabled: bool) -> impl Iterator<Item = &Arc<str>> {
        let idle = self.iter().filter(move |(_, guard)| guard.gated > 0 && !(enabled && guard.is_shut()));
        idle.map(|(key, _)| key)
    }

    /// Tasks that are held back, by any of them.
    #[must_use]
    pub fn gated(&self) -> u64 {
        self.iter().map(|(_, guard)| guard.gated).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Timestamp;

    fn now() -> Now {
        Now { at: Timestamp::from_millis(1_000_000), skew: 0 }
    }

    #[test]
    fn one_for_all_types_until_told_otherwise() {
        let config = Config { failure_threshold: 1, probe_timeout: None, ..Config::default() };
        let mut breakers = Breakers::new(config, false);
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        breakers.of_mut(&a).gated = 3;
        assert_eq!(breakers.of("b").map(|guard| guard.gated), Some(3));
        assert_eq!(&*breakers.key(&a), "");

        breakers.configure(config, true, now());
        assert_eq!(breakers.gated(), 0, "counted anew");
        assert!(breakers.of("a").is_none(), "nothing was handed out yet");
        breakers.of_mut(&a).gated = 2;
        assert_eq!(breakers.of("a").map(|guard| guard.gated), Some(2));
        assert!(breakers.of("b").is_none());
        assert_eq!((&*breakers.key(&a), &*breakers.key(&b)), ("a", "b"));
        assert_eq!(breakers.iter().map(|(key, _)| &**key).collect::<Vec<_>>(), ["", "a"]);
    }

    #[test]
    fn a_probe_of_a_breaker_that_went_out_of_use_gives_its_slot_back() {
        let config = Config { probe_timeout: None, ..Config::default() };
        let mut breakers = Breakers::new(config, false);
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let at = now().at.since_epoch();
        let probe = |breakers: &mut Breakers, task_type: &Arc<str>| {
            let breaker = &mut breakers.of_mut(task_type).breaker;
            breaker.trip(Some(Duration::ZERO), at, 0);
            breaker.try_acquire(at).expect("a probe")
        };
        let of_all = probe(&mut breakers, &a);
        assert!(of_all.probe);
        breakers.configure(config, true, now());
        assert_eq!(breakers.give_back(&a, of_all).as_deref(), Some(""));
        assert_eq!(breakers.give_back(&a, of_all), None, "it has it no more");
        assert_eq!(breakers.of("").map(|own| own.breaker.probes_in_flight()), Some(0));

        let of_type = probe(&mut breakers, &b);
        assert_eq!(breakers.give_back(&a, of_type), None, "another type's");
        breakers.configure(config, false, now());
        assert_eq!(breakers.give_back(&b, of_type).as_deref(), Some("b"));
        assert_eq!(breakers.give_back(&b, of_type), None);
    }

    #[test]
    fn types_beyond_the_limit_share_the_agents_own() {
        let mut breakers = Breakers::new(Config { probe_timeout: None, ..Config::default() }, true);
        for number in 0..AGENT_BREAKERS {
            breakers.of_mut(&format!("t{number}").into());
        }
        let more: Arc<str> = "more".into();
        breakers.of_mut(&more).gated = 1;
        assert_eq!(&*breakers.key(&more), "");
        assert_eq!(breakers.of("more").map(|guard| guard.gated), Some(1));
        assert_eq!(breakers.of("t5").map(|guard| guard.gated), Some(0), "those that have one keep it");
        assert_eq!(breakers.iter().count(), AGENT_BREAKERS + 1);
    }
}

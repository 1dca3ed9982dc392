//! An agent: the routing key, and what belongs to it: settings, breaker, retry budget.

use crate::breakers::Breakers;
use crate::id::AgentId;
use crate::settings::{AgentOverrides, Settings, Violation};
use crate::store::{AgentRow, BreakerRow, BudgetRow, Counts, Pause};
use crate::task::State;
use crate::time::{Now, Timestamp};
use retry_core::{Bucket, Level, Limits};
use std::sync::Arc;

/// An agent in memory. Its rows are written in the batch that changes them.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Its number.
    pub id: AgentId,
    /// Its name.
    pub name: Arc<str>,
    /// When it was first seen.
    pub created_at: Timestamp,
    /// What its tasks go by.
    pub settings: Arc<Settings>,
    /// What it goes by where nothing was set for it.
    defaults: Arc<AgentOverrides>,
    /// Whether its workers are tried at all.
    pub breakers: Breakers,
    /// What its retries are paid from.
    pub budget: Bucket,
    /// What it is granted of its own budget while the shared one is empty: its floor, and nothing saved up. Not stored;
    /// it starts empty after a restart, so that restarts mint nothing.
    floor: Bucket,
    /// Daemons that share what its budget allows.
    share: u32,
    /// Tasks by state.
    pub counts: Counts,
    /// Why nothing is handed out.
    pub pause: Option<Pause>,
}

/// Whether a name can be an agent's: `[a-z0-9][a-z0-9._-]{0,62}`.
#[must_use]
pub fn is_agent_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = name.as_bytes();
    bytes.first().is_some_and(|first| plain(*first))
        && bytes.len() <= crate::limits::AGENT_BYTES
        && bytes.iter().all(|byte| plain(*byte) || matches!(byte, b'.' | b'_' | b'-'))
}

impl Agent {
    /// A new agent that goes by these defaults, with a closed breaker and a full budget.
    #[must_use]
    pub fn new(id: AgentId, name: Arc<str>, defaults: Arc<AgentOverrides>, now: Now) -> Self {
        let settings = effective(&defaults, AgentOverrides::default());
        Self {
            id,
            name,
            created_at: now.at,
            breakers: Breakers::new(settings.breaker, settings.per_task_type),
            budget: Bucket::full(limits(&settings, 1), now.at.since_epoch()),
            floor: empty_floor(&settings, 1, now),
            share: 1,
            settings: Arc::new(settings),
            defaults,
            counts: Counts::default(),
            pause: None,
        }
    }

    /// An agent as its rows say, that goes by these defaults otherwise. Settings that a newer rule refuses fall back to defaults.
    #[must_use]
    pub fn restore(
        row: AgentRow,
        defaults: Arc<AgentOverrides>,
        breakers: Vec<BreakerRow>,
        budget: Option<BudgetRow>,
        counts: Counts,
        now: Now,
    ) -> Self {
        let settings = effective(&defaults, row.given);
        let new = Self::new(row.id, row.name, defaults, now);
        let mut agent = Self { created_at: row.created_at, pause: row.pause, ..new };
        agent.breakers = Breakers::restore(breakers, settings.breaker, settings.per_task_type, now);
        agent.floor = empty_floor(&settings, 1, now);
        agent.settings = Arc::new(settings);
        agent.set_budget(budget, now);
        agent.counts = counts;
        agent
    }

    /// Changes what `change` sets.
    ///
    /// # Errors
    /// Everything that breaks a rule; nothing changed.
    pub fn configure(&mut self, change: AgentOverrides, now: Now) -> Result<(), Vec<Violation>> {
        let settings = Settings::over(&self.defaults, change.or(self.settings.given))?;
        self.go_by(settings, now);
        Ok(())
    }

    /// Goes by these where nothing was set for it.
    pub fn default_to(&mut self, defaults: Arc<AgentOverrides>, now: Now) {
        self.defaults = defaults;
        self.go_by(effective(&self.defaults, self.settings.given), now);
    }

    /// Why it does without the defaults, or without what was set for it: the two do not go together.
    #[must_use]
    pub fn refuses_defaults(&self) -> Option<Vec<Violation>> {
        Settings::over(&self.defaults, self.settings.given).err()
    }

    fn go_by(&mut self, settings: Settings, now: Now) {
        self.breakers.configure(settings.breaker, settings.per_task_type, now);
        self.settings = Arc::new(settings);
        self.share(self.share, now);
    }

    /// Divides what its budget allows among so many daemons, of which each has a budget of its own.
    pub fn share(&mut self, daemons: u32, now: Now) {
        self.share = daemons;
        let limits = limits(&self.settings, daemons);
        self.budget.resize(limits, now.at.since_epoch());
        self.floor.resize(limits.floor_only(DEAREST), now.at.since_epoch());
    }

    /// What its budget holds, as stored; none: it was not used so far.
    pub fn set_budget(&mut self, row: Option<BudgetRow>, now: Now) {
        let limits = limits(&self.settings, self.share);
        self.budget = match row {
            Some(row) => Bucket::restore(limits, row.level),
            None => Bucket::full(limits, now.at.since_epoch()),
        };
    }

    /// Takes over what another daemon stored: settings, and why nothing is handed out.
    pub fn follow(&mut self, row: AgentRow, now: Now) {
        self.pause = row.pause;
        self.go_by(effective(&self.defaults, row.given), now);
    }

    /// Whether a retry can be paid now: from its own budget, and from the shared one or, while that is empty, from its
    /// floor. An empty shared budget delays an agent, but never below its own floor.
    #[must_use]
    pub fn affords(&self, shared: &Bucket, now: Now, tokens: u32) -> bool {
        let (at, price) = (now.at.since_epoch(), u64::from(tokens) * 1_000);
        self.budget.available(at) >= price
            && (shared.available(at) >= price || self.floor.available(at) >= price)
    }

    /// Pays a retry. False, and nothing taken, when it [cannot be afforded](Self::affords).
    pub fn pay(&mut self, shared: &mut Bucket, now: Now, tokens: u32) -> bool {
        let at = now.at.since_epoch();
        retry_core::reserve_with_floor(&mut self.budget, shared, &mut self.floor, at, tokens).is_ok()
    }

    /// When time alone will have made it affordable; none when only successes can.
    #[must_use]
    pub fn affordable_at(&self, shared: &Bucket, now: Now, tokens: u32) -> Option<Timestamp> {
        let at = now.at.since_epoch();
        let own = self.budget.next_at(at, tokens)?;
        let other = match (shared.next_at(at, tokens), self.floor.next_at(at, tokens)) {
            (Some(shared), Some(floor)) => shared.min(floor),
            (shared, floor) => shared.or(floor)?,
        };
        Some(Timestamp::from_epoch(own.max(other)))
    }

    /// Tasks that wait: QUEUED, RETRY, BLOCKED.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        [State::Queued, State::Retry, State::Blocked]
            .iter()
            .map(|state| self.counts[usize::from(state.code())])
            .sum()
    }

    /// Its row.
    #[must_use]
    pub fn row(&self) -> AgentRow {
        AgentRow {
            id: self.id,
            name: Arc::clone(&self.name),
            given: self.settings.given,
            created_at: self.created_at,
            pause: self.pause.clone(),
        }
    }

    /// Its budget's row.
    #[must_use]
    pub fn budget_row(&self) -> BudgetRow {
        BudgetRow { agent: Some(self.id), level: self.budget.level() }
    }
}

/// Tokens that the dearest retry costs.
pub const DEAREST: u32 = 2;

/// What was set for an agent, over the defaults where the two go together. What cannot be used is kept all the same: other
/// defaults, or another version, may have a use for it.
fn effective(defaults: &AgentOverrides, own: AgentOverrides) -> Settings {
    let alone = |_| Settings::of(own);
    Settings::over(defaults, own)
        .or_else(alone)
        .unwrap_or_else(|_| Settings { given: own, ..Settings::default() })
}

fn empty_floor(settings: &Settings, daemons: u32, now: Now) -> Bucket {
    let updated_at = u64::try_from(now.at.millis()).unwrap_or(0);
    Bucket::restore(limits(settings, daemons).floor_only(DEAREST), Level { millitokens: 0, updated_at })
}

fn limits(settings: &Settings, daemons: u32) -> Limits {
    settings.budget.build().unwrap_or_default().shared_by(daemons, DEAREST)
}

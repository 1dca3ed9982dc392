//! What an agent's tasks go by, and what one task has set otherwise.
//!
//! A task stores only what it overrides; the effective value is the agent's at the moment of decision.

use retry_core::Jitter;
use std::time::Duration;

/// One value that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The field, as it is spelled on the wire, with its path.
    pub field: String,
    /// What would be right.
    pub rule: String,
}

impl Violation {
    /// A violation of `rule` by `field`.
    pub fn new(field: impl Into<String>, rule: impl Into<String>) -> Self {
        Self { field: field.into(), rule: rule.into() }
    }
}

/// Settings of one task; none where the agent's hold.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Overrides {
    /// Failures that may lead to another attempt, 0..=1,000.
    pub max_retries: Option<u32>,
    /// First retry delay.
    pub base_delay: Option<Duration>,
    /// Factor between delays.
    pub exponential_base: Option<f64>,
    /// Longest retry delay.
    pub max_delay: Option<Duration>,
    /// Spread of delays.
    pub jitter: Option<Jitter>,
    /// Time to acknowledge.
    pub ack_timeout: Option<Duration>,
    /// Time without a beat after which an acknowledged task is lost.
    pub lease_duration: Option<Duration>,
    /// Longest run of an attempt.
    pub attempt_timeout: Option<Duration>,
    /// Longest time without progress while beats come.
    pub stall_timeout: Option<Duration>,
    /// Longest wait for the first ack.
    pub queue_timeout: Option<Duration>,
    /// Time to end after a stop.
    pub stop_grace: Option<Duration>,
    /// Losses after which it fails, 1..=1,000.
    pub max_losses: Option<u32>,
    /// Longest hint of the other side that is honoured, up to 24 h.
    pub hint_max: Option<Duration>,
}

/// The bounds of the timeouts: name, shortest, longest.
const BOUNDS: [(&str, Duration, Duration); 6] = {
    const DAY: Duration = Duration::from_secs(24 * 3_600);
    const YEAR: Duration = Duration::from_secs(366 * 24 * 3_600);
    [
        ("ack_timeout", Duration::from_millis(100), Duration::from_secs(3_600)),
        ("lease_duration", Duration::from_secs(1), DAY),
        ("attempt_timeout", Duration::from_secs(1), YEAR),
        ("stall_timeout", Duration::from_secs(1), YEAR),
        ("queue_timeout", Duration::from_secs(1), YEAR),
        ("stop_grace", Duration::ZERO, DAY),
    ]
};

impl Overrides {
    /// Nothing set.
    pub const NONE: Self = Self {
        max_retries: None,
        base_delay: None,
        exponential_base: None,
        max_delay: None,
        jitter: None,
        ack_timeout: None,
        lease_duration: None,
        attempt_timeout: None,
        stall_timeout: None,
        queue_timeout: None,
        stop_grace: None,
        max_losses: None,
        hint_max: None,
    };

    /// Whether the retry policy differs from the agent's.
    #[must_use]
    pub const fn changes_retry(&self) -> bool {
        self.max_retries.is_some()
            || self.base_delay.is_some()
            || self.exponential_base.is_some()
            || self.max_delay.is_some()
            || self.jitter.is_some()
            || self.max_losses.is_some()
            || self.hint_max.is_some()
    }

    /// These where set, `other` elsewhere.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            max_retries: self.max_retries.or(other.max_retries),
            base_delay: self.base_delay.or(other.base_delay),
            exponential_base: self.exponential_base.or(other.exponential_base),
            max_delay: self.max_delay.or(other.max_delay),
            jitter: self.jitter.or(other.jitter),
            ack_timeout: self.ack_timeout.or(other.ack_timeout),
            lease_duration: self.lease_duration.or(other.lease_duration),
            attempt_timeout: self.attempt_timeout.or(other.attempt_timeout),
            stall_timeout: self.stall_timeout.or(other.stall_timeout),
            queue_timeout: self.queue_timeout.or(other.queue_timeout),
            stop_grace: self.stop_grace.or(other.stop_grace),
            max_losses: self.max_losses.or(other.max_losses),
            hint_max: self.hint_max.or(other.hint_max),
        }
    }

    /// Adds what breaks a rule to `found`, with `path` before the field names. The combination with an agent's
    /// settings is looked at when it is used: see [`Settings::retry_for`].
    pub fn check(&self, path: &str, found: &mut Vec<Violation>) {
        let values = [
            self.ack_timeout,
            self.lease_duration,
            self.attempt_timeout,
            self.stall_timeout,
            self.queue_timeout,
            self.stop_grace,
        ];
        for ((name, least, most), value) in BOUNDS.iter().zip(values) {
            if value.is_some_and(|value| value < *least || value > *most) {
                found.push(Violation::new(
                    format!("{path}{name}"),
                    format!("set it to {least:?} to {most:?}"),
                ));
            }
        }
        let config = self.retry_config(&retry_core::Config {
            // Unset sides of a pair take a value that any valid other side goes with.
            max_delay: if self.base_delay.is_some() {
                Duration::from_secs(7 * 24 * 3_600)
            } else {
                Duration::from_secs(30)
            },
            base_delay: if self.max_delay.is_some() { Duration::ZERO } else { Duration::from_millis(100) },
            ..retry_core::Config::default()
        });
        if let Err(errors) = config.validate() {
            self.name_retry_errors(&errors, path, found);
        }
    }

    /// Adds what retry-core found, in the words of the wire and each field once.
    fn name_retry_errors(&self, errors: &retry_core::ConfigErrors, path: &str, found: &mut Vec<Violation>) {
        for error in errors.errors() {
            let field = match error.field {
                "jitter" => "jitter_ratio",
                // Not given, so it can only be wrong beside a first delay that was named already.
                "max_delay" if self.max_delay.is_none() && names(found, path, "base_delay") => continue,
                field => field,
            };
            if !names(found, path, field) {
                found.push(Violation::new(format!("{path}{field}"), format!("set it to {}", error.rule)));
            }
        }
    }

    fn retry_config(&self, agent: &retry_core::Config) -> retry_core::Config {
        retry_core::Config {
            max_retries: self.max_retries.unwrap_or(agent.max_retries),
            base_delay: self.base_delay.unwrap_or(agent.base_delay),
            exponential_base: self.exponential_base.unwrap_or(agent.exponential_base),
            max_delay: self.max_delay.unwrap_or(agent.max_delay),
            jitter: self.jitter.unwrap_or(agent.jitter),
            max_losses: self.max_losses.unwrap_or(agent.max_losses),
            hint_max: self.hint_max.unwrap_or(agent.hint_max),
            ..*agent
        }
    }
}

fn names(found: &[Violation], path: &str, field: &str) -> bool {
    found.iter().any(|known| known.field.strip_prefix(path) == Some(field))
}

/// What one agent's breaker and budget are set to; none where the default holds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AgentOverrides {
    /// Retry policy and timeouts of its tasks.
    pub policy: Overrides,
    /// Failures in a row that open the breaker.
    pub failure_threshold: Option<u32>,
    /// Probe successes that close it.
    pub success_threshold: Option<u32>,
    /// How long it stays open.
    pub open_timeout: Option<Duration>,
    /// Probes at one time.
    pub half_open_permits: Option<u32>,
    /// Whether there is a breaker at all.
    pub breaker_enabled: Option<bool>,
    /// One breaker per task type instead of one per agent.
    pub per_task_type: Option<bool>,
    /// Factor between open periods.
    pub open_multiplier: Option<f64>,
    /// Longest open period.
    pub open_max: Option<Duration>,
    /// Share by which an open period may be longer.
    pub open_jitter: Option<f64>,
    /// Longest half-open without a verdict; zero: no limit.
    pub half_open_max: Option<Duration>,
    /// What rates are judged over; the inner none takes a window away.
    pub window: Option<Option<breaker_core::Window>>,
    /// Share of failures that opens it.
    pub failure_rate: Option<f64>,
    /// From which length an attempt is slow; zero: none is.
    pub slow_after: Option<Duration>,
    /// Share of slow attempts that opens it.
    pub slow_rate: Option<f64>,
    /// How long running tasks take to grow to the usual number after closing.
    pub ramp_for: Option<Duration>,
    /// With which share of it that begins.
    pub ramp_start: Option<f64>,
    /// A failure with a hint opens it until then.
    pub hint_opens: Option<bool>,
    /// Tokens the retry budget can hold.
    pub budget_capacity: Option<f64>,
    /// Tokens that come by themselves each second.
    pub budget_floor: Option<f64>,
    /// Tokens that each success adds.
    pub budget_deposit: Option<f64>,
    /// Whether retries need a token.
    pub budget_enabled: Option<bool>,
    /// Tasks that may wait.
    pub max_waiting: Option<u64>,
}

impl AgentOverrides {
    /// These where set, `other` elsewhere.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            policy: self.policy.or(other.policy),
            failure_threshold: self.failure_threshold.or(other.failure_threshold),
            success_threshold: self.success_threshold.or(other.success_threshold),
            open_timeout: self.open_timeout.or(other.open_timeout),
            half_open_permits: self.half_open_permits.or(other.half_open_permits),
            breaker_enabled: self.breaker_enabled.or(other.breaker_enabled),
            per_task_type: self.per_task_type.or(other.per_task_type),
            open_multiplier: self.open_multiplier.or(other.open_multiplier),
            open_max: self.open_max.or(other.open_max),
            open_jitter: self.open_jitter.or(other.open_jitter),
            half_open_max: self.half_open_max.or(other.half_open_max),
            window: self.window.or(other.window),
            failure_rate: self.failure_rate.or(other.failure_rate),
            slow_after: self.slow_after.or(other.slow_after),
            slow_rate: self.slow_rate.or(other.slow_rate),
            ramp_for: self.ramp_for.or(other.ramp_for),
            ramp_start: self.ramp_start.or(other.ramp_start),
            hint_opens: self.hint_opens.or(other.hint_opens),
            budget_capacity: self.budget_capacity.or(other.budget_capacity),
            budget_floor: self.budget_floor.or(other.budget_floor),
            budget_deposit: self.budget_deposit.or(other.budget_deposit),
            budget_enabled: self.budget_enabled.or(other.budget_enabled),
            max_waiting: self.max_waiting.or(other.max_waiting),
        }
    }
}

/// Effective settings of an agent, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// What was set for this agent; the rest below are defaults.
    pub given: AgentOverrides,
    /// When to try again.
    pub retry: retry_core::Policy,
    /// Default 10 s.
    pub ack_timeout: Duration,
    /// Default 60 s.
    pub lease_duration: Duration,
    /// Default 30 min.
    pub attempt_timeout: Duration,
    /// Default none.
    pub stall_timeout: Option<Duration>,
    /// Default none.
    pub queue_timeout: Option<Duration>,
    /// Default 30 s.
    pub stop_grace: Duration,
    /// The breaker's.
    pub breaker: breaker_core::Config,
    /// Whether the breaker is asked.
    pub breaker_enabled: bool,
    /// One breaker per task type instead of one per agent.
    pub per_task_type: bool,
    /// A failure with a hint opens the breaker until then.
    pub hint_opens: bool,
    /// The budget's.
    pub budget: retry_core::BucketConfig,
    /// Whether the budget is asked.
    pub budget_enabled: bool,
    /// Default 10,000,000.
    pub max_waiting: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            given: AgentOverrides::default(),
            retry: retry_core::Policy::default(),
            ack_timeout: Duration::from_secs(10),
            lease_duration: Duration::from_secs(60),
            attempt_timeout: Duration::from_secs(30 * 60),
            stall_timeout: None,
            queue_timeout: None,
            stop_grace: Duration::from_secs(30),
            // A probe that runs for a minute passes, and one that is lost fails: half-open needs no limit of its own.
            breaker: breaker_core::Config {
                half_open_permits: 2,
                half_open_max: None,
                // The leases of tasks are the leases of probes.
                probe_timeout: None,
                ramp_for: Duration::from_secs(10),
                ..breaker_core::Config::default()
            },
            breaker_enabled: true,
            per_task_type: false,
            hint_opens: false,
            budget: retry_core::BucketConfig::default(),
            budget_enabled: true,
            max_waiting: 10_000_000,
        }
    }
}

impl Settings {
    /// The effective settings of an agent for which `given` was set.
    ///
    /// # Errors
    /// Everything in it that breaks a rule, at once.
    pub fn of(given: AgentOverrides) -> Result<Self, Vec<Violation>> {
        Self::over(&AgentOverrides::default(), given)
    }

    /// The effective settings of an agent for which `own` was set, where `defaults` hold for the rest.
    ///
    /// # Errors
    /// Everything in the two together that breaks a rule, at once.
    pub fn over(defaults: &AgentOverrides, own: AgentOverrides) -> Result<Self, Vec<Violation>> {
        let given = own.or(*defaults);
        let default = Self::default();
        let mut found = Vec::new();
        given.policy.check("settings.policy.", &mut found);
        let breaker = breaker_core::Config {
            failure_threshold: given.failure_threshold.unwrap_or(default.breaker.failure_threshold),
            success_threshold: given.success_threshold.unwrap_or(default.breaker.success_threshold),
            open_timeout: given.open_timeout.unwrap_or(default.breaker.open_timeout),
            // A longer period than the default limit raises the limit: the user said how long.
            open_max: given
                .open_max
                .unwrap_or_else(|| default.breaker.open_max.max(given.open_timeout.unwrap_or_default())),
            open_multiplier: given.open_multiplier.unwrap_or(default.breaker.open_multiplier),
            open_jitter: given.open_jitter.unwrap_or(default.breaker.open_jitter),
            half_open_max: given.half_open_max.filter(|max| !max.is_zero()),
            window: given.window.unwrap_or(default.breaker.window),
            failure_rate: given.failure_rate.unwrap_or(default.breaker.failure_rate),
            slow_after: given.slow_after.filter(|after| !after.is_zero()),
            slow_rate: given.slow_rate.unwrap_or(default.breaker.slow_rate),
            ramp_for: given.ramp_for.unwrap_or(default.breaker.ramp_for),
            ramp_start: given.ramp_start.unwrap_or(default.breaker.ramp_start),
            half_open_permits: given.half_open_permits.unwrap_or(default.breaker.half_open_permits),
            ..default.breaker
        };
        if let Err(errors) = breaker.validate() {
            for error in errors.iter() {
                let field = match error.field {
                    "open_max" if given.open_max.is_none() => "open_timeout",
                    field => field,
                };
                found.push(Violation::new(
                    format!("settings.breaker.{field}"),
                    format!("set it to {}", error.rule),
                ));
            }
        }
        let capacity = given.budget_capacity.unwrap_or_else(|| f64::from(default.budget.capacity));
        if !(1.0..=1_000_000.0).contains(&capacity) || capacity.fract() != 0.0 {
            found
                .push(Violation::new("settings.budget.capacity", "set it to a whole number, 1 to 1,000,000"));
        }
        let budget = retry_core::BucketConfig {
            capacity: capacity as u32,
            floor: given.budget_floor.unwrap_or(default.budget.floor),
            deposit: given.budget_deposit.unwrap_or(default.budget.deposit),
        };
        if let Err(errors) = budget.build() {
            for error in errors.errors().iter().filter(|error| error.field != "capacity") {
                let field = if error.field == "floor" { "floor_per_second" } else { error.field };
                found.push(Violation::new(
                    format!("settings.budget.{field}"),
                    format!("set it to {}", error.rule),
                ));
            }
        }
        let max_waiting = given.max_waiting.unwrap_or(default.max_waiting);
        if !(1..=100_000_000).contains(&max_waiting) {
            found.push(Violation::new("settings.max_waiting", "set it to 1 to 100,000,000"));
        }
        let retry = given.policy.retry_config(default.retry.config()).build();
        match retry {
            Ok(retry) if found.is_empty() => Ok(Self {
                given: own,
                retry,
                ack_timeout: given.policy.ack_timeout.unwrap_or(default.ack_timeout),
                lease_duration: given.policy.lease_duration.unwrap_or(default.lease_duration),
                attempt_timeout: given.policy.attempt_timeout.unwrap_or(default.attempt_timeout),
                stall_timeout: given.policy.stall_timeout,
                queue_timeout: given.policy.queue_timeout,
                stop_grace: given.policy.stop_grace.unwrap_or(default.stop_grace),
                breaker,
                breaker_enabled: given.breaker_enabled.unwrap_or(true),
                per_task_type: given.per_task_type.unwrap_or(false),
                hint_opens: given.hint_opens.unwrap_or(false),
                budget,
                budget_enabled: given.budget_enabled.unwrap_or(true),
                max_waiting,
            }),
            Ok(_) => Err(found),
            Err(errors) => {
                given.policy.name_retry_errors(&errors, "settings.policy.", &mut found);
                Err(found)
            }
        }
    }

    /// All that makes time do something to a task.
    #[must_use]
    pub const fn times(&self) -> [Option<Duration>; 6] {
        [
            Some(self.ack_timeout),
            Some(self.lease_duration),
            Some(self.attempt_timeout),
            self.stall_timeout,
            self.queue_timeout,
            Some(self.stop_grace),
        ]
    }

    /// The retry policy of a task with these overrides: the agent's own where nothing differs.
    #[must_use]
    pub fn retry_for(&self, overrides: &Overrides) -> std::borrow::Cow<'_, retry_core::Policy> {
        use std::borrow::Cow;
        if !overrides.changes_retry() {
            return Cow::Borrowed(&self.retry);
        }
        let mut config = overrides.retry_config(self.retry.config());
        // Each side was valid by itself; where a task's cap lies below its agent's base, the task's word counts.
        if config.max_delay < config.base_delay {
            if overrides.max_delay.is_some() {
                config.base_delay = config.max_delay;
            } else {
                config.max_delay = config.base_delay;
            }
        }
        config.build().map_or(Cow::Borrowed(&self.retry), Cow::Owned)
    }

    /// Time that a task has to be acknowledged.
    #[must_use]
    pub fn ack_timeout(&self, overrides: &Overrides) -> Duration {
        overrides.ack_timeout.unwrap_or(self.ack_timeout)
    }

    /// Time that an acknowledged task may be without a beat.
    #[must_use]
    pub fn lease_duration(&self, overrides: &Overrides) -> Duration {
        overrides.lease_duration.unwrap_or(self.lease_duration)
    }

    /// Longest run of an attempt.
    #[must_use]
    pub fn attempt_timeout(&self, overrides: &Overrides) -> Duration {
        overrides.attempt_timeout.unwrap_or(self.attempt_timeout)
    }

    /// Longest time without progress.
    #[must_use]
    pub fn stall_timeout(&self, overrides: &Overrides) -> Option<Duration> {
        overrides.stall_timeout.or(self.stall_timeout)
    }

    /// Longest wait for the first ack.
    #[must_use]
    pub fn queue_timeout(&self, overrides: &Overrides) -> Option<Duration> {
        overrides.queue_timeout.or(self.queue_timeout)
    }

    /// Time to end after a stop.
    #[must_use]
    pub fn stop_grace(&self, overrides: &Overrides) -> Duration {
        overrides.stop_grace.unwrap_or(self.stop_grace)
    }
}

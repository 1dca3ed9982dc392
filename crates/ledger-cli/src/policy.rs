//! Settings that a task and an agent share, as flags and on the wire.

use std::str::FromStr;
use std::time::Duration;

use ledgerd_client::v1::{JitterKind, TaskPolicy};
use serde::Deserialize;

use crate::time::{duration_to_wire, parse_duration};

/// A duration as an argument and as a field of a task file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Span(pub(crate) Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse_duration(text).map(Self)
    }
}

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl Span {
    fn wire(span: Option<Self>) -> Option<prost_types::Duration> {
        span.map(|Self(duration)| duration_to_wire(duration))
    }
}

/// How retry delays are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Jitter {
    /// Exact delays.
    None,
    /// Plus or minus the jitter ratio.
    Proportional,
    /// From 0 to the delay.
    Full,
    /// Half of the delay, plus 0 to the other half.
    Equal,
    /// From the base delay to three times the previous one.
    Decorrelated,
}

/// Retry policy and timeouts. What is not given stays the agent's.
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
#[command(next_help_heading = "Retry policy and timeouts")]
pub(crate) struct PolicyArgs {
    /// Failures that may lead to another attempt
    #[arg(long, value_name = "N")]
    pub(crate) max_retries: Option<i32>,
    /// First retry delay
    #[arg(long, value_name = "DUR")]
    pub(crate) base_delay: Option<Span>,
    /// Factor between consecutive delays
    #[arg(long, value_name = "X")]
    pub(crate) exponential_base: Option<f64>,
    /// Longest retry delay
    #[arg(long, value_name = "DUR")]
    pub(crate) max_delay: Option<Span>,
    /// How delays are spread
    #[arg(long, value_enum)]
    pub(crate) jitter: Option<Jitter>,
    /// Spread of proportional jitter, 0 to 1
    #[arg(long, value_name = "X")]
    pub(crate) jitter_ratio: Option<f64>,
    /// Time a worker has to acknowledge
    #[arg(long, value_name = "DUR")]
    pub(crate) ack_timeout: Option<Span>,
    /// Time without a beat after which a running task is lost
    #[arg(long, value_name = "DUR")]
    pub(crate) lease: Option<Span>,
    /// Longest run of one attempt
    #[arg(long, value_name = "DUR")]
    pub(crate) attempt_timeout: Option<Span>,
    /// Longest time without progress
    #[arg(long, value_name = "DUR")]
    pub(crate) stall_timeout: Option<Span>,
    /// Longest wait for a worker
    #[arg(long, value_name = "DUR")]
    pub(crate) queue_timeout: Option<Span>,
    /// Time a worker has to end a task after a stop
    #[arg(long, value_name = "DUR")]
    pub(crate) stop_grace: Option<Span>,
    /// Losses after which the task fails as POISON
    #[arg(long, value_name = "N")]
    pub(crate) max_losses: Option<i32>,
    /// Longest retry_after of a failure that is honoured; a longer one is cut to it
    #[arg(long, value_name = "DUR")]
    pub(crate) hint_max: Option<Span>,
}

impl PolicyArgs {
    /// The message; none when nothing was given.
    pub(crate) fn into_wire(self) -> Option<TaskPolicy> {
        let policy = TaskPolicy {
            max_retries: self.max_retries,
            base_delay: Span::wire(self.base_delay),
            exponential_base: self.exponential_base,
            max_delay: Span::wire(self.max_delay),
            jitter: self.jitter.map_or(JitterKind::Unspecified, JitterKind::from).into(),
            jitter_ratio: self.jitter_ratio,
            ack_timeout: Span::wire(self.ack_timeout),
            lease_duration: Span::wire(self.lease),
            attempt_timeout: Span::wire(self.attempt_timeout),
            stall_timeout: Span::wire(self.stall_timeout),
            queue_timeout: Span::wire(self.queue_timeout),
            stop_grace: Span::wire(self.stop_grace),
            max_losses: self.max_losses,
            hint_max: Span::wire(self.hint_max),
        };
        (policy != TaskPolicy::default()).then_some(policy)
    }
}

impl From<Jitter> for JitterKind {
    fn from(jitter: Jitter) -> Self {
        match jitter {
            Jitter::None => Self::None,
            Jitter::Proportional => Self::Proportional,
            Jitter::Full => Self::Full,
            Jitter::Equal => Self::Equal,
            Jitter::Decorrelated => Self::Decorrelated,
        }
    }
}

/// `key=value`.
pub(crate) fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err(format!("`{text}` is no label; write key=value")),
    }
}

/// Settings of a policy as `name  value` lines.
pub(crate) fn describe(policy: &TaskPolicy, facts: &mut crate::output::Facts) {
    use crate::output::span;
    let number = |value: Option<String>| value.unwrap_or_default();
    facts.push("max retries", number(policy.max_retries.map(|n| n.to_string())));
    facts.push("base delay", span(policy.base_delay.as_ref()));
    facts.push("exponential base", number(policy.exponential_base.map(|n| n.to_string())));
    facts.push("max delay", span(policy.max_delay.as_ref()));
    if let Ok(jitter) = JitterKind::try_from(policy.jitter)
        && jitter != JitterKind::Unspecified
    {
        facts.push("jitter", jitter.as_str_name().trim_start_matches("JITTER_KIND_").to_lowercase());
    }
    facts.push("jitter ratio", number(policy.jitter_ratio.map(|n| n.to_string())));
    facts.push("ack timeout", span(policy.ack_timeout.as_ref()));
    facts.push("lease", span(policy.lease_duration.as_ref()));
    facts.push("attempt timeout", span(policy.attempt_timeout.as_ref()));
    facts.push("stall timeout", span(policy.stall_timeout.as_ref()));
    facts.push("queue timeout", span(policy.queue_timeout.as_ref()));
    facts.push("stop grace", span(policy.stop_grace.as_ref()));
    facts.push("max losses", number(policy.max_losses.map(|n| n.to_string())));
    facts.push("longest hint", span(policy.hint_max.as_ref()));
}

//! `ledgerd breaker`: circuit breakers of agents.

use clap::{Args, Subcommand, ValueEnum};
use comfy_table::{Cell, Color};
use ledgerd_client::Client;
use ledgerd_client::v1::breaker_settings::Window;
use ledgerd_client::v1::{
    Breaker, BreakerSettings, BreakerState, ForceBreakerRequest, GetBreakerRequest, ListBreakersRequest,
    ListBreakersResponse, ResetBreakerRequest, TripBreakerRequest, TripBreakerResponse,
};

use crate::Global;
use crate::actor::Actor;
use crate::connect::connect;
use crate::failure::Failure;
use crate::output::{Facts, Format, Rows, cell, instant, one_line, print, print_json, span};
use crate::policy::Span;
use crate::time::duration_to_wire;

/// Commands on circuit breakers.
#[derive(Debug, Subcommand)]
pub enum BreakerCommand {
    /// List breakers by agent and task type
    List,
    /// Show one breaker
    Show(Which),
    /// Open a breaker as if it had failed; after its period it probes as usual
    Trip(Trip),
    /// Hold a breaker open, let everything through, or only observe
    Force(Force),
    /// Close a breaker, end an order, and set its counts to zero
    Reset(Reset),
}

/// Names a breaker.
#[derive(Debug, Args)]
pub struct Which {
    /// Name of the agent
    #[arg(value_name = "AGENT")]
    agent: String,
    /// Task type, where the agent has a breaker for each; else its own
    #[arg(long = "type", value_name = "TYPE", default_value = "")]
    task_type: String,
}

/// `breaker trip`.
#[derive(Debug, Args)]
pub struct Trip {
    #[command(flatten)]
    which: Which,
    /// Why, for the audit trail
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// How long, 10ms to 24h; else its usual period
    #[arg(long = "for", value_name = "DUR")]
    duration: Option<Span>,
    #[command(flatten)]
    actor: Actor,
}

/// What a breaker is forced to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Forced {
    /// Refuse everything.
    Open,
    /// Let everything through and count nothing.
    Closed,
    /// Let everything through and tell when it would have opened.
    Observe,
    /// End the order.
    Auto,
}

/// `breaker force`.
#[derive(Debug, Args)]
pub struct Force {
    #[command(flatten)]
    which: Which,
    /// What it is held at
    #[arg(value_enum, value_name = "STATE")]
    state: Forced,
    /// Why, for the audit trail
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// It ends by itself after this time, 1s to 366d; else when told otherwise
    #[arg(long = "for", value_name = "DUR")]
    duration: Option<Span>,
    #[command(flatten)]
    actor: Actor,
}

/// `breaker reset`. Without a type all breakers of the agent.
#[derive(Debug, Args)]
pub struct Reset {
    #[command(flatten)]
    which: Which,
    /// Why, for the audit trail
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    #[command(flatten)]
    actor: Actor,
}

impl BreakerCommand {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        let client = connect(global).await?;
        let (name, breaker) = match self {
            Self::List => return list(&client, global).await,
            Self::Show(Which { agent, task_type }) => {
                let request = GetBreakerRequest { agent, task_type };
                let response = client.admin().get_breaker(request).await?.into_inner();
                if global.output == Format::Json {
                    return print_json("GetBreakerResponse", &response);
                }
                return print(&describe(&response.breaker.unwrap_or_default()));
            }
            Self::Trip(Trip { which: Which { agent, task_type }, reason, duration, actor }) => {
                let duration = duration.map(|span| duration_to_wire(span.0));
                let request = TripBreakerRequest { agent, task_type, duration, actor: actor.name(), reason };
                let response = client.admin().trip_breaker(request).await?.into_inner();
                ("TripBreakerResponse", response.breaker)
            }
            Self::Force(Force { which: Which { agent, task_type }, state, reason, duration, actor }) => {
                let state = match state {
                    Forced::Open => BreakerState::ForcedOpen,
                    Forced::Closed => BreakerState::Disabled,
                    Forced::Observe => BreakerState::Observe,
                    Forced::Auto => BreakerState::Closed,
                };
                let request = ForceBreakerRequest {
                    agent,
                    task_type,
                    state: state.into(),
                    duration: duration.map(|span| duration_to_wire(span.0)),
                    actor: actor.name(),
                    reason,
                };
                let response = client.admin().force_breaker(request).await?.into_inner();
                ("ForceBreakerResponse", response.breaker)
            }
            Self::Reset(Reset { which: Which { agent, task_type }, reason, actor }) => {
                let request = ResetBreakerRequest { agent, task_type, actor: actor.name(), reason };
                let response = client.admin().reset_breaker(request).await?.into_inner();
                ("ResetBreakerResponse", response.breaker)
            }
        };
        match global.output {
            // All three answers have the breaker alone.
            Format::Json => print_json(name, &TripBreakerResponse { breaker }),
            Format::Table => print(&describe(&breaker.unwrap_or_default())),
        }
    }
}

async fn list(client: &Client, global: &Global) -> Result<(), Failure> {
    let mut merged = ListBreakersResponse::default();
    let mut request = ListBreakersRequest::default();
    loop {
        let page = client.admin().list_breakers(request.clone()).await?.into_inner();
        merged.breakers.extend(page.breakers);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    match global.output {
        Format::Json => print_json("ListBreakersResponse", &merged),
        Format::Table => rows(&merged.breakers).print("no breakers"),
    }
}

/// The name of a state.
pub(crate) fn state_name(state: i32) -> &'static str {
    let name = BreakerState::try_from(state).unwrap_or(BreakerState::Unspecified).as_str_name();
    name.strip_prefix("BREAKER_STATE_").unwrap_or(name)
}

/// A cell for the state of a breaker.
pub(crate) fn breaker_cell(state: i32) -> Cell {
    let text = cell(state_name(state));
    match BreakerState::try_from(state) {
        Ok(BreakerState::Open | BreakerState::ForcedOpen) => text.fg(Color::Red),
        Ok(BreakerState::HalfOpen | BreakerState::Disabled | BreakerState::Observe) => text.fg(Color::Yellow),
        _ => text,
    }
}

fn rows(breakers: &[Breaker]) -> Rows {
    let mut rows = Rows::new([
        "AGENT",
        "TYPE",
        "STATE",
        "FAILURES",
        "SUCCESSES",
        "PROBES",
        "BLOCKED",
        "REOPENS",
        "OPEN UNTIL",
    ]);
    for breaker in breakers {
        rows.push([
            cell(&breaker.agent),
            cell(&breaker.task_type),
            breaker_cell(breaker.state),
            cell(breaker.failure_run),
            cell(breaker.successes),
            cell(breaker.probes),
            cell(breaker.blocked),
            cell(breaker.reopens),
            cell(instant(breaker.open_until.as_ref())),
        ]);
    }
    rows
}

fn describe(breaker: &Breaker) -> String {
    let mut facts = Facts::default();
    facts.push("agent", &breaker.agent);
    if !breaker.task_type.is_empty() {
        facts.push("task type", &breaker.task_type);
    }
    facts.push("state", state_name(breaker.state));
    if let Some(order) = &breaker.order {
        facts.push("ordered by", one_line(&order.actor));
        facts.push("because", one_line(&order.reason));
        let until = order.until.as_ref().map_or_else(|| "told otherwise".into(), |at| instant(Some(at)));
        facts.push("ordered until", until);
    }
    if let Some(wait) = &breaker.retry_after {
        facts.push("next task in", span(Some(wait)));
    }
    facts.push("failures in a row", breaker.failure_run);
    facts.push("probe successes", breaker.successes);
    facts.push("probes running", breaker.probes);
    facts.push("tasks blocked", breaker.blocked);
    facts.push("reopens", breaker.reopens);
    facts.push("open until", instant(breaker.open_until.as_ref()));
    if breaker.half_open_until.is_some() {
        facts.push("half-open until", instant(breaker.half_open_until.as_ref()));
    }
    if breaker.ramp_until.is_some() {
        facts.push("ramps up until", instant(breaker.ramp_until.as_ref()));
        facts.push("share that may run", format!("{:.0} %", breaker.ramp_share * 100.0));
    }
    if breaker.window_calls > 0 {
        let (calls, failed, slow) = (breaker.window_calls, breaker.window_failures, breaker.window_slow);
        facts.push("window", format!("{calls} calls, {failed} failed, {slow} slow"));
    }
    facts.push("epoch", breaker.epoch);
    if let Some(settings) = &breaker.settings {
        describe_settings(settings, &mut facts);
    }
    facts.render()
}

/// Settings of a breaker as `name  value` lines.
pub(crate) fn describe_settings(settings: &BreakerSettings, facts: &mut Facts) {
    fn text(value: Option<impl ToString>) -> String {
        value.map(|value| value.to_string()).unwrap_or_default()
    }
    facts.push("breaker enabled", text(settings.enabled));
    facts.push("one per task type", text(settings.per_task_type));
    facts.push("failure threshold", text(settings.failure_threshold));
    facts.push("success threshold", text(settings.success_threshold));
    facts.push("open timeout", span(settings.open_timeout.as_ref()));
    facts.push("open multiplier", text(settings.open_multiplier));
    facts.push("open max", span(settings.open_max.as_ref()));
    facts.push("open jitter", text(settings.open_jitter));
    facts.push("half-open permits", text(settings.half_open_permits));
    // Zero is the wire's word for none, and facts without a value are not shown.
    let longest = settings.half_open_max.as_ref().filter(|max| (max.seconds, max.nanos) != (0, 0));
    facts.push("half-open max", span(longest));
    match &settings.window {
        Some(Window::CountWindow(window)) => {
            facts.push("judged over", format!("{} calls, from {} on", window.size, window.min_calls));
        }
        Some(Window::TimeWindow(window)) => {
            let bucket = span(window.bucket.as_ref());
            facts.push("judged over", format!("10 x {bucket}, from {} calls on", window.min_calls));
        }
        _ => {}
    }
    if matches!(&settings.window, Some(Window::CountWindow(_) | Window::TimeWindow(_))) {
        facts.push("failure rate", text(settings.failure_rate));
        facts.push("slow after", span(settings.slow_after.as_ref()));
        facts.push("slow rate", text(settings.slow_rate));
    }
    facts.push("ramps up for", span(settings.ramp_for.as_ref()));
    facts.push("ramp start", text(settings.ramp_start));
    facts.push("hints open it", text(settings.hint_opens));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breakers_read_as_rows_and_lines() {
        let breaker =
            Breaker { agent: "codex".into(), state: 2, failure_run: 5, blocked: 4, ..Breaker::default() };
        assert_eq!(
            rows(std::slice::from_ref(&breaker)).render(),
            "AGENT  TYPE  STATE  FAILURES  SUCCESSES  PROBES  BLOCKED  REOPENS  OPEN UNTIL\n\
             codex        OPEN   5         0          0       4        0\n"
        );
        assert!(describe(&breaker).starts_with("agent              codex\nstate              OPEN\n"));
    }
}

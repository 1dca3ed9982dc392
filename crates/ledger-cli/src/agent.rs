//! `ledgerd agent`: classes of workers and their settings.

use clap::{Args, Subcommand, ValueEnum};
use ledgerd_client::v1::breaker_settings::Window;
use ledgerd_client::v1::{
    Agent, AgentEvent, AgentSettings, BreakerSettings, BudgetSettings, ConfigureAgentRequest, CountWindow,
    GetAgentRequest, ListAgentEventsRequest, ListAgentEventsResponse, ListAgentsRequest, ListAgentsResponse,
    NoWindow, PauseAgentRequest, ResumeAgentRequest, StateCount, TaskState, TimeWindow,
};

use crate::Global;
use crate::actor::Actor;
use crate::breaker::{breaker_cell, describe_settings, state_name};
use crate::connect::connect;
use crate::failure::Failure;
use crate::output::{
    Facts, Format, Rows, cell, instant, one_line, print, print_json, task_state, with_reason,
};
use crate::policy::{self, PolicyArgs, Span};
use crate::time::duration_to_wire;

/// Commands on agents.
#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// List agents by name
    List,
    /// Show one agent with its settings
    Show(Named),
    /// Create an agent or change the given settings of one
    Configure(Box<Configure>),
    /// Hand out none of an agent's tasks; what runs goes on
    Pause(Pause),
    /// End a pause
    Resume(Resume),
    /// Show what happened to agents and their breakers, newest first
    Events(Events),
}

/// `agent events`.
#[derive(Debug, Args)]
pub struct Events {
    /// Name of the agent; else all of them
    #[arg(value_name = "AGENT", default_value = "")]
    agent: String,
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 50)]
    limit: usize,
}

/// `agent pause`.
#[derive(Debug, Args)]
pub struct Pause {
    /// Name of the agent
    #[arg(value_name = "AGENT")]
    agent: String,
    /// Why, for who finds it paused, at most 1 KiB
    #[arg(long)]
    reason: String,
    /// It ends by itself after this time, 1 s to 366 days; else with `agent resume`
    #[arg(long = "for", value_name = "DUR")]
    duration: Option<Span>,
    #[command(flatten)]
    actor: Actor,
}

/// `agent resume`.
#[derive(Debug, Args)]
pub struct Resume {
    /// Name of the agent
    #[arg(value_name = "AGENT")]
    agent: String,
    /// Why, for the audit trail
    #[arg(long, default_value = "")]
    reason: String,
    #[command(flatten)]
    actor: Actor,
}

/// Names an agent.
#[derive(Debug, Args)]
pub struct Named {
    /// Name of the agent
    #[arg(value_name = "AGENT")]
    pub(crate) agent: String,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// `agent configure`. What is not given stays as it is.
#[derive(Debug, Args)]
pub struct Configure {
    /// Name of the agent
    #[arg(value_name = "AGENT")]
    agent: String,
    /// Tasks that may wait; enqueue is refused beyond it
    #[arg(long, value_name = "N")]
    max_waiting: Option<u64>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    breaker: BreakerArgs,
    #[command(flatten)]
    budget: BudgetArgs,
    /// Why, for the audit trail
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    #[command(flatten)]
    actor: Actor,
}

#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Circuit breaker")]
struct BreakerArgs {
    /// Whether the agent has a breaker
    #[arg(long, value_enum)]
    breaker: Option<Switch>,
    /// Failures in a row that open it
    #[arg(long, value_name = "N")]
    failure_threshold: Option<u32>,
    /// Probe successes that close it
    #[arg(long, value_name = "N")]
    success_threshold: Option<u32>,
    /// How long it stays open
    #[arg(long, value_name = "DUR")]
    open_timeout: Option<Span>,
    /// Probes at one time
    #[arg(long, value_name = "N")]
    half_open_permits: Option<u32>,
    /// One breaker per task type instead of one for all
    #[arg(long, value_enum)]
    per_task_type: Option<Switch>,
    /// Each failed half-open period lengthens the next open one by this factor, 1 to 10
    #[arg(long, value_name = "X")]
    open_multiplier: Option<f64>,
    /// Longest open period
    #[arg(long, value_name = "DUR")]
    open_max: Option<Span>,
    /// Open periods are longer by up to this share, 0 to 1
    #[arg(long, value_name = "X")]
    open_jitter: Option<f64>,
    /// Half-open without a verdict for so long opens again; 0s: never
    #[arg(long, value_name = "DUR")]
    half_open_max: Option<Span>,
    /// Judge rates over the last SIZE calls, or over ten BUCKETs of time, from MIN calls on: count:SIZE:MIN,
    /// time:BUCKET:MIN, or none
    #[arg(long, value_name = "WINDOW", value_parser = window)]
    window: Option<Window>,
    /// Share of failures in the window that opens it
    #[arg(long, value_name = "X")]
    failure_rate: Option<f64>,
    /// Attempts of this length are slow; 0s: none
    #[arg(long, value_name = "DUR")]
    slow_after: Option<Span>,
    /// Share of slow attempts in the window that opens it
    #[arg(long, value_name = "X")]
    slow_rate: Option<f64>,
    /// After closing, running tasks grow to the usual number over this time; 0s: at once
    #[arg(long, value_name = "DUR")]
    ramp_for: Option<Span>,
    /// Share of the usual number with which that begins
    #[arg(long, value_name = "X")]
    ramp_start: Option<f64>,
    /// Whether a failure with retry_after opens it until then
    #[arg(long, value_enum)]
    hint_opens: Option<Switch>,
}

/// `count:SIZE:MIN`, `time:BUCKET:MIN` or `none`.
fn window(text: &str) -> Result<Window, String> {
    let number = |text: &str| text.parse::<u32>().map_err(|_| format!("{text:?} is no number of calls"));
    match text.split(':').collect::<Vec<_>>()[..] {
        ["none"] => Ok(Window::NoWindow(NoWindow {})),
        ["count", size, min] => {
            Ok(Window::CountWindow(CountWindow { size: number(size)?, min_calls: number(min)? }))
        }
        ["time", bucket, min] => {
            let bucket: Span = bucket.parse()?;
            let bucket = Some(duration_to_wire(bucket.0));
            Ok(Window::TimeWindow(TimeWindow { bucket, min_calls: number(min)? }))
        }
        _ => {
            Err("write count:SIZE:MIN, time:BUCKET:MIN or none, for instance count:100:20 or time:6s:20"
                .into())
        }
    }
}

#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Retry budget")]
struct BudgetArgs {
    /// Whether retries of the agent need a token
    #[arg(long, value_enum)]
    budget: Option<Switch>,
    /// Tokens it can hold
    #[arg(long, value_name = "X")]
    budget_capacity: Option<f64>,
    /// Tokens that come by themselves each second
    #[arg(long, value_name = "X")]
    budget_floor: Option<f64>,
    /// Tokens that each success adds
    #[arg(long, value_name = "X")]
    budget_deposit: Option<f64>,
}

impl AgentCommand {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        match self {
            Self::List => list(global).await,
            Self::Show(named) => {
                let request = GetAgentRequest { agent: named.agent };
                let response = connect(global).await?.admin().get_agent(request).await?.into_inner();
                match global.output {
                    Format::Json => print_json("GetAgentResponse", &response),
                    Format::Table => print(&describe(&response.agent.unwrap_or_default())),
                }
            }
            Self::Pause(command) => {
                let request = PauseAgentRequest {
                    agent: command.agent,
                    reason: command.reason,
                    actor: command.actor.name(),
                    duration: command.duration.map(|span| duration_to_wire(span.0)),
                };
                let response = connect(global).await?.admin().pause_agent(request).await?.into_inner();
                match global.output {
                    Format::Json => print_json("PauseAgentResponse", &response),
                    Format::Table => print(&describe(&response.agent.unwrap_or_default())),
                }
            }
            Self::Resume(command) => {
                let (agent, reason, actor) = (command.agent, command.reason, command.actor.name());
                let request = ResumeAgentRequest { agent, reason, actor };
                let response = connect(global).await?.admin().resume_agent(request).await?.into_inner();
                match global.output {
                    Format::Json => print_json("ResumeAgentResponse", &response),
                    Format::Table => print(&describe(&response.agent.unwrap_or_default())),
                }
            }
            Self::Events(command) => events(command, global).await,
            Self::Configure(command) => {
                let request = command.into_request();
                let response = connect(global).await?.admin().configure_agent(request).await?.into_inner();
                match global.output {
                    Format::Json => print_json("ConfigureAgentResponse", &response),
                    Format::Table => print(&describe(&response.agent.unwrap_or_default())),
                }
            }
        }
    }
}

async fn list(global: &Global) -> Result<(), Failure> {
    let client = connect(global).await?;
    let mut merged = ListAgentsResponse::default();
    let mut request = ListAgentsRequest::default();
    loop {
        let page = client.admin().list_agents(request.clone()).await?.into_inner();
        merged.agents.extend(page.agents);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    match global.output {
        Format::Json => print_json("ListAgentsResponse", &merged),
        Format::Table => rows(&merged.agents).print("no agents"),
    }
}

async fn events(command: Events, global: &Global) -> Result<(), Failure> {
    let client = connect(global).await?;
    let mut merged = ListAgentEventsResponse::default();
    let mut request = ListAgentEventsRequest { agent: command.agent, ..ListAgentEventsRequest::default() };
    while merged.events.len() < command.limit {
        request.page_size = (command.limit - merged.events.len()).min(1_000) as i32;
        let page = client.admin().list_agent_events(request.clone()).await?.into_inner();
        merged.events.extend(page.events);
        merged.next_page_token.clone_from(&page.next_page_token);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    match global.output {
        Format::Json => print_json("ListAgentEventsResponse", &merged),
        Format::Table => event_rows(&merged.events).print("no events"),
    }
}

fn event_rows(events: &[AgentEvent]) -> Rows {
    let mut rows = Rows::new(["TIME", "AGENT", "TYPE", "EVENT", "WHAT", "BY", "REASON", "UNTIL"]);
    for event in events {
        let moved = match (event.from, event.to) {
            (0, 0) => String::new(),
            (from, to) => format!("{} -> {} ({})", state_name(from), state_name(to), event.cause),
        };
        rows.push([
            cell(instant(event.time.as_ref())),
            cell(&event.agent),
            cell(&event.task_type),
            cell(&event.event),
            cell(moved),
            cell(one_line(&event.actor)),
            cell(one_line(&event.reason)),
            cell(instant(event.until.as_ref())),
        ]);
    }
    rows
}

impl Configure {
    fn into_request(self) -> ConfigureAgentRequest {
        let Self { agent, max_waiting, policy, breaker, budget, actor, reason } = self;
        let is_on = |switch: Option<Switch>| switch.map(|switch| switch == Switch::On);
        let breaker = BreakerSettings {
            failure_threshold: breaker.failure_threshold,
            success_threshold: breaker.success_threshold,
            open_timeout: breaker.open_timeout.map(|span| duration_to_wire(span.0)),
            half_open_permits: breaker.half_open_permits,
            enabled: is_on(breaker.breaker),
            per_task_type: is_on(breaker.per_task_type),
            open_multiplier: breaker.open_multiplier,
            open_max: breaker.open_max.map(|span| duration_to_wire(span.0)),
            open_jitter: breaker.open_jitter,
            half_open_max: breaker.half_open_max.map(|span| duration_to_wire(span.0)),
            window: breaker.window,
            failure_rate: breaker.failure_rate,
            slow_after: breaker.slow_after.map(|span| duration_to_wire(span.0)),
            slow_rate: breaker.slow_rate,
            ramp_for: breaker.ramp_for.map(|span| duration_to_wire(span.0)),
            ramp_start: breaker.ramp_start,
            hint_opens: is_on(breaker.hint_opens),
        };
        let budget = BudgetSettings {
            capacity: budget.budget_capacity,
            floor_per_second: budget.budget_floor,
            deposit: budget.budget_deposit,
            enabled: is_on(budget.budget),
        };
        let settings = AgentSettings {
            policy: policy.into_wire(),
            breaker: (breaker != BreakerSettings::default()).then_some(breaker),
            budget: (budget != BudgetSettings::default()).then_some(budget),
            max_waiting,
        };
        ConfigureAgentRequest { agent, settings: Some(settings), actor: actor.name(), reason }
    }
}

fn rows(agents: &[Agent]) -> Rows {
    let mut rows =
        Rows::new(["AGENT", "QUEUED", "RUNNING", "RETRY", "BLOCKED", "WORKERS", "BREAKER", "BUDGET", "SEEN"]);
    for agent in agents {
        let count = |state| cell(count_of(&agent.counts, state));
        rows.push([
            cell(with_reason(&agent.agent, if agent.pause.is_some() { "paused" } else { "" })),
            count(TaskState::Queued),
            count(TaskState::Running),
            count(TaskState::Retry),
            count(TaskState::Blocked),
            cell(agent.sessions),
            breaker_cell(agent.breaker_state),
            cell(format!("{:.1}", agent.budget_tokens)),
            cell(instant(agent.create_time.as_ref())),
        ]);
    }
    rows
}

fn count_of(counts: &[StateCount], state: TaskState) -> u64 {
    counts.iter().find(|count| count.state() == state).map_or(0, |count| count.count)
}

/// `QUEUED 3, RUNNING 1`.
pub(crate) fn show_counts(counts: &[StateCount]) -> String {
    let counts = counts.iter().map(|count| format!("{} {}", task_state(count.state), count.count));
    counts.collect::<Vec<_>>().join(", ")
}

fn describe(agent: &Agent) -> String {
    let mut facts = Facts::default();
    facts.push("agent", &agent.agent);
    facts.push("tasks", show_counts(&agent.counts));
    if let Some(pause) = &agent.pause {
        facts.push("paused", one_line(&pause.reason));
        facts.push("paused by", one_line(&pause.actor));
        facts.push("paused since", instant(pause.time.as_ref()));
        let until = pause.until.as_ref().map_or_else(|| "resumed".into(), |at| instant(Some(at)));
        facts.push("paused until", until);
    }
    facts.push("workers", agent.sessions);
    facts.push("breaker", crate::breaker::state_name(agent.breaker_state));
    facts.push("budget tokens", format!("{:.1}", agent.budget_tokens));
    facts.push("first seen", instant(agent.create_time.as_ref()));
    if let Some(settings) = &agent.settings {
        facts.push("max waiting", settings.max_waiting.map(|n| n.to_string()).unwrap_or_default());
        if let Some(given) = &settings.policy {
            policy::describe(given, &mut facts);
        }
        if let Some(breaker) = &settings.breaker {
            describe_settings(breaker, &mut facts);
        }
        if let Some(budget) = &settings.budget {
            let number = |value: Option<f64>| value.map(|n| n.to_string()).unwrap_or_default();
            facts.push("budget enabled", budget.enabled.map(|on| on.to_string()).unwrap_or_default());
            facts.push("budget capacity", number(budget.capacity));
            facts.push("budget floor/s", number(budget.floor_per_second));
            facts.push("budget deposit", number(budget.deposit));
        }
    }
    facts.render()
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use ledgerd_client::v1;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        configure: Configure,
    }

    fn settings(args: &str) -> AgentSettings {
        let line = Line::try_parse_from(std::iter::once("x").chain(args.split(' '))).expect("arguments");
        line.configure.into_request().settings.expect("settings")
    }

    #[test]
    fn only_given_settings_are_sent() {
        assert_eq!(settings("claude"), AgentSettings::default());
        let given =
            settings("claude --breaker off --open-timeout 2m --budget-floor 0.5 --max-waiting 7 --lease 90s");
        let breaker = given.breaker.expect("breaker");
        assert_eq!((breaker.enabled, breaker.open_timeout.map(|d| d.seconds)), (Some(false), Some(120)));
        assert_eq!(breaker.failure_threshold, None);
        let budget = given.budget.expect("budget");
        assert_eq!((budget.floor_per_second, budget.enabled), (Some(0.5), None));
        assert_eq!(given.max_waiting, Some(7));
        assert_eq!(given.policy.and_then(|policy| policy.lease_duration).map(|d| d.seconds), Some(90));
    }

    #[test]
    fn events_read_as_rows() {
        let event = AgentEvent {
            agent: "codex".into(),
            event: "BREAKER".into(),
            from: 1,
            to: 2,
            cause: "TRIPPED".into(),
            actor: "ada".into(),
            reason: "bad\ndeploy".into(),
            ..AgentEvent::default()
        };
        let text = event_rows(&[event]).render();
        assert!(text.contains("codex        BREAKER  CLOSED -> OPEN (TRIPPED)  ada  bad"), "{text}");
    }

    #[test]
    fn windows_are_written_short() {
        let one = |text: &str| settings(&format!("a --window {text}")).breaker.and_then(|b| b.window);
        assert_eq!(one("count:100:20"), Some(Window::CountWindow(CountWindow { size: 100, min_calls: 20 })));
        let bucket = Some(prost_types::Duration { seconds: 6, nanos: 0 });
        assert_eq!(one("time:6s:20"), Some(Window::TimeWindow(TimeWindow { bucket, min_calls: 20 })));
        assert_eq!(one("none"), Some(Window::NoWindow(NoWindow {})));
        for wrong in ["count:1", "time:x:2", "100", "count:a:b"] {
            assert!(window(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_pause_is_seen() {
        let pause = v1::Pause { actor: "ada@box".into(), reason: "repairs".into(), ..Default::default() };
        let mut agent = Agent { agent: "claude".into(), pause: Some(pause), ..Agent::default() };
        assert!(rows(std::slice::from_ref(&agent)).render().contains("\nclaude (paused)  0 "));
        let text = describe(&agent);
        for line in ["paused         repairs\n", "paused by      ada@box\n", "paused until   resumed\n"] {
            assert!(text.contains(line), "{text}");
        }
        let until = prost_types::Timestamp { seconds: 1_767_225_600, nanos: 0 };
        agent.pause.as_mut().expect("paused").until = Some(until);
        let end = format!("paused until   {}\n", instant(Some(&until)));
        assert!(describe(&agent).contains(&end), "{}", describe(&agent));
    }

    #[test]
    fn agents_read_as_rows() {
        let agent = Agent {
            agent: "claude".into(),
            counts: vec![
                StateCount { state: TaskState::Queued.into(), count: 12 },
                StateCount { state: TaskState::Blocked.into(), count: 3 },
            ],
            breaker_state: 2,
            budget_tokens: 9.96,
            sessions: 2,
            ..Agent::default()
        };
        assert_eq!(
            rows(std::slice::from_ref(&agent)).render(),
            "AGENT   QUEUED  RUNNING  RETRY  BLOCKED  WORKERS  BREAKER  BUDGET  SEEN\n\
             claude  12      0        0      3        2        OPEN     10.0\n"
        );
        assert!(!describe(&agent).contains("paused"));
        assert!(describe(&agent).contains("tasks          QUEUED 12, BLOCKED 3\n"), "{}", describe(&agent));
    }
}

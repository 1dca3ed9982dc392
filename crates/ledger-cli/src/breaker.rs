//! `ledgerd breaker`: circuit breakers of agents.

use clap::Subcommand;
use comfy_table::{Cell, Color};
use ledgerd_client::v1::{
    Breaker, BreakerSettings, BreakerState, GetBreakerRequest, ListBreakersRequest, ListBreakersResponse,
    ResetBreakerRequest,
};

use crate::Global;
use crate::agent::Named;
use crate::connect::connect;
use crate::failure::Failure;
use crate::output::{Facts, Format, Rows, cell, instant, print, print_json, span};

/// Commands on circuit breakers.
#[derive(Debug, Subcommand)]
pub enum BreakerCommand {
    /// List breakers by agent
    List,
    /// Show the breaker of one agent
    Show(Named),
    /// Close a breaker and set its counts to zero
    Reset(Named),
}

impl BreakerCommand {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        let client = connect(global).await?;
        match self {
            Self::List => {
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
            Self::Show(named) => {
                let request = GetBreakerRequest { agent: named.agent, ..GetBreakerRequest::default() };
                let response = client.admin().get_breaker(request).await?.into_inner();
                match global.output {
                    Format::Json => print_json("GetBreakerResponse", &response),
                    Format::Table => print(&describe(&response.breaker.unwrap_or_default())),
                }
            }
            Self::Reset(named) => {
                let request = ResetBreakerRequest { agent: named.agent, ..ResetBreakerRequest::default() };
                let response = client.admin().reset_breaker(request).await?.into_inner();
                match global.output {
                    Format::Json => print_json("ResetBreakerResponse", &response),
                    Format::Table => print(&describe(&response.breaker.unwrap_or_default())),
                }
            }
        }
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
        Ok(BreakerState::Open) => text.fg(Color::Red),
        Ok(BreakerState::HalfOpen) => text.fg(Color::Yellow),
        _ => text,
    }
}

fn rows(breakers: &[Breaker]) -> Rows {
    let mut rows =
        Rows::new(["AGENT", "STATE", "FAILURES", "SUCCESSES", "PROBES", "BLOCKED", "REOPENS", "OPEN UNTIL"]);
    for breaker in breakers {
        rows.push([
            cell(&breaker.agent),
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
    facts.push("state", state_name(breaker.state));
    facts.push("failures in a row", breaker.failure_run);
    facts.push("probe successes", breaker.successes);
    facts.push("probes running", breaker.probes);
    facts.push("tasks blocked", breaker.blocked);
    facts.push("reopens", breaker.reopens);
    facts.push("open until", instant(breaker.open_until.as_ref()));
    facts.push("epoch", breaker.epoch);
    if let Some(settings) = &breaker.settings {
        describe_settings(settings, &mut facts);
    }
    facts.render()
}

/// Settings of a breaker as `name  value` lines.
pub(crate) fn describe_settings(settings: &BreakerSettings, facts: &mut Facts) {
    let number = |value: Option<u32>| value.map(|n| n.to_string()).unwrap_or_default();
    facts.push("breaker enabled", settings.enabled.map(|on| on.to_string()).unwrap_or_default());
    facts.push("failure threshold", number(settings.failure_threshold));
    facts.push("success threshold", number(settings.success_threshold));
    facts.push("open timeout", span(settings.open_timeout.as_ref()));
    facts.push("half-open permits", number(settings.half_open_permits));
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
            "AGENT  STATE  FAILURES  SUCCESSES  PROBES  BLOCKED  REOPENS  OPEN UNTIL\n\
             codex  OPEN   5         0          0       4        0\n"
        );
        assert!(describe(&breaker).starts_with("agent              codex\nstate              OPEN\n"));
    }
}

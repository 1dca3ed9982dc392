//! What the demo sets for its agents, so that in half a minute there is to be seen what else takes several.

use std::time::Duration;

use ledgerd_client::Client;
use ledgerd_client::v1::{AgentSettings, BreakerSettings, BudgetSettings, ConfigureAgentRequest, TaskPolicy};

use super::program::Program;
use crate::failure::Failure;
use crate::time::{duration_to_wire, show_duration};

const OPEN: Duration = Duration::from_secs(3);
const LEASE: Duration = Duration::from_secs(5);
/// Workers hold acks back for a part of it. Short, so that tasks of a tenth of a second are known to have started.
const ACK: Duration = Duration::from_millis(500);
const MAX_DELAY: Duration = Duration::from_secs(1);
const RETRIES: i32 = 50;
const LOSSES: i32 = 10;
const TOKENS: f64 = 100.0;
const FLOOR: f64 = 10.0;

/// What is set, with the defaults.
pub(super) fn describe() -> String {
    let [open, lease, ack, delay] = [OPEN, LEASE, ACK, MAX_DELAY].map(show_duration);
    format!(
        "shortened (default): breaker open for {open} (60s), lease {lease} (60s), ack timeout {ack} (10s), retry\n\
         delay at most {delay} (30s); generous: {RETRIES} retries (3), {LOSSES} losses (3), retry budget {TOKENS} tokens and\n\
         {FLOOR} a second (10 and 0.1)"
    )
}

/// Sets it.
///
/// # Errors
/// Those of the calls; when an agent has something to do already.
pub(super) async fn configure(client: &Client) -> Result<(), Failure> {
    super::refuse_leftovers(client).await?;
    for program in Program::ALL {
        let settings = AgentSettings {
            policy: Some(TaskPolicy {
                max_retries: Some(RETRIES),
                max_delay: Some(duration_to_wire(MAX_DELAY)),
                ack_timeout: Some(duration_to_wire(ACK)),
                lease_duration: Some(duration_to_wire(LEASE)),
                max_losses: Some(LOSSES),
                ..TaskPolicy::default()
            }),
            breaker: Some(BreakerSettings {
                open_timeout: Some(duration_to_wire(OPEN)),
                ..BreakerSettings::default()
            }),
            budget: Some(BudgetSettings {
                capacity: Some(TOKENS),
                floor_per_second: Some(FLOOR),
                ..BudgetSettings::default()
            }),
            ..AgentSettings::default()
        };
        let request = ConfigureAgentRequest {
            agent: program.name().into(),
            settings: Some(settings),
            ..ConfigureAgentRequest::default()
        };
        client.admin().configure_agent(request).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_difference_is_told_with_its_default() {
        let text = super::describe();
        assert!(
            text.contains("breaker open for 3s (60s), lease 5s (60s), ack timeout 500ms (10s)"),
            "{text}"
        );
    }
}

//! `ledgerd stats`: counts of the whole ledger.

use clap::Args;
use ledgerd_client::v1::{GetStatsRequest, GetStatsResponse};

use crate::Global;
use crate::agent::show_counts;
use crate::connect::connect;
use crate::failure::Failure;
use crate::output::{Facts, Format, print, print_json, span};

/// `stats`.
#[derive(Debug, Args)]
pub struct Stats {}

impl Stats {
    pub(crate) async fn run(self, global: &Global) -> Result<(), Failure> {
        let response = connect(global).await?.admin().get_stats(GetStatsRequest {}).await?.into_inner();
        match global.output {
            Format::Json => print_json("GetStatsResponse", &response),
            Format::Table => print(&describe(&response)),
        }
    }
}

fn describe(stats: &GetStatsResponse) -> String {
    let mut facts = Facts::default();
    facts.push("tasks", show_counts(&stats.counts));
    facts.push("dead letters", stats.dead_letters);
    facts.push("workers", stats.sessions);
    facts.push("agents", stats.agents);
    facts.push("transitions", stats.transitions);
    facts.push("commits", stats.commits);
    facts.push("budget tokens", format!("{:.1}", stats.budget_tokens));
    facts.push("store", store(stats));
    facts.push("log", show_bytes(stats.log_bytes));
    facts.push("kept", kept(stats));
    facts.push("removed", stats.removed_tasks);
    facts.push("written", show_bytes(stats.written_bytes));
    facts.push("cpu time", span(stats.cpu_time.as_ref()));
    facts.push("uptime", span(stats.uptime.as_ref()));
    facts.push("version", &stats.version);
    facts.render()
}

fn store(stats: &GetStatsResponse) -> String {
    match stats.store_free_bytes {
        0 => show_bytes(stats.store_bytes),
        free => format!("{}, of these {} free", show_bytes(stats.store_bytes), show_bytes(free)),
    }
}

/// How long ended tasks stay.
fn kept(stats: &GetStatsResponse) -> String {
    let span = |kept: Option<&prost_types::Duration>| match kept {
        None => "for ever".into(),
        kept => span(kept),
    };
    format!(
        "DONE and CANCELLED {}, FAILED {}",
        span(stats.retention_done.as_ref()),
        span(stats.retention_failed.as_ref())
    )
}

fn show_bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use ledgerd_client::v1::{StateCount, TaskState};

    use super::*;

    #[test]
    fn stats_read_as_lines() {
        let stats = GetStatsResponse {
            counts: vec![StateCount { state: TaskState::Done.into(), count: 12 }],
            store_bytes: 3 * 1024 * 1024,
            store_free_bytes: 1024,
            retention_done: Some(prost_types::Duration { seconds: 7 * 86_400, nanos: 0 }),
            removed_tasks: 9,
            uptime: Some(prost_types::Duration { seconds: 61, nanos: 5_000_000 }),
            version: "0.1.0".into(),
            ..GetStatsResponse::default()
        };
        let text = describe(&stats);
        assert!(text.starts_with("tasks          DONE 12\ndead letters   0\n"), "{text}");
        assert!(text.contains("store          3.00 MiB, of these 1.00 KiB free\n"), "{text}");
        assert!(text.contains("kept           DONE and CANCELLED 7d, FAILED for ever\n"), "{text}");
        assert!(text.contains("removed        9\n"), "{text}");
        assert!(text.contains("uptime         1m1s5ms\nversion        0.1.0\n"), "{text}");
    }
}

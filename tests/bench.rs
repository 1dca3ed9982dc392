//! The bench as users start it on a daemon of theirs: what it says is what was done.

use crate::support::program::said;
use crate::support::*;
use ledgerd_client::v1;

#[tokio::test(flavor = "multi_thread")]
async fn a_bench_of_a_daemon_that_runs_says_what_it_did() {
    let daemon = Daemon::start();
    let load = ["--callers", "2", "--batch", "10", "--keys", "--request-ids", "--duration", "1s"];
    let output = command().args(["bench", "--target", &daemon.address]).args(load).output().expect("it runs");
    assert!(output.status.success(), "{}", said(&output));
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!((told["verified"].as_bool(), told["errors"].as_u64()), (Some(true), Some(0)), "{told}");
    let stats =
        daemon.client().await.admin().get_stats(v1::GetStatsRequest {}).await.expect("answered").into_inner();
    let done = stats.counts.iter().filter(|count| count.state == v1::TaskState::Done as i32);
    let done: u64 = done.map(|count| count.count).sum();
    assert_eq!(Some(done), told["tasks"].as_u64(), "{told}");
    assert!(done >= 20, "{told}");
}

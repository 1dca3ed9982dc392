//! A producer: `cargo run --example producer`, beside the example `worker`.

use std::time::Duration;

use ledgerd_client::{Client, NewTask, v1};
use serde_json::{Value, json};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let ledger = Client::from_env()?;

    let review = json!({ "repo": "a/b", "pull": 7 });
    let task = ledger.enqueue("reviewer", "review.run", &review).key("a/b#7").max_retries(5).await?;
    println!("{} created: {}", task.id(), task.created());
    let verdict: Value = task.result().timeout(Duration::from_secs(60)).await?;
    println!("{verdict}");
    for event in task.history().await? {
        println!("  {:>3} {:<12} {}", event.version, event.event, event.to());
    }

    let many =
        (1..=10).map(|pull| NewTask::new("reviewer", "review.run", &json!({ "repo": "a/b", "pull": pull })));
    for enqueued in ledger.enqueue_many(many.collect(), v1::BatchMode::PerItem).await? {
        println!("{}", enqueued?.id());
    }
    Ok(())
}

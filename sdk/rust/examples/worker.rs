//! A worker: `cargo run --example worker`, with the daemon at `LEDGERD_ADDRESS` or 127.0.0.1:7420.

use std::time::Duration;

use ledgerd_client::{Client, Context, TaskError, Worker};
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
struct Review {
    repo: String,
    pull: u32,
}

#[derive(Serialize)]
struct Verdict {
    verdict: &'static str,
    attempt: u32,
}

async fn review(job: Review, context: Context) -> Result<Verdict, TaskError> {
    if job.pull == 0 {
        return Err(TaskError::fatal("no such pull request").code("NOT_FOUND"));
    }
    let first = context.last_checkpoint().and_then(|state| state.first().copied()).unwrap_or(0);
    for step in first..10 {
        context.progress(f64::from(step) / 10.0, format!("{}#{}: file {step}", job.repo, job.pull));
        context.checkpoint(vec![step])?;
        tokio::select! {
            () = context.cancelled().cancelled() => return Err(TaskError::cancelled()),
            () = tokio::time::sleep(Duration::from_millis(200)) => {}
        }
    }
    Ok(Verdict { verdict: "ok", attempt: context.attempt() })
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let worker = Worker::builder(Client::from_env()?)
        .agents(["reviewer"])
        .capacity(4)
        .task("review.run", review)
        .build()?;
    println!("{} waits for tasks; Ctrl-C drains it", worker.worker_id());
    worker.run_until_signal().await?;
    Ok(())
}

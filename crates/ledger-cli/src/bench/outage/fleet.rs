//! The agents: a worker each, through the SDK, whose tasks call the backend; and the producer of these tasks.

use std::time::Duration;

use bytes::Bytes;
use ledgerd_client::v1::{AgentSettings, BreakerSettings, BudgetSettings, ConfigureAgentRequest, TaskPolicy};
use ledgerd_client::{CancellationToken, Client, Error, TaskError, Worker};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::backend::{Backend, Failed};
use super::{Args, Policy};
use crate::failure::{Exit, Failure};
use crate::time::duration_to_wire;

const TASK_TYPE: &str = "call";
/// Before a call is repeated that the SDK has given up on.
const AGAIN: Duration = Duration::from_millis(100);

pub(super) fn agent(index: u32) -> String {
    format!("outage-{index}")
}

/// Sets what the experiment is about; everything else is the default.
pub(super) async fn configure(client: &Client, args: &Args, policy: Policy) -> Result<(), Failure> {
    let enabled = Some(policy == Policy::Ledgerd);
    for index in 0..args.agents {
        let settings = AgentSettings {
            policy: Some(TaskPolicy { max_retries: Some(3), ..TaskPolicy::default() }),
            breaker: Some(BreakerSettings {
                open_timeout: Some(duration_to_wire(args.open.0)),
                enabled,
                ..BreakerSettings::default()
            }),
            budget: Some(BudgetSettings { enabled, ..BudgetSettings::default() }),
            ..AgentSettings::default()
        };
        let request = ConfigureAgentRequest {
            agent: agent(index),
            settings: Some(settings),
            ..ConfigureAgentRequest::default()
        };
        client.admin().configure_agent(request).await?;
    }
    Ok(())
}

/// Starts the workers. Each has a connection of its own, as workers on machines of their own have.
pub(super) fn workers(
    address: &str,
    args: &Args,
    policy: Policy,
    backend: &Backend,
    stop: &CancellationToken,
) -> Result<JoinSet<Result<(), Error>>, Failure> {
    let mut workers = JoinSet::new();
    for index in 0..args.agents {
        let backend = backend.clone();
        let handler = move |payload: Bytes, _| {
            let backend = backend.clone();
            async move {
                let number = payload.first_chunk().map(|number| u64::from_be_bytes(*number));
                let number = number.ok_or_else(|| TaskError::fatal("the payload is no number"))?;
                match backend.call(number).await {
                    Ok(()) => Ok(Bytes::new()),
                    Err(Failed::Refused) => Err(TaskError::retryable("the backend is down")),
                    Err(Failed::Overloaded) => Err(TaskError::overloaded("the backend's queue is full")),
                    Err(Failed::Timeout) => Err(TaskError::timeout("no answer within a second")),
                }
            }
        };
        let worker = Worker::builder(Client::lazy(address)?)
            .worker_id(format!("outage/{index}"))
            .agents([agent(index)])
            .capacity(args.slots(policy))
            .task_bytes(TASK_TYPE, handler)
            .build()?;
        let stop = stop.clone();
        workers.spawn(worker.run_until(stop));
    }
    Ok(workers)
}

/// Enqueues tasks at a fixed rate until `stop`, whether or not the daemon is there: a call that found nobody is repeated
/// with the same request id until it is answered. Gives the number of tasks when all are stored.
pub(super) async fn produce(
    client: Client,
    args: &Args,
    backend: &Backend,
    stop: &CancellationToken,
) -> Result<u64, Failure> {
    let mut tick = interval(Duration::from_secs(1) / args.rate);
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut calls, mut tasks) = (JoinSet::new(), 0);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(stored) = calls.join_next() => stored.expect("an enqueue does not panic")?,
            _ = tick.tick() => {
                let number = backend.arrived();
                tasks += 1;
                calls.spawn(enqueue(client.clone(), agent((number % u64::from(args.agents)) as u32), number));
            }
        }
    }
    while let Some(stored) = calls.join_next().await {
        stored.expect("an enqueue does not panic")?;
    }
    Ok(tasks)
}

async fn enqueue(client: Client, agent: String, number: u64) -> Result<(), Failure> {
    loop {
        let payload = Bytes::copy_from_slice(&number.to_be_bytes());
        let call = client.enqueue_bytes(&agent, TASK_TYPE, payload).request_id(format!("outage-{number}"));
        match call.await {
            Ok(_) => return Ok(()),
            Err(
                Error::Unavailable { .. }
                | Error::OutcomeUnknown { .. }
                | Error::ResourceExhausted { .. }
                | Error::Timeout { .. },
            ) => sleep(AGAIN).await,
            Err(error) => {
                return Err(Failure::new(Exit::Failure, format!("task {number} was refused: {error}")));
            }
        }
    }
}

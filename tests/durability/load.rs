//! Load that keeps a record of everything it was told is durable.

use crate::support::worker::{complete, fail, hello, outcome};
use crate::support::{PATIENCE, task};
use ledgerd_client::{Client, v1};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use v1::{work_request, work_response};

/// A task and a fence.
pub(crate) type Key = (String, u64);

/// What was acknowledged.
#[derive(Debug, Default)]
pub(crate) struct Record {
    pub(crate) enqueued: Vec<String>,
    pub(crate) cancelled: Vec<String>,
    pub(crate) receipts: Vec<(Key, v1::Receipt)>,
    pub(crate) assigned: Vec<(Key, String)>,
}

/// What is in flight, and how much was acknowledged.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) acknowledged: AtomicU64,
    pub(crate) enqueues: AtomicU64,
    pub(crate) acks: AtomicU64,
    pub(crate) outcomes: AtomicU64,
    pub(crate) cancels: AtomicU64,
}

impl Counts {
    pub(crate) fn flying(&self) -> String {
        let read = |count: &AtomicU64| count.load(Relaxed);
        format!(
            "{} enqueues, {} acks, {} outcomes, {} cancels",
            read(&self.enqueues),
            read(&self.acks),
            read(&self.outcomes),
            read(&self.cancels)
        )
    }
}

/// Running load.
pub(crate) struct Load {
    pub(crate) counts: Arc<Counts>,
    shared: Arc<Shared>,
    producing: CancellationToken,
    working: CancellationToken,
    producers: TaskTracker,
    workers: TaskTracker,
}

struct Shared {
    address: String,
    counts: Arc<Counts>,
    shape: Shape,
    record: Mutex<Record>,
}

/// How much of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) producers: usize,
    /// Callers that cancel what is newest.
    pub(crate) cancellers: usize,
    pub(crate) workers: usize,
    /// Tasks that a worker may hold.
    pub(crate) capacity: u32,
    /// Tasks that are enqueued in all; none: until it is told to finish.
    pub(crate) tasks: Option<usize>,
}

impl Default for Shape {
    fn default() -> Self {
        Self { producers: 3, cancellers: 2, workers: 3, capacity: 20, tasks: None }
    }
}

impl Load {
    pub(crate) fn start(address: &str) -> Self {
        Self::start_as(address, Shape::default())
    }

    pub(crate) fn start_as(address: &str, shape: Shape) -> Self {
        let counts = Arc::new(Counts::default());
        let shared = Arc::new(Shared {
            address: address.to_owned(),
            counts: Arc::clone(&counts),
            shape,
            record: Mutex::default(),
        });
        let load = Self {
            counts,
            shared,
            producing: CancellationToken::new(),
            working: CancellationToken::new(),
            producers: TaskTracker::new(),
            workers: TaskTracker::new(),
        };
        for index in 0..shape.producers {
            let (shared, stop) = (Arc::clone(&load.shared), load.producing.clone());
            load.producers.spawn(async move { shared.produce(index, stop).await });
        }
        for index in 0..shape.cancellers {
            let (shared, stop) = (Arc::clone(&load.shared), load.producing.clone());
            load.producers.spawn(async move { shared.cancel(index, stop).await });
        }
        for index in 0..shape.workers {
            let (shared, stop) = (Arc::clone(&load.shared), load.working.clone());
            load.workers.spawn(async move { shared.work(index, stop).await });
        }
        load
    }

    /// Tasks that were enqueued so far.
    pub(crate) fn enqueued(&self) -> usize {
        self.shared.enqueued()
    }

    /// Stops producing, lets the workers finish what is there, and returns what was acknowledged.
    pub(crate) async fn finish(self) -> Record {
        self.producing.cancel();
        self.producers.close();
        tokio::time::timeout(PATIENCE, self.producers.wait()).await.expect("producers end");
        let client = Client::lazy(&self.shared.address).expect("the address is one");
        loop {
            let Ok(stats) = client.admin().get_stats(v1::GetStatsRequest {}).await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let live: u64 = stats
                .into_inner()
                .counts
                .iter()
                .filter(|count| count.state < v1::TaskState::Done.into())
                .map(|count| count.count)
                .sum();
            if live == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.working.cancel();
        self.workers.close();
        tokio::time::timeout(PATIENCE, self.workers.wait()).await.expect("workers end");
        std::mem::take(&mut self.shared.record.lock().expect("nobody panicked"))
    }
}

impl Shared {
    fn enqueued(&self) -> usize {
        self.record.lock().expect("nobody panicked").enqueued.len()
    }

    fn record(&self, write: impl FnOnce(&mut Record)) {
        write(&mut self.record.lock().expect("nobody panicked"));
    }

    /// Repeats a call, with its request id, until somebody answers.
    async fn insist<T, F>(&self, call: impl Fn(Client) -> F) -> T
    where
        F: Future<Output = Result<T, tonic::Status>>,
    {
        loop {
            match call(Client::lazy(&self.address).expect("the address is one")).await {
                Ok(answer) => return answer,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn produce(&self, index: usize, stop: CancellationToken) {
        for call in 0.. {
            let enough = || self.shape.tasks.is_some_and(|tasks| self.enqueued() >= tasks);
            if stop.is_cancelled() || enough() {
                return;
            }
            let request = v1::EnqueueTasksRequest {
                tasks: vec![task("load"); 10],
                request_id: format!("produce-{index}-{call}"),
                ..v1::EnqueueTasksRequest::default()
            };
            self.counts.enqueues.fetch_add(1, Relaxed);
            let call = |client: Client| {
                let request = request.clone();
                async move { client.tasks().enqueue_tasks(request).await }
            };
            let answer = self.insist(call).await.into_inner();
            self.counts.enqueues.fetch_sub(1, Relaxed);
            self.counts.acknowledged.fetch_add(answer.results.len() as u64, Relaxed);
            self.record(|record| record.enqueued.extend(answer.results.into_iter().map(|item| item.task_id)));
        }
    }

    /// Cancels one task in so many, whatever it is doing.
    async fn cancel(&self, index: usize, stop: CancellationToken) {
        for call in 0.. {
            if stop.is_cancelled() {
                return;
            }
            let newest = self.record.lock().expect("nobody panicked").enqueued.last().cloned();
            let Some(task_id) = newest else {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            let request = v1::CancelTaskRequest {
                task_id: task_id.clone(),
                reason: "test".into(),
                request_id: format!("cancel-{index}-{call}"),
            };
            self.counts.cancels.fetch_add(1, Relaxed);
            let call = |client: Client| {
                let request = request.clone();
                async move {
                    match client.tasks().cancel_task(request).await {
                        Err(status) if status.code() == tonic::Code::FailedPrecondition => Ok(false),
                        other => other.map(|_| true),
                    }
                }
            };
            let done = self.insist(call).await;
            self.counts.cancels.fetch_sub(1, Relaxed);
            if done {
                self.counts.acknowledged.fetch_add(1, Relaxed);
                self.record(|record| record.cancelled.push(task_id));
            }
        }
    }

    async fn work(&self, index: usize, stop: CancellationToken) {
        let name = format!("worker-{index}");
        let mut hands = Hands::default();
        while !stop.is_cancelled() {
            let hello = v1::Hello {
                held: hands.started.iter().map(lease_of).collect(),
                unreceipted: hands.ended.keys().map(lease_of).collect(),
                ..hello(&name, "load", self.shape.capacity)
            };
            let (sender, frames) = mpsc::channel(1_024);
            let _ = sender.send(v1::WorkRequest { frame: Some(work_request::Frame::Hello(hello)) }).await;
            let client = Client::lazy(&self.address).expect("the address is one");
            let opened = client.workers().work(ReceiverStream::new(frames)).await;
            if let Ok(stream) = opened {
                self.session(&name, &mut hands, sender, stream.into_inner(), &stop).await;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn session(
        &self,
        name: &str,
        hands: &mut Hands,
        sender: mpsc::Sender<v1::WorkRequest>,
        mut stream: tonic::Streaming<v1::WorkResponse>,
        stop: &CancellationToken,
    ) {
        loop {
            let next = tokio::select! {
                next = stream.message() => next,
                () = stop.cancelled() => return,
            };
            let Ok(Some(response)) = next else { return };
            match response.frame {
                Some(work_response::Frame::Welcome(welcome)) => {
                    for verdict in welcome.leases.into_iter().filter(|v| v.state() == v1::LeaseState::Lost) {
                        hands.started.retain(|key| Some(lease_of(key)) != verdict.lease);
                    }
                    // Acks that were under way when the stream broke are so no more.
                    self.counts.acks.fetch_sub(hands.acked.len() as u64, Relaxed);
                    hands.acked.clear();
                    let again: Vec<_> = hands.ended.values().cloned().collect();
                    send(&sender, work_request::Frame::Outcomes(v1::Outcomes { items: again })).await;
                    // What was started before the break ends now.
                    let started = std::mem::take(&mut hands.started);
                    self.end(hands, started, &sender).await;
                }
                Some(work_response::Frame::Assignments(frame)) => {
                    let keys: Vec<Key> = frame.items.into_iter().map(|a| (a.task_id, a.fence)).collect();
                    self.record(|record| {
                        record.assigned.extend(keys.iter().map(|key| (key.clone(), name.to_owned())));
                    });
                    self.counts.acks.fetch_add(keys.len() as u64, Relaxed);
                    let items = keys.iter().map(lease_of).collect();
                    hands.acked.extend(keys.iter().cloned());
                    hands.started.extend(keys);
                    send(&sender, work_request::Frame::Acks(v1::Acks { items })).await;
                }
                Some(work_response::Frame::Receipts(frame)) => {
                    let mut started = Vec::new();
                    for receipt in frame.items {
                        let lease = receipt.lease.clone().unwrap_or_default();
                        let key = (lease.task_id, lease.fence);
                        if receipt.kind() == v1::ReceiptKind::Ack {
                            if hands.acked.remove(&key) {
                                self.counts.acks.fetch_sub(1, Relaxed);
                            }
                            hands.started.retain(|held| *held != key);
                            if receipt.error.is_none() {
                                started.push(key.clone());
                            }
                        } else if hands.ended.remove(&key).is_some() {
                            self.counts.outcomes.fetch_sub(1, Relaxed);
                        }
                        if receipt.error.is_none() {
                            self.counts.acknowledged.fetch_add(1, Relaxed);
                            self.record(|record| record.receipts.push((key, receipt)));
                        }
                    }
                    self.end(hands, started, &sender).await;
                }
                _ => {}
            }
        }
    }

    /// Ends tasks: every seventh fails.
    async fn end(&self, hands: &mut Hands, keys: Vec<Key>, sender: &mpsc::Sender<v1::WorkRequest>) {
        let mut items = Vec::new();
        for key in keys {
            hands.count += 1;
            let how = if hands.count.is_multiple_of(7) { fail("unlucky") } else { complete("done") };
            let item = outcome(lease_of(&key), how);
            self.counts.outcomes.fetch_add(1, Relaxed);
            hands.ended.insert(key, item.clone());
            items.push(item);
        }
        if !items.is_empty() {
            send(sender, work_request::Frame::Outcomes(v1::Outcomes { items })).await;
        }
    }
}

/// A stream that broke says so on its other side.
async fn send(sender: &mpsc::Sender<v1::WorkRequest>, frame: work_request::Frame) {
    let _ = sender.send(v1::WorkRequest { frame: Some(frame) }).await;
}

/// What a worker holds, over its streams.
#[derive(Debug, Default)]
struct Hands {
    acked: HashSet<Key>,
    started: Vec<Key>,
    ended: HashMap<Key, v1::Outcome>,
    count: u64,
}

fn lease_of(key: &Key) -> v1::Lease {
    v1::Lease { task_id: key.0.clone(), fence: key.1 }
}

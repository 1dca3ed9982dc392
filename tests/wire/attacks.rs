//! Clients that want to do harm, beside one that works: its calls all succeed, and the daemon's memory stays bounded.
//!
//! Each script runs for `LEDGERD_ATTACK_MS`, 300 ms unless that says otherwise. Times are printed and not judged, for a busy
//! machine has times of its own; `docs/reference/bad-inputs.md` says how to see them.

use super::raw::*;
use crate::support::*;
use bytes::{BufMut, Bytes, BytesMut};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

const WAIT_TASK: &str = "/ledger.v1.TaskService/WaitTask";
const LIST_TASKS: &str = "/ledger.v1.TaskService/ListTasks";
/// Resident memory at its highest.
pub(super) const MOST_KIB: u64 = 256 << 10;
/// Frames that are sent at once.
const BURST: usize = 256;

/// What is sent, burst after burst; the number is that of the burst.
type Script = fn(u32) -> Bytes;

fn many(burst: u32, each: impl Fn(u32) -> Bytes) -> Bytes {
    let mut bytes = BytesMut::new();
    for at in 0..BURST as u32 {
        bytes.put(each(burst * BURST as u32 + at));
    }
    bytes.freeze()
}

fn headers(stream: u32, flags: u8) -> Bytes {
    frame(HEADERS, flags, stream, &block(WAIT_TASK, &[]))
}

fn joined(frames: &[Bytes; 2]) -> Bytes {
    frames.concat().into()
}

/// Opens a stream first, and then sends the same for ever.
fn on_one(burst: u32, each: impl Fn() -> Bytes) -> Bytes {
    if burst == 0 { headers(1, END_HEADERS) } else { many(burst, |_| each()) }
}

const SCRIPTS: [(&str, Script); 18] = [
    ("rapid reset", |burst| {
        many(burst, |n| {
            joined(&[headers(2 * n + 1, END_HEADERS), frame(RST_STREAM, 0, 2 * n + 1, &[0, 0, 0, 8])])
        })
    }),
    ("resets that we are made to send", |burst| {
        many(burst, |n| {
            joined(&[headers(2 * n + 1, END_HEADERS), frame(WINDOW_UPDATE, 0, 2 * n + 1, &[0; 4])])
        })
    }),
    ("CONTINUATION without end", |burst| {
        if burst == 0 { headers(1, 0) } else { frame(CONTINUATION, 0, 1, &[0; 16 << 10]) }
    }),
    ("empty CONTINUATION", |burst| {
        if burst == 0 { headers(1, 0) } else { many(burst, |_| frame(CONTINUATION, 0, 1, &[])) }
    }),
    ("empty SETTINGS", |burst| many(burst, |_| frame(SETTINGS, 0, 0, &[]))),
    ("SETTINGS that change", |burst| {
        many(burst, |n| frame(SETTINGS, 0, 0, &[0, 4, 0, 0, (n % 128) as u8, 1, 0, 1, 0, 0, n as u8, 0]))
    }),
    ("PING", |burst| many(burst, |n| frame(PING, 0, 0, &u64::from(n).to_be_bytes()))),
    ("PING answers", |burst| many(burst, |_| frame(PING, ACK, 0, &[7; 8]))),
    ("empty DATA", |burst| on_one(burst, || frame(DATA, 0, 1, &[]))),
    ("DATA of one byte", |burst| on_one(burst, || frame(DATA, 0, 1, &[0]))),
    ("padded DATA of nothing", |burst| on_one(burst, || frame(DATA, 8, 1, &[7, 0, 0, 0, 0, 0, 0, 0]))),
    ("PRIORITY", |burst| many(burst, |n| frame(PRIORITY, 0, 2 * n + 1, &[0, 0, 0, 0, 9]))),
    ("WINDOW_UPDATE", |burst| many(burst, |_| frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]))),
    ("unknown frames", |burst| many(burst, |_| frame(0x77, 0, 0, &[7; 64]))),
    ("GOAWAY", |burst| many(burst, |_| frame(GOAWAY, 0, 0, &[0; 8]))),
    ("header bomb", |burst| {
        // A header of 3 KiB goes into the table, and each byte after it says it again.
        let mut bomb = block(WAIT_TASK, &[]);
        bomb.push(0x40);
        text(&mut bomb, "bomb");
        text(&mut bomb, &"b".repeat(3 << 10));
        bomb.resize(16 << 10, 0x80 + 62);
        frame(HEADERS, END_HEADERS, 2 * burst + 1, &bomb)
    }),
    ("length prefix of 4 MiB on all streams", |burst| {
        // More streams than there may be would be refused, so no more than those.
        if burst >= 3 {
            return frame(PING, 0, 0, &[1; 8]);
        }
        many(burst, |n| {
            joined(&[headers(2 * n + 1, END_HEADERS), frame(DATA, 0, 2 * n + 1, &[0, 0, 0x40, 0, 0])])
        })
    }),
    ("bytes that are no frames", |burst| vec![burst as u8 ^ 0xa5; 16 << 10].into()),
];

pub(super) fn span() -> Duration {
    let ms = std::env::var("LEDGERD_ATTACK_MS").ok().and_then(|ms| ms.parse().ok());
    Duration::from_millis(ms.unwrap_or(300))
}

/// Runs a script until its time is over, over connection after connection; connections and bytes.
async fn attack(address: &str, script: Script, until: Instant) -> (u32, u64) {
    let (mut connections, mut sent) = (0, 0);
    while Instant::now() < until {
        let Ok(raw) = Raw::open(address).await else { continue };
        connections += 1;
        let (mut from, mut to) = raw.0.into_split();
        let reading = tokio::spawn(async move {
            let mut heard = vec![0; 64 << 10];
            while matches!(from.read(&mut heard).await, Ok(bytes) if bytes > 0) {}
        });
        for burst in 0.. {
            let bytes = script(burst);
            match tokio::time::timeout_at(until, to.write_all(&bytes)).await {
                Ok(Ok(())) => sent += bytes.len() as u64,
                _ => break,
            }
        }
        drop(to);
        reading.abort();
    }
    (connections, sent)
}

/// A client that works, until its time is over: how long its calls took.
pub(super) async fn work(client: &ledgerd_client::Client, until: Instant) -> Vec<Duration> {
    let mut took = Vec::new();
    while Instant::now() < until || took.is_empty() {
        let start = Instant::now();
        within("a call beside an attack", enqueue(client, task("good"))).await;
        took.push(start.elapsed());
    }
    took.sort();
    took
}

/// What so many in a hundred took at most, in ms.
fn at(took: &[Duration], hundredth: usize) -> f64 {
    took[(took.len() * hundredth / 100).min(took.len() - 1)].as_secs_f64() * 1_000.0
}

/// Works by itself for a while and then beside an attack, and prints what came of it as a line of [`HEAD`]. The attack ends with
/// how many connections it made and what it sent.
pub(super) async fn beside<F>(
    daemon: &Daemon,
    client: &ledgerd_client::Client,
    name: &str,
    attack: impl FnOnce(Instant) -> F,
) where
    F: Future<Output = (u32, u64)> + Send + 'static,
{
    // Just before, for a busy machine is not equally busy all the time.
    let idle = work(client, Instant::now() + span()).await;
    let until = Instant::now() + span();
    let attacking = tokio::spawn(attack(until));
    let took = work(client, until).await;
    let (connections, sent) = attacking.await.expect("no panic");
    let peak = peak_kib(daemon);
    eprintln!(
        "| {name} | {} | {:.1} / {:.1} | {} | {:.1} / {:.1} | {:.1} | {connections} | {:.1} | {} |",
        idle.len(),
        at(&idle, 50),
        at(&idle, 99),
        took.len(),
        at(&took, 50),
        at(&took, 99),
        at(&took, 99) / at(&idle, 99),
        sent as f64 / f64::from(1 << 20),
        peak >> 10
    );
    assert!(connections > 0, "{name}");
    assert!(peak < MOST_KIB, "{name}: {peak} KiB");
}

pub(super) const HEAD: &str = "\
| attack | idle calls | p50 / p99, ms | calls | p50 / p99, ms | p99 times idle | connections | MiB sent | peak MiB |\n\
|---|---|---|---|---|---|---|---|---|";

/// The most memory that a process had, in KiB.
pub(super) fn peak_kib(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("it lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("it is told");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attacks_do_not_keep_a_good_client_from_its_work() {
    eprintln!("\n{HEAD}");
    for (name, script) in SCRIPTS {
        // Each has a daemon of its own, so that its memory is not that of the tasks that were stored beside the others.
        let daemon = Daemon::start();
        let client = daemon.client().await;
        let address = daemon.address.clone();
        beside(&daemon, &client, name, |until| async move { attack(&address, script, until).await }).await;
        assert!(!daemon.log().contains("panic"), "{}", daemon.log());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_never_reads_costs_no_more_than_its_window() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    store_much(&client).await;
    let mut deaf = Vec::new();
    for _ in 0..8 {
        let mut raw = Raw::open(&daemon.address).await.expect("the daemon listens");
        ask_and_never_read(&mut raw, &[]).await;
        deaf.push(raw);
    }
    work(&client, Instant::now() + span()).await;
    let peak = peak_kib(&daemon);
    eprintln!("8 clients that never read: peak {} MiB", peak >> 10);
    assert!(peak < MOST_KIB, "{peak} KiB");
}

#[tokio::test]
async fn a_connection_that_says_nothing_in_many_bytes_is_closed() {
    let daemon = Daemon::start();
    let mut raw = Raw::open(&daemon.address).await.expect("the daemon listens");
    let pings = many(0, |_| frame(PING, ACK, 0, &[7; 8]));
    let mut sent = 0;
    while within("it is closed", raw.send(&pings)).await.is_ok() {
        sent += pings.len();
        assert!(sent < 64 << 20, "{sent} bytes were taken");
    }
    assert!(sent >= 5 << 20, "{sent} bytes are within the budget");
    eventually("it is logged", async || daemon.log().contains("says nothing").then_some(())).await;
    enqueue(&daemon.client().await, task("a")).await;
}

#[tokio::test]
async fn a_connection_that_takes_its_calls_back_is_closed() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let mut wanted = vec![0x0a, id.len() as u8];
    wanted.extend_from_slice(id.as_bytes());
    let mut raw = Raw::open(&daemon.address).await.expect("the daemon listens");
    let mut taken_back = 0;
    for n in 0..1_000_u32 {
        let stream = 2 * n + 1;
        let begun = async {
            raw.send(&call(stream, WAIT_TASK, &wanted)).await?;
            // When this is answered the call was taken up, so h2's own limit does not count it.
            raw.send(&frame(PING, 0, 0, &[7; 8])).await?;
            while raw.next_of(PING).await?.flags & ACK == 0 {}
            raw.send(&frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])).await
        };
        if within("it is closed", begun).await.is_err() {
            break;
        }
        taken_back += 1;
    }
    assert!((100..200).contains(&taken_back), "{taken_back} calls were taken back");
    assert!(daemon.log().contains("takes its calls back"), "{}", daemon.log());
    enqueue(&client, task("a")).await;
}

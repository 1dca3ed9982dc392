//! Clients that want to do harm, beside one that works: its calls all succeed, and the daemon's memory stays bounded.
//!
//! Each script runs for `LEDGERD_ATTACK_MS`, 150 ms unless that says otherwise, after the same client was alone for as long. Times
//! are printed and not judged, for a busy machine has times of its own; `just attacks` prints those that mean something.

use super::alone::cpu;
use super::raw::*;
use crate::support::secure::Way;
use crate::support::sockets::Place;
use crate::support::*;
use bytes::{BufMut, Bytes, BytesMut};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

both_ways!(
    attacks_do_not_keep_a_good_client_from_its_work,
    a_client_that_never_reads_costs_no_more_than_its_window,
    a_connection_that_says_nothing_in_many_bytes_is_closed,
    a_connection_that_takes_its_calls_back_is_closed,
);

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
    Duration::from_millis(ms.unwrap_or(150))
}

/// Runs a script until its time is over, over connection after connection; connections and bytes.
async fn attack(place: Place, script: Script, until: Instant) -> (u32, u64) {
    let (mut connections, mut sent) = (0, 0);
    while Instant::now() < until {
        let Ok(raw) = Raw::open(&place).await else { continue };
        connections += 1;
        let (mut from, mut to) = tokio::io::split(raw.0);
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
        reading.abort();
        let _ = reading.await;
    }
    (connections, sent)
}

/// Puts an attack beside a client that works, prints what that did to it, and looks at the daemon's memory.
///
/// Each has a daemon of its own: without any attack one takes 64 MiB of pages for each of six connections that read, as its ledger
/// grows, and a client that works all the while has it grow. The attacker has a thread of its own, so that only the machine's processors are shared.
pub(super) async fn beside_a_good_client<A>(
    way: Way,
    name: &str,
    attack: impl Fn(Place, Instant) -> A + Clone + Send + 'static,
) where
    A: Future<Output = (u32, u64)>,
{
    let daemon = way.start();
    let client = daemon.client().await;
    let idle = work(&client, Instant::now() + span()).await;
    let before = (cpu(daemon.pid()), cpu(std::process::id()));
    let mut longer = span();
    let ((connections, sent), took) = loop {
        let (place, until, attack) = (Place::of(&daemon), Instant::now() + longer, attack.clone());
        let attacking = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(attack(place, until))
        });
        let took = work(&client, until).await;
        let attacked = within("the attack ends", tokio::task::spawn_blocking(|| attacking.join())).await;
        let attacked = attacked.expect("no panic").expect("no panic");
        if attacked.0 > 0 {
            break (attacked, took);
        }
        // Not even a handshake in that time: the machine is slow.
        longer *= 4;
        assert!(longer < PATIENCE, "{name}");
    };
    let (daemon_cpu, our_cpu) = (cpu(daemon.pid()) - before.0, cpu(std::process::id()) - before.1);
    let peak = peak_kib(&daemon);
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    eprintln!(
        "| {name} | {connections} | {} | {} | {:.1} / {:.1} | {} | {:.1} / {:.1} | {:.1} | {:.1} / {:.1} | {} |",
        sent >> 10,
        idle.len(),
        ms(at(&idle, 50)),
        ms(at(&idle, 99)),
        took.len(),
        ms(at(&took, 50)),
        ms(at(&took, 99)),
        at(&took, 99).as_secs_f64() / at(&idle, 99).as_secs_f64(),
        daemon_cpu.as_secs_f64(),
        our_cpu.as_secs_f64(),
        peak >> 10
    );
    assert!(peak < MOST_KIB, "{name}: {peak} KiB");
    enqueue(&daemon.client().await, task("a")).await;
    assert!(!daemon.log().contains("panic"), "{name}: {}", daemon.log());
}

/// The columns of what [`beside_a_good_client`] prints.
pub(super) fn print_columns(way: Way) {
    eprintln!(
        "{way:?}, {:?} each\n| attack | connections | KiB sent | idle calls | p50 / p99 ms | calls | p50 / p99 ms | \
         p99 / idle | daemon / attacker and client, CPU s | peak MiB |\n|---|---|---|---|---|---|---|---|---|---|",
        span()
    );
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

/// A percentile of what is sorted.
fn at(took: &[Duration], percent: usize) -> Duration {
    took[(took.len() * percent / 100).min(took.len() - 1)]
}

/// The most memory that a process had, in KiB.
pub(super) fn peak_kib(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("it lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("it is told");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

async fn attacks_do_not_keep_a_good_client_from_its_work(way: Way) {
    print_columns(way);
    for (name, script) in SCRIPTS {
        let run = move |place, until| attack(place, script, until);
        beside_a_good_client(way, name, run).await;
    }
}

async fn a_client_that_never_reads_costs_no_more_than_its_window(way: Way) {
    let daemon = way.start();
    let client = daemon.client().await;
    for _ in 0..32 {
        let big = ledgerd_client::v1::NewTask { payload: vec![7; 256 << 10].into(), ..task("big") };
        enqueue(&client, big).await;
    }
    let mut deaf = Vec::new();
    for _ in 0..8 {
        let mut raw = Raw::open(&Place::of(&daemon)).await.expect("the daemon listens");
        for stream in 0..256 {
            let call = call(2 * stream + 1, LIST_TASKS, &[]);
            if tokio::time::timeout(Duration::from_millis(20), raw.send(&call)).await.is_err() {
                break;
            }
        }
        deaf.push(raw);
    }
    work(&client, Instant::now() + span()).await;
    let peak = peak_kib(&daemon);
    eprintln!("8 clients that never read: peak {} MiB", peak >> 10);
    assert!(peak < MOST_KIB, "{peak} KiB");
}

async fn a_connection_that_says_nothing_in_many_bytes_is_closed(way: Way) {
    let daemon = way.start();
    let mut raw = Raw::open(&Place::of(&daemon)).await.expect("the daemon listens");
    let pings = many(0, |_| frame(PING, ACK, 0, &[7; 8]));
    let (begun, mut sent) = (Instant::now(), 0);
    while within("it is closed", raw.send(&pings)).await.is_ok() {
        sent += pings.len();
        assert!(sent < 64 << 20, "{sent} bytes were taken");
    }
    // Turns of 16 KiB and a little after the first 64 KiB, 20 ms apart; in one go a debug build reads it in 1.7 s.
    assert!(
        begun.elapsed() >= Duration::from_secs(4),
        "{:?}: it takes a processor for itself",
        begun.elapsed()
    );
    assert!(!daemon.log().contains("h2::proto"), "a line for each of them");
    // Under TLS a little of the budget goes into records.
    assert!(sent >= 9 << 19, "{sent} bytes are within the budget");
    eventually("it is logged", async || daemon.log().contains("says nothing").then_some(())).await;
    enqueue(&daemon.client().await, task("a")).await;
}

async fn a_connection_that_takes_its_calls_back_is_closed(way: Way) {
    let daemon = way.start();
    let client = daemon.client().await;
    let id = enqueue(&client, task("a")).await;
    let mut wanted = vec![0x0a, id.len() as u8];
    wanted.extend_from_slice(id.as_bytes());
    let mut raw = Raw::open(&Place::of(&daemon)).await.expect("the daemon listens");
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

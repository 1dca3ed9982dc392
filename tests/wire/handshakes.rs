//! Attacks that only TLS makes possible: on the handshake, and with records that are none.

use super::attacks::{beside_a_good_client, print_columns};
use super::raw::{PING, frame};
use crate::support::secure::Way;
use crate::support::sockets::{Place, name};
use crate::support::*;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

/// Connections that one attacker keeps open.
const CROWD: usize = 256;

/// The first bytes of a handshake, good ones: what the daemon answers costs it a key exchange and a signature, and who sends it nothing.
fn client_hello(place: &Place) -> Vec<u8> {
    let config = place.tls.clone().expect("TLS");
    let mut session = rustls::ClientConnection::new(config, name()).expect("a session");
    let mut hello = Vec::new();
    session.write_tls(&mut hello).expect("memory");
    hello
}

/// Records that are none, or that nobody may send: a type, TLS 1.2 as all say, a length and so many bytes.
fn record(kind: u8, length: u16, body: &[u8]) -> Vec<u8> {
    [&[kind, 3, 3], &length.to_be_bytes()[..], body].concat()
}

const BROKEN: [&str; 6] = [
    "a record longer than any",
    "another hello, in the clear",
    "a change of ciphers again and again",
    "an alert in the clear",
    "a record that does not decrypt",
    "bytes that are no records",
];

fn broken(which: &str, place: &Place) -> Vec<u8> {
    match which {
        "a record longer than any" => record(23, u16::MAX, &[7; 1 << 10]),
        "another hello, in the clear" => client_hello(place),
        "a change of ciphers again and again" => record(20, 1, &[1]).repeat(64),
        "an alert in the clear" => record(21, 2, &[1, 100]).repeat(64),
        "a record that does not decrypt" => record(23, 64, &[7; 64]),
        _ => vec![0xa5; 4 << 10],
    }
}

async fn drained(mut from: impl AsyncRead + Unpin) -> io::Result<()> {
    let mut heard = [0; 1 << 10];
    while from.read(&mut heard).await? > 0 {}
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_are_none_end_their_connection() {
    let daemon = Way::Tls.start();
    let place = Place::of(&daemon);
    for which in BROKEN {
        let bytes = broken(which, &place);
        // Instead of a handshake, unless it is the beginning of one; and after it.
        if !which.starts_with("another hello") {
            let mut socket = place.plain().await.expect("the daemon listens");
            let _ = socket.write_all(&bytes).await;
            let _ = within(which, drained(socket)).await;
        }
        let (mut socket, _) = place.shake().await.expect("a handshake").into_inner();
        let _ = socket.write_all(&bytes).await;
        let _ = within(which, drained(socket)).await;
    }
    // New keys, asked for again and again: each costs the daemon an answer.
    let mut tls = place.shake().await.expect("a handshake");
    let mut asked = 0;
    while asked < 100_000 && new_keys(&mut tls).await.is_ok() {
        asked += 1;
    }
    assert!(asked < 100_000, "it answers for ever");
    enqueue(&daemon.client().await, task("a")).await;
}

async fn new_keys(tls: &mut tokio_rustls::client::TlsStream<TcpStream>) -> io::Result<()> {
    tls.get_mut().1.refresh_traffic_keys().map_err(io::Error::other)?;
    tls.flush().await
}

type Counts = (u32, u64);

async fn hellos(place: Place, until: Instant) -> Counts {
    let (hello, mut counts) = (client_hello(&place), (0, 0));
    while Instant::now() < until {
        let answered = async {
            let mut socket = place.plain().await?;
            socket.write_all(&hello).await?;
            socket.read(&mut [0; 1]).await
        };
        if let Ok(Ok(_)) = timeout_at(until, answered).await {
            counts = (counts.0 + 1, counts.1 + hello.len() as u64);
        }
    }
    counts
}

async fn handshakes(place: Place, until: Instant) -> Counts {
    let mut counts = (0, 0);
    while let Ok(shaken) = timeout_at(until, place.shake()).await {
        counts.0 += u32::from(shaken.is_ok());
    }
    counts
}

/// A crowd that says its hello a byte at a time, and is never done with it.
async fn slow_hellos(place: Place, until: Instant) -> Counts {
    let (hello, mut counts, mut crowd) = (client_hello(&place), (0, 0), Vec::new());
    let shaking = async {
        for byte in &hello[..hello.len() - 1] {
            while crowd.len() < CROWD {
                match place.plain().await {
                    Ok(socket) => crowd.push(socket),
                    Err(_) => break,
                }
                counts.0 += 1;
            }
            for socket in &mut crowd {
                counts.1 += u64::from(socket.write_all(&[*byte]).await.is_ok());
            }
        }
        std::future::pending::<()>().await;
    };
    let _ = timeout_at(until, shaking).await;
    counts
}

/// Handshakes and then records that are none.
async fn garbage(place: Place, until: Instant) -> Counts {
    let mut counts = (0, 0);
    for which in BROKEN.iter().cycle() {
        let bytes = broken(which, &place);
        let sent = async {
            let (mut socket, _) = place.shake().await?.into_inner();
            socket.write_all(&bytes).await?;
            drained(socket).await
        };
        if timeout_at(until, sent).await.is_err() {
            break;
        }
        counts = (counts.0 + 1, counts.1 + bytes.len() as u64);
    }
    counts
}

async fn keys(place: Place, until: Instant) -> Counts {
    let mut counts = (0, 0);
    let asking = async {
        loop {
            let Ok(mut tls) = place.shake().await else { continue };
            counts.0 += 1;
            while new_keys(&mut tls).await.is_ok() {
                counts.1 += 1 << 10;
            }
        }
    };
    let _ = timeout_at(until, asking).await;
    counts
}

/// Records of one byte: each is 22 bytes on the way and one within.
async fn small_records(place: Place, until: Instant) -> Counts {
    let mut counts = (0, 0);
    let sending = async {
        loop {
            let Ok(mut raw) = super::raw::Raw::open(&place).await else { continue };
            counts.0 += 1;
            let ping = frame(PING, 1, 0, &[7; 8]);
            for byte in ping.iter().cycle() {
                if raw.send(&[*byte]).await.is_err() {
                    break;
                }
                counts.1 += 1;
            }
        }
    };
    let _ = timeout_at(until, sending).await;
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attacks_on_handshakes_and_records_do_not_keep_a_good_client_from_its_work() {
    print_columns(Way::Tls);
    beside_a_good_client(Way::Tls, "hellos without a handshake", hellos).await;
    beside_a_good_client(Way::Tls, "handshakes without a call", handshakes).await;
    beside_a_good_client(Way::Tls, "hellos that never end", slow_hellos).await;
    beside_a_good_client(Way::Tls, "records that are none", garbage).await;
    beside_a_good_client(Way::Tls, "new keys without end", keys).await;
    beside_a_good_client(Way::Tls, "records of one byte", small_records).await;
}

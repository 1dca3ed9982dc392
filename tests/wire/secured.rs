//! The attacks that TLS makes possible or makes different: on the handshake, in records, and by clients that never read.

use super::attacks::{HEAD, MOST_KIB, ask_and_never_read, beside, peak_kib, span, store_much, work};
use super::raw::*;
use crate::support::secure::{ADMIN, Authority, Files, admin, put};
use crate::support::*;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// A daemon under TLS, who works with it, and what an attacker needs.
struct Secured {
    daemon: Daemon,
    client: ledgerd_client::Client,
    attacker: Attacker,
    _files: Files,
}

impl Secured {
    async fn start() -> Self {
        let (files, authority) = (Files::new(&admin()), Authority::new());
        put(&files.path("ca.pem"), &authority.pem());
        files.put_pair("server", &authority.server());
        let daemon = files.serve_tls(&[]);
        let client = files.connect_tls(&daemon, Some(ADMIN), None).await.expect("it serves");
        let mut roots = RootCertStore::empty();
        let root = CertificateDer::from_pem_slice(authority.pem().as_bytes()).expect("PEM");
        roots.add(root).expect("a root");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("it is spoken")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let attacker = Attacker { address: daemon.address.clone(), config: Arc::new(config) };
        Self { daemon, client, attacker, _files: files }
    }
}

#[derive(Clone)]
struct Attacker {
    address: String,
    config: Arc<ClientConfig>,
}

impl Attacker {
    async fn connect(&self) -> std::io::Result<TcpStream> {
        TcpStream::connect(&self.address).await
    }

    async fn shake(&self) -> std::io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from("localhost").expect("a name");
        TlsConnector::from(Arc::clone(&self.config)).connect(name, self.connect().await?).await
    }

    /// Handshake after handshake, each left as soon as it is over.
    async fn handshakes(self, until: Instant) -> (u32, u64) {
        let mut connections = 0;
        while Instant::now() < until {
            connections += u32::from(self.shake().await.is_ok());
        }
        (connections, 0)
    }

    /// As many as there may be of half a hello, and then nothing.
    async fn halves(self, until: Instant) -> (u32, u64) {
        let mut open = Vec::new();
        while Instant::now() < until && open.len() < 1_000 {
            let Ok(mut socket) = self.connect().await else { break };
            let _ = socket.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]).await;
            open.push(socket);
        }
        tokio::time::sleep_until(until).await;
        (open.len() as u32, 11 * open.len() as u64)
    }

    /// Connection after connection: `first` by hand or after a handshake, and then these bytes in the clear, again and again.
    async fn records(self, shakes: bool, record: &[u8], until: Instant) -> (u32, u64) {
        let (mut connections, mut sent) = (0, 0);
        while Instant::now() < until {
            let mut socket = if shakes {
                let Ok(stream) = self.shake().await else { continue };
                stream.into_inner().0
            } else {
                let Ok(socket) = self.connect().await else { continue };
                socket
            };
            connections += 1;
            while let Ok(Ok(())) = timeout_at(until, socket.write_all(record)).await {
                sent += record.len() as u64;
            }
        }
        (connections, sent)
    }

    /// After the handshake, under TLS: what is no HTTP/2, or is and says nothing, a piece a record.
    async fn speaks(self, preface: bool, pieces: &[u8], piece: usize, until: Instant) -> (u32, u64) {
        let (mut connections, mut sent) = (0, 0);
        while Instant::now() < until {
            let Ok(stream) = self.shake().await else { continue };
            let stream = if preface { Raw::over(stream).await.map(|raw| raw.0) } else { Ok(stream) };
            let Ok(mut stream) = stream else { continue };
            connections += 1;
            'sending: loop {
                for piece in pieces.chunks(piece) {
                    let send = async {
                        stream.write_all(piece).await?;
                        stream.flush().await
                    };
                    match timeout_at(until, send).await {
                        Ok(Ok(())) => sent += piece.len() as u64,
                        _ => break 'sending,
                    }
                }
            }
        }
        (connections, sent)
    }

    /// Asks for new keys, again and again.
    async fn key_updates(self, until: Instant) -> (u32, u64) {
        let (mut connections, mut sent) = (0, 0);
        while Instant::now() < until {
            let Ok(mut stream) = self.shake().await else { continue };
            connections += 1;
            let ping = frame(PING, 0, 0, &[7; 8]);
            while stream.get_mut().1.refresh_traffic_keys().is_ok() {
                let send = async {
                    stream.write_all(&ping).await?;
                    stream.flush().await
                };
                let Ok(Ok(())) = timeout_at(until, send).await else { break };
                sent += ping.len() as u64;
            }
        }
        (connections, sent)
    }
}

/// A record of TLS that says it is longer than any may be, and its bytes.
fn oversized(kind: u8) -> Vec<u8> {
    let mut record = vec![kind, 3, 3, 0xff, 0xff];
    record.resize(5 + 0xffff, 7);
    record
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attacks_under_tls_do_not_keep_a_good_client_from_its_work() {
    let Secured { daemon, client, attacker, _files } = Secured::start().await;
    eprintln!("\n{HEAD}");
    let by = || attacker.clone();
    beside(&daemon, &client, "handshakes", |until| by().handshakes(until)).await;
    beside(&daemon, &client, "half hellos", |until| by().halves(until)).await;
    let attacker_ = by();
    beside(&daemon, &client, "oversized handshake records", |until| async move {
        attacker_.records(false, &oversized(22), until).await
    })
    .await;
    let attacker_ = by();
    beside(&daemon, &client, "oversized records after the handshake", |until| async move {
        attacker_.records(true, &oversized(23), until).await
    })
    .await;
    let attacker_ = by();
    beside(&daemon, &client, "records that nobody encrypted", |until| async move {
        attacker_
            .records(true, &[23, 3, 3, 0, 32].into_iter().chain([7; 32]).collect::<Vec<u8>>(), until)
            .await
    })
    .await;
    let attacker_ = by();
    beside(&daemon, &client, "garbage under TLS", |until| async move {
        attacker_.speaks(false, &[0xa5; 16 << 10], 16 << 10, until).await
    })
    .await;
    let attacker_ = by();
    beside(&daemon, &client, "PING, a byte a record", |until| async move {
        attacker_.speaks(true, &frame(PING, ACK, 0, &[7; 8]), 1, until).await
    })
    .await;
    beside(&daemon, &client, "new keys", |until| by().key_updates(until)).await;
    assert!(!daemon.log().contains("panic"), "{}", daemon.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_stall_are_dropped_and_keep_nobody_waiting() {
    let Secured { daemon, client, attacker, _files } = Secured::start().await;
    let mut stalled = Vec::new();
    for at in 0..1_000 {
        let mut socket = attacker.connect().await.expect("the daemon listens");
        if at % 2 == 0 {
            socket.write_all(&[22, 3, 1, 2, 0, 1]).await.expect("half a hello");
        }
        stalled.push(socket);
    }
    let before = Instant::now();
    attacker.shake().await.expect("others get through");
    enqueue(&client, task("a")).await;
    assert!(before.elapsed() < std::time::Duration::from_secs(4), "they waited for those that stall");
    let mut heard = Vec::new();
    for mut socket in stalled {
        let _ = within("it is dropped", socket.read_to_end(&mut heard)).await;
    }
    let peak = peak_kib(&daemon);
    eprintln!("1,000 handshakes that stall: peak {} MiB", peak >> 10);
    assert!(peak < MOST_KIB, "{peak} KiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_is_too_long_ends_its_connection_at_once() {
    let Secured { daemon, client, attacker, _files } = Secured::start().await;
    let mut raw = attacker.connect().await.expect("the daemon listens");
    let mut shaken = attacker.shake().await.expect("a handshake").into_inner().0;
    let mut heard = Vec::new();
    for (kind, socket) in [(22, &mut raw), (23, &mut shaken)] {
        socket.write_all(&oversized(kind)[..5]).await.expect("a head");
        let before = Instant::now();
        let _ = within("it is closed", socket.read_to_end(&mut heard)).await;
        assert!(before.elapsed() < std::time::Duration::from_secs(4), "{kind}: its head was enough");
    }
    enqueue(&client, task("a")).await;
    assert!(!daemon.log().contains("panic"), "{}", daemon.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_under_tls_that_never_reads_costs_no_more_than_its_window() {
    let Secured { daemon, client, attacker, _files } = Secured::start().await;
    store_much(&client).await;
    let bearer = format!("Bearer {ADMIN}");
    let mut deaf = Vec::new();
    for _ in 0..8 {
        let stream = attacker.shake().await.expect("a handshake");
        let mut raw = Raw::over(stream).await.expect("it is HTTP/2");
        ask_and_never_read(&mut raw, &[("authorization", &bearer)]).await;
        deaf.push(raw);
    }
    work(&client, Instant::now() + span()).await;
    let peak = peak_kib(&daemon);
    eprintln!("8 clients that never read, under TLS: peak {} MiB", peak >> 10);
    assert!(peak < MOST_KIB, "{peak} KiB");
}

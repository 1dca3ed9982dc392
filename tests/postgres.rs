//! On PostgreSQL: what was acknowledged outlives the server as it outlives the daemon.
//! All other promises are tested on it by running them with `LEDGERD_TEST_STORE=postgres`.

mod numbers;

use crate::durability::load::Load;
use crate::durability::nothing_is_missing;
use crate::support::*;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;

/// Times that the server is stopped without any order.
const STOPS: u64 = 3;
/// Transitions that must have been acknowledged since the last stop, else the next proves little.
const BETWEEN_STOPS: u64 = 300;

/// A server of a test's own, that it may stop and start.
pub(crate) struct Server {
    script: Child,
    pub(crate) url: String,
    pub(crate) bin: String,
    pub(crate) data: String,
}

impl Server {
    pub(crate) fn start() -> Self {
        let say = "echo $LEDGERD_TEST_POSTGRES_URL $LEDGERD_TEST_POSTGRES_BIN $LEDGERD_TEST_POSTGRES_DATA; exec cat";
        let mut script = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.ci/postgres"))
            .args(["sh", "-c", say])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the script starts");
        let mut line = String::new();
        let said = BufReader::new(script.stdout.as_mut().expect("it is piped")).read_line(&mut line);
        assert!(said.is_ok_and(|read| read > 0), "no server was started");
        let mut words = line.split_whitespace().map(str::to_owned);
        let mut word = || words.next().expect("three words");
        Self { url: word(), bin: word(), data: word(), script }
    }

    pub(crate) fn control(&self, words: &[&str]) {
        let mut command = Command::new(if is_root() { "setpriv" } else { "env" });
        if is_root() {
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
        }
        let log = format!("{}/log", self.data);
        let done = command
            .arg(format!("{}/pg_ctl", self.bin))
            .args(["-D", &self.data, "-w", "-l", &log])
            .args(words)
            .current_dir("/")
            .stdout(Stdio::null())
            .status();
        assert!(done.is_ok_and(|status| status.success()), "pg_ctl {words:?}");
    }
}

/// Runs a statement as a superuser; what it says.
pub(crate) fn ask(url: &str, sql: &str) -> String {
    let bin = std::env::var("LEDGERD_TEST_POSTGRES_BIN").expect("it comes with the server");
    let said = Command::new(format!("{bin}/psql")).args([url, "-qAtc", sql]).output();
    String::from_utf8_lossy(&said.expect("psql runs").stdout).trim().to_owned()
}

impl Drop for Server {
    fn drop(&mut self) {
        // The end of its input ends it, and the server with it.
        drop(self.script.stdin.take());
        let _ = self.script.wait();
    }
}

pub(crate) fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|said| said.stdout == b"0\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_work_survives_stops_of_the_server_under_load() {
    if postgres::server().is_none() {
        return;
    }
    let server = Server::start();
    let folder = Folder::new();
    let store = postgres::database(&server.url, &folder);
    let daemon = Daemon::start_with(folder, "127.0.0.1:0", &["--store", &store]);
    configure(&daemon.client().await, "load", quick()).await;
    let load = Load::start(&daemon.address);
    let mut seen = 0;
    for stop in 1..=STOPS {
        eventually("enough is acknowledged", async || {
            (load.counts.acknowledged.load(Relaxed) >= seen + BETWEEN_STOPS).then_some(())
        })
        .await;
        server.control(&["-m", "immediate", "stop"]);
        server.control(&["start"]);
        seen = load.counts.acknowledged.load(Relaxed);
        eprintln!("stop {stop}: {seen} transitions acknowledged so far");
    }
    eventually("the daemon serves again", async || {
        (load.counts.acknowledged.load(Relaxed) >= seen + BETWEEN_STOPS).then_some(())
    })
    .await;
    let record = load.finish().await;
    let found = nothing_is_missing(&daemon.client().await, &record).await;
    eprintln!("{STOPS} stops, {found}: nothing is missing");
}

#[tokio::test]
async fn a_database_that_cannot_be_used_is_told_in_a_sentence() {
    for (store, code, sentence) in [
        ("postgres://ann:hush@db.example.com/x?sslmode=require", 78, "needs sslmode=verify-full"),
        ("postgres://ann:hush@127.0.0.1:1/x", 74, "PostgreSQL at 127.0.0.1:1/x: "),
    ] {
        let output = command()
            .args(["serve", "--listen", "127.0.0.1:0", "--http-listen", "off", "--store", store])
            .output()
            .expect("the binary starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(sentence) && !said.contains("hush"), "{said}");
    }
}

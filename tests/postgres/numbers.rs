//! A server that stops without a checkpoint gives numbers of transactions once more.

use super::{Server, ask};
use crate::support::*;
use ledgerd_client::v1;
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Stops, until one has undone what the server had in its memory alone.
const STOPS: usize = 10;

#[derive(Clone, Copy, PartialEq)]
enum State {
    Open,
    /// The next COMMIT does not get through.
    Armed,
    /// The daemon has no connection and gets none. The server has not noticed.
    Cut,
}

/// What is between a daemon and its server.
struct Link {
    address: String,
    state: Arc<watch::Sender<State>>,
}

impl Link {
    async fn to(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let state = Arc::new(watch::Sender::new(State::Open));
        let (server, shared) = (server.to_owned(), Arc::clone(&state));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let cut = *shared.borrow() == State::Cut;
                if !cut && let Ok(server) = TcpStream::connect(&server).await {
                    tokio::spawn(pass(client, server, Arc::clone(&shared)));
                }
            }
        });
        Self { address, state }
    }

    fn set(&self, state: State) {
        self.state.send_replace(state);
    }

    async fn is_cut(&self) {
        within("a commit", is(&mut self.state.subscribe(), |state| *state == State::Cut)).await;
    }
}

async fn pass(mut client: TcpStream, mut server: TcpStream, state: Arc<watch::Sender<State>>) {
    let mut changed = state.subscribe();
    let (mut asked, mut told) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    loop {
        tokio::select! {
            biased;
            () = is(&mut changed, |state| *state == State::Cut) => break,
            read = client.read(&mut asked) => {
                let Ok(read @ 1..) = read else { return };
                let commits = asked[..read].windows(7).any(|bytes| bytes == b"COMMIT\0");
                if commits && state.send_if_modified(cut) {
                    break;
                }
                if server.write_all(&asked[..read]).await.is_err() {
                    return;
                }
            }
            read = server.read(&mut told) => {
                let Ok(read @ 1..) = read else { return };
                if client.write_all(&told[..read]).await.is_err() {
                    return;
                }
            }
        }
    }
    drop(client);
    is(&mut changed, |state| *state != State::Cut).await;
}

async fn is(changed: &mut watch::Receiver<State>, so: fn(&State) -> bool) {
    let _ = changed.wait_for(so).await;
}

fn cut(state: &mut State) -> bool {
    let armed = *state == State::Armed;
    if armed {
        *state = State::Cut;
    }
    armed
}

fn number(url: &str, sql: &str) -> u64 {
    ask(url, sql).parse().unwrap_or_else(|_| panic!("{sql} tells a number"))
}

/// What its number says of a commit that was lost is by then said of somebody else's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_a_stop_undid_is_not_taken_for_one_with_its_number() {
    if postgres::server().is_none() {
        return;
    }
    let server = Server::start();
    // What nobody commits stays in the server's memory for so long.
    ask(&server.url, "ALTER SYSTEM SET wal_writer_delay = '10s'");
    ask(&server.url, "SELECT pg_reload_conf()");
    let folder = Folder::new();
    let store = postgres::database(&server.url, &folder);
    let (user, place) = store.split_once('@').expect("an address with a user");
    let (place, database) = place.split_once('/').expect("an address with a database");
    let link = Link::to(place).await;
    let store = format!("{user}@{}/{database}", link.address);
    let daemon = Daemon::start_with(folder, "127.0.0.1:0", &["--store", &store]);
    let client = daemon.client().await;
    let mut undone = false;
    for stop in 1..=STOPS {
        let request = v1::EnqueueTaskRequest { task: Some(task("a")), request_id: format!("request {stop}") };
        link.set(State::Armed);
        let (tasks, sent) = (client.tasks(), request.clone());
        let call = tokio::spawn(async move { { tasks }.enqueue_task(sent).await });
        link.is_cut().await;
        let lost = ask(&server.url, "SELECT min(backend_xid::text::bigint) FROM pg_stat_activity");
        server.control(&["-m", "immediate", "stop"]);
        server.control(&["start"]);
        let first = number(&server.url, "SELECT pg_current_xact_id()");
        let more = "DO $$ BEGIN FOR n IN 1..50 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$";
        ask(&server.url, more);
        let given = number(&server.url, "SELECT pg_current_xact_id()");
        eprintln!("stop {stop}: {lost:?} was lost, from {first} on to {given} were given then");
        link.set(State::Open);
        match within("the call is answered", call).await.expect("no panic") {
            // The commit was somebody else's, and this one came after it.
            Ok(reply) => drop(get(&client, &reply.into_inner().task_id).await),
            Err(status) => {
                assert_eq!(reason(&status), "STORE_UNAVAILABLE", "{status}");
                undone = lost.parse().is_ok_and(|lost| (first..given).contains(&lost));
            }
        }
        let id = eventually("the daemon serves again", async || {
            client.tasks().enqueue_task(request.clone()).await.ok().map(|reply| reply.into_inner().task_id)
        });
        get(&client, &id.await).await;
        if undone {
            return;
        }
    }
    panic!("none of {STOPS} stops undid what was in memory");
}

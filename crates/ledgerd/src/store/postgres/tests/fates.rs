//! Commits whose answer was lost, and numbers of transactions that a server gives once more.

use super::flights::agent;
use super::{database, end_sessions, eventually, number, options, raw, rig_on, store_of, url_of};
use crate::store::postgres::flight::Pilot;
use crate::store::postgres::shared::Basis;
use crate::store::postgres::staged::Staged;
use crate::store::rig::{New, Rig};
use ledger_core::store::StoreError;
use sqlx::{AssertSqlSafe, Executor as _, Row as _};
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Passes bytes on between the store and the server, and cuts when the store says COMMIT.
struct Cutter {
    /// Passes the next COMMIT on and cuts before its answer, or cuts before it.
    cut: Arc<std::sync::Mutex<Option<Cut>>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Cut {
    BeforeTheAnswer,
    BeforeTheCommit,
    /// Passes it on, and tells that the server panics in place of its answer.
    Panic,
}

/// As the server says that its disk fails under it.
fn panic() -> Vec<u8> {
    let said = b"SPANIC\0VPANIC\0C58030\0Mcould not fdatasync file\0\0";
    [b"E", &(said.len() as u32 + 4).to_be_bytes()[..], said].concat()
}

impl Cutter {
    async fn before(url: &str) -> (Self, String) {
        let server = url.strip_prefix("postgres://postgres@").expect("the address of the tests");
        let (server, database) = server.split_once('/').expect("an address with a database");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let cut = Arc::new(std::sync::Mutex::new(None));
        let (server, shared) = (server.to_owned(), Arc::clone(&cut));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&server).await.expect("the server is there");
                tokio::spawn(pass(client, server, Arc::clone(&shared)));
            }
        });
        (Self { cut }, format!("postgres://postgres@{address}/{database}?sslmode=disable"))
    }

    fn next(&self, cut: Cut) {
        *self.cut.lock().expect("nobody panics") = Some(cut);
    }

    /// Whether the cut was made.
    fn was_made(&self) -> bool {
        self.cut.lock().expect("nobody panics").is_none()
    }
}

async fn pass(client: TcpStream, server: TcpStream, cut: Arc<std::sync::Mutex<Option<Cut>>>) {
    let ((mut from_client, to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let to_client = Arc::new(tokio::sync::Mutex::new(to_client));
    let said = Arc::clone(&to_client);
    let back = tokio::spawn(async move {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(read @ 1..) = from_server.read(&mut buffer).await {
            if said.lock().await.write_all(&buffer[..read]).await.is_err() {
                break;
            }
        }
    });
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from_client.read(&mut buffer).await {
        let commits = buffer[..read].windows(7).any(|bytes| bytes == b"COMMIT\0");
        let now = if commits { cut.lock().expect("nobody panics").take() } else { None };
        match now {
            // Both sides go at once: the server finds out when it answers.
            Some(Cut::BeforeTheCommit) => break,
            Some(how @ (Cut::BeforeTheAnswer | Cut::Panic)) => {
                back.abort();
                let _ = back.await;
                let _ = to_server.write_all(&buffer[..read]).await;
                if how == Cut::Panic {
                    let _ = to_client.lock().await.write_all(&panic()).await;
                }
                // What it does is on its way; the answer finds nobody.
                return;
            }
            None if to_server.write_all(&buffer[..read]).await.is_err() => break,
            None => {}
        }
    }
    back.abort();
}

#[tokio::test]
async fn a_commit_without_an_answer_is_asked_for() {
    let Some(url) = database().await else { return };
    let (cutter, through) = Cutter::before(&url).await;
    let mut rig = rig_on(&through).await;
    let (mut kept, mut made) = (0, [0, 0]);
    for n in 0..200 {
        let how = if n % 2 == 0 { Cut::BeforeTheAnswer } else { Cut::BeforeTheCommit };
        let id = rig.enqueue(New::of("a")).await;
        cutter.next(how);
        let committed = rig.store().commit().await;
        assert!(cutter.was_made(), "the commit went through the proxy");
        made[n % 2] += 1;
        match (how, committed) {
            (Cut::BeforeTheAnswer, Ok(_)) => kept += 1,
            (Cut::BeforeTheCommit, Err(StoreError::Unavailable(_))) => {}
            (how, other) => panic!(
                "cut {} the answer: {other:?}",
                if how == Cut::BeforeTheAnswer { "before" } else { "long before" }
            ),
        }
        if how == Cut::BeforeTheCommit {
            rig.recover().await;
        }
        assert_eq!(rig.get(id).await.is_some(), how == Cut::BeforeTheAnswer, "what was told is so");
    }
    assert_eq!((made, kept), ([100, 100], 100));
    assert_eq!(number(&url, "SELECT COUNT(*) FROM tasks").await, 100);
    assert_eq!(number(&url, "SELECT COUNT(*) FROM history").await, 100);
    assert_eq!(number(&url, "SELECT last_seq FROM slots").await, 100);
}

/// Its disk failed under a commit, which is there when the server is back.
#[tokio::test]
async fn a_server_that_panics_under_a_commit_is_asked_for_it() {
    let Some(url) = database().await else { return };
    let (cutter, through) = Cutter::before(&url).await;
    let mut rig = rig_on(&through).await;
    for tasks in 1..=3 {
        rig.enqueue(New::of("a")).await;
        cutter.next(Cut::Panic);
        rig.store().commit().await.expect("it was committed");
        assert!(cutter.was_made(), "the commit went through the proxy");
        assert_eq!(number(&url, "SELECT COUNT(*) FROM tasks").await, tasks);
    }
}

/// Who asks for the fate of a batch of this store's, on a connection of its own.
fn asking(rig: &mut Rig) -> (Pilot, Basis) {
    let options = options(&url_of(rig)).expect("the tests' address is valid");
    (Pilot { session: None, begun: false, options }, Basis::of(&Staged::default(), &store_of(rig).place))
}

/// A server that stopped without a checkpoint gives the numbers once more of transactions that left no trace: one in the future was
/// lost, and what it says of one that was committed may be said of somebody else's.
#[tokio::test]
async fn only_the_row_of_our_slot_says_that_a_batch_is_durable() {
    let Some(mut rig) = Rig::postgres().await else { return };
    rig.enqueue(New::of("a")).await;
    rig.commit().await;
    let url = url_of(&rig);
    let mut other = raw(&url).await;
    let ours: String = other.fetch_one("SELECT batch::text FROM slots").await.expect("it has one").get(0);
    let theirs = "INSERT INTO mail (slot, worker) VALUES (0, 'w') RETURNING pg_current_xact_id()::text";
    let theirs: String = other.fetch_one(theirs).await.expect("it is committed").get(0);
    let future = (theirs.parse::<u64>().expect("a number") + 1_000_000).to_string();
    let (mut pilot, basis) = asking(&mut rig);
    for (owner, batch_owner, fates) in [
        ("owner", "owner", [Some(true), Some(false), Some(false)]),
        // Another daemon took over, and nobody has written as its owner since.
        ("NULL", "owner", [Some(true), Some(false), Some(false)]),
        // Somebody may have, or has, and is gone again.
        ("7", "batch_owner", [None, None, None]),
        ("NULL", "7", [None, None, None]),
    ] {
        let take = format!("UPDATE slots SET owner = {owner}, batch_owner = {batch_owner}");
        other.execute(AssertSqlSafe(take)).await.expect("nobody holds it");
        for (transaction, fate) in [&ours, &theirs, &future].into_iter().zip(fates) {
            assert_eq!(pilot.ask_fate(&basis, transaction).await, Ok(fate), "{transaction} beside {ours}");
        }
    }
}

#[tokio::test]
async fn a_commit_that_is_under_way_is_waited_for() {
    let Some(mut rig) = Rig::postgres().await else { return };
    let url = url_of(&rig);
    for (end, fate) in [("COMMIT", true), ("ROLLBACK", false)] {
        let mut other = raw(&url).await;
        other.execute("BEGIN").await.expect("it is new");
        let batch = "UPDATE slots SET batch = pg_current_xact_id() RETURNING batch::text";
        let batch: String = other.fetch_one(batch).await.expect("nobody holds it").get(0);
        let (mut pilot, basis) = asking(&mut rig);
        let asked = tokio::spawn(async move { pilot.ask_fate(&basis, &batch).await });
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
            AND wait_event_type = 'Lock' AND query LIKE '%FOR SHARE'";
        eventually(async || (number(&url, waits).await == 1).then_some(())).await;
        other.execute(end).await.expect("it is the last");
        assert_eq!(asked.await.expect("no panic"), Ok(Some(fate)), "{end}");
    }
}

#[tokio::test]
async fn after_a_stop_of_the_server_changes_of_smaller_numbers_are_seen() {
    let Some(mut first) = Rig::postgres().await else { return };
    let url = url_of(&first);
    let now = first.now;
    first.store().news(&[], false, now).await.expect("it looks");
    // What it knows of is after whatever comes.
    "900000000".clone_into(&mut store_of(&mut first).place.seen);
    end_sessions(&url).await;
    assert!(first.store().news(&[], false, now).await.is_err(), "its session has ended");
    first.recover().await;
    let mut second = rig_on(&url).await;
    second.write(agent("another")).await;
    second.commit().await;
    let news = first.store().news(&[], false, now).await.expect("it looks");
    assert_eq!(news.agents.iter().map(|row| &*row.name).collect::<Vec<_>>(), ["another"]);
}

/// The block that was taken last went with what the server lost, and goes to whoever asks next.
#[tokio::test]
async fn after_a_stop_of_the_server_no_number_of_a_task_is_given_by_two() {
    let Some(mut first) = Rig::postgres().await else { return };
    let url = url_of(&first);
    let lost = first.enqueue(New::of("a")).await;
    end_sessions(&url).await;
    assert!(first.store().commit().await.is_err(), "its session has ended");
    raw(&url).await.execute("ALTER SEQUENCE task_blocks RESTART").await.expect("nobody uses it");
    first.recover().await;
    let mut second = rig_on(&url).await;
    let theirs = second.enqueue_all((0..3).map(|_| New::of("a"))).await;
    second.commit().await;
    assert_eq!(theirs[0], lost, "as if nobody had had it");
    let ours = first.enqueue_all((0..3).map(|_| New::of("a"))).await;
    first.commit().await;
    assert!(ours.iter().all(|id| !theirs.contains(id)), "{ours:?} beside {theirs:?}");
}

/// It took the place of one that was gone, and what that one watched over is its own, however often the start is tried.
#[tokio::test]
async fn what_is_inherited_by_a_start_is_so_when_it_is_tried_again() {
    let Some(first) = Rig::postgres().await else { return };
    let url = url_of(&first);
    let _second = rig_on(&url).await;
    raw(&url).await.execute("UPDATE slots SET beat_at = 0 WHERE slot = 0").await.expect("nobody holds it");
    drop(first);
    let mut heir = eventually(async || {
        let mut heir = rig_on(&url).await;
        let took = store_of(&mut heir).place.slot == 0;
        took.then_some(heir)
    })
    .await;
    for _ in 0..2 {
        assert!(!store_of(&mut heir).watches_own, "it watches over all that nobody does");
        heir.recover().await;
    }
    assert!(!store_of(&mut heir).watches_own);
}

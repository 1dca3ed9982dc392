//! Connections that only read.

use super::{eventually, raw, url_of};
use crate::store::rig::{Kind, Rig};
use sqlx::postgres::PgConnection;
use sqlx::{Executor, Row};

/// Waits until the session of a reader that went back to its pool has been left there.
async fn left(of: i32, conn: &mut PgConnection) {
    eventually(async || {
        let session = sqlx::query("SELECT state, query FROM pg_stat_activity WHERE pid = $1").bind(of);
        let session = session.fetch_one(&mut *conn).await.expect("its session goes on");
        let (state, last): (String, String) = (session.get(0), session.get(1));
        (state == "idle" && last.contains("ROLLBACK")).then_some(())
    })
    .await;
}

#[tokio::test]
async fn whoever_reads_leaves_no_transaction_open_and_no_word_in_the_servers_log() {
    let Some(rig) = Rig::postgres().await else { return };
    let Kind::Postgres { reader, .. } = &rig.kind else { panic!("it is on PostgreSQL") };
    let mut other = raw(&url_of(&rig)).await;
    // As after a read; and as after one that was dropped half-way.
    for half_way in [false, true] {
        let mut session = reader.pool.acquire().await.expect("one is free");
        if half_way {
            session.execute("BEGIN").await.expect("it begins");
        }
        let of: i32 = session.fetch_one("SELECT pg_backend_pid()").await.expect("it reads").get(0);
        drop(session);
        left(of, &mut other).await;
        if half_way {
            continue;
        }
        let log: String = other.fetch_one("SELECT pg_read_file('log')").await.expect("it reads").get(0);
        assert!(log.contains("database system is ready"), "this is the log");
        let of_it = format!("[{of}] ");
        let said: Vec<&str> = log.lines().filter(|line| line.contains(&of_it)).collect();
        assert!(said.is_empty(), "{said:?}");
    }
}

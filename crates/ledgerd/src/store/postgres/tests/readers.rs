//! Connections that only read.

use super::{eventually, raw, url_of};
use crate::store::rig::{Kind, Rig};
use ledger_core::TaskId;
use ledger_core::store::Reader;
use sqlx::{Executor, Row};

#[tokio::test]
async fn whoever_reads_leaves_no_transaction_open_and_no_word_in_the_servers_log() {
    let Some(rig) = Rig::postgres().await else { return };
    let Kind::Postgres { reader, .. } = &rig.kind else { panic!("it is on PostgreSQL") };
    for _ in 0..3 {
        reader.history(TaskId(1)).await.expect("it reads");
    }
    let who = "SELECT pg_backend_pid(), pg_read_file('log')";
    let asked = reader.pool.fetch_one(who).await.expect("it reads");
    let (pid, log): (i32, String) = (asked.get(0), asked.get(1));
    let (of_it, of_server) = (format!("[{pid}] "), "database system is ready");
    assert!(log.contains(of_server), "this is the log");
    let said: Vec<&str> = log.lines().filter(|line| line.contains(&of_it)).collect();
    assert!(said.is_empty(), "{said:?}");
    // As after a call that was dropped half-way.
    let mut left = reader.pool.acquire().await.expect("one is free");
    left.execute("BEGIN").await.expect("it begins");
    let of: i32 = left.fetch_one(who).await.expect("it reads").get(0);
    drop(left);
    let mut other = raw(&url_of(&rig)).await;
    eventually(async || {
        let state = sqlx::query_scalar("SELECT state FROM pg_stat_activity WHERE pid = $1").bind(of);
        let state: String = state.fetch_one(&mut other).await.expect("its session goes on");
        (state == "idle").then_some(())
    })
    .await;
}

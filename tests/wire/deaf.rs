//! Whoever does not read. A file of its own, for it takes half a minute, and tests begin in the order of their paths.

use crate::support::secure::Way;
use crate::support::worker::{Stream, hello};
use crate::support::*;
use ledgerd_client::v1;

both_ways!(a_worker_that_stops_reading_is_ended);

async fn a_worker_that_stops_reading_is_ended(way: Way) {
    let daemon = way.start();
    let client = daemon.client().await;
    let worker = Stream::open(&daemon, hello("deaf", "a", 100)).await;
    // More than the windows of a stream and a connection take, so that frames wait in the daemon.
    for _ in 0..8 {
        let big = v1::NewTask { payload: vec![7; 900 << 10].into(), ..task("a") };
        enqueue(&client, big).await;
    }
    // 95: 30 s without room to send; nothing here reads the stream meanwhile.
    let gone = async {
        loop {
            let workers =
                client.admin().list_workers(v1::ListWorkersRequest::default()).await.expect("listed");
            if workers.into_inner().workers.is_empty() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(250)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(90), gone).await.expect("95: the session is ended");
    drop(worker);
}

//! One address in front of several daemons, as a service of a cluster has: each connection goes to the next that answers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

#[derive(Debug)]
pub(crate) struct Balancer {
    pub(crate) address: String,
    behind: Arc<Mutex<Vec<String>>>,
    accepts: JoinHandle<()>,
}

impl Balancer {
    pub(crate) async fn before(addresses: Vec<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let behind = Arc::new(Mutex::new(addresses));
        let shared = Arc::clone(&behind);
        let accepts = tokio::spawn(async move {
            let turn = Arc::new(AtomicUsize::new(0));
            while let Ok((client, _)) = listener.accept().await {
                let (behind, turn) = (Arc::clone(&shared), Arc::clone(&turn));
                tokio::spawn(async move { pass(client, &behind, &turn).await });
            }
        });
        Self { address, behind, accepts }
    }

    /// Sends new connections to these from now on.
    pub(crate) fn send_to(&self, addresses: Vec<String>) {
        *self.behind.lock().expect("nobody panics") = addresses;
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.accepts.abort();
    }
}

async fn pass(mut client: TcpStream, behind: &Mutex<Vec<String>>, turn: &AtomicUsize) {
    let addresses = behind.lock().expect("nobody panics").clone();
    let first = turn.fetch_add(1, Ordering::Relaxed);
    for at in 0..addresses.len() {
        // One that is down refuses at once, and the next is asked.
        if let Ok(mut daemon) = TcpStream::connect(&addresses[(first + at) % addresses.len()]).await {
            let _ = (client.set_nodelay(true), daemon.set_nodelay(true));
            let _ = tokio::io::copy_bidirectional(&mut client, &mut daemon).await;
            return;
        }
    }
}

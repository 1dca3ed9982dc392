//! One connection to any of several daemons that serve one ledger: the next that answers.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Time that one of them gets, so that a host that swallows packets does not keep the others from being asked.
const EACH: Duration = Duration::from_secs(2);

/// Dials addresses in turn. Clones share whose turn it is.
#[derive(Clone, Debug)]
pub(crate) struct Dialer {
    addresses: Arc<[String]>,
    turn: Arc<AtomicUsize>,
}

impl Dialer {
    /// The first dialled is one of them, not always the same: many clients spread over the daemons.
    pub(crate) fn new(addresses: Vec<String>, first: usize) -> Self {
        Self { addresses: addresses.into(), turn: Arc::new(AtomicUsize::new(first)) }
    }

    /// # Errors
    /// Why the last of them was not to be had.
    pub(crate) async fn dial(self) -> io::Result<TokioIo<TcpStream>> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for _ in 0..self.addresses.len() {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            let address = &self.addresses[turn % self.addresses.len()];
            match timeout(EACH, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    stream.set_nodelay(true)?;
                    return Ok(TokioIo::new(stream));
                }
                Ok(Err(error)) => last = error,
                Err(_) => last = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn the_next_that_answers_is_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = listener.local_addr().unwrap().to_string();
        // Nobody listens on port 1.
        for first in 0..3 {
            let dialer = Dialer::new(vec!["127.0.0.1:1".into(), there.clone(), "127.0.0.1:1".into()], first);
            assert!(dialer.dial().await.is_ok(), "{first}");
        }
        let nobody = Dialer::new(vec!["127.0.0.1:1".into()], 5).dial().await.unwrap_err();
        assert_eq!(nobody.kind(), io::ErrorKind::ConnectionRefused);
    }
}

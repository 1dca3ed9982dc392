//! Connections before they speak HTTP/2: how many there may be, and how long one may say nothing. Later, what its conduct is.
//!
//! Why our own accept loop: tonic's turns at once when descriptors run out, and waits for ever for a peer that connects
//! and stays silent.

use super::conduct::Conduct;
use futures_util::Stream;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};

/// A connection says at least the preface of HTTP/2 within this time.
pub(super) const SPEAKS_WITHIN: Duration = Duration::from_secs(5);
pub(super) const PREFACE_BYTES: usize = 24;
/// The operating system tries a silent connection so often, and gives up on unconfirmed data after this.
const KEEPALIVE: Duration = Duration::from_secs(60);
const USER_TIMEOUT_MS: u32 = 30_000;
/// First and longest pause after an accept that failed.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Connections as they come. Over the limit they wait in the queue of the operating system.
pub(super) fn incoming(listener: TcpListener) -> impl Stream<Item = io::Result<Guarded>> {
    let slots = Arc::new(Semaphore::new(crate::process::connection_limit()));
    futures_util::stream::unfold((listener, slots), |(listener, slots)| async move {
        let guarded = accept(&listener, &slots).await?;
        Some((Ok(guarded), (listener, slots)))
    })
}

async fn accept(listener: &TcpListener, slots: &Arc<Semaphore>) -> Option<Guarded> {
    // Never closed, so this only ends with the process.
    let slot = Arc::clone(slots).acquire_owned().await.ok()?;
    let mut pause = PAUSE;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                if let Err(error) = settle(&stream) {
                    tracing::debug!(%error, %peer, "a connection was gone before it began");
                    continue;
                }
                return Some(Guarded {
                    stream,
                    heard: 0,
                    silence: Some(Box::pin(sleep(SPEAKS_WITHIN))),
                    conduct: Conduct::new(),
                    _slot: slot,
                });
            }
            // Out of descriptors, most likely; the next try would fail as well.
            Err(error) => {
                tracing::warn!(%error, "no connection can be taken");
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

fn settle(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE)?;
    sockopt::set_tcp_user_timeout(stream, USER_TIMEOUT_MS)?;
    Ok(())
}

/// A connection that must speak soon, and that counts.
pub(super) struct Guarded {
    stream: TcpStream,
    heard: usize,
    /// Armed until the preface was heard.
    silence: Option<Pin<Box<Sleep>>>,
    conduct: Conduct,
    _slot: OwnedSemaphorePermit,
}

impl Guarded {
    /// How it behaves, for its calls to tell.
    pub(super) fn conduct(&self) -> Conduct {
        self.conduct.clone()
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(silence) = &mut self.silence
            && silence.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let came = buf.filled().len() - before;
        if read.is_ready() && !self.conduct.came(came) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if self.silence.is_some() {
            self.heard += came;
            if self.heard >= PREFACE_BYTES {
                self.silence = None;
            }
        }
        read
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;
    use std::pin::pin;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn a_silent_connection_is_dropped_and_one_that_speaks_is_kept() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let mut incoming = pin!(incoming(listener));
        let mut client = TcpStream::connect(address).await.expect("a connection");
        let mut guarded = incoming.next().await.expect("a connection").expect("a connection");
        client.write_all(b"PRI * HTTP").await.expect("half a preface");
        let mut heard = [0; 64];
        assert_eq!(guarded.read(&mut heard).await.expect("bytes"), 10);
        // As if its time were over.
        guarded.silence = Some(Box::pin(sleep(Duration::ZERO)));
        let error = guarded.read(&mut heard).await.expect_err("too late");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        client.write_all(b"/2.0\r\n\r\nSM\r\n\r\n").await.expect("the rest");
        guarded.silence = Some(Box::pin(sleep(SPEAKS_WITHIN)));
        assert_eq!(guarded.read(&mut heard).await.expect("bytes"), 14);
        assert!(guarded.silence.is_none(), "it spoke");
    }
}

//! Connections as they are accepted: how many there may be, and what the conduct of each is.
//!
//! Why our own accept loop: tonic's turns at once when descriptors run out, and waits for ever for a peer that connects
//! and stays silent (`prompt`).

use super::conduct::Conduct;
use super::prompt::Prompt;
use futures_util::Stream;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};

/// The operating system tries a silent connection so often, and gives up on unconfirmed data after this.
const KEEPALIVE: Duration = Duration::from_secs(60);
const USER_TIMEOUT_MS: u32 = 30_000;
/// How long a connection that says much to no purpose rests after each turn, unless something useful makes up for it before: a
/// handler may come late to what waits for it. So it is read at no more than 1 MiB a second, which as frames of 14 bytes takes less
/// than a tenth of a processor in a debug build; read in one go, it takes the whole of one.
const REST: Duration = Duration::from_millis(20);
/// Bytes of one turn. h2 takes up everything that there is before it lets others go on, and tokio counts reads, not what they
/// bring: a hundred of them can be 100,000 frames, and whoever shares the thread waits for all.
const TURN: usize = 16 << 10;
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
                let stream = Prompt::new(stream);
                return Some(Guarded::new(stream, slot));
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

/// A connection that must speak soon, that counts, and that lets others have their turn.
pub(super) struct Guarded<S = TcpStream> {
    stream: Prompt<S>,
    conduct: Conduct,
    /// Bytes that came in this turn.
    turn: usize,
    /// Bytes that came since the last rest.
    unrested: usize,
    rest: Option<Pin<Box<Sleep>>>,
    _slot: OwnedSemaphorePermit,
}

impl<S> Guarded<S> {
    fn new(stream: Prompt<S>, slot: OwnedSemaphorePermit) -> Self {
        Self { stream, conduct: Conduct::new(), turn: 0, unrested: 0, rest: None, _slot: slot }
    }

    /// How it behaves, for its calls to tell.
    pub(super) fn conduct(&self) -> Conduct {
        self.conduct.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Who sends slowly has many turns that are short, and rests as well.
        if self.unrested >= TURN && self.conduct.is_unhurried(cx) {
            let rest = self.rest.get_or_insert_with(|| Box::pin(sleep(REST)));
            ready!(rest.as_mut().poll(cx));
            (self.unrested, self.turn) = (0, 0);
        }
        self.rest = None;
        if self.turn >= TURN {
            self.turn = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let came = buf.filled().len() - before;
        self.turn = if read.is_ready() { self.turn + came } else { 0 };
        self.unrested = self.unrested.saturating_add(came);
        if read.is_ready() && !self.conduct.came(came) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::Instant;

    /// How long 1 MiB takes of which each turn is said something to about this.
    async fn reading(mut about: impl FnMut(&Conduct, usize)) -> Duration {
        let (mut client, server) = duplex(TURN);
        let slot = Arc::new(Semaphore::new(1)).try_acquire_owned().expect("it is free");
        let mut guarded = Guarded::new(Prompt::new(server), slot);
        let sending = tokio::spawn(async move { client.write_all(&vec![7; 1 << 20]).await });
        let (start, mut heard) = (Instant::now(), vec![0; TURN]);
        loop {
            let came = guarded.read(&mut heard).await.expect("it goes on");
            if came == 0 {
                break;
            }
            about(&guarded.conduct(), came);
        }
        sending.await.expect("no panic").expect("all is sent");
        start.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn what_says_nothing_is_read_slowly_and_what_says_something_is_not() {
        // 64 KiB of it are read at once.
        let rests = ((1 << 20) - (64 << 10)) / TURN as u32 - 1;
        assert!(reading(|_, _| {}).await >= REST * rests);
        assert!(reading(|conduct, came| conduct.says_something(came, 0)).await.is_zero());
        // A handler that comes to it late: it is read on then, and not only when the rest is over.
        let mut handler = None;
        let late = |conduct: &Conduct, _| {
            let conduct = conduct.clone();
            handler.get_or_insert_with(|| {
                tokio::spawn(async move {
                    loop {
                        sleep(Duration::from_millis(1)).await;
                        conduct.says_something(64 << 10, 1);
                    }
                })
            });
        };
        assert!(reading(late).await < REST);
        handler.expect("it began").abort();
    }
}

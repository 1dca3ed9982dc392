//! A connection that must begin HTTP/2 soon. h2 itself waits for the preface for ever.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// A connection says this much before it is believed to speak HTTP/2.
const PREFACE_BYTES: usize = 24;
/// And it says it within this time.
pub(super) const SPEAKS_WITHIN: Duration = Duration::from_secs(5);

/// See the module.
pub(super) struct Prompt<S> {
    stream: S,
    heard: usize,
    /// Armed until the preface was heard.
    silence: Option<Pin<Box<Sleep>>>,
}

impl<S> Prompt<S> {
    /// From now on.
    pub(super) fn new(stream: S) -> Self {
        Self { stream, heard: 0, silence: Some(Box::pin(sleep(SPEAKS_WITHIN))) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prompt<S> {
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
        if self.silence.is_some() {
            self.heard += buf.filled().len() - before;
            if self.heard >= PREFACE_BYTES {
                self.silence = None;
            }
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prompt<S> {
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

    #[tokio::test(start_paused = true)]
    async fn one_that_is_silent_or_slow_is_dropped_and_one_that_speaks_is_kept() {
        let (mut client, server) = duplex(64);
        let mut prompt = Prompt::new(server);
        let mut heard = [0; 64];
        client.write_all(b"PRI * HTTP").await.expect("half a preface");
        assert_eq!(prompt.read(&mut heard).await.expect("bytes"), 10);
        // The clock is moved on while nothing else can happen.
        let error = prompt.read(&mut heard).await.expect_err("too late");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);

        let (mut client, server) = duplex(64);
        let mut prompt = Prompt::new(server);
        client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("a preface");
        assert_eq!(prompt.read(&mut heard).await.expect("bytes"), 24);
        tokio::time::advance(SPEAKS_WITHIN * 2).await;
        client.write_all(b"more").await.expect("bytes");
        assert_eq!(prompt.read(&mut heard).await.expect("it spoke"), 4);
    }
}

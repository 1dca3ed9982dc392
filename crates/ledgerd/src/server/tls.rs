//! Connections under TLS: the handshake, and whom the certificate of a client names.
//!
//! TLS 1.3 with HTTP/2 alone. Each handshake is a task of its own with a deadline, so that a slow one keeps nobody waiting;
//! how many there may be is up to the guard, whose slot a connection holds from its first byte on.

use super::conduct::Conduct;
use super::guard::{self, Guarded};
use super::prompt::{Prompt, SPEAKS_WITHIN};
use crate::trust::Trusted;
use futures_util::{Stream, StreamExt};
use rustls::pki_types::CertificateDer;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// Connections that wait to be taken up after their handshake; the server takes them at once.
const READY: usize = 16;

/// Whom a connection belongs to, and how it behaves.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// DNS names and URIs of its certificate, which was verified; none where it has no certificate.
    pub(super) names: Arc<[Box<str>]>,
    /// How the connection behaves.
    pub(super) conduct: Conduct,
}

/// Connections as they come, after their handshake where there is TLS.
pub(super) fn incoming(
    listener: TcpListener,
    trusted: Trusted,
) -> Pin<Box<dyn Stream<Item = io::Result<Connection>> + Send>> {
    let accepted = guard::incoming(listener);
    if trusted.borrow().tls.is_none() {
        return Box::pin(accepted.map(|guarded| guarded.map(Connection::Plain)));
    }
    let (ready, taken) = mpsc::channel(READY);
    tokio::spawn(async move {
        let mut accepted = pin!(accepted);
        // Ends, and closes the port, when the server takes no more.
        while let Some(Some(Ok(guarded))) = tokio::select! {
            next = accepted.next() => Some(next),
            () = ready.closed() => None,
        } {
            // As the files are now: a certificate that was replaced holds from the next connection on.
            let Some(config) = trusted.borrow().tls.clone() else { return };
            let ready = ready.clone();
            tokio::spawn(async move {
                match timeout(SPEAKS_WITHIN, shake(TlsAcceptor::from(config), guarded)).await {
                    Ok(Ok(connection)) => drop(ready.send(Ok(connection)).await),
                    Ok(Err(error)) => {
                        tracing::debug!(%error, "a connection did not get through its handshake");
                    }
                    Err(_) => tracing::debug!("a handshake took too long"),
                }
            });
        }
    });
    Box::pin(ReceiverStream::new(taken))
}

async fn shake(acceptor: TlsAcceptor, guarded: Guarded) -> io::Result<Connection> {
    let stream = acceptor.accept(guarded).await?;
    let (_, session) = stream.get_ref();
    // Who offers no protocol at all gets through the handshake; nothing but HTTP/2 is spoken here.
    if session.alpn_protocol() != Some(b"h2") {
        return Err(io::Error::other("it did not ask for HTTP/2"));
    }
    let names = session.peer_certificates().and_then(<[_]>::first).map(names).unwrap_or_default();
    let conduct = stream.get_ref().0.conduct();
    let peer = Peer { names: names.into(), conduct };
    // What the guard hears is only ciphertext, so here it begins anew.
    Ok(Connection::Tls(Box::new(Prompt::new(stream)), peer))
}

/// DNS names and URIs of a certificate; other names are nobody's.
fn names(certificate: &CertificateDer<'_>) -> Vec<Box<str>> {
    let Ok(certificate) = webpki::EndEntityCert::try_from(certificate) else { return Vec::new() };
    certificate.valid_uri_names().chain(certificate.valid_dns_names()).map(Box::from).collect()
}

/// A connection, with or without TLS.
pub(super) enum Connection {
    Plain(Guarded),
    Tls(Box<Prompt<TlsStream<Guarded>>>, Peer),
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        match self {
            Self::Plain(plain) => Peer { names: Arc::default(), conduct: plain.conduct() },
            Self::Tls(_, peer) => peer.clone(),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(plain) => Pin::new(plain).poll_read(cx, buf),
            Self::Tls(secured, _) => Pin::new(secured).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(plain) => Pin::new(plain).poll_write(cx, buf),
            Self::Tls(secured, _) => Pin::new(secured).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(plain) => Pin::new(plain).poll_flush(cx),
            Self::Tls(secured, _) => Pin::new(secured).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(plain) => Pin::new(plain).poll_shutdown(cx),
            Self::Tls(secured, _) => Pin::new(secured).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(plain) => Pin::new(plain).poll_write_vectored(cx, bufs),
            Self::Tls(secured, _) => Pin::new(secured).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(plain) => plain.is_write_vectored(),
            Self::Tls(secured, _) => secured.is_write_vectored(),
        }
    }
}

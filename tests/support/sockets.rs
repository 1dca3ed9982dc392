//! Connections by hand, as bytes: in the clear, or after a handshake of TLS.

use super::Daemon;
use super::secure::Leaf;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// What every daemon here is called.
pub(crate) fn name() -> ServerName<'static> {
    ServerName::try_from("localhost").expect("a name")
}

/// What a client of TLS goes by that trusts this authority.
pub(crate) fn config(ca: &str, protocols: &[&[u8]], identity: Option<&Leaf>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).expect("PEM")).expect("a root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("it is spoken")
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(leaf) => {
            let chain = vec![CertificateDer::from_pem_slice(leaf.cert.as_bytes()).expect("PEM")];
            let key = PrivateKeyDer::from_pem_slice(leaf.key.as_bytes()).expect("PEM");
            builder.with_client_auth_cert(chain, key).expect("a pair")
        }
    };
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    // Each handshake is a whole one.
    config.resumption = rustls::client::Resumption::disabled();
    Arc::new(config)
}

/// Where a daemon is and how it is spoken to, for whoever outlives a borrow of it.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) address: String,
    pub(crate) tls: Option<Arc<ClientConfig>>,
}

impl Place {
    pub(crate) fn of(daemon: &Daemon) -> Self {
        let ca = daemon.ca().map(|ca| std::fs::read_to_string(ca).expect("a certificate"));
        Self { address: daemon.address.clone(), tls: ca.map(|ca| config(&ca, &[b"h2"], None)) }
    }

    /// `http` or `https`.
    pub(crate) fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// A connection in which HTTP/2 can begin.
    pub(crate) async fn connect(&self) -> io::Result<Socket> {
        Ok(if self.tls.is_some() { Box::new(self.shake().await?) } else { Box::new(self.plain().await?) })
    }

    /// A connection before anything was said.
    pub(crate) async fn plain(&self) -> io::Result<TcpStream> {
        TcpStream::connect(&self.address).await
    }

    /// A connection after its handshake.
    pub(crate) async fn shake(&self) -> io::Result<TlsStream<TcpStream>> {
        let config = self.tls.clone().ok_or(io::ErrorKind::Unsupported)?;
        TlsConnector::from(config).connect(name(), self.plain().await?).await
    }
}

/// A connection of either kind.
pub(crate) type Socket = Box<dyn Bytes>;

/// Bytes in and out.
pub(crate) trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

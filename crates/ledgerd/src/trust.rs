//! What the daemon goes by about others: its certificate, whose certificates it trusts, and its callers.
//!
//! All of it is in files, which are read again when they change, and at once on SIGHUP. Files that cannot be used leave
//! what was read before in force: a certificate and its key are often replaced one after the other.

use crate::Live;
use crate::callers::Callers;
use crate::config::{Config, TlsFiles};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

/// How often the files are looked at: what is revoked ends within seconds.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What was read last and can be used.
#[derive(Debug)]
pub(crate) struct Trust {
    /// For connections; none: calls travel in the clear.
    pub(crate) tls: Option<Arc<ServerConfig>>,
    /// Who may do what; none: everybody everything.
    pub(crate) callers: Option<Callers>,
}

/// A view of it that stays up to date.
pub(crate) type Trusted = watch::Receiver<Arc<Trust>>;

/// A file, and what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("{}: {fault}", path.display())]
pub struct TrustError {
    path: PathBuf,
    fault: String,
}

impl TrustError {
    fn new(path: &Path, fault: &impl ToString) -> Self {
        Self { path: path.to_owned(), fault: fault.to_string() }
    }
}

/// The files, and what was in them when they were looked at last.
#[derive(Debug)]
pub(crate) struct Keeper {
    tls: Option<TlsFiles>,
    callers: Option<PathBuf>,
    seen: Vec<Vec<u8>>,
    trust: watch::Sender<Arc<Trust>>,
}

impl Keeper {
    /// Reads the files for the first time.
    ///
    /// # Errors
    /// The first file that cannot be used.
    pub(crate) fn start(config: &Config) -> Result<Self, TrustError> {
        let empty = Trust { tls: None, callers: None };
        let mut keeper = Self {
            tls: config.tls.clone(),
            callers: config.callers.clone(),
            seen: Vec::new(),
            trust: watch::Sender::new(Arc::new(empty)),
        };
        keeper.seen = keeper.look()?;
        let first = keeper.understand(&keeper.seen)?;
        keeper.trust.send_replace(Arc::new(first));
        if let Some(tls) = &keeper.tls
            && is_open(&tls.key)
        {
            tracing::warn!(path = %tls.key.display(), "every user of this machine can read this key; take that away");
        }
        Ok(keeper)
    }

    /// What is in force, now and later.
    pub(crate) fn trusted(&self) -> Trusted {
        self.trust.subscribe()
    }

    /// Keeps it up to date, for ever. `live` asks for it at once.
    pub(crate) async fn keep(mut self, live: Arc<Live>) {
        let mut tick = interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let asked = tokio::select! {
                () = live.reload.notified() => true,
                _ = tick.tick() => false,
            };
            self.look_again(asked);
        }
    }

    fn look_again(&mut self, asked: bool) {
        let found = match self.look() {
            Ok(found) => found,
            // It may be gone for a moment only, while it is replaced.
            Err(error) => return tracing::warn!(%error, "a file cannot be read; what it said stays in force"),
        };
        if found.is_empty() || (found == self.seen && !asked) {
            return;
        }
        match self.understand(&found) {
            Ok(trust) => {
                let callers = trust.callers.as_ref().map(Callers::count);
                tracing::info!(callers, "certificates and callers were read again");
                self.trust.send_replace(Arc::new(trust));
            }
            Err(error) => tracing::warn!(%error, "a file cannot be used; what it said before stays in force"),
        }
        // The same fault is told once.
        self.seen = found;
    }

    /// Every file, in one order.
    fn paths(&self) -> impl Iterator<Item = &Path> {
        let tls = self.tls.iter().flat_map(|tls| [Some(&tls.cert), Some(&tls.key), tls.client_ca.as_ref()]);
        tls.flatten().chain(&self.callers).map(PathBuf::as_path)
    }

    /// Small files on a local disk: reading them is quicker than asking whether they changed.
    fn look(&self) -> Result<Vec<Vec<u8>>, TrustError> {
        self.paths().map(|path| std::fs::read(path).map_err(|error| TrustError::new(path, &error))).collect()
    }

    fn understand(&self, found: &[Vec<u8>]) -> Result<Trust, TrustError> {
        let mut found = found.iter().map(Vec::as_slice);
        let mut next = || found.next().unwrap_or_default();
        let tls = match &self.tls {
            None => None,
            Some(files) => {
                let (cert, key) = (next(), next());
                let client_ca = files.client_ca.as_deref().map(|path| (path, next()));
                Some(Arc::new(server_config((&files.cert, cert), (&files.key, key), client_ca)?))
            }
        };
        let callers = self.callers.as_deref().map(|path| {
            let text = std::str::from_utf8(next()).map_err(|error| TrustError::new(path, &error))?;
            Callers::read(text).map_err(|error| TrustError::new(path, &error))
        });
        Ok(Trust { tls, callers: callers.transpose()? })
    }
}

/// Whether every user of the machine can read a file.
fn is_open(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|file| file.permissions().mode() & 0o004 != 0)
}

/// A file and what is in it.
type Read<'a> = (&'a Path, &'a [u8]);

fn server_config(
    cert: Read<'_>,
    key: Read<'_>,
    client_ca: Option<Read<'_>>,
) -> Result<ServerConfig, TrustError> {
    let chain = certificates(cert)?;
    let secret = PrivateKeyDer::from_pem_slice(key.1)
        .map_err(|_| TrustError::new(key.0, &"there is no private key in it that can be read"))?;
    // Named, so that it does not depend on what else is in the binary: there is one provider for all of it.
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| TrustError::new(cert.0, &error))?;
    let is_mutual = client_ca.is_some();
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let mut roots = RootCertStore::empty();
            for root in certificates(file)? {
                roots.add(root).map_err(|error| TrustError::new(file.0, &error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            let verifier = verifier.build().map_err(|error| TrustError::new(file.0, &error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config =
        builder.with_single_cert(chain, secret).map_err(|error| TrustError::new(cert.0, &error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    if is_mutual {
        // A resumed session would bring back a client whose certificate is not looked at again.
        config.send_tls13_tickets = 0;
    }
    Ok(config)
}

fn certificates((path, pem): Read<'_>) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match read {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(TrustError::new(path, &"there is no certificate in it that can be read")),
    }
}

//! Certificates, callers and tokens of tests.

use super::{Daemon, Folder};
use ledgerd_client::Client;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType, date_time_ymd,
};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Who signs certificates.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key.
#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    pub(crate) cert: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        // Each with a name of its own: two of one name are told apart by their signatures only.
        let name = key.public_key_raw().iter().take(9).fold(String::new(), |mut name, byte| {
            let _ = write!(name, "{byte:02x}");
            name
        });
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, key).expect("an authority"))
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate of a daemon on this machine.
    pub(crate) fn server(&self) -> Leaf {
        self.sign(&CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).expect("names"))
    }

    /// A certificate of a client with this URI.
    pub(crate) fn client(&self, uri: &str) -> Leaf {
        self.client_valid(uri, 1990, 3000)
    }

    /// One that is valid between the beginnings of these years.
    pub(crate) fn client_valid(&self, uri: &str, from: i32, until: i32) -> Leaf {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.subject_alt_names = vec![SanType::URI(uri.try_into().expect("a URI"))];
        params.not_before = date_time_ymd(from, 1, 1);
        params.not_after = date_time_ymd(until, 1, 1);
        self.sign(&params)
    }

    fn sign(&self, params: &CertificateParams) -> Leaf {
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.0).expect("a certificate");
        Leaf { cert: cert.pem(), key: key.serialize_pem() }
    }
}

/// Replaces a file at once, as operators are told to.
pub(crate) fn put(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).expect("the folder is writable");
    std::fs::rename(new, path).expect("the folder is writable");
}

/// A stanza of the file of callers for a token.
pub(crate) fn caller(name: &str, token: &str, roles: &[&str], agents: &[&str], payloads: bool) -> String {
    let digest = Sha256::digest(token).iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    });
    format!(
        "[[caller]]\nname = {name:?}\nroles = {roles:?}\nagents = {agents:?}\npayloads = {payloads}\n\
         token_sha256 = \"{digest}\"\n"
    )
}

/// A stanza for a certificate.
pub(crate) fn certified(name: &str, san: &str, roles: &[&str], agents: &[&str]) -> String {
    format!("[[caller]]\nname = {name:?}\nroles = {roles:?}\nagents = {agents:?}\nsan = {san:?}\n")
}

/// Somebody who may do everything, with [`ADMIN`].
pub(crate) fn admin() -> String {
    caller("admin", ADMIN, &["producer", "worker", "operator", "viewer"], &["*"], true)
}

/// A token.
pub(crate) const ADMIN: &str = "ldg_admin-of-the-tests";

/// The files of a daemon that knows its callers.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) folder: Arc<Folder>,
}

impl Files {
    pub(crate) fn new(callers: &str) -> Self {
        let files = Self { folder: Folder::new() };
        put(&files.path("callers.toml"), callers);
        files
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("plain").to_owned()
    }

    pub(crate) fn put_pair(&self, name: &str, leaf: &Leaf) {
        put(&self.path(&format!("{name}.pem")), &leaf.cert);
        put(&self.path(&format!("{name}.key")), &leaf.key);
    }

    /// A daemon in the clear that knows its callers.
    pub(crate) fn serve(&self, more: &[&str]) -> Daemon {
        let callers = self.text("callers.toml");
        self.start(&[&["--callers", &callers], more].concat())
    }

    /// A daemon under TLS, with `server.pem` and `server.key`.
    pub(crate) fn serve_tls(&self, more: &[&str]) -> Daemon {
        let (cert, key) = (self.text("server.pem"), self.text("server.key"));
        self.serve(&[&["--tls-cert", &cert, "--tls-key", &key], more].concat())
    }

    /// An authority, as `ca.pem`, and the daemon's certificate of it.
    pub(crate) fn certify(&self) -> Authority {
        let authority = Authority::new();
        put(&self.path("ca.pem"), &authority.pem());
        self.put_pair("server", &authority.server());
        authority
    }

    fn start(&self, flags: &[&str]) -> Daemon {
        Daemon::start_with(Arc::clone(&self.folder), "127.0.0.1:0", flags)
    }

    /// What a client with this certificate needs.
    pub(crate) async fn connect_tls(
        &self,
        daemon: &Daemon,
        token: Option<&str>,
        identity: Option<&str>,
    ) -> Result<Client, ledgerd_client::Error> {
        let mut builder = daemon.builder();
        if let Some(token) = token {
            builder = builder.token(token)?;
        }
        if let Some(name) = identity {
            let (cert, key) = (format!("{name}.pem"), format!("{name}.key"));
            builder = builder.certificate_files(self.path(&cert), self.path(&key))?;
        }
        builder.connect().await
    }
}

/// A client with a token.
pub(crate) async fn with_token(daemon: &Daemon, token: &str) -> Client {
    let builder = daemon.builder().token(token).expect("a token");
    builder.connect().await.expect("the daemon listens")
}

/// How a daemon is reached. What is promised is promised both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Clear,
    Tls,
}

impl Way {
    /// A daemon that asks nobody who they are.
    pub(crate) fn start(self) -> Daemon {
        self.start_with(&[])
    }

    /// With more flags.
    pub(crate) fn start_with(self, more: &[&str]) -> Daemon {
        let files = Files { folder: Folder::new() };
        match self {
            Self::Clear => files.start(more),
            Self::Tls => {
                files.certify();
                let (cert, key) = (files.text("server.pem"), files.text("server.key"));
                files.start(&[&["--tls-cert", &cert, "--tls-key", &key], more].concat())
            }
        }
    }

    /// A daemon that knows its callers.
    pub(crate) fn serve(self, files: &Files, more: &[&str]) -> Daemon {
        match self {
            Self::Clear => files.serve(more),
            Self::Tls => {
                files.certify();
                files.serve_tls(more)
            }
        }
    }
}

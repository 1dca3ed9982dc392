//! Loose text in, typed [`Config`] out: flags over `LEDGERD_*` over a TOML file over defaults.
//!
//! Every value knows where it came from, and errors say so. Nothing downstream checks again.

mod loaded;
#[cfg(test)]
mod tests;

pub use loaded::Loaded;

use crate::ledger::Retention;
use crate::ledger::command::AgentRules;
use ledger_core::{AgentOverrides, Violation};
use loaded::{AGENT_DEFAULTS, without_password};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Why an address of the network is refused.
const UNPROTECTED: &str = "beyond this machine gRPC needs TLS and callers it knows: set tls_cert, tls_key and callers, or \
     listen on 127.0.0.1; --i-accept-unauthenticated-network-access lets everybody in";

/// The longest drain: whoever stops a daemon does not wait longer.
const LONGEST_DRAIN: Duration = Duration::from_secs(3_600);

/// Below this, who waits for a task might find it gone.
const SHORTEST_RETENTION: Duration = Duration::from_secs(1);
/// A hundred years.
const LONGEST_RETENTION: Duration = Duration::from_secs(36_500 * 86_400);

/// What the command line may set. Absent: the environment, the file, or the default.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Flags {
    /// TOML file with any of the keys below, spelled with underscores [env: LEDGERD_CONFIG]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where gRPC listens; beyond this machine only with TLS and callers [default: 127.0.0.1:7420] [env: LEDGERD_LISTEN]
    #[arg(long, value_name = "IP:PORT")]
    pub listen: Option<String>,
    /// Where /livez and /readyz listen, or `off` [default: 127.0.0.1:7421] [env: LEDGERD_HTTP_LISTEN]
    #[arg(long, value_name = "IP:PORT|off")]
    pub http_listen: Option<String>,
    /// PEM file with the certificate that clients are shown, and those above it, or `off` [default: off] [env: LEDGERD_TLS_CERT]
    #[arg(long, value_name = "FILE|off")]
    pub tls_cert: Option<String>,
    /// PEM file with its key [default: off] [env: LEDGERD_TLS_KEY]
    #[arg(long, value_name = "FILE|off")]
    pub tls_key: Option<String>,
    /// PEM file with the authorities whose certificates every client must have [default: off] [env: LEDGERD_TLS_CLIENT_CA]
    #[arg(long, value_name = "FILE|off")]
    pub tls_client_ca: Option<String>,
    /// TOML file that says who may do what; without it everybody may do everything [default: off] [env: LEDGERD_CALLERS]
    #[arg(long, value_name = "FILE|off")]
    pub callers: Option<String>,
    /// Let everybody who reaches this machine over the network do anything with the ledger
    #[arg(long)]
    pub i_accept_unauthenticated_network_access: bool,
    /// Directory of the ledger, made when it is missing [default: ledgerd-data] [env: LEDGERD_DATA_DIR]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<String>,
    /// `sqlite` in the data directory, `sqlite:DIR`, or `postgres://USER@HOST/DATABASE` [default: sqlite] [env: LEDGERD_STORE]
    #[arg(long, value_name = "STORE")]
    pub store: Option<String>,
    /// What to log: `error`, `warn`, `info`, `debug`, `trace`, or a filter by module [default: info] [env: LEDGERD_LOG]
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
    /// `text` or `json` [default: text] [env: LEDGERD_LOG_FORMAT]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Attempts of a task that is older have traces of their own, linked to the task's; `off`: never [default: 15m] [env: LEDGERD_TRACE_JOIN_AGE]
    #[arg(long, value_name = "TIME|off")]
    pub trace_join_age: Option<String>,
    /// `on`: tasks and workers bring agents into being; `off`: only `agent configure` does [default: on] [env: LEDGERD_AGENTS_AUTO_CREATE]
    #[arg(long, value_name = "on|off")]
    pub agents_auto_create: Option<String>,
    /// How long streams have to end when the daemon stops [default: 25s] [env: LEDGERD_DRAIN_GRACE]
    #[arg(long, value_name = "TIME")]
    pub drain_grace: Option<String>,
    /// How long DONE and CANCELLED tasks are kept, with their results and keys, or `off` [default: 7d] [env: LEDGERD_RETENTION_DONE]
    #[arg(long, value_name = "TIME|off")]
    pub retention_done: Option<String>,
    /// How long FAILED tasks are kept, or `off` [default: 90d] [env: LEDGERD_RETENTION_FAILED]
    #[arg(long, value_name = "TIME|off")]
    pub retention_failed: Option<String>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line, for machines.
    Json,
}

/// Where a ledger is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreAt {
    /// In a directory of this machine.
    Sqlite(PathBuf),
    /// In a database of PostgreSQL.
    Postgres(Url),
}

impl StoreAt {
    /// Its kind, in one word.
    #[must_use]
    pub const fn backend(&self) -> &'static str {
        match self {
            Self::Sqlite(_) => "sqlite",
            Self::Postgres(_) => "postgresql",
        }
    }
}

/// An address that may hold a password, which it never shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Url(String);

impl Url {
    /// All of it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&without_password(&self.0))
    }
}

/// Where the daemon's certificate is, and whose it trusts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, and those above it.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authorities of clients' certificates; none: clients have none.
    pub client_ca: Option<PathBuf>,
}

/// What the daemon goes by.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where gRPC listens. Loopback, unless callers are known over TLS, or [`Config::is_open`].
    pub listen: SocketAddr,
    /// Files for TLS; none: calls travel in the clear.
    pub tls: Option<TlsFiles>,
    /// The file that says who may do what; none: everybody may do everything.
    pub callers: Option<PathBuf>,
    /// Callers from the network are not known, or could be overheard, and that was accepted.
    pub is_open: bool,
    /// Where the probes of HTTP listen.
    pub http_listen: Option<SocketAddr>,
    /// Where the ledger is.
    pub store: StoreAt,
    /// What to log.
    pub log: String,
    /// How.
    pub log_format: LogFormat,
    /// How old a task may be for an attempt to join its trace.
    pub trace_join_age: Option<Duration>,
    /// What holds for agents.
    pub agents: AgentRules,
    /// How long streams have to end.
    pub drain_grace: Duration,
    /// How long ended tasks are kept.
    pub retention: Retention,
}

/// Values that cannot be used, one sentence each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<String>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for ConfigErrors {}

impl Loaded {
    /// The typed form.
    ///
    /// # Errors
    /// Every value that cannot be used, with its key and origin.
    pub fn config(&self) -> Result<Config, ConfigErrors> {
        let mut errors = Vec::new();
        let listen = self.typed("listen", &mut errors, address);
        let http_listen = self.typed("http_listen", &mut errors, |text| match text {
            "off" => Ok(None),
            text => address(text).map(Some),
        });
        let protection = self.protection(listen, &mut errors);
        let data_dir = self.typed("data_dir", &mut errors, directory);
        let store = self.typed("store", &mut errors, store);
        let log = self.typed("log", &mut errors, |text| match crate::telemetry::filter(text) {
            Ok(_) => Ok(text.to_owned()),
            Err(error) => Err(format!("name a level or a filter by module ({error})")),
        });
        let log_format = self.typed("log_format", &mut errors, |text| match text {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err("write text or json".to_owned()),
        });
        let trace_join_age = self.typed("trace_join_age", &mut errors, |text| match text {
            "off" => Ok(None),
            text => span(text).map(Some).ok_or_else(|| "write a time, for instance 15m, or off".to_owned()),
        });
        let agents_auto_create = self.typed("agents_auto_create", &mut errors, |text| match text {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err("write on or off".to_owned()),
        });
        let agent_defaults = self.agent_defaults(&mut errors);
        let drain_grace = self.typed("drain_grace", &mut errors, |text| {
            span(text)
                .filter(|span| *span <= LONGEST_DRAIN)
                .ok_or_else(|| "write a time up to 1h, for instance 25s or 500ms".to_owned())
        });
        let done = self.typed("retention_done", &mut errors, kept);
        let failed = self.typed("retention_failed", &mut errors, kept);
        // Each of them has been looked at by now, so that every fault is told at once.
        let all = || {
            let (tls, callers, is_open) = protection?;
            let data_dir = data_dir?;
            Some(Config {
                listen: listen?,
                tls,
                callers,
                is_open,
                http_listen: http_listen?,
                store: store?.unwrap_or(StoreAt::Sqlite(data_dir)),
                log: log?,
                log_format: log_format?,
                trace_join_age: trace_join_age?,
                agents: AgentRules { auto_create: agents_auto_create?, defaults: agent_defaults? },
                drain_grace: drain_grace?,
                retention: Retention { done: done?, failed: failed? },
            })
        };
        all().ok_or(ConfigErrors(errors))
    }

    /// The table of the file that is not one value.
    fn agent_defaults(&self, errors: &mut Vec<String>) -> Option<Arc<AgentOverrides>> {
        let Some((table, origin)) = &self.agent_defaults else { return Some(Arc::default()) };
        let read = crate::grpc::agent_defaults(AGENT_DEFAULTS, table);
        let told = |found: Vec<Violation>| {
            errors.extend(found.iter().map(|one| format!("{} (from {origin}): {}", one.field, one.rule)));
        };
        read.map_err(told).ok().map(Arc::new)
    }

    /// Files for TLS, the file of callers, and whether the network may do anything: whoever reaches an unprotected port
    /// may, so without a word about it only this machine reaches it.
    fn protection(
        &self,
        listen: Option<SocketAddr>,
        errors: &mut Vec<String>,
    ) -> Option<(Option<TlsFiles>, Option<PathBuf>, bool)> {
        let mut file = |key| {
            self.typed(key, errors, |text| match text {
                "off" => Ok(None),
                text => directory(text).map(Some).map_err(|_| "name a file, or write off".to_owned()),
            })
        };
        let (cert, key, client_ca) = (file("tls_cert")?, file("tls_key")?, file("tls_client_ca")?);
        let callers = file("callers")?;
        let mut refuse = |key: &str, rule: &str| -> Option<_> {
            errors.extend(self.fault(key, rule));
            None
        };
        let tls = match (cert, key) {
            (Some(cert), Some(key)) => Some(TlsFiles { cert, key, client_ca: client_ca.clone() }),
            (None, None) => None,
            (Some(_), None) => return refuse("tls_key", "name the key of tls_cert"),
            (None, Some(_)) => return refuse("tls_cert", "name the certificate of tls_key"),
        };
        if client_ca.is_some() && tls.is_none() {
            return refuse("tls_client_ca", "set tls_cert and tls_key as well");
        }
        if client_ca.is_some() && callers.is_none() {
            return refuse(
                "tls_client_ca",
                "set callers as well: the file that says what each client may do",
            );
        }
        let is_known = tls.is_some() && callers.is_some();
        if listen?.ip().is_loopback() || is_known {
            return Some((tls, callers, false));
        }
        if !self.accepts_anybody {
            return refuse("listen", UNPROTECTED);
        }
        Some((tls, callers, true))
    }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let localhost = text.strip_prefix("localhost:").and_then(|port| port.parse().ok());
    match localhost {
        Some(port) => Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)),
        None => {
            text.parse().map_err(|_| "write an address as IP:PORT, for instance 127.0.0.1:7420".to_owned())
        }
    }
}

fn directory(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("name a directory".to_owned()) } else { Ok(PathBuf::from(text)) }
}

/// Where the ledger is, when that is not the data directory.
fn store(text: &str) -> Result<Option<StoreAt>, String> {
    match text.split_once(':') {
        None if text == "sqlite" => Ok(None),
        Some(("sqlite", dir)) => directory(dir).map(|dir| Some(StoreAt::Sqlite(dir))),
        Some(("postgres" | "postgresql", rest)) if rest.starts_with("//") => {
            crate::store::postgres::options(text).map_err(|error| error.to_string())?;
            Ok(Some(StoreAt::Postgres(Url(text.to_owned()))))
        }
        _ => Err("write sqlite, sqlite:DIR or postgres://USER@HOST/DATABASE".to_owned()),
    }
}

/// How long something is kept; none: for ever.
fn kept(text: &str) -> Result<Option<Duration>, String> {
    if text == "off" {
        return Ok(None);
    }
    let fits = |span: &Duration| (SHORTEST_RETENTION..=LONGEST_RETENTION).contains(span);
    span(text)
        .filter(fits)
        .map(Some)
        .ok_or_else(|| "write a time from 1s to 36500d, for instance 7d or 12h, or off".to_owned())
}

/// A number and its unit.
pub(crate) fn span(text: &str) -> Option<Duration> {
    let unit = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(unit);
    let number: u64 = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3_600).map(Duration::from_secs),
        "d" => number.checked_mul(86_400).map(Duration::from_secs),
        _ => None,
    }
}

//! Loose text in, typed [`Config`] out: flags over `LEDGERD_*` over a TOML file over defaults.
//!
//! Every value knows where it came from, and errors say so. Nothing downstream checks again.

use crate::ledger::Retention;
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A key, which a variable and a flag are named after.
struct Key {
    name: &'static str,
    default: &'static str,
    /// What the command line says.
    flag: fn(&Flags) -> Option<&String>,
}

impl Key {
    const fn new(name: &'static str, default: &'static str, flag: fn(&Flags) -> Option<&String>) -> Self {
        Self { name, default, flag }
    }
}

/// Every key, in the order they are shown.
const KEYS: [Key; 14] = [
    Key::new("listen", "127.0.0.1:7420", |flags| flags.listen.as_ref()),
    Key::new("http_listen", "127.0.0.1:7421", |flags| flags.http_listen.as_ref()),
    Key::new("tls_cert", "off", |flags| flags.tls_cert.as_ref()),
    Key::new("tls_key", "off", |flags| flags.tls_key.as_ref()),
    Key::new("tls_client_ca", "off", |flags| flags.tls_client_ca.as_ref()),
    Key::new("callers", "off", |flags| flags.callers.as_ref()),
    Key::new("data_dir", "ledgerd-data", |flags| flags.data_dir.as_ref()),
    Key::new("store", "sqlite", |flags| flags.store.as_ref()),
    Key::new("log", "info", |flags| flags.log.as_ref()),
    Key::new("log_format", "text", |flags| flags.log_format.as_ref()),
    Key::new("trace_join_age", "15m", |flags| flags.trace_join_age.as_ref()),
    Key::new("drain_grace", "25s", |flags| flags.drain_grace.as_ref()),
    Key::new("retention_done", "7d", |flags| flags.retention_done.as_ref()),
    Key::new("retention_failed", "90d", |flags| flags.retention_failed.as_ref()),
];

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
#[derive(Clone, Debug, PartialEq, Eq)]
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

/// A value with where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Effective {
    key: &'static str,
    value: String,
    origin: String,
}

impl Effective {
    /// Its value, for people: secrets are hidden.
    fn shown(&self) -> String {
        if self.key == "store" { without_password(&self.value) } else { self.value.clone() }
    }
}

/// Every value that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    values: Vec<Effective>,
    /// Only the command line can accept this: it is not to be inherited unseen.
    accepts_anybody: bool,
}

/// Some values of one origin.
struct Given {
    origin: String,
    values: Dict,
}

impl Given {
    fn one(origin: String, key: &str, value: &str) -> Self {
        Self { origin, values: Dict::from([(key.to_owned(), Value::from(value))]) }
    }
}

impl Provider for Given {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.origin.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

impl Loaded {
    /// Reads flags, environment and file.
    ///
    /// Only variables with the name of a key are looked at, so a misspelt one is not noticed: the prefix is shared with
    /// clients, and Kubernetes sets `LEDGERD_PORT` and its like for a service called ledgerd.
    ///
    /// # Errors
    /// A file that cannot be read, keys that do not exist, values of another type.
    pub fn read(flags: &Flags, env: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigErrors> {
        let mut figment = Figment::new();
        for key in KEYS {
            figment = figment.merge(Given::one("default".to_owned(), key.name, key.default));
        }
        if let Some(path) = flags.config.clone().or_else(|| env("LEDGERD_CONFIG").map(PathBuf::from)) {
            figment = figment.merge(file(&path)?);
        }
        for key in KEYS {
            let name = format!("LEDGERD_{}", key.name.to_ascii_uppercase());
            if let Some(value) = env(&name) {
                figment = figment.merge(Given::one(name, key.name, &value));
            }
        }
        for key in KEYS {
            if let Some(value) = (key.flag)(flags) {
                figment =
                    figment.merge(Given::one(format!("--{}", key.name.replace('_', "-")), key.name, value));
            }
        }
        let mut found: BTreeMap<String, String> = figment.extract().map_err(spoken)?;
        let values = KEYS.iter().map(|key| {
            let origin =
                figment.find_metadata(key.name).map(|found| found.name.to_string()).unwrap_or_default();
            Effective { key: key.name, value: found.remove(key.name).unwrap_or_default(), origin }
        });
        let values = values.collect();
        let unknown: Vec<String> =
            found.keys().map(|key| format!("{key} (from the file): there is no such key")).collect();
        if !unknown.is_empty() {
            return Err(ConfigErrors(unknown));
        }
        Ok(Self { values, accepts_anybody: flags.i_accept_unauthenticated_network_access })
    }

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
        let drain_grace = self.typed("drain_grace", &mut errors, |text| {
            span(text)
                .filter(|span| *span <= LONGEST_DRAIN)
                .ok_or_else(|| "write a time up to 1h, for instance 25s or 500ms".to_owned())
        });
        let done = self.typed("retention_done", &mut errors, kept);
        let failed = self.typed("retention_failed", &mut errors, kept);
        match (
            listen,
            http_listen,
            protection,
            data_dir,
            store,
            log,
            log_format,
            trace_join_age,
            drain_grace,
            done,
            failed,
        ) {
            (
                Some(listen),
                Some(http_listen),
                Some((tls, callers, is_open)),
                Some(data_dir),
                Some(store),
                Some(log),
                Some(log_format),
                Some(trace_join_age),
                Some(drain_grace),
                Some(done),
                Some(failed),
            ) => {
                let store = store.unwrap_or(StoreAt::Sqlite(data_dir));
                let retention = Retention { done, failed };
                Ok(Config {
                    listen,
                    tls,
                    callers,
                    is_open,
                    http_listen,
                    store,
                    log,
                    log_format,
                    trace_join_age,
                    drain_grace,
                    retention,
                })
            }
            _ => Err(ConfigErrors(errors)),
        }
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
            let found = self.values.iter().find(|found| found.key == key)?;
            errors.push(format!("{key} = {:?} (from {}): {rule}", found.shown(), found.origin));
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

    fn typed<T>(
        &self,
        key: &'static str,
        errors: &mut Vec<String>,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let found = self.values.iter().find(|found| found.key == key)?;
        read(&found.value)
            .map_err(|rule| {
                errors.push(format!("{key} = {:?} (from {}): {rule}", found.shown(), found.origin));
            })
            .ok()
    }
}

/// One value a line, as a file would have it, with its origin.
impl fmt::Display for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for found in &self.values {
            writeln!(f, "{:<40} # {}", format!("{} = {:?}", found.key, found.shown()), found.origin)?;
        }
        Ok(())
    }
}

fn file(path: &Path) -> Result<Given, ConfigErrors> {
    use figment::providers::{Format, Toml};
    let origin = path.display().to_string();
    let bad = |error: &dyn fmt::Display| ConfigErrors(vec![format!("{origin}: {error}")]);
    let text = std::fs::read_to_string(path).map_err(|error| bad(&error))?;
    let mut profiles = Toml::string(&text).data().map_err(|error| bad(&error))?;
    Ok(Given { values: profiles.remove(&Profile::Default).unwrap_or_default(), origin })
}

fn spoken(errors: figment::Error) -> ConfigErrors {
    let one = |error: figment::Error| {
        let origin = error.metadata.as_ref().map_or("the file", |found| &*found.name);
        match error.path.as_slice() {
            [] => format!("{} (from {origin})", error.kind),
            path => format!("{} (from {origin}): {}", path.join("."), error.kind),
        }
    };
    ConfigErrors(errors.into_iter().map(one).collect())
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

/// An address without the password in it, which stands before the host or among the parameters.
fn without_password(address: &str) -> String {
    let Some((scheme, rest)) = address.split_once("://") else { return address.to_owned() };
    let (place, parameters) = match rest.split_once('?') {
        Some((place, parameters)) => (place, Some(parameters)),
        None => (rest, None),
    };
    let place = match place.rsplit_once('@') {
        Some((who, host)) => match who.split_once(':') {
            Some((user, _)) => format!("{user}:***@{host}"),
            None => place.to_owned(),
        },
        None => place.to_owned(),
    };
    let hide = |parameter: &str| match parameter.split_once('=') {
        Some((name, _)) if name.eq_ignore_ascii_case("password") => format!("{name}=***"),
        _ => parameter.to_owned(),
    };
    let parameters = parameters.map(|all| all.split('&').map(hide).collect::<Vec<_>>().join("&"));
    let question = if parameters.is_some() { "?" } else { "" };
    format!("{scheme}://{place}{question}{}", parameters.unwrap_or_default())
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
fn span(text: &str) -> Option<Duration> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read(flags: &Flags, env: &[(&str, &str)]) -> Result<Loaded, ConfigErrors> {
        Loaded::read(flags, |name| {
            env.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    fn error(flags: &Flags, env: &[(&str, &str)]) -> String {
        match read(flags, env).map(|loaded| loaded.config()) {
            Ok(Ok(config)) => panic!("{config:?}"),
            Ok(Err(error)) | Err(error) => error.to_string(),
        }
    }

    fn with_file(text: &str) -> (tempfile::TempDir, Flags) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("ledgerd.toml");
        std::fs::write(&path, text).expect("a file");
        (dir, Flags { config: Some(path), ..Flags::default() })
    }

    #[test]
    fn defaults_are_safe() {
        let config = read(&Flags::default(), &[]).expect("defaults").config().expect("defaults");
        assert!(
            config.listen.ip().is_loopback() && config.http_listen.is_some_and(|at| at.ip().is_loopback())
        );
        assert_eq!(config.drain_grace, Duration::from_secs(25));
        assert_eq!(config.store, StoreAt::Sqlite("ledgerd-data".into()));
        let days = |days: u64| Some(Duration::from_secs(days * 86_400));
        assert_eq!(config.retention, Retention { done: days(7), failed: days(90) });
    }

    #[test]
    fn flags_win_over_environment_over_file_over_defaults() {
        let (_dir, mut flags) = with_file("listen = '127.0.0.1:1'\ndrain_grace = '1s'\nlog = 'warn'\n");
        flags.listen = Some("127.0.0.1:3".to_owned());
        let env =
            [("LEDGERD_LISTEN", "127.0.0.1:2"), ("LEDGERD_DRAIN_GRACE", "2s"), ("LEDGERD_PORT", "tcp://x")];
        let loaded = read(&flags, &env).expect("a config");
        let config = loaded.config().expect("a config");
        assert_eq!(config.listen.port(), 3);
        assert_eq!(config.drain_grace, Duration::from_secs(2));
        assert_eq!(config.log, "warn");
        assert_eq!(config.http_listen.map(|at| at.port()), Some(7421));
        let shown = loaded.to_string();
        for (key, origin) in [
            ("listen", "# --listen"),
            ("drain_grace", "# LEDGERD_DRAIN_GRACE"),
            ("log", "ledgerd.toml"),
            ("store", "# default"),
        ] {
            let line = shown.lines().find(|line| line.starts_with(&format!("{key} = "))).expect("a line");
            assert!(line.ends_with(origin), "{line}");
        }
    }

    #[test]
    fn a_password_is_never_shown() {
        for (given, shown) in [
            ("postgres://ann:se@cret@localhost:5432/ledger", "postgres://ann:***@localhost:5432/ledger"),
            (
                "postgres://ann@localhost/ledger?password=se@cret",
                "postgres://ann@localhost/ledger?password=***",
            ),
            ("postgres://localhost/ledger?user=ann", "postgres://localhost/ledger?user=ann"),
        ] {
            assert_eq!(without_password(given), shown);
        }
        let flags = Flags { store: Some("postgres://ann:secret@localhost/x".into()), ..Flags::default() };
        let loaded = read(&flags, &[]).expect("a config");
        let config = loaded.config().expect("a config");
        assert!(matches!(&config.store, StoreAt::Postgres(url) if url.reveal().contains("secret")));
        let flags = Flags { store: Some("postgres://ann:secret@host/x?sslmode=disable".into()), ..flags };
        for shown in [loaded.to_string(), format!("{config:?}"), error(&flags, &[])] {
            assert!(!shown.contains("secret"), "{shown}");
        }
    }

    #[test]
    fn what_is_shown_can_be_read() {
        let shown = read(&Flags::default(), &[]).expect("defaults").to_string();
        let (_dir, flags) = with_file(&shown);
        assert_eq!(
            read(&flags, &[]).expect("a config").config(),
            read(&Flags::default(), &[]).expect("defaults").config()
        );
    }

    #[test]
    fn errors_name_key_value_and_origin() {
        for (key, value) in [
            ("LISTEN", "nowhere"),
            ("LISTEN", "0.0.0.0:7420"),
            ("LISTEN", "[::]:7420"),
            ("HTTP_LISTEN", "7421"),
            ("STORE", "postgres:db"),
            ("STORE", "postgres://db.example.com/ledger?sslmode=require"),
            ("STORE", "postgres://localhost/ledger?sslmode=perhaps"),
            ("STORE", "mysql"),
            ("DATA_DIR", ""),
            ("LOG", "a=b=c"),
            ("LOG_FORMAT", "xml"),
            ("TLS_CERT", ""),
            ("TLS_CLIENT_CA", "ca.pem"),
            ("DRAIN_GRACE", "25"),
            ("DRAIN_GRACE", "-1s"),
            ("DRAIN_GRACE", "2h"),
            ("RETENTION_DONE", "999ms"),
            ("RETENTION_DONE", "never"),
            ("RETENTION_FAILED", "36501d"),
        ] {
            let name = format!("LEDGERD_{key}");
            let error = error(&Flags::default(), &[(&name, value)]);
            let key = key.to_ascii_lowercase();
            assert!(error.starts_with(&format!("{key} = {value:?} (from {name}): ")), "{error}");
        }
        let (_dir, flags) = with_file("lisen = 'x'\n");
        assert!(error(&flags, &[]).contains("lisen"), "{}", error(&flags, &[]));
        let (_dir, flags) = with_file("drain_grace = 25\n");
        assert!(error(&flags, &[]).starts_with("drain_grace (from "), "{}", error(&flags, &[]));
        let (_dir, flags) = with_file("listen = \n");
        assert!(error(&flags, &[]).contains("ledgerd.toml"));
        let missing = Flags { config: Some("/nowhere/x.toml".into()), ..Flags::default() };
        assert!(error(&missing, &[]).starts_with("/nowhere/x.toml: "));
    }

    #[test]
    fn the_network_needs_tls_and_callers_or_a_flag_that_says_so() {
        let everywhere = ("LEDGERD_LISTEN", "0.0.0.0:7420");
        let tls = [("LEDGERD_TLS_CERT", "c.pem"), ("LEDGERD_TLS_KEY", "k.pem")];
        let callers = ("LEDGERD_CALLERS", "callers.toml");
        let client_ca = ("LEDGERD_TLS_CLIENT_CA", "ca.pem");
        for too_little in [vec![everywhere], vec![everywhere, callers], vec![everywhere, tls[0], tls[1]]] {
            let error = error(&Flags::default(), &too_little);
            assert!(error.contains("--i-accept-unauthenticated-network-access"), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
            let flags = Flags { i_accept_unauthenticated_network_access: true, ..Flags::default() };
            assert!(read(&flags, &too_little).expect("values").config().expect("accepted").is_open);
        }
        let enough = read(&Flags::default(), &[everywhere, tls[0], tls[1], callers]).expect("values");
        let enough = enough.config().expect("enough");
        assert!(!enough.is_open && enough.tls.is_some_and(|tls| tls.client_ca.is_none()));
        assert_eq!(enough.callers, Some("callers.toml".into()));
        for (incomplete, key) in [
            (vec![tls[0]], "tls_key"),
            (vec![tls[1]], "tls_cert"),
            (vec![client_ca, callers], "tls_client_ca"),
            (vec![tls[0], tls[1], client_ca], "tls_client_ca"),
        ] {
            let error = error(&Flags::default(), &incomplete);
            assert!(error.starts_with(&format!("{key} = ")), "{error}");
        }
    }

    #[test]
    fn probes_may_listen_anywhere_and_nowhere() {
        let http =
            |value| read(&Flags::default(), &[("LEDGERD_HTTP_LISTEN", value)]).expect("a value").config();
        assert_eq!(http("off").expect("off").http_listen, None);
        assert_eq!(http("0.0.0.0:7421").expect("anywhere").http_listen.map(|at| at.port()), Some(7421));
        assert_eq!(http("localhost:1").expect("a name").http_listen.map(|at| at.port()), Some(1));
    }
}

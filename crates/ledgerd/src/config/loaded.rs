//! Where each value comes from: defaults, a file, the environment, the command line, the later the stronger.

use super::{ConfigErrors, Flags};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// A key, which a variable and a flag are named after.
pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) default: &'static str,
    /// What the command line says.
    flag: fn(&Flags) -> Option<&String>,
}

impl Key {
    const fn new(name: &'static str, default: &'static str, flag: fn(&Flags) -> Option<&String>) -> Self {
        Self { name, default, flag }
    }
}

/// The one key that is a table, which only the file can have.
pub(super) const AGENT_DEFAULTS: &str = "agent_defaults";

/// Every other key, in the order they are shown.
pub(super) const KEYS: [Key; 15] = [
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
    Key::new("agents_auto_create", "on", |flags| flags.agents_auto_create.as_ref()),
    Key::new("drain_grace", "25s", |flags| flags.drain_grace.as_ref()),
    Key::new("retention_done", "7d", |flags| flags.retention_done.as_ref()),
    Key::new("retention_failed", "90d", |flags| flags.retention_failed.as_ref()),
];

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
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    values: Vec<Effective>,
    /// And where they are.
    pub(super) agent_defaults: Option<(Dict, String)>,
    /// Only the command line can accept this: it is not to be inherited unseen.
    pub(super) accepts_anybody: bool,
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

    /// A key that is a table, with where it is.
    fn take_table(&mut self, key: &str) -> Result<Option<(Dict, String)>, ConfigErrors> {
        match self.values.remove(key) {
            None => Ok(None),
            Some(Value::Dict(_, table)) => Ok(Some((table, self.origin.clone()))),
            Some(_) => {
                let told = format!(
                    "{key} (from {}): write a table, [{key}], with settings of an agent",
                    self.origin
                );
                Err(ConfigErrors(vec![told]))
            }
        }
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
        let (mut figment, mut agent_defaults) = (Figment::new(), None);
        for key in KEYS {
            figment = figment.merge(Given::one("default".to_owned(), key.name, key.default));
        }
        if let Some(path) = flags.config.clone().or_else(|| env("LEDGERD_CONFIG").map(PathBuf::from)) {
            let mut given = file(&path)?;
            agent_defaults = given.take_table(AGENT_DEFAULTS)?;
            figment = figment.merge(given);
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
        Ok(Self { values, agent_defaults, accepts_anybody: flags.i_accept_unauthenticated_network_access })
    }

    /// The typed form of one value; an error where it has none.
    pub(super) fn typed<T>(
        &self,
        key: &'static str,
        errors: &mut Vec<String>,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let found = self.values.iter().find(|found| found.key == key)?;
        read(&found.value).map_err(|rule| errors.extend(self.fault(key, &rule))).ok()
    }

    /// A value that cannot be used, as it is told.
    pub(super) fn fault(&self, key: &str, rule: &str) -> Option<String> {
        let found = self.values.iter().find(|found| found.key == key)?;
        Some(format!("{key} = {:?} (from {}): {rule}", found.shown(), found.origin))
    }
}

/// One value a line, as a file would have it, with its origin.
impl fmt::Display for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for found in &self.values {
            writeln!(f, "{:<40} # {}", format!("{} = {:?}", found.key, found.shown()), found.origin)?;
        }
        match &self.agent_defaults {
            Some((table, origin)) => show_table(f, AGENT_DEFAULTS, table, origin),
            None => Ok(()),
        }
    }
}

fn show_table(f: &mut fmt::Formatter<'_>, path: &str, table: &Dict, origin: &str) -> fmt::Result {
    for (name, value) in table {
        let key = format!("{path}.{name}");
        let shown = match value {
            Value::Dict(_, inner) if !inner.is_empty() => {
                show_table(f, &key, inner, origin)?;
                continue;
            }
            Value::Dict(..) => "{}".to_owned(),
            Value::String(_, text) => format!("{text:?}"),
            Value::Bool(_, value) => value.to_string(),
            Value::Num(_, number) => match (number.to_i128(), number.to_f64()) {
                (Some(whole), _) => whole.to_string(),
                (None, part) => format!("{:?}", part.unwrap_or_default()),
            },
            // No setting is any of these.
            _ => "?".to_owned(),
        };
        writeln!(f, "{:<40} # {origin}", format!("{key} = {shown}"))?;
    }
    Ok(())
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

/// An address without the password in it, which stands before the host or among the parameters.
pub(super) fn without_password(address: &str) -> String {
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

//! Who calls, and what each may do: the file of callers, and the table of roles.
//!
//! Pure: it is given text and answers questions. A token is never kept, only its SHA-256; since a digest is what is
//! looked up, the time that takes tells nothing about a token.

use figment::providers::{Format, Toml};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

/// What somebody is there for. A caller may have several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Enqueues tasks, follows them and changes them.
    Producer,
    /// Runs tasks.
    Worker,
    /// Changes agents, breakers, dead letters and tasks, and sees everything.
    Operator,
    /// Sees everything, changes nothing.
    Viewer,
}

/// What a call takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// New tasks.
    Enqueue,
    /// Tasks, their history and why they wait.
    SeeTasks,
    /// Cancel, update and answer tasks.
    ChangeTasks,
    /// Be handed tasks, and settle them.
    Work,
    /// Agents, breakers, dead letters, workers and counts.
    SeeFleet,
    /// Change any of those.
    Operate,
    /// Ask what is served here: everybody who is known may.
    Describe,
}

impl Role {
    /// In the order of the documents.
    pub const ALL: [Self; 4] = [Self::Producer, Self::Worker, Self::Operator, Self::Viewer];

    /// The table of roles.
    #[must_use]
    pub const fn may(self, permission: Permission) -> bool {
        match permission {
            Permission::Enqueue => matches!(self, Self::Producer),
            Permission::SeeTasks => matches!(self, Self::Producer | Self::Operator | Self::Viewer),
            Permission::ChangeTasks => matches!(self, Self::Producer | Self::Operator),
            Permission::Work => matches!(self, Self::Worker),
            Permission::SeeFleet => matches!(self, Self::Operator | Self::Viewer),
            Permission::Operate => matches!(self, Self::Operator),
            Permission::Describe => true,
        }
    }

    /// As the file spells it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Producer => "producer",
            Self::Worker => "worker",
            Self::Operator => "operator",
            Self::Viewer => "viewer",
        }
    }
}

/// What proves who somebody is.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Credential {
    /// SHA-256 of a token.
    Token([u8; 32]),
    /// A name in a verified certificate: a DNS name or a URI.
    San(Box<str>),
}

impl Credential {
    /// Of a token.
    #[must_use]
    pub fn of_token(token: &str) -> Self {
        Self::Token(Sha256::digest(token.as_bytes()).into())
    }
}

/// A digest says nothing to a reader, and is not to be mistaken for a token.
impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(_) => f.write_str("a token"),
            Self::San(name) => write!(f, "a certificate of {name:?}"),
        }
    }
}

/// Names of agents: one, or all that begin alike.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pattern {
    start: Box<str>,
    /// More may follow.
    is_open: bool,
}

impl Pattern {
    fn read(text: &str) -> Option<Self> {
        let (start, is_open) = match text.strip_suffix('*') {
            Some(start) => (start, true),
            None => (text, false),
        };
        // The beginning of a name is a name, or nothing at all.
        let good = (is_open && start.is_empty()) || ledger_core::agent::is_agent_name(start);
        good.then(|| Self { start: start.into(), is_open })
    }

    fn fits(&self, agent: &str) -> bool {
        if self.is_open { agent.starts_with(&*self.start) } else { *agent == *self.start }
    }
}

/// Somebody who is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// What the audit trail calls them.
    pub name: Arc<str>,
    /// They may read what tasks carry, and not only where tasks are.
    pub reads_payloads: bool,
    roles: BTreeSet<Role>,
    agents: Vec<Pattern>,
}

impl Caller {
    /// Whether any of their roles allows this.
    #[must_use]
    pub fn may(&self, permission: Permission) -> bool {
        self.roles.iter().any(|role| role.may(permission))
    }

    /// Whether their rights reach this agent.
    #[must_use]
    pub fn covers(&self, agent: &str) -> bool {
        self.agents.iter().any(|pattern| pattern.fits(agent))
    }

    /// Whether their rights reach every agent, those to come included.
    #[must_use]
    pub fn covers_all(&self) -> bool {
        self.agents.iter().any(|pattern| pattern.is_open && pattern.start.is_empty())
    }
}

/// Everybody who is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Callers(HashMap<Credential, Arc<Caller>>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    caller: Vec<Stanza>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stanza {
    name: String,
    roles: Vec<Role>,
    agents: Vec<String>,
    #[serde(default)]
    payloads: bool,
    token_sha256: Option<String>,
    san: Option<String>,
}

impl Callers {
    /// Reads the file of callers.
    ///
    /// # Errors
    /// What is wrong with it, in one sentence. One without callers is refused: it is a file that is just being written, or
    /// a mistake, and would end every session.
    pub fn read(text: &str) -> Result<Self, String> {
        let file: File = figment::Figment::from(Toml::string(text)).extract().map_err(|error| {
            // Between the place and the reason there is the line itself, which is nobody's business.
            let text = error.to_string();
            let mut lines = text.lines().filter(|line| !line.trim_start().starts_with('|'));
            let first = lines.next().unwrap_or_default().to_owned();
            match lines.rfind(|line| !line.contains(" | ")) {
                Some(why) => format!("{first}: {why}"),
                None => first,
            }
        })?;
        if file.caller.is_empty() {
            return Err("there is no [[caller]] in it".to_owned());
        }
        let mut known = HashMap::new();
        for stanza in file.caller {
            let name = stanza.name.clone();
            let (credential, caller) = stanza.checked().map_err(|rule| format!("caller {name:?}: {rule}"))?;
            if known.insert(credential, Arc::new(caller)).is_some() {
                return Err(format!("caller {name:?}: its token or certificate is somebody else's as well"));
            }
        }
        Ok(Self(known))
    }

    /// Whose credential this is.
    #[must_use]
    pub fn find(&self, credential: &Credential) -> Option<&Arc<Caller>> {
        self.0.get(credential)
    }

    /// How many credentials there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl Stanza {
    fn checked(self) -> Result<(Credential, Caller), &'static str> {
        if !ledger_core::agent::is_agent_name(&self.name) {
            return Err("name it with 1 to 63 of a-z, 0-9, `.`, `_`, `-`, the first a letter or digit");
        }
        if self.roles.is_empty() {
            return Err("give it one of the roles producer, worker, operator, viewer");
        }
        let agents: Option<Vec<_>> = self.agents.iter().map(|text| Pattern::read(text)).collect();
        let agents = agents
            .filter(|agents| !agents.is_empty())
            .ok_or("give it agents: names, beginnings like \"review-*\", or \"*\"")?;
        let credential = match (self.token_sha256, self.san) {
            (Some(text), None) => digest(&text)
                .map(Credential::Token)
                .ok_or("token_sha256 is 64 hexadecimal digits, as `ledgerd token new` prints them")?,
            (None, Some(name)) if !name.is_empty() => Credential::San(name.into()),
            _ => return Err("give it either token_sha256 or san"),
        };
        let roles = self.roles.into_iter().collect();
        Ok((credential, Caller { name: self.name.into(), reads_payloads: self.payloads, roles, agents }))
    }
}

fn digest(text: &str) -> Option<[u8; 32]> {
    let plain = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let mut digest = [0; 32];
    for (index, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(index * 2..index * 2 + 2)?, 16).ok()?;
    }
    plain.then_some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    fn one(rest: &str) -> Result<Caller, String> {
        let text = format!("[[caller]]\nname = 'ci'\n{rest}");
        Callers::read(&text).map(|callers| (**callers.0.values().next().expect("one")).clone())
    }

    #[test]
    fn a_caller_is_found_by_what_proves_it() {
        let text = format!(
            "[[caller]]\nname = 'ci'\nroles = ['producer']\nagents = ['a']\ntoken_sha256 = '{DIGEST}'\n\
             [[caller]]\nname = 'box'\nroles = ['worker', 'viewer']\nagents = ['*']\npayloads = true\n\
             san = 'spiffe://x/box'\n"
        );
        let callers = Callers::read(&text).expect("a file");
        let ci = callers.find(&Credential::of_token("hello")).expect("known");
        assert_eq!((&*ci.name, ci.reads_payloads, ci.covers_all()), ("ci", false, false));
        let san = callers.find(&Credential::San("spiffe://x/box".into())).expect("known");
        assert!(san.reads_payloads && san.covers_all() && san.may(Permission::Work));
        assert!(san.may(Permission::SeeFleet) && !san.may(Permission::Operate));
        assert_eq!(callers.find(&Credential::of_token("hello ")), None);
        assert_eq!(callers.find(&Credential::San("spiffe://x/bo".into())), None);
        assert!(!format!("{callers:?}").contains("2cf24d"));
    }

    #[test]
    fn patterns_are_names_and_beginnings() {
        let rest = format!("roles = ['worker']\nagents = ['claude', 'review-*']\ntoken_sha256 = '{DIGEST}'");
        let caller = one(&rest).expect("a caller");
        for (agent, covered) in
            [("claude", true), ("claude-2", false), ("review-1", true), ("review-", true), ("review", false)]
        {
            assert_eq!(caller.covers(agent), covered, "{agent}");
        }
    }

    #[test]
    fn faults_are_named_and_repeat_no_secret() {
        let with = |roles: &str, agents: &str, proof: &str| {
            one(&format!("roles = {roles}\nagents = {agents}\n{proof}\n")).expect_err("a fault")
        };
        let good = format!("token_sha256 = '{DIGEST}'");
        for (fault, said) in [
            (with("[]", "['a']", &good), "roles"),
            (with("['king']", "['a']", &good), "king"),
            (with("['worker']", "[]", &good), "agents"),
            (with("['worker']", "['*-a']", &good), "agents"),
            (with("['worker']", "['../x']", &good), "agents"),
            (with("['worker']", "['a']", ""), "either token_sha256 or san"),
            (with("['worker']", "['a']", &format!("{good}\nsan = 'x'")), "either"),
            (with("['worker']", "['a']", "token_sha256 = 'ldg_secret'"), "64 hexadecimal digits"),
            (with("['worker']", "['a']", "token = 'ldg_secret'"), "token"),
            (with("['worker']", "['a']", "token_sha256 = 'ldg_secret"), "TOML parse error"),
            (Callers::read("").expect_err("empty"), "no [[caller]]"),
        ] {
            assert!(fault.contains(said) && !fault.contains("secret"), "{said}: {fault}");
        }
        let twice = format!(
            "[[caller]]\nname = 'a'\nroles = ['worker']\nagents = ['a']\n{good}\n\
             [[caller]]\nname = 'b'\nroles = ['worker']\nagents = ['a']\n{good}\n"
        );
        assert!(Callers::read(&twice).expect_err("twice").contains("somebody else's"));
    }
}

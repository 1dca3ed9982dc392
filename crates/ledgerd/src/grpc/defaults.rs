//! Settings of agents as a configuration file has them: the message AgentSettings, with the names of its fields, and times
//! and words as the rest of the file has them.

use super::{DESCRIPTORS, convert, wire};
use crate::config::span;
use crate::ledger::command::LedgerError;
use figment::value::{Dict, Value};
use ledger_core::{AgentOverrides, Settings, Violation};
use prost_reflect::{DescriptorPool, DynamicMessage, EnumDescriptor, Kind, MessageDescriptor};

/// What agents go by for which nothing was set.
///
/// # Errors
/// Everything that is no setting or breaks a rule, with its path from `root`.
pub(crate) fn agent_defaults(root: &str, table: &Dict) -> Result<AgentOverrides, Vec<Violation>> {
    let pool = DescriptorPool::decode(DESCRIPTORS).expect("our build made it");
    let settings = pool.get_message_by_name("ledger.v1.AgentSettings").expect("admin.proto has it");
    let mut found = Vec::new();
    let settings = message(&settings, root, table, &mut found);
    if !found.is_empty() {
        return Err(found);
    }
    let settings: wire::AgentSettings = settings.transcode_to().expect("it is a message of that kind");
    // The name stands for any agent.
    let given = convert::agent_settings("any", Some(settings)).and_then(|given| {
        Settings::of(given).map_err(LedgerError::Invalid)?;
        Ok(given)
    });
    given.map_err(|error| match error {
        LedgerError::Invalid(found) => found.into_iter().map(|one| below(root, one)).collect(),
        error => vec![Violation::new(root, error.to_string())],
    })
}

/// Calls have them in a field of their own.
fn below(root: &str, found: Violation) -> Violation {
    let field = found.field.strip_prefix("settings").unwrap_or(&found.field);
    Violation::new(format!("{root}{field}"), found.rule)
}

fn message(kind: &MessageDescriptor, path: &str, table: &Dict, found: &mut Vec<Violation>) -> DynamicMessage {
    let mut message = DynamicMessage::new(kind.clone());
    for (name, value) in table {
        let path = format!("{path}.{name}");
        let Some(field) = kind.get_field_by_name(name) else {
            let known: Vec<_> = kind.fields().map(|field| field.name().to_owned()).collect();
            found.push(Violation::new(path, format!("there is no such setting, only {}", known.join(", "))));
            continue;
        };
        let others = field.containing_oneof().filter(|group| !group.is_synthetic());
        if others.is_some_and(|group| group.fields().any(|other| message.has_field(&other))) {
            found.push(Violation::new(path, "set one kind of it"));
            continue;
        }
        match (field.kind(), value) {
            (Kind::Message(kind), Value::Dict(_, table)) if kind.full_name() != DURATION => {
                let inner = self::message(&kind, &path, table, found);
                message.set_field(&field, prost_reflect::Value::Message(inner));
            }
            (kind, value) => match scalar(&kind, value) {
                Ok(value) => message.set_field(&field, value),
                Err(rule) => found.push(Violation::new(path, rule)),
            },
        }
    }
    message
}

const DURATION: &str = "google.protobuf.Duration";

/// One value as a field of that kind has it; else what to write.
fn scalar(kind: &Kind, value: &Value) -> Result<prost_reflect::Value, String> {
    use prost_reflect::Value as Out;
    let whole = || value.to_i128();
    let read = match kind {
        Kind::Bool => value.to_bool().map(Out::Bool),
        Kind::Int32 => whole().and_then(|n| n.try_into().ok()).map(Out::I32),
        Kind::Uint32 => whole().and_then(|n| n.try_into().ok()).map(Out::U32),
        Kind::Uint64 => whole().and_then(|n| n.try_into().ok()).map(Out::U64),
        Kind::Double => value.to_f64().or_else(|| whole().map(|n| n as f64)).map(Out::F64),
        Kind::Enum(kind) => value.as_str().and_then(|word| named(kind, word)).map(Out::EnumNumber),
        Kind::Message(kind) if kind.full_name() == DURATION => {
            value.as_str().and_then(span).and_then(|span| {
                let mut message = DynamicMessage::new(kind.clone());
                message.transcode_from(&convert::span(span)).ok()?;
                Some(Out::Message(message))
            })
        }
        _ => None,
    };
    read.ok_or_else(|| match kind {
        Kind::Bool => "write true or false".to_owned(),
        Kind::Int32 | Kind::Uint32 | Kind::Uint64 => "write a whole number".to_owned(),
        Kind::Double => "write a number".to_owned(),
        Kind::Enum(kind) => {
            format!("write one of {}", words(kind).map(|(word, _)| word).collect::<Vec<_>>().join(", "))
        }
        Kind::Message(kind) if kind.full_name() == DURATION => {
            "write a time, for instance 500ms or 15m".to_owned()
        }
        _ => "write a table".to_owned(),
    })
}

/// `full` for JITTER_KIND_FULL.
fn words(kind: &EnumDescriptor) -> impl Iterator<Item = (String, i32)> {
    let prefix = kind.values().next().map(|first| first.name().trim_end_matches("UNSPECIFIED").to_owned());
    let prefix = prefix.unwrap_or_default();
    let named = kind.values().filter(|value| value.number() != 0);
    let words =
        named.map(|value| (value.name().trim_start_matches(&*prefix).to_ascii_lowercase(), value.number()));
    words.collect::<Vec<_>>().into_iter()
}

fn named(kind: &EnumDescriptor, word: &str) -> Option<i32> {
    words(kind).find(|(known, _)| known == word).map(|(_, number)| number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use figment::providers::{Format, Toml};
    use figment::{Profile, Provider};
    use ledger_core::Overrides;
    use std::time::Duration;

    fn read(text: &str) -> Result<AgentOverrides, Vec<String>> {
        let mut profiles = Toml::string(text).data().expect("it is TOML");
        let read = agent_defaults("agent_defaults", &profiles.remove(&Profile::Default).unwrap_or_default());
        read.map_err(|found| found.into_iter().map(|one| format!("{}: {}", one.field, one.rule)).collect())
    }

    #[test]
    fn settings_are_named_as_on_the_wire_and_times_as_in_the_file() {
        let text = "
            max_waiting = 1000
            policy = { max_retries = 5, base_delay = '1500ms', exponential_base = 3, jitter = 'full', lease_duration = '2m' }
            [breaker]
            enabled = false
            failure_rate = 0.25
            time_window = { bucket = '6s', min_calls = 20 }
            [budget]
            capacity = 20
        ";
        let policy = Overrides {
            max_retries: Some(5),
            base_delay: Some(Duration::from_millis(1_500)),
            exponential_base: Some(3.0),
            jitter: Some(retry_core::Jitter::Full),
            lease_duration: Some(Duration::from_secs(120)),
            ..Overrides::NONE
        };
        let window = breaker_core::Window::Time { bucket: Duration::from_secs(6), min_calls: 20 };
        let wanted = AgentOverrides {
            policy,
            max_waiting: Some(1_000),
            breaker_enabled: Some(false),
            failure_rate: Some(0.25),
            window: Some(Some(window)),
            budget_capacity: Some(20.0),
            ..AgentOverrides::default()
        };
        assert_eq!(read(text), Ok(wanted));
        assert_eq!(read(""), Ok(AgentOverrides::default()));
        let none = AgentOverrides { window: Some(None), ..AgentOverrides::default() };
        assert_eq!(read("breaker = { no_window = {} }"), Ok(none));
    }

    #[test]
    fn whatever_is_no_setting_or_breaks_a_rule_is_told_with_its_path() {
        for (text, wanted) in [
            (
                "max_retries = 5",
                "agent_defaults.max_retries: there is no such setting, only policy, breaker, budget, max_waiting",
            ),
            ("policy = 5", "agent_defaults.policy: write a table"),
            ("policy = { max_retries = 'five' }", "agent_defaults.policy.max_retries: write a whole number"),
            (
                "policy = { max_retries = 5000000000 }",
                "agent_defaults.policy.max_retries: write a whole number",
            ),
            (
                "policy = { lease_duration = 30 }",
                "agent_defaults.policy.lease_duration: write a time, for instance 500ms or 15m",
            ),
            (
                "policy = { lease_duration = {} }",
                "agent_defaults.policy.lease_duration: write a time, for instance 500ms or 15m",
            ),
            (
                "policy = { jitter = 'some' }",
                "agent_defaults.policy.jitter: write one of none, proportional, full, equal, decorrelated",
            ),
            ("breaker = { enabled = 1 }", "agent_defaults.breaker.enabled: write true or false"),
            ("breaker = { slow_rate = 'x' }", "agent_defaults.breaker.slow_rate: write a number"),
            (
                "breaker = { no_window = {}, count_window = { size = 100, min_calls = 9 } }",
                "agent_defaults.breaker.no_window: set one kind of it",
            ),
            (
                "policy = { lease_duration = '1ms' }",
                "agent_defaults.policy.lease_duration: set it to 1s to 86400s",
            ),
            (
                "budget = { capacity = 0.5 }",
                "agent_defaults.budget.capacity: set it to a whole number, 1 to 1,000,000",
            ),
            (
                "breaker = { time_window = { bucket = '1ms', min_calls = 9 } }",
                "agent_defaults.breaker.time_window.bucket: set it to 10ms..=60s",
            ),
            ("max_waiting = 0", "agent_defaults.max_waiting: set it to 1 to 100,000,000"),
        ] {
            assert_eq!(read(text), Err(vec![wanted.to_owned()]), "{text}");
        }
        let all =
            read("max_waiting = 'x'\nbudget = { deposit = true }\nother = 1").expect_err("three are wrong");
        assert_eq!(all.len(), 3, "{all:?}");
    }
}

//! What `OTEL_*` variables ask for, besides what the library reads itself: `OTEL_SDK_DISABLED`,
//! `OTEL_{TRACES,METRICS,LOGS}_EXPORTER`, `OTEL_PROPAGATORS`, and who we are.

use opentelemetry::KeyValue;
use opentelemetry_sdk::Resource;

/// Reads the environment: a variable that is empty counts as unset.
pub(super) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A signal that may be exported.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Signal {
    Traces,
    Metrics,
    Logs,
}

/// Where a signal goes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Exporters {
    pub(super) otlp: bool,
    /// Standard output.
    pub(super) console: bool,
}

impl Exporters {
    pub(super) const fn any(self) -> bool {
        self.otlp || self.console
    }
}

impl Signal {
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Traces => "TRACES",
            Self::Metrics => "METRICS",
            Self::Logs => "LOGS",
        }
    }

    /// Where it is to be exported. Without a list that says so, over OTLP if an endpoint is named; logs only if it is theirs,
    /// as many that take spans and metrics take no logs.
    ///
    /// # Errors
    /// An exporter is asked for that there is none of; nothing is exported then.
    pub(super) fn exporters(self, variable: impl Fn(&str) -> Option<String>) -> Result<Exporters, String> {
        let mut exporters = Exporters::default();
        if is_disabled(&variable) {
            return Ok(exporters);
        }
        let name = format!("OTEL_{}_EXPORTER", self.word());
        let Some(list) = variable(&name) else {
            let of_all = self != Self::Logs && variable("OTEL_EXPORTER_OTLP_ENDPOINT").is_some();
            let own = variable(&format!("OTEL_EXPORTER_OTLP_{}_ENDPOINT", self.word())).is_some();
            return Ok(Exporters { otlp: of_all || own, console: false });
        };
        for word in list.split(',') {
            match (word.trim(), self) {
                ("otlp", _) => exporters.otlp = true,
                // The log is on standard error anyhow.
                ("console", Self::Logs) | ("none", _) => {}
                ("console", _) => exporters.console = true,
                // As `/metrics` is there.
                ("prometheus", Self::Metrics) => {}
                (other, _) => {
                    let more = if self == Self::Metrics { ", prometheus" } else { "" };
                    return Err(format!(
                        "{name}: {other} is none of otlp, console{more} and none; nothing is exported"
                    ));
                }
            }
        }
        Ok(exporters)
    }
}

/// Whether nothing is to be measured.
pub(super) fn is_disabled(variable: impl Fn(&str) -> Option<String>) -> bool {
    variable("OTEL_SDK_DISABLED").is_some_and(|word| word.eq_ignore_ascii_case("true"))
}

/// Whether callers' trace contexts are taken up.
pub(super) fn propagates(variable: impl Fn(&str) -> Option<String>) -> bool {
    variable("OTEL_PROPAGATORS").is_none_or(|list| list.split(',').any(|word| word.trim() == "tracecontext"))
}

/// Who we are, with what `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME` say.
pub(super) fn resource(name: &'static str, instance: &str) -> Resource {
    let own = [
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", instance.to_owned()),
    ];
    let named = variable("OTEL_SERVICE_NAME").is_some()
        || variable("OTEL_RESOURCE_ATTRIBUTES").is_some_and(|list| list.contains("service.name="));
    // What the environment says comes first; ours does not replace it.
    let given = Resource::builder().build();
    let mut builder = Resource::builder();
    if !named {
        builder = builder.with_service_name(name);
    }
    builder.with_attributes(own.into_iter().filter(|own| given.get_ref(&own.key).is_none())).build()
}

/// Reads a variable of one signal, or else that of all.
pub(super) fn of_signal(signal: Signal, name: &str) -> Option<(String, String)> {
    let names =
        [format!("OTEL_EXPORTER_OTLP_{}_{name}", signal.word()), format!("OTEL_EXPORTER_OTLP_{name}")];
    names.into_iter().find_map(|name| variable(&name).map(|value| (name, value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(signal: Signal, set: &[(&str, &str)]) -> Result<Exporters, String> {
        signal.exporters(|name| {
            set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    const NONE: Exporters = Exporters { otlp: false, console: false };
    const OTLP: Exporters = Exporters { otlp: true, console: false };
    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317");

    #[test]
    fn nothing_is_exported_unless_somebody_says_where() {
        let each = [Signal::Traces, Signal::Metrics, Signal::Logs];
        let of_each =
            |set: &[(&str, &str)]| each.map(|signal| asked(signal, set).expect("it can be asked for"));
        assert_eq!(of_each(&[]), [NONE; 3]);
        assert_eq!(of_each(&[ENDPOINT]), [OTLP, OTLP, NONE], "logs have to be asked for");
        assert_eq!(of_each(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:4317")]), [OTLP, NONE, NONE]);
        assert_eq!(of_each(&[("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://c:4317")]), [NONE, NONE, OTLP]);
        assert_eq!(of_each(&[("OTEL_METRICS_EXPORTER", "otlp")]), [NONE, OTLP, NONE]);
        assert_eq!(of_each(&[ENDPOINT, ("OTEL_LOGS_EXPORTER", "otlp")]), [OTLP; 3]);
        assert_eq!(of_each(&[ENDPOINT, ("OTEL_SDK_DISABLED", "true")]), [NONE; 3]);
        assert_eq!(of_each(&[ENDPOINT, ("OTEL_TRACES_EXPORTER", "none")]), [NONE, OTLP, NONE]);
    }

    #[test]
    fn exporters_are_a_list_and_what_is_unknown_in_it_is_said() {
        let list = |signal, list| {
            asked(signal, &[ENDPOINT, (&format!("OTEL_{}_EXPORTER", Signal::word(signal)), list)])
        };
        let both = Exporters { otlp: true, console: true };
        assert_eq!(list(Signal::Traces, "console"), Ok(Exporters { console: true, ..NONE }));
        assert_eq!(list(Signal::Traces, "otlp, console"), Ok(both));
        assert_eq!(list(Signal::Metrics, "prometheus,console,otlp"), Ok(both));
        assert_eq!(list(Signal::Logs, "console"), Ok(NONE), "they are on standard error");
        for (signal, bad) in
            [(Signal::Traces, "zipkin"), (Signal::Logs, "otlp,prometheus"), (Signal::Traces, "otlp,")]
        {
            let refused = list(signal, bad).expect_err("there is none");
            let word = bad.rsplit(',').next().unwrap_or_default();
            assert!(refused.contains(&format!("EXPORTER: {word} is none of")), "{refused}");
        }
    }

    #[test]
    fn contexts_are_taken_up_unless_told_not_to() {
        assert!(propagates(|_| None));
        assert!(propagates(|_| Some("baggage, tracecontext".to_owned())));
        assert!(!propagates(|_| Some("none".to_owned())));
    }
}

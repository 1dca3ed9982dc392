//! Logs, metrics and traces: what the daemon tells its operators.
//!
//! Logs are lines on standard error, for people or for machines, with the trace they belong to. Metrics are kept for
//! `/metrics`, unless all of it is switched off, and pushed where an OTLP endpoint is named; spans are made only then. Logs
//! leave over OTLP too, if asked to.

mod asked;
mod bulk;
mod export;
mod meters;
mod observe;
mod otlp;
mod spans;
mod traces;

pub use meters::{METRICS, Meters, Metric, reference};

pub(crate) use observe::observe;
pub(crate) use traces::{context, traceparent};

use crate::config::{Config, LogFormat};
use asked::{Exporters, Signal};
use meters::Dropped;
use opentelemetry::trace::TracerProvider;
use opentelemetry::trace::{SpanContext, TraceContextExt};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_sdk::logs::SdkLoggerProvider;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use spans::Spans;
use std::fmt;
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use traces::Traces;
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{FilterExt, LevelFilter, ParseError, filter_fn};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

/// Spans of this target are exported, and no others.
pub(crate) const CALLS: &str = "ledgerd::calls";

/// Events of these targets are exported: of the daemon and of nobody else.
const OWN: &str = "ledger";

/// How long the last spans and metrics have to leave.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// The HTTP/2 library warns of odd frames one by one, and a peer may send fifty thousand a second.
const LIBRARY: &str = "h2";

/// A filter by level and module. The library's warnings pass where the text names it.
///
/// # Errors
/// What is wrong with the text.
pub fn filter(text: &str) -> Result<EnvFilter, ParseError> {
    let filter = EnvFilter::builder().parse(text)?;
    if text.contains(LIBRARY) {
        return Ok(filter);
    }
    Ok(filter.add_directive(format!("{LIBRARY}=error").parse()?))
}

/// What is wrong with how telemetry was asked for.
#[derive(Debug, thiserror::Error)]
#[error("telemetry: {0}")]
pub struct TelemetryError(String);

/// What was set up. [`Telemetry::end`] comes last: then what waits is exported.
#[derive(Debug)]
pub struct Telemetry {
    /// The instruments.
    pub meters: Meters,
    /// Spans of tasks, where they are exported.
    spans: Option<Spans>,
    /// Something is counted at all.
    measures: bool,
    /// Contexts of callers are taken up.
    propagates: bool,
    /// Metrics are pushed, so gauges have to be looked at without being asked.
    pushes: bool,
    /// What the log goes by, for each that hears of it.
    levels: Vec<Level>,
    meter_provider: SdkMeterProvider,
    tracer_provider: Option<SdkTracerProvider>,
    logger_provider: Option<SdkLoggerProvider>,
}

type Level = reload::Handle<EnvFilter, Registry>;

impl Telemetry {
    /// Starts logging, and what the environment asks for. Once in a process: later calls leave the log as it is.
    ///
    /// # Errors
    /// Endpoints or certificates that cannot be used.
    pub fn start(config: &Config) -> Result<Self, TelemetryError> {
        let dropped = Arc::new(Dropped::default());
        let resource = asked::resource("ledgerd", &instance());
        // There is no log yet.
        let mut unknown = Vec::new();
        let [traces, metrics, logs] = [Signal::Traces, Signal::Metrics, Signal::Logs].map(|signal| {
            signal.exporters(asked::variable).unwrap_or_else(|fault| {
                unknown.push(fault);
                Exporters::default()
            })
        });
        let traced = traces
            .any()
            .then(|| {
                let make = Traces::new(config.trace_join_age);
                export::tracer_provider(resource.clone(), traces, Arc::clone(&dropped), make)
            })
            .transpose()
            .map_err(TelemetryError)?;
        let (tracer_provider, spans) = traced.unzip();
        let logger_provider = logs
            .otlp
            .then(|| export::logger_provider(resource.clone(), Arc::clone(&dropped)))
            .transpose()
            .map_err(TelemetryError)?;
        let (meter_provider, registry) = export::meter_provider(resource, metrics).map_err(TelemetryError)?;
        let levels = log(&config.log, config.log_format, tracer_provider.as_ref(), logger_provider.as_ref());
        for fault in unknown {
            tracing::warn!("{fault}");
        }
        Ok(Self {
            meters: Meters::new(&meter_provider, registry, dropped),
            spans,
            measures: !asked::is_disabled(asked::variable),
            propagates: asked::propagates(asked::variable),
            pushes: metrics.any(),
            levels,
            meter_provider,
            tracer_provider,
            logger_provider,
        })
    }

    /// Whether spans are exported.
    #[must_use]
    pub const fn is_traced(&self) -> bool {
        self.spans.is_some()
    }

    /// Whether anything is counted: without it there is no `/metrics`.
    #[must_use]
    pub(crate) const fn measures(&self) -> bool {
        self.measures
    }

    /// Whether trace contexts of callers are taken up.
    #[must_use]
    pub(crate) const fn propagates(&self) -> bool {
        self.propagates
    }

    /// Whether metrics are pushed.
    #[must_use]
    pub(crate) const fn pushes(&self) -> bool {
        self.pushes
    }

    /// Logs by another filter from now on.
    ///
    /// # Errors
    /// What is wrong with the text; the filter stays as it is.
    pub fn set_log(&self, text: &str) -> Result<(), ParseError> {
        for level in &self.levels {
            if let Err(error) = level.reload(filter(text)?) {
                tracing::warn!(%error, "the log goes on as before");
            }
        }
        Ok(())
    }

    /// Sends what waits to be exported, for so long at most, and nothing after it.
    pub fn end(&self) {
        last_words(|| {
            // Each has a thread of its own that sends; exporters that are away are not waited for longer than this.
            let until = Instant::now() + LAST_WORDS;
            let left = || until.saturating_duration_since(Instant::now());
            if let Some(provider) = &self.tracer_provider {
                let _ = provider.shutdown_with_timeout(left());
            }
            let _ = self.meter_provider.shutdown_with_timeout(left());
            if let Some(provider) = &self.logger_provider {
                let _ = provider.shutdown_with_timeout(left());
            }
        });
        let _ = std::io::stderr().flush();
    }
}

/// Waits for what is sent, which passes through this runtime.
fn last_words(end: impl FnOnce()) {
    match tokio::runtime::Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(tokio::runtime::RuntimeFlavor::MultiThread) => tokio::task::block_in_place(end),
        _ => end(),
    }
}

/// The spans that the SDK makes in a worker of this program, exported.
#[derive(Debug)]
pub struct WorkerSpans(SdkTracerProvider);

impl WorkerSpans {
    /// Has them exported where the environment asks for it, under the name `ledgerd-worker` unless that says otherwise.
    ///
    /// # Errors
    /// Endpoints or certificates that cannot be used, and exporters that are unknown.
    pub fn start() -> Result<Option<Self>, TelemetryError> {
        let to = Signal::Traces.exporters(asked::variable).map_err(TelemetryError)?;
        if !to.any() {
            return Ok(None);
        }
        let resource = asked::resource("ledgerd-worker", &instance());
        let (provider, _) = export::tracer_provider(resource, to, Arc::default(), Traces::new(None))
            .map_err(TelemetryError)?;
        opentelemetry::global::set_tracer_provider(provider.clone());
        Ok(Some(Self(provider)))
    }

    /// Sends what waits to be exported, for so long at most.
    pub fn end(&self) {
        last_words(|| {
            let _ = self.0.shutdown_with_timeout(LAST_WORDS);
        });
    }
}

/// The context of the span that this runs in, where it is exported.
pub(crate) fn current() -> Option<SpanContext> {
    use tracing_opentelemetry::OpenTelemetrySpanExt;
    let context = tracing::Span::current().context();
    let span = context.span();
    Some(span.span_context().clone()).filter(|span| span.is_valid() && span.is_sampled())
}

/// Starts the log; what it goes by can be changed later.
fn log(
    text: &str,
    format: LogFormat,
    traced: Option<&SdkTracerProvider>,
    logged: Option<&SdkLoggerProvider>,
) -> Vec<Level> {
    let (layers, levels) = layers(text, format, traced, logged);
    // Somebody else's subscriber, as in a test, is as good.
    let _ = tracing_subscriber::registry().with(layers).try_init();
    levels
}

/// What hears of events and spans: only those who want something of it, each with a filter that says so. One without, and be
/// it an absent one, wants all: then every span of every library is made, for nobody.
fn layers(
    text: &str,
    format: LogFormat,
    traced: Option<&SdkTracerProvider>,
    logged: Option<&SdkLoggerProvider>,
) -> (Layers, Vec<Level>) {
    let mut levels = Vec::new();
    let mut level = || {
        let (filter, level) = reload::Layer::new(filter(text).unwrap_or_else(|_| EnvFilter::new("info")));
        levels.push(level);
        filter
    };
    // Spans are there for the exporter; in the log they are the two numbers that name them.
    let events = filter_fn(|about| !about.is_span() || about.target() == CALLS);
    let events = level().and(events.with_max_level_hint(LevelFilter::TRACE));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => {
            let json = tracing_subscriber::fmt::format().json().flatten_event(true);
            let json = json.with_current_span(false).with_span_list(false);
            lines
                .fmt_fields(tracing_subscriber::fmt::format::JsonFields::new())
                .event_format(WithTrace(json))
                .boxed()
        }
    };
    let mut layers = vec![lines.with_filter(events).boxed()];
    if let Some(provider) = logged {
        // What a library says while it sends would be sent in turn.
        let own = filter_fn(|about| !about.is_span() && about.target().starts_with(OWN));
        let own = level().and(own.with_max_level_hint(LevelFilter::TRACE));
        layers.push(OpenTelemetryTracingBridge::new(provider).with_filter(own).boxed());
    }
    if let Some(provider) = traced {
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("ledgerd"));
        let layer =
            layer.with_location(false).with_threads(false).with_tracked_inactivity(false).with_target(false);
        let calls = filter_fn(|about| about.is_span() && about.target() == CALLS);
        layers.push(layer.with_filter(calls.with_max_level_hint(LevelFilter::INFO)).boxed());
    }
    (layers, levels)
}

type Layers = Vec<Box<dyn Layer<Registry> + Send + Sync>>;

/// A line of JSON with the trace and the span that it belongs to.
struct WithTrace<F>(F);

impl<S, N, F> FormatEvent<S, N> for WithTrace<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, cx: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let span = cx.lookup_current().and_then(|span| {
            let id = span.id();
            let context = tracing::dispatcher::get_default(|dispatch| {
                tracing_opentelemetry::get_otel_context(&id, dispatch)
            })?;
            Some(context.span().span_context().clone()).filter(SpanContext::is_valid)
        });
        let Some(span) = span else { return self.0.format_event(cx, out, event) };
        let mut line = String::new();
        self.0.format_event(cx, Writer::new(&mut line), event)?;
        let rest = line.strip_prefix('{').unwrap_or(&line);
        write!(out, "{{\"trace_id\":\"{}\",\"span_id\":\"{}\",{rest}", span.trace_id(), span.span_id())
    }
}

/// Another one with each start.
fn instance() -> String {
    let bits: [u64; 2] = [crate::clock::dice(), crate::clock::dice()];
    let (high, low) = (bits[0], bits[1]);
    format!(
        "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xfff,
        low >> 48 & 0x3fff | 0x8000,
        low & 0xffff_ffff_ffff
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    #[test]
    fn spans_of_libraries_are_never_made() {
        let provider = SdkTracerProvider::builder().build();
        for (provider, log) in [(None, "info"), (Some(&provider), "info"), (Some(&provider), "warn")] {
            let (layers, _levels) = layers(log, LogFormat::Json, provider, None);
            let subscriber = tracing_subscriber::registry().with(layers);
            let seen = if provider.is_some() { LevelFilter::INFO } else { log.parse().expect("a level") };
            assert_eq!(subscriber.max_level_hint(), Some(seen), "below this nobody looks at anything");
            tracing::subscriber::with_default(subscriber, || {
                assert!(tracing::trace_span!(target: "h2::proto", "poll").is_disabled(), "{log}");
                assert!(tracing::info_span!(target: "hyper", "call").is_disabled(), "{log}");
                assert_eq!(
                    tracing::enabled!(target: "hyper", Level::INFO),
                    log == "info",
                    "its events, by the log"
                );
                assert!(!tracing::info_span!(target: CALLS, "call").is_disabled(), "{log}");
            });
        }
    }

    #[test]
    fn odd_frames_are_not_logged_one_by_one_unless_somebody_asks() {
        for (log, is_logged) in [("debug", false), ("info,ledgerd=debug", false), ("info,h2=warn", true)] {
            let (layers, _levels) = layers(log, LogFormat::Text, None, None);
            let subscriber = tracing_subscriber::registry().with(layers);
            tracing::subscriber::with_default(subscriber, || {
                let logged = tracing::enabled!(target: "h2::proto::ping_pong", Level::WARN);
                assert_eq!(logged, is_logged, "{log}");
                assert!(tracing::enabled!(target: "ledgerd", Level::WARN), "{log}");
            });
        }
    }
}

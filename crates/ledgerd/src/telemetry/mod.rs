//! Logs, metrics and traces: what the daemon tells its operators.
//!
//! Logs are lines on standard error, for people or for machines, with the trace they belong to. Metrics are always kept, for
//! `/metrics`, and pushed where an OTLP endpoint is named; spans are made only then.

mod meters;
mod observe;
mod otlp;
mod traces;

pub use meters::{METRICS, Meters, Metric, reference};

pub(crate) use observe::observe;
pub(crate) use traces::{context, traceparent};

use crate::config::{Config, LogFormat};
use meters::Dropped;
use opentelemetry::trace::TracerProvider;
use opentelemetry::trace::{SpanContext, TraceContextExt};
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use otlp::Signal;
use std::fmt;
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;
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
    traces: Option<Traces>,
    /// Contexts of callers are taken up.
    propagates: bool,
    /// Metrics are pushed, so gauges have to be looked at without being asked.
    pushes: bool,
    level: reload::Handle<EnvFilter, Registry>,
    meter_provider: SdkMeterProvider,
    tracer_provider: Option<SdkTracerProvider>,
}

impl Telemetry {
    /// Starts logging, and what the environment asks for. Once in a process: later calls leave the log as it is.
    ///
    /// # Errors
    /// Endpoints or certificates that cannot be used.
    pub fn start(config: &Config) -> Result<Self, TelemetryError> {
        let dropped = Arc::new(Dropped::default());
        let resource = otlp::resource("ledgerd", &instance());
        let (traced, pushes) =
            (Signal::Traces.is_exported(otlp::variable), Signal::Metrics.is_exported(otlp::variable));
        // There is no log yet.
        let unknown: Vec<String> =
            [&traced, &pushes].into_iter().filter_map(|asked| asked.clone().err()).collect();
        let (traced, pushes) = (traced.unwrap_or(false), pushes.unwrap_or(false));
        let tracer_provider = traced
            .then(|| otlp::tracer_provider(resource.clone(), Arc::clone(&dropped)))
            .transpose()
            .map_err(TelemetryError)?;
        let (meter_provider, registry) = otlp::meter_provider(resource, pushes).map_err(TelemetryError)?;
        let level = log(&config.log, config.log_format, tracer_provider.as_ref());
        for exporter in unknown {
            tracing::warn!("{exporter}");
        }
        Ok(Self {
            meters: Meters::new(&meter_provider, registry, dropped),
            traces: tracer_provider
                .as_ref()
                .map(|provider| Traces::new(provider.tracer("ledgerd"), config.trace_join_age)),
            propagates: otlp::propagates(otlp::variable),
            pushes,
            level,
            meter_provider,
            tracer_provider,
        })
    }

    /// Whether spans are exported.
    #[must_use]
    pub const fn is_traced(&self) -> bool {
        self.traces.is_some()
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
        let filter = filter(text)?;
        if let Err(error) = self.level.reload(filter) {
            tracing::warn!(%error, "the log goes on as before");
        }
        Ok(())
    }

    /// Sends what waits to be exported, for so long at most, and nothing after it.
    pub fn end(&self) {
        last_words(|| {
            // Both have threads of their own that send; an exporter that is away is not waited for longer than this.
            if let Some(provider) = &self.tracer_provider {
                let _ = provider.shutdown_with_timeout(LAST_WORDS);
            }
            let _ = self.meter_provider.shutdown_with_timeout(LAST_WORDS);
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
        if !Signal::Traces.is_exported(otlp::variable).map_err(TelemetryError)? {
            return Ok(None);
        }
        let resource = otlp::resource("ledgerd-worker", &instance());
        let provider = otlp::tracer_provider(resource, Arc::default()).map_err(TelemetryError)?;
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
    provider: Option<&SdkTracerProvider>,
) -> reload::Handle<EnvFilter, Registry> {
    let (layers, level) = layers(text, format, provider);
    // Somebody else's subscriber, as in a test, is as good.
    let _ = tracing_subscriber::registry().with(layers).try_init();
    level
}

/// What hears of events and spans: only those who want something of it, each with a filter that says so. One without, and be
/// it an absent one, wants all: then every span of every library is made, for nobody.
fn layers(
    text: &str,
    format: LogFormat,
    provider: Option<&SdkTracerProvider>,
) -> (Layers, reload::Handle<EnvFilter, Registry>) {
    let filter = filter(text).unwrap_or_else(|_| EnvFilter::new("info"));
    let (filter, level) = reload::Layer::new(filter);
    // Spans are there for the exporter; in the log they are the two numbers that name them.
    let events = filter_fn(|about| !about.is_span() || about.target() == CALLS);
    let events = filter.and(events.with_max_level_hint(LevelFilter::TRACE));
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
    if let Some(provider) = provider {
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("ledgerd"));
        let layer =
            layer.with_location(false).with_threads(false).with_tracked_inactivity(false).with_target(false);
        let calls = filter_fn(|about| about.is_span() && about.target() == CALLS);
        layers.push(layer.with_filter(calls.with_max_level_hint(LevelFilter::INFO)).boxed());
    }
    (layers, level)
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
            let (layers, _level) = layers(log, LogFormat::Json, provider);
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
            let (layers, _level) = layers(log, LogFormat::Text, None);
            let subscriber = tracing_subscriber::registry().with(layers);
            tracing::subscriber::with_default(subscriber, || {
                let logged = tracing::enabled!(target: "h2::proto::ping_pong", Level::WARN);
                assert_eq!(logged, is_logged, "{log}");
                assert!(tracing::enabled!(target: "ledgerd", Level::WARN), "{log}");
            });
        }
    }
}

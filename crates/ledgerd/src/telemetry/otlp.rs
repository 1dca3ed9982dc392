//! What `OTEL_*` variables ask for: exporters over OTLP, the sampler, propagation.
//!
//! The library reads most of them itself; here are those that it does not: `OTEL_SDK_DISABLED`,
//! `OTEL_{TRACES,METRICS}_EXPORTER`, `OTEL_PROPAGATORS`, and the certificates of the transports. Without an endpoint there is
//! no exporter. An exporter that is slow or away costs spans, which are counted, and nothing else.

use super::meters::{Dropped, SERIES};
use super::traces::Ids;
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig, Identity};
use opentelemetry_otlp::{ExporterBuildError, MetricExporter, SpanExporter, WithHttpConfig, WithTonicConfig};
use opentelemetry_prometheus::exporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::metrics::{Instrument, InstrumentKind, SdkMeterProvider, Stream};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider, Span, SpanData, SpanExporter as Exporter,
    SpanProcessor,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Spans that may wait to be exported, unless `OTEL_BSP_MAX_QUEUE_SIZE` says otherwise. About 2 KiB each. Four times what the
/// specification has: a commit of the ledger ends a thousand at once.
const QUEUE: usize = 8_192;

/// Reads the environment: a variable that is empty counts as unset.
pub(super) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A signal that may be exported.
#[derive(Clone, Copy, Debug)]
pub(super) enum Signal {
    Traces,
    Metrics,
}

impl Signal {
    const fn word(self) -> &'static str {
        match self {
            Self::Traces => "TRACES",
            Self::Metrics => "METRICS",
        }
    }

    /// Whether it is to be exported over OTLP.
    ///
    /// # Errors
    /// Another exporter is asked for, which there is none of; nothing is exported then.
    pub(super) fn is_exported(self, variable: impl Fn(&str) -> Option<String>) -> Result<bool, String> {
        if variable("OTEL_SDK_DISABLED").is_some_and(|word| word.eq_ignore_ascii_case("true")) {
            return Ok(false);
        }
        let name = format!("OTEL_{}_EXPORTER", self.word());
        Ok(match variable(&name).as_deref() {
            Some("otlp") => true,
            // `/metrics` is there anyhow.
            Some("none" | "prometheus") => false,
            Some(other) => {
                return Err(format!(
                    "{name}={other} is none of otlp, prometheus and none; nothing is exported"
                ));
            }
            None => {
                variable("OTEL_EXPORTER_OTLP_ENDPOINT").is_some()
                    || variable(&format!("OTEL_EXPORTER_OTLP_{}_ENDPOINT", self.word())).is_some()
            }
        })
    }
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
fn of_signal(signal: Signal, name: &str) -> Option<(String, String)> {
    let names =
        [format!("OTEL_EXPORTER_OTLP_{}_{name}", signal.word()), format!("OTEL_EXPORTER_OTLP_{name}")];
    names.into_iter().find_map(|name| variable(&name).map(|value| (name, value)))
}

/// Certificates for the transport, as PEM. The library reads none of the variables that name them.
struct Certificates {
    /// Whom to trust, besides those whom this machine trusts.
    root: Option<Vec<u8>>,
    /// Our own, and its key.
    identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl Certificates {
    /// None where the environment names none.
    fn read(signal: Signal) -> Result<Option<Self>, String> {
        let read = |name: &str, what: &str, is_there: fn(&[u8]) -> bool| {
            let Some((name, path)) = of_signal(signal, name) else { return Ok(None) };
            match std::fs::read(&path) {
                // Libraries take a file with nothing in it for none.
                Ok(pem) if !is_there(&pem) => Err(format!("{name}: there is no {what} in {path}")),
                Ok(pem) => Ok(Some(pem)),
                Err(error) => Err(format!("{name}: cannot read {path}: {error}")),
            }
        };
        let is_certificate = |pem: &[u8]| CertificateDer::from_pem_slice(pem).is_ok();
        let root = read("CERTIFICATE", "certificate", is_certificate)?;
        let (own, its_key) = ("CLIENT_CERTIFICATE", "CLIENT_KEY");
        if of_signal(signal, own).is_some() != of_signal(signal, its_key).is_some() {
            let name = "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE";
            return Err(format!("{name} and OTEL_EXPORTER_OTLP_CLIENT_KEY: set both or neither"));
        }
        let certificate = read(own, "certificate", is_certificate)?;
        let key = read(its_key, "key", |pem| PrivateKeyDer::from_pem_slice(pem).is_ok())?;
        let identity = certificate.zip(key);
        Ok((root.is_some() || identity.is_some()).then_some(Self { root, identity }))
    }

    /// For gRPC.
    fn of_grpc(self) -> ClientTlsConfig {
        let mut config = ClientTlsConfig::new().with_enabled_roots();
        if let Some(root) = self.root {
            config = config.ca_certificate(Certificate::from_pem(root));
        }
        if let Some((certificate, key)) = self.identity {
            config = config.identity(Identity::from_pem(certificate, key));
        }
        config
    }

    /// A client for HTTP.
    fn of_http(self, timeout: Duration) -> Result<reqwest::blocking::Client, String> {
        let mut builder = reqwest::blocking::Client::builder().timeout(timeout);
        if let Some(root) = self.root {
            let roots = reqwest::Certificate::from_pem_bundle(&root).map_err(|error| unusable(&error))?;
            builder = builder.tls_certs_merge(roots);
        }
        if let Some((mut identity, key)) = self.identity {
            identity.push(b'\n');
            identity.extend(key);
            let identity = reqwest::Identity::from_pem(&identity).map_err(|error| unusable(&error))?;
            builder = builder.identity(identity);
        }
        // It has a runtime of its own, which may not be made or dropped within another.
        let built = std::thread::spawn(move || builder.build()).join();
        built.expect("it does not panic").map_err(|error| unusable(&error))
    }
}

/// Why certificates are refused: the cause too, as the error itself says little.
fn unusable(error: &dyn std::error::Error) -> String {
    let mut text = format!("the certificates of OTLP cannot be used: {error}");
    let mut cause = error.source();
    while let Some(inner) = cause {
        let _ = write!(text, ": {inner}");
        cause = inner.source();
    }
    text
}

/// Whether a signal travels over gRPC; else it is HTTP, as the specification has it where nothing is said.
fn is_grpc(signal: Signal) -> bool {
    of_signal(signal, "PROTOCOL").is_some_and(|(_, protocol)| protocol == "grpc")
}

/// How long one export over HTTP may take. A client that the library does not make has to be told.
fn timeout(signal: Signal) -> Duration {
    let given = of_signal(signal, "TIMEOUT").and_then(|(_, millis)| millis.parse().ok());
    given.map_or(opentelemetry_otlp::OTEL_EXPORTER_OTLP_TIMEOUT_DEFAULT, Duration::from_millis)
}

fn spans() -> Result<SpanExporter, String> {
    let signal = Signal::Traces;
    let builder = SpanExporter::builder();
    let built = match Certificates::read(signal)? {
        Some(given) if is_grpc(signal) => builder.with_tonic().with_tls_config(given.of_grpc()).build(),
        Some(given) => builder.with_http().with_http_client(given.of_http(timeout(signal))?).build(),
        None => builder.build(),
    };
    built.map_err(|error: ExporterBuildError| error.to_string())
}

fn metrics() -> Result<MetricExporter, String> {
    let signal = Signal::Metrics;
    let builder = MetricExporter::builder();
    let built = match Certificates::read(signal)? {
        Some(given) if is_grpc(signal) => builder.with_tonic().with_tls_config(given.of_grpc()).build(),
        Some(given) => builder.with_http().with_http_client(given.of_http(timeout(signal))?).build(),
        None => builder.build(),
    };
    built.map_err(|error: ExporterBuildError| error.to_string())
}

/// Instruments' provider, read by `/metrics` and, where `exported`, pushed.
pub(super) fn meter_provider(
    resource: Resource,
    exported: bool,
) -> Result<(SdkMeterProvider, prometheus::Registry), String> {
    let registry = prometheus::Registry::new();
    let reader = exporter().with_registry(registry.clone()).scope_info_enabled(false).build();
    let reader = reader.map_err(|error| error.to_string())?;
    let mut builder = SdkMeterProvider::builder().with_resource(resource).with_reader(reader);
    // The library's own limit is meant for sums, which stay right when series are put together.
    builder = builder.with_view(|instrument: &Instrument| {
        let gauge = instrument.kind() == InstrumentKind::ObservableGauge;
        gauge.then(|| Stream::builder().with_cardinality_limit(SERIES).build().ok()).flatten()
    });
    if exported {
        builder = builder.with_periodic_exporter(metrics()?);
    }
    Ok((builder.build(), registry))
}

/// Spans' provider; sampler and limits are the environment's.
pub(super) fn tracer_provider(
    resource: Resource,
    dropped: Arc<Dropped>,
) -> Result<SdkTracerProvider, String> {
    let queue =
        variable("OTEL_BSP_MAX_QUEUE_SIZE").and_then(|text| text.parse().ok()).unwrap_or(QUEUE).max(1);
    let waiting = Arc::new(AtomicUsize::new(0));
    let exporter = Counting { inner: spans()?, waiting: Arc::clone(&waiting), dropped: Arc::clone(&dropped) };
    // One more than we let in, so that what it drops is what we have counted.
    let config = BatchConfigBuilder::default().with_max_queue_size(queue + 1).build();
    let inner = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
    let processor = Bounded { inner, queue, waiting, dropped };
    Ok(SdkTracerProvider::builder()
        .with_resource(resource)
        .with_id_generator(Ids::default())
        .with_span_processor(processor)
        .build())
}

/// Lets so many spans wait as the queue holds, and counts the others.
#[derive(Debug)]
struct Bounded {
    inner: BatchSpanProcessor,
    queue: usize,
    waiting: Arc<AtomicUsize>,
    dropped: Arc<Dropped>,
}

impl SpanProcessor for Bounded {
    fn on_start(&self, span: &mut Span, cx: &Context) {
        self.inner.on_start(span, cx);
    }

    fn on_end(&self, span: SpanData) {
        if !span.span_context.is_sampled() {
            return;
        }
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.queue {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.dropped.spans.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.inner.on_end(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// Makes room for what is taken to be exported, and counts what is not taken by the other side.
#[derive(Debug)]
struct Counting {
    inner: SpanExporter,
    waiting: Arc<AtomicUsize>,
    dropped: Arc<Dropped>,
}

impl Exporter for Counting {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let count = batch.len();
        self.waiting.fetch_sub(count, Ordering::Relaxed);
        let exported = self.inner.export(batch).await;
        if exported.is_err() {
            self.dropped.spans.fetch_add(count as u64, Ordering::Relaxed);
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_exported_unless_somebody_says_where() {
        let with = |set: &'static [(&str, &str)]| {
            move |name: &str| {
                set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
            }
        };
        assert_eq!(Signal::Traces.is_exported(with(&[])), Ok(false));
        let all = with(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317")]);
        assert_eq!(Signal::Traces.is_exported(all), Ok(true));
        let traces = with(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:4317")]);
        assert_eq!(
            (Signal::Traces.is_exported(traces), Signal::Metrics.is_exported(traces)),
            (Ok(true), Ok(false))
        );
        assert_eq!(Signal::Metrics.is_exported(with(&[("OTEL_METRICS_EXPORTER", "otlp")])), Ok(true));
        for off in [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")] {
            let set = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317"), off];
            let read = |name: &str| {
                set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
            };
            assert_eq!(Signal::Traces.is_exported(read), Ok(false), "{off:?}");
        }
        let other = Signal::Traces.is_exported(with(&[("OTEL_TRACES_EXPORTER", "zipkin")]));
        assert!(other.is_err_and(|error| error.contains("zipkin")));
    }

    #[test]
    fn contexts_are_taken_up_unless_told_not_to() {
        assert!(propagates(|_| None));
        assert!(propagates(|_| Some("baggage, tracecontext".to_owned())));
        assert!(!propagates(|_| Some("none".to_owned())));
    }
}

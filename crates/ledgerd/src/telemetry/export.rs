//! What is exported where, and what waits for it: bounded queues that count what they have no room for. An exporter that is slow
//! or away costs spans and records of the log, and nothing else.

use super::asked::{Exporters, variable};
use super::bulk::Written;
use super::meters::{Dropped, SERIES};
use super::otlp;
use super::spans::{Ended, Limits, Spans};
use super::traces::{SCOPE, Traces};
use futures_executor::block_on;
use opentelemetry::InstrumentationScope;
use opentelemetry_http::Bytes;
use opentelemetry_prometheus::exporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{
    BatchConfigBuilder, BatchLogProcessor, LogBatch, LogExporter, LogProcessor, SdkLogRecord,
    SdkLoggerProvider,
};
use opentelemetry_sdk::metrics::{Instrument, InstrumentKind, SdkMeterProvider, Stream};
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanExporter};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Records of the log that may wait, unless `OTEL_BLRP_MAX_QUEUE_SIZE` says otherwise: what the specification has.
const RECORDS: usize = 2_048;

/// Instruments' provider, read by `/metrics` and pushed to those that are asked for.
pub(super) fn meter_provider(
    resource: Resource,
    to: Exporters,
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
    if to.otlp {
        builder = builder.with_periodic_exporter(otlp::metrics()?);
    }
    if to.console {
        builder = builder.with_periodic_exporter(opentelemetry_stdout::MetricExporter::default());
    }
    Ok((builder.build(), registry))
}

/// Where spans go to be exported, and the provider of those that are made while they live; sampler and limits are the
/// environment's.
pub(super) fn tracer_provider(
    resource: Resource,
    to: Exporters,
    dropped: Arc<Dropped>,
    mut traces: Traces,
) -> Result<(SdkTracerProvider, Spans), String> {
    let (mut otlp, load) = match to.otlp.then(otlp::spans).transpose()? {
        Some((exporter, load)) => (Some(exporter), load),
        None => (None, None),
    };
    let mut console = to.console.then(opentelemetry_stdout::SpanExporter::default);
    if let Some(otlp) = &mut otlp {
        otlp.set_resource(&resource);
    }
    if let Some(console) = &mut console {
        console.set_resource(&resource);
    }
    let load = load.filter(|_| console.is_none() && traces.are_whole());
    let mut written = load.map(|load| (Written::new(&resource, SCOPE), load));
    let send = move |batch: Vec<Ended>| {
        let (mut spans, mut count) = (Vec::new(), 0);
        for ended in batch {
            match ended {
                Ended::Span(span) => spans.push(*span),
                Ended::Delivery(delivery) => match (traces.about(&delivery), &mut written) {
                    (Some(about), Some((written, _))) => {
                        written.add(&about);
                        count += 1;
                    }
                    (Some(about), None) => spans.push(traces.span(about)),
                    (None, _) => {}
                },
            }
        }
        count += spans.len();
        if count == 0 {
            return 0;
        }
        if let Some((written, load)) = &mut written {
            load.set(written.take(), spans.is_empty());
        }
        let shown = console.as_ref().map_or(Ok(()), |console| block_on(console.export(spans.clone())));
        let sent = otlp.as_ref().map_or(Ok(()), |otlp| block_on(otlp.export(spans)));
        if let Some((_, load)) = &written {
            load.set(Bytes::new(), false);
        }
        if sent.and(shown).is_ok() { 0 } else { count }
    };
    let spans = Spans::start(Limits::asked(), dropped, send).map_err(|error| error.to_string())?;
    let provider =
        SdkTracerProvider::builder().with_resource(resource).with_span_processor(spans.clone()).build();
    Ok((provider, spans))
}

/// The provider of loggers whose records are exported over OTLP.
pub(super) fn logger_provider(
    resource: Resource,
    dropped: Arc<Dropped>,
) -> Result<SdkLoggerProvider, String> {
    let most =
        variable("OTEL_BLRP_MAX_QUEUE_SIZE").and_then(|text| text.parse().ok()).unwrap_or(RECORDS).max(1);
    let room = Arc::new(Room { most, waiting: AtomicUsize::new(0), dropped });
    // One more than we let in, so that what it drops is what we have counted.
    let config = BatchConfigBuilder::default().with_max_queue_size(most + 1).build();
    let exporter = Leaving { inner: otlp::logs()?, room: Arc::clone(&room) };
    let inner = BatchLogProcessor::builder(exporter).with_batch_config(config).build();
    let processor = Entering { inner, room };
    Ok(SdkLoggerProvider::builder().with_resource(resource).with_log_processor(processor).build())
}

/// How many records wait for the exporter, and whom to tell of those that did not get there.
#[derive(Debug)]
struct Room {
    most: usize,
    waiting: AtomicUsize,
    dropped: Arc<Dropped>,
}

impl Room {
    fn lose(&self, count: usize) {
        self.dropped.logs.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// Lets as many records wait as there is room for, and counts the others.
#[derive(Debug)]
struct Entering {
    inner: BatchLogProcessor,
    room: Arc<Room>,
}

impl LogProcessor for Entering {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        if self.room.waiting.fetch_add(1, Ordering::Relaxed) < self.room.most {
            self.inner.emit(record, scope);
        } else {
            self.room.waiting.fetch_sub(1, Ordering::Relaxed);
            self.room.lose(1);
        }
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
struct Leaving {
    inner: opentelemetry_otlp::LogExporter,
    room: Arc<Room>,
}

impl LogExporter for Leaving {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        let count = batch.iter().count();
        self.room.waiting.fetch_sub(count, Ordering::Relaxed);
        let exported = self.inner.export(batch).await;
        if exported.is_err() {
            self.room.lose(count);
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

//! What is exported, and what waits for it: bounded queues that count what they have no room for. An exporter that is slow or
//! away costs spans and records of the log, and nothing else.

use super::asked::{Exporters, variable};
use super::meters::{Dropped, SERIES};
use super::otlp;
use opentelemetry::{Context, InstrumentationScope};
use opentelemetry_prometheus::exporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{
    BatchConfigBuilder as LogConfig, BatchLogProcessor, LogBatch, LogExporter, LogProcessor, SdkLogRecord,
    SdkLoggerProvider,
};
use opentelemetry_sdk::metrics::{Instrument, InstrumentKind, SdkMeterProvider, Stream};
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider, Span, SpanData, SpanExporter, SpanProcessor,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Spans that may wait to be exported, unless `OTEL_BSP_MAX_QUEUE_SIZE` says otherwise. About 2 KiB each. Four times what the
/// specification has: a commit of the ledger ends a thousand at once.
const SPANS: usize = 8_192;

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
    dropped: &Arc<Dropped>,
) -> Result<(SdkTracerProvider, Spans), String> {
    let mut queues = Vec::new();
    if to.otlp {
        queues.push(Queue::of_spans(otlp::spans()?, &resource, dropped));
    }
    if to.console {
        queues.push(Queue::of_spans(opentelemetry_stdout::SpanExporter::default(), &resource, dropped));
    }
    let spans = Spans(queues.into());
    let provider =
        SdkTracerProvider::builder().with_resource(resource).with_span_processor(spans.clone()).build();
    Ok((provider, spans))
}

/// The provider of loggers whose records are exported over OTLP.
pub(super) fn logger_provider(
    resource: Resource,
    dropped: &Arc<Dropped>,
) -> Result<SdkLoggerProvider, String> {
    let processor = Queue::of_records(otlp::logs()?, dropped);
    Ok(SdkLoggerProvider::builder().with_resource(resource).with_log_processor(processor).build())
}

/// How many wait for an exporter, and whom to tell of those that did not get there.
#[derive(Debug)]
struct Room {
    most: usize,
    waiting: AtomicUsize,
    dropped: Arc<Dropped>,
    of: fn(&Dropped) -> &AtomicU64,
}

impl Room {
    fn new(
        variable_name: &str,
        usual: usize,
        dropped: &Arc<Dropped>,
        of: fn(&Dropped) -> &AtomicU64,
    ) -> Arc<Self> {
        let most = variable(variable_name).and_then(|text| text.parse().ok()).unwrap_or(usual).max(1);
        Arc::new(Self { most, waiting: AtomicUsize::new(0), dropped: Arc::clone(dropped), of })
    }

    /// Whether there is room for one more, which waits from now on.
    fn enter(&self) -> bool {
        let is_room = self.waiting.fetch_add(1, Ordering::Relaxed) < self.most;
        if !is_room {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.lose(1);
        }
        is_room
    }

    fn leave(&self, count: usize) {
        self.waiting.fetch_sub(count, Ordering::Relaxed);
    }

    fn lose(&self, count: usize) {
        (self.of)(&self.dropped).fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// Lets as many in as it has room for.
#[derive(Debug)]
struct Queue<P> {
    inner: P,
    room: Arc<Room>,
}

impl Queue<BatchSpanProcessor> {
    fn of_spans(exporter: impl SpanExporter + 'static, resource: &Resource, dropped: &Arc<Dropped>) -> Self {
        let room = Room::new("OTEL_BSP_MAX_QUEUE_SIZE", SPANS, dropped, |dropped| &dropped.spans);
        // One more than we let in, so that what it drops is what we have counted.
        let config = BatchConfigBuilder::default().with_max_queue_size(room.most + 1).build();
        let exporter = Leaving { inner: exporter, room: Arc::clone(&room) };
        let mut inner = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
        inner.set_resource(resource);
        Self { inner, room }
    }
}

impl Queue<BatchLogProcessor> {
    fn of_records(exporter: impl LogExporter + 'static, dropped: &Arc<Dropped>) -> Self {
        let room = Room::new("OTEL_BLRP_MAX_QUEUE_SIZE", RECORDS, dropped, |dropped| &dropped.logs);
        let config = LogConfig::default().with_max_queue_size(room.most + 1).build();
        let exporter = Leaving { inner: exporter, room: Arc::clone(&room) };
        Self { inner: BatchLogProcessor::builder(exporter).with_batch_config(config).build(), room }
    }
}

/// Takes spans that are over, for each exporter that is asked for.
#[derive(Clone, Debug)]
pub(super) struct Spans(Arc<[Queue<BatchSpanProcessor>]>);

impl Spans {
    fn each(&self, ask: impl Fn(&BatchSpanProcessor) -> OTelSdkResult) -> OTelSdkResult {
        self.0.iter().map(|queue| ask(&queue.inner)).fold(Ok(()), OTelSdkResult::and)
    }
}

impl SpanProcessor for Spans {
    fn on_start(&self, span: &mut Span, cx: &Context) {
        for queue in self.0.iter() {
            queue.inner.on_start(span, cx);
        }
    }

    fn on_end(&self, span: SpanData) {
        let Some((last, others)) = self.0.split_last().filter(|_| span.span_context.is_sampled()) else {
            return;
        };
        for queue in others.iter().filter(|queue| queue.room.enter()) {
            queue.inner.on_end(span.clone());
        }
        if last.room.enter() {
            last.inner.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.each(BatchSpanProcessor::force_flush)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.each(|inner| inner.shutdown_with_timeout(timeout))
    }
}

impl LogProcessor for Queue<BatchLogProcessor> {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        if self.room.enter() {
            self.inner.emit(record, scope);
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
struct Leaving<E> {
    inner: E,
    room: Arc<Room>,
}

impl<E> Leaving<E> {
    async fn export(&self, count: usize, exported: impl Future<Output = OTelSdkResult>) -> OTelSdkResult {
        self.room.leave(count);
        let exported = exported.await;
        if exported.is_err() {
            self.room.lose(count);
        }
        exported
    }
}

impl<E: SpanExporter> SpanExporter for Leaving<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        Self::export(self, batch.len(), self.inner.export(batch)).await
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

impl<E: LogExporter> LogExporter for Leaving<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        Self::export(self, batch.iter().count(), self.inner.export(batch)).await
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

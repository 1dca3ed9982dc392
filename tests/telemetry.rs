//! What operators are told: traces that hold a task's whole life, metrics, logs that name their trace.

mod https;

use crate::support::worker::{Stream, complete, hello, lease, outcome};
use crate::support::*;
use ledgerd_client::v1;
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{LogsService, LogsServiceServer};
use opentelemetry_proto::tonic::collector::logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// What an OTLP receiver got.
#[derive(Clone, Debug, Default)]
struct Received {
    spans: Arc<Mutex<Vec<Span>>>,
    /// Each with its scope's name.
    records: Arc<Mutex<Vec<(String, LogRecord)>>>,
    resources: Arc<Mutex<Vec<BTreeMap<String, String>>>>,
}

#[tonic::async_trait]
impl LogsService for Received {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        for of_resource in request.into_inner().resource_logs {
            let resource = of_resource.resource.unwrap_or_default();
            self.resources.lock().expect("not poisoned").push(texts(&resource.attributes));
            for of_scope in of_resource.scope_logs {
                let scope = of_scope.scope.unwrap_or_default().name;
                let records = of_scope.log_records.into_iter().map(|record| (scope.clone(), record));
                self.records.lock().expect("not poisoned").extend(records);
            }
        }
        Ok(Response::new(ExportLogsServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl TraceService for Received {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.take(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Received {
    fn take(&self, request: ExportTraceServiceRequest) {
        for of_resource in request.resource_spans {
            let resource = of_resource.resource.unwrap_or_default();
            self.resources.lock().expect("not poisoned").push(texts(&resource.attributes));
            let spans = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.spans.lock().expect("not poisoned").extend(spans);
        }
    }

    /// A receiver that runs, and its address.
    async fn start() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("it is bound"));
        let received = Self::default();
        let logs = LogsServiceServer::new(received.clone());
        let serving =
            Server::builder().add_service(TraceServiceServer::new(received.clone())).add_service(logs);
        tokio::spawn(serving.serve_with_incoming(TcpListenerStream::new(listener)));
        (received, address)
    }

    /// One that takes spans over HTTP, and its address.
    async fn over_http() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("it is bound"));
        let received = Self::default();
        let all = received.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(https::serve(all.clone(), stream));
            }
        });
        (received, address)
    }

    /// Waits for a record of the log with this message, and returns it with its scope.
    async fn record(&self, message: &str) -> (String, LogRecord) {
        eventually(message, async || {
            let records = self.records.lock().expect("not poisoned");
            records.iter().find(|(_, record)| text(record.body.as_ref()) == message).cloned()
        })
        .await
    }

    /// Waits for so many spans of names that begin so, and returns them by their start.
    async fn named(&self, prefix: &str, count: usize) -> Vec<Span> {
        let what = format!("{count} spans {prefix}");
        let mut found = eventually(&what, async || {
            let spans = self.spans.lock().expect("not poisoned");
            let named: Vec<_> = spans.iter().filter(|span| span.name.starts_with(prefix)).cloned().collect();
            (named.len() >= count).then_some(named)
        })
        .await;
        assert_eq!(found.len(), count, "{prefix}: {found:?}");
        found.sort_by_key(|span| span.start_time_unix_nano);
        found
    }
}

fn text(value: Option<&AnyValue>) -> String {
    match value.and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    }
}

fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    attributes.iter().map(|pair| (pair.key.clone(), text(pair.value.as_ref()))).collect()
}

fn exporting(endpoint: &str) -> Vec<(&'static str, OsString)> {
    vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.into()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc".into()),
        ("OTEL_BSP_SCHEDULE_DELAY", "20".into()),
        ("OTEL_BLRP_SCHEDULE_DELAY", "20".into()),
    ]
}

fn launch(folder: Arc<Folder>, listen: &str, flags: &[&str], environment: &[(&str, OsString)]) -> Daemon {
    Daemon::launch(folder, listen, flags, environment).unwrap_or_else(|fault| panic!("{fault}"))
}

/// A new one.
fn telling(flags: &[&str], environment: &[(&str, OsString)]) -> Daemon {
    launch(Folder::new(), "127.0.0.1:0", flags, environment)
}

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CREATION: &str = "b7ad6b7169203331";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn a_tasks_whole_life_is_one_trace_over_a_restart() {
    let (received, endpoint) = Received::start().await;
    whole_life(received, &exporting(&endpoint)).await;
}

#[tokio::test]
async fn a_tasks_whole_life_is_one_trace_over_http_as_well() {
    let (received, endpoint) = Received::over_http().await;
    let mut environment = exporting(&endpoint);
    environment.retain(|(name, _)| !name.ends_with("_PROTOCOL"));
    whole_life(received, &environment).await;
    // Compressed, they go the library's own way.
    let (received, endpoint) = Received::over_http().await;
    environment[0].1 = endpoint.into();
    environment.push(("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip".into()));
    whole_life(received, &environment).await;
}

async fn whole_life(received: Received, environment: &[(&'static str, OsString)]) {
    let mut daemon = telling(&[], environment);
    let client = daemon.client().await;
    let quick = quick();
    let policy = v1::TaskPolicy { lease_duration: ms(1_000), ..quick.policy.unwrap_or_default() };
    configure(&client, "a", v1::AgentSettings { policy: Some(policy), ..quick }).await;
    let traceparent = format!("00-{TRACE}-{CREATION}-01");
    let id = enqueue(&client, v1::NewTask { traceparent: traceparent.clone(), ..task("a") }).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    for _ in 0..2 {
        let (assignment, _) = worker.fail_next("down").await;
        assert_eq!(assignment.traceparent, traceparent, "every attempt gets the producer's context");
    }
    let lost = worker.assignment().await;
    worker.ack(lease(&lost)).await;
    worker.receipt().await;
    received.named("attempt a", 2).await;
    received.named("wait a", 3).await;
    // What has left is not lost with the process, and the next one knows nothing of the third assignment.
    daemon.kill();
    let (folder, address) = (Arc::clone(&daemon.folder), daemon.address.clone());
    drop(daemon);
    let daemon = launch(folder, &address, &[], environment);
    let client = daemon.client().await;
    // No beats: its lease runs out.
    received.named("attempt a", 3).await;
    let mut worker = Stream::open(&daemon, v1::Hello { incarnation: 2, ..hello("w", "a", 1) }).await;
    worker.complete_next("up").await;
    in_state(&client, &id, v1::TaskState::Done).await;

    let attempts = received.named("attempt a", 4).await;
    let waits = received.named("wait a", 4).await;
    for span in attempts.iter().chain(&waits) {
        assert_eq!((hex(&span.trace_id).as_str(), hex(&span.parent_span_id).as_str()), (TRACE, CREATION));
        assert_eq!(span.kind(), SpanKind::Internal);
        let said = texts(&span.attributes);
        let operation = span.name.split(' ').next().unwrap_or_default();
        for (key, value) in [
            ("messaging.system", "ledgerd"),
            ("messaging.operation.name", operation),
            ("messaging.destination.name", "a"),
            ("messaging.message.id", &*id),
            ("messaging.client.id", "w"),
            ("ledgerd.task.type", "test"),
        ] {
            assert_eq!(said.get(key).map(String::as_str), Some(value), "{key} of {said:?}");
        }
        for key in said.keys() {
            let page = include_str!("../docs/observing.md");
            assert!(page.contains(&format!("`{key}`")), "docs/observing.md does not name {key}");
        }
    }
    let number = |span: &Span| texts(&span.attributes)["ledgerd.attempt.number"].clone();
    assert_eq!(attempts.iter().map(number).collect::<Vec<_>>(), ["1", "2", "3", "4"]);
    assert_eq!(waits.iter().map(number).collect::<Vec<_>>(), ["1", "2", "3", "4"]);
    let errors = attempts.iter().map(|span| texts(&span.attributes).get("error.type").cloned());
    let transient = || Some("transient".to_owned());
    assert_eq!(errors.collect::<Vec<_>>(), [transient(), transient(), Some("lease_lost".to_owned()), None]);
    let links: Vec<Vec<String>> =
        attempts.iter().map(|span| span.links.iter().map(|link| hex(&link.span_id)).collect()).collect();
    let ids: Vec<_> = attempts.iter().map(|span| hex(&span.span_id)).collect();
    assert_eq!(links, [vec![], vec![ids[0].clone()], vec![ids[1].clone()], vec![ids[2].clone()]]);
    for (wait, attempt) in waits.iter().zip(&attempts) {
        assert!(wait.start_time_unix_nano <= wait.end_time_unix_nano);
        assert!(wait.end_time_unix_nano <= attempt.start_time_unix_nano);
        assert!(attempt.start_time_unix_nano <= attempt.end_time_unix_nano);
    }
    let lasted = attempts[2].end_time_unix_nano - attempts[2].start_time_unix_nano;
    assert!(lasted >= 1_000_000_000, "a lost attempt lasts as long as its lease: {lasted} ns");
    let resources = received.resources.lock().expect("not poisoned");
    assert!(resources.iter().all(|said| said["service.name"] == "ledgerd"), "{resources:?}");
    let instances: std::collections::BTreeSet<_> =
        resources.iter().map(|said| &said["service.instance.id"]).collect();
    assert_eq!(instances.len(), 2, "one for each start");
}

#[tokio::test]
async fn a_call_is_a_span_and_where_tasks_come_from_whose_producer_names_no_trace() {
    let (received, endpoint) = Received::start().await;
    let daemon = telling(&[], &exporting(&endpoint));
    let client = daemon.client().await;
    let mut request =
        Request::new(v1::EnqueueTaskRequest { task: Some(task("a")), request_id: String::new() });
    let context = format!("00-{TRACE}-{CREATION}-01");
    request.metadata_mut().insert("traceparent", context.parse().expect("it is ASCII"));
    let id = client.tasks().enqueue_task(request).await.expect("it is stored").into_inner().task_id;
    let call = received.named("ledger.v1.TaskService/EnqueueTask", 1).await.remove(0);
    assert_eq!((hex(&call.trace_id).as_str(), hex(&call.parent_span_id).as_str()), (TRACE, CREATION));
    assert_eq!(call.kind(), SpanKind::Server);
    let said = texts(&call.attributes);
    for (key, value) in [
        ("rpc.system.name", "grpc"),
        ("rpc.method", "ledger.v1.TaskService/EnqueueTask"),
        ("rpc.status_code", "OK"),
    ] {
        assert_eq!(said.get(key).map(String::as_str), Some(value), "{key} of {said:?}");
    }
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    let assignment = worker.assignment().await;
    assert_eq!(assignment.task_id, id);
    assert_eq!(assignment.traceparent, format!("00-{TRACE}-{}-01", hex(&call.span_id)));
    worker.settle(vec![outcome(lease(&assignment), complete("up"))]).await;
    let attempt = received.named("attempt a", 1).await.remove(0);
    assert_eq!((attempt.trace_id, attempt.parent_span_id), (call.trace_id, call.span_id));
    // The caller's mistakes are no errors of ours.
    let missing = v1::GetTaskRequest { task_id: "t999".to_owned(), ..v1::GetTaskRequest::default() };
    client.tasks().get_task(missing).await.expect_err("there is none");
    let get = received.named("ledger.v1.TaskService/GetTask", 1).await.remove(0);
    assert_eq!(texts(&get.attributes)["rpc.status_code"], "NOT_FOUND");
    assert_eq!(get.status.unwrap_or_default().code, 0);
}

#[tokio::test]
async fn an_old_task_has_a_trace_for_each_attempt_linked_to_its_own() {
    let (received, endpoint) = Received::start().await;
    let flags = ["--trace-join-age", "0s"];
    let daemon = telling(&flags, &exporting(&endpoint));
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let new = v1::NewTask { traceparent: format!("00-{TRACE}-{CREATION}-01"), ..task("a") };
    enqueue(&client, new).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.fail_next("down").await;
    worker.fail_next("down").await;
    // The first may be over within the millisecond in which its task came.
    let attempt = received.named("attempt a", 2).await.remove(1);
    assert_ne!(hex(&attempt.trace_id), TRACE);
    assert!(attempt.parent_span_id.is_empty());
    let links: Vec<_> = attempt.links.iter().map(|link| (hex(&link.trace_id), hex(&link.span_id))).collect();
    assert_eq!(links, [(TRACE.to_owned(), CREATION.to_owned())]);
}

#[tokio::test]
async fn an_exporter_that_is_away_costs_spans_that_are_counted_and_nothing_else() {
    let mut environment = exporting("http://127.0.0.1:9");
    environment.push(("OTEL_BSP_MAX_QUEUE_SIZE", "16".into()));
    environment.push(("OTEL_BLRP_MAX_QUEUE_SIZE", "16".into()));
    environment.push(("OTEL_LOGS_EXPORTER", "otlp".into()));
    environment.push(("OTEL_EXPORTER_OTLP_TIMEOUT", "200".into()));
    let flags = ["--http-listen", "127.0.0.1:0"];
    let mut daemon = telling(&flags, &environment);
    let client = daemon.client().await;
    for _ in 0..100 {
        enqueue(&client, task("a")).await;
    }
    let http = daemon.http.clone().expect("it listens");
    for signal in ["spans", "logs"] {
        eventually(signal, async || {
            let series = format!("ledgerd_telemetry_dropped_total{{signal=\"{signal}\"}}");
            (value(&metrics(&http).await, &series) >= 50.0).then_some(())
        })
        .await;
    }
    daemon.signal("TERM");
    assert!(daemon.ended().await.success(), "it does not wait for the exporter for long");
}

/// The answer to a GET.
async fn get_page(address: &str, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.expect("it listens");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("it answers");
    answer
}

/// `/metrics` as it is now.
async fn metrics(address: &str) -> String {
    let answer = get_page(address, "/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

/// One value of them; 0 where it is not there.
fn value(metrics: &str, series: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(series));
    line.map_or(0.0, |rest| rest.trim().parse().expect("a number"))
}

#[tokio::test]
async fn metrics_count_what_happened_and_show_what_is() {
    let flags = ["--http-listen", "127.0.0.1:0"];
    let daemon = Daemon::start_with(Folder::new(), "127.0.0.1:0", &flags);
    let http = daemon.http.clone().expect("it listens");
    let client = daemon.client().await;
    let quick = quick();
    let policy = v1::TaskPolicy { max_retries: Some(1), ..quick.policy.unwrap_or_default() };
    configure(&client, "a", v1::AgentSettings { policy: Some(policy), ..quick }).await;
    let id = enqueue(&client, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 2)).await;
    worker.fail_next("down").await;
    worker.fail_next("down").await;
    in_state(&client, &id, v1::TaskState::Failed).await;
    let other = enqueue(&client, task("a")).await;
    let held = worker.assignment().await;
    assert_eq!(held.task_id, other);
    // The worker has two places, so one task more waits.
    let third = enqueue(&client, task("a")).await;
    assert_eq!(worker.assignment().await.task_id, third);
    enqueue(&client, task("a")).await;
    let calls = "rpc_server_call_duration_seconds_count{rpc_method=\"ledger.v1.TaskService/EnqueueTask\",rpc_status_code=\"OK\"}";
    for (series, expected) in [
        ("ledgerd_task_retries_total{agent=\"a\",reason=\"TRANSIENT\"}", 1.0),
        ("ledgerd_task_dead_lettered_total{agent=\"a\",reason=\"RETRIES_EXHAUSTED\"}", 1.0),
        ("ledgerd_attempt_duration_seconds_count{agent=\"a\",outcome=\"failed\"}", 2.0),
        ("ledgerd_agent_depth{agent=\"a\",state=\"FAILED\"}", 1.0),
        ("ledgerd_agent_depth{agent=\"a\",state=\"RUNNING\"}", 2.0),
        ("ledgerd_agent_depth{agent=\"a\",state=\"QUEUED\"}", 1.0),
        ("ledgerd_worker_sessions", 1.0),
        ("ledgerd_worker_slots{state=\"used\"}", 2.0),
        ("ledgerd_worker_slots{state=\"free\"}", 0.0),
        ("ledgerd_breaker_state{agent=\"a\",state=\"CLOSED\",task_type=\"\"}", 1.0),
        ("ledgerd_task_wait_duration_seconds_count{agent=\"a\"}", 4.0),
        (calls, 4.0),
    ] {
        eventually(series, async || (value(&metrics(&http).await, series) == expected).then_some(())).await;
    }
    eventually("the oldest gets older", async || {
        let age = value(&metrics(&http).await, "ledgerd_agent_oldest_age_seconds{agent=\"a\"}");
        (age > 0.05).then_some(())
    })
    .await;
}

#[tokio::test]
async fn nothing_is_measured_where_telemetry_is_switched_off() {
    let (received, endpoint) = Received::start().await;
    let mut environment = exporting(&endpoint);
    environment.push(("OTEL_SDK_DISABLED", "true".into()));
    let flags = ["--http-listen", "127.0.0.1:0"];
    let mut daemon = telling(&flags, &environment);
    enqueue(&daemon.client().await, task("a")).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    assert_eq!(worker.complete_next("done").await.state(), v1::TaskState::Done);
    let http = daemon.http.clone().expect("it listens");
    let answer = get_page(&http, "/metrics").await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    drop(worker);
    daemon.signal("TERM");
    assert!(daemon.ended().await.success());
    assert!(received.spans.lock().expect("not poisoned").is_empty(), "what is left is sent at the end");
}

#[tokio::test]
async fn json_lines_name_the_trace_they_belong_to() {
    let (received, endpoint) = Received::start().await;
    let flags = ["--log-format", "json", "--log", "info,ledgerd::server=debug"];
    let daemon = telling(&flags, &exporting(&endpoint));
    enqueue(&daemon.client().await, task("a")).await;
    let call = received.named("ledger.v1.TaskService/EnqueueTask", 1).await.remove(0);
    let lines: Vec<serde_json::Value> =
        daemon.log().lines().map(|line| serde_json::from_str(line).expect("every line is JSON")).collect();
    let of_call = lines.iter().find(|line| line["message"] == "answered").expect("it is logged");
    assert_eq!(of_call["trace_id"], hex(&call.trace_id));
    assert_eq!(of_call["span_id"], hex(&call.span_id));
    let start = lines.iter().find(|line| line["message"] == "starting").expect("it is logged");
    assert!(start.get("trace_id").is_none());
}

#[tokio::test]
async fn one_trace_joins_producer_daemon_and_worker() {
    use ledgerd_client::{TaskError, Worker};
    use opentelemetry::trace::SpanKind as Kind;
    use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};
    // This program's own tracer, as an application would set one up.
    let own = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(own.clone()).build();
    opentelemetry::global::set_tracer_provider(provider);
    let (received, endpoint) = Received::start().await;
    let daemon = telling(&[], &exporting(&endpoint));
    let client = daemon.client().await;
    configure(&client, "traced", quick()).await;
    let worker = Worker::builder(client.clone())
        .agents(["traced"])
        .task("test", |_: serde_json::Value, context: ledgerd_client::Context| async move {
            match context.attempt() {
                1 => Err(TaskError::retryable("down")),
                _ => Ok(serde_json::json!("up")),
            }
        })
        .build()
        .expect("it is set up well");
    let stop = ledgerd_client::CancellationToken::new();
    let working = tokio::spawn(worker.run_until(stop.clone()));
    let task = client.enqueue("traced", "test", &1).await.expect("it is stored");
    in_state(&client, task.id(), v1::TaskState::Done).await;
    let of_task = |kind: Kind| {
        let spans = own.get_finished_spans().expect("they are kept");
        let id = opentelemetry::Value::from(task.id().to_owned());
        let mine = spans.into_iter().filter(move |span| {
            span.span_kind == kind
                && span
                    .attributes
                    .iter()
                    .any(|pair| pair.key.as_str() == "messaging.message.id" && pair.value == id)
        });
        mine.collect::<Vec<_>>()
    };
    let handled = eventually("both attempts were traced by the worker", async || {
        let handled = of_task(Kind::Consumer);
        (handled.len() == 2).then_some(handled)
    })
    .await;
    let settled = eventually("both outcomes have a receipt", async || {
        let settled = of_task(Kind::Client);
        (settled.len() == 2).then_some(settled)
    })
    .await;
    for ((span, process), outcome) in settled.iter().zip(&handled).zip(["failed", "completed"]) {
        assert_eq!(span.name, "settle traced");
        assert_eq!(span.parent_span_id, process.span_context.span_id());
        let said = span.attributes.iter().find(|pair| pair.key.as_str() == "ledgerd.outcome");
        assert_eq!(said.map(|pair| pair.value.to_string()).as_deref(), Some(outcome));
    }
    let [sent] = &of_task(Kind::Producer)[..] else { panic!("it was sent once") };
    assert_eq!(sent.name, "enqueue traced");
    let (trace, creation) = (sent.span_context.trace_id(), sent.span_context.span_id());
    for span in &handled {
        assert_eq!((span.name.as_ref(), span.parent_span_id), ("process traced", creation));
        assert_eq!(span.span_context.trace_id(), trace);
        let links: Vec<_> = span.links.iter().map(|link| link.span_context.span_id()).collect();
        assert_eq!(links, [creation]);
    }
    let failed = |span: &opentelemetry_sdk::trace::SpanData| {
        span.attributes
            .iter()
            .find(|pair| pair.key.as_str() == "error.type")
            .map(|pair| pair.value.to_string())
    };
    assert_eq!(handled.iter().map(failed).collect::<Vec<_>>(), [Some("transient".to_owned()), None]);
    // The daemon's own spans stand in the same trace, under the same parent.
    for (name, count) in [("wait traced", 2), ("attempt traced", 2), ("ledger.v1.TaskService/EnqueueTask", 1)]
    {
        for span in received.named(name, count).await {
            assert_eq!(
                (hex(&span.trace_id), hex(&span.parent_span_id)),
                (trace.to_string(), creation.to_string()),
                "{name}"
            );
        }
    }
    stop.cancel();
    working.await.expect("it does not panic").expect("it ends well");
}

#[tokio::test]
async fn logs_leave_over_otlp_where_they_are_asked_for_and_name_their_trace() {
    let (received, endpoint) = Received::start().await;
    let mut environment = exporting(&endpoint);
    environment.push(("OTEL_LOGS_EXPORTER", "otlp".into()));
    let flags = ["--log", "trace,h2=trace"];
    let mut daemon = telling(&flags, &environment);
    enqueue(&daemon.client().await, task("a")).await;
    let call = received.named("ledger.v1.TaskService/EnqueueTask", 1).await.remove(0);
    let (scope, answered) = received.record("answered").await;
    assert_eq!((scope.as_str(), answered.severity_text.as_str()), ("ledgerd::server::calls", "DEBUG"));
    assert_eq!((&answered.trace_id, &answered.span_id), (&call.trace_id, &call.span_id));
    assert_eq!(texts(&answered.attributes)["method"], "ledger.v1.TaskService/EnqueueTask");
    let (_, starting) = received.record("starting").await;
    assert!(starting.trace_id.is_empty(), "it belongs to no call");
    daemon.signal("TERM");
    assert!(daemon.ended().await.success());
    received.record("drained").await;
    let resources = received.resources.lock().expect("not poisoned");
    assert!(resources.iter().all(|said| said["service.name"] == "ledgerd"), "{resources:?}");
    let records = received.records.lock().expect("not poisoned");
    let foreign: Vec<_> = records.iter().filter(|(scope, _)| !scope.starts_with("ledger")).collect();
    assert!(foreign.is_empty(), "what libraries say while they send would be sent in turn: {foreign:?}");
    assert!(daemon.log().contains(" h2::"), "it is in the log, as was asked for");
}

#[tokio::test]
async fn spans_are_shown_on_standard_output_where_nobody_collects_them() {
    let environment = [("OTEL_TRACES_EXPORTER", "console".into()), ("OTEL_BSP_SCHEDULE_DELAY", "20".into())];
    let daemon = telling(&[], &environment);
    enqueue(&daemon.client().await, task("a")).await;
    eventually("the span of the call", async || {
        daemon.output().contains("ledger.v1.TaskService/EnqueueTask").then_some(())
    })
    .await;
    assert!(daemon.output().contains("service.name"), "{}", daemon.output());
}

#[tokio::test]
async fn a_program_that_is_a_worker_is_given_the_span_of_its_attempt() {
    let (received, endpoint) = Received::start().await;
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let program = ["sh", "-c", "printf %s \"$TRACEPARENT\""];
    let _worker = crate::exec::exec_with(&daemon, "w", &program, &exporting(&endpoint));
    let new = v1::NewTask { traceparent: format!("00-{TRACE}-{CREATION}-01"), ..task("a") };
    let id = enqueue(&client, new).await;
    let result = in_state(&client, &id, v1::TaskState::Done).await.result;
    let process = received.named("process a", 1).await.remove(0);
    assert_eq!((hex(&process.trace_id).as_str(), hex(&process.parent_span_id).as_str()), (TRACE, CREATION));
    let given = format!("00-{TRACE}-{}-01", hex(&process.span_id));
    assert_eq!(String::from_utf8_lossy(&result), given);
    let settle = received.named("settle a", 1).await.remove(0);
    assert_eq!((settle.trace_id, settle.parent_span_id), (process.trace_id, process.span_id));
    assert_eq!(texts(&settle.attributes)["ledgerd.outcome"], "completed");
    let resources = received.resources.lock().expect("not poisoned");
    assert!(resources.iter().all(|said| said["service.name"] == "ledgerd-worker"), "{resources:?}");
}

#[tokio::test]
async fn what_tasks_carry_is_in_no_log_span_or_metric() {
    const CANARY: &str = "canary-5e1f";
    let (received, endpoint) = Received::start().await;
    let flags = ["--http-listen", "127.0.0.1:0", "--log-format", "json", "--log", "debug"];
    let mut environment = exporting(&endpoint);
    environment.push(("OTEL_LOGS_EXPORTER", "otlp".into()));
    let daemon = telling(&flags, &environment);
    let client = daemon.client().await;
    configure(&client, "a", quick()).await;
    let said = |what: &str| format!("{CANARY} {what}");
    let new = v1::NewTask {
        payload: said("payload").into_bytes().into(),
        labels: [("label".to_owned(), said("label"))].into(),
        idempotency_key: said("key"),
        ..task("a")
    };
    let id = enqueue(&client, new.clone()).await;
    let mut worker = Stream::open(&daemon, hello("w", "a", 1)).await;
    worker.fail_next(&said("failure")).await;
    worker.complete_next(&said("result")).await;
    in_state(&client, &id, v1::TaskState::Done).await;
    // Refusals speak of what was wrong, too.
    let other = v1::NewTask { payload: said("other").into_bytes().into(), ..new };
    let taken = v1::EnqueueTaskRequest { task: Some(other), request_id: said("request") };
    client.tasks().enqueue_task(taken).await.expect_err("the key is taken by another payload");
    let http = daemon.http.clone().expect("it listens");
    received.named("attempt a", 2).await;
    let metrics = metrics(&http).await;
    let spans = format!("{:?}", received.spans.lock().expect("not poisoned"));
    let records = eventually("records of calls", async || {
        let records = format!("{:?}", received.records.lock().expect("not poisoned"));
        records.contains("EnqueueTask").then_some(records)
    });
    let records = records.await;
    for (what, text) in [("log", daemon.log()), ("spans", spans), ("records", records), ("metrics", metrics)]
    {
        assert!(text.contains("EnqueueTask"), "{what} is what it should be: {text}");
        assert!(!text.contains(CANARY), "{what} has what tasks carry: {text}");
    }
}

"""A stock OTLP receiver takes the daemon's spans and metrics."""

import http.server
import queue
import threading
from concurrent import futures

import grpc
import pytest
from daemon import Daemon
from ledger.v1 import task_pb2, task_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Receiver(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps what it is sent."""

    def __init__(self):
        self.spans, self.metrics = queue.SimpleQueue(), queue.SimpleQueue()

    def Export(self, request, context):
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        self.spans.put(span)
            return trace_service_pb2.ExportTraceServiceResponse()
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    self.metrics.put(metric)
        return metrics_service_pb2.ExportMetricsServiceResponse()


@pytest.fixture
def receiver():
    """A receiver and its address."""
    kept = Receiver()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


def wait_for(kept, name):
    """The first of this name; fails when none comes for 20 s."""
    while True:
        found = kept.get(timeout=20)
        if found.name == name:
            return found


def test_spans_and_metrics_arrive_over_http(binary, tmp_path):
    """The transport that OTLP has unless told otherwise."""
    posted = queue.SimpleQueue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            posted.put((self.path, body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_METRIC_EXPORT_INTERVAL": "100",
        }
        with Daemon(binary, tmp_path, environment=environment) as daemon, grpc.insecure_channel(daemon.address) as channel:
            task = task_pb2.NewTask(agent="a", task_type="test", payload=b"{}")
            task_pb2_grpc.TaskServiceStub(channel).EnqueueTask(task_pb2.EnqueueTaskRequest(task=task), timeout=15)
            bodies = {}
            while len(bodies) < 2:
                path, body = posted.get(timeout=20)
                bodies[path] = body
        server.shutdown()

    spans = trace_service_pb2.ExportTraceServiceRequest.FromString(bodies["/v1/traces"])
    assert spans.resource_spans[0].scope_spans[0].spans[0].name == "ledger.v1.TaskService/EnqueueTask"
    metrics = metrics_service_pb2.ExportMetricsServiceRequest.FromString(bodies["/v1/metrics"])
    assert metrics.resource_metrics


def test_spans_and_metrics_arrive(binary, tmp_path, receiver):
    kept, endpoint = receiver
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_METRIC_EXPORT_INTERVAL": "100",
    }
    with Daemon(binary, tmp_path, environment=environment) as daemon, grpc.insecure_channel(daemon.address) as channel:
        task = task_pb2.NewTask(agent="a", task_type="test", payload=b"{}")
        stub = task_pb2_grpc.TaskServiceStub(channel)
        context = [("traceparent", f"00-{TRACE}-b7ad6b7169203331-01")]
        stub.EnqueueTask(task_pb2.EnqueueTaskRequest(task=task), metadata=context, timeout=15)

        span = wait_for(kept.spans, "ledger.v1.TaskService/EnqueueTask")
        metric = wait_for(kept.metrics, "rpc.server.call.duration")

    assert span.trace_id.hex() == TRACE
    assert metric.unit == "s"
    assert metric.histogram.data_points[0].count == 1

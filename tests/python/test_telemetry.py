"""A stock OTLP receiver takes the daemon's spans and metrics."""

import queue
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

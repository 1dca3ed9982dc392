#!/usr/bin/env python3
"""Has a real OpenTelemetry Collector, with the configuration of deploy/, take what a daemon exports, over both transports.

`just collector-check` builds it and runs this; CI does not, for the time that takes. A second configuration moves its ports and adds an
exporter to a file, which is read here. A task fails once and is done: its trace and its metrics are to arrive whole.
"""

import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

from ports import held_ports
from scrape import BINARY, ROOT, eventually

COLLECTOR = ROOT / "target/deploy/bin/collector"
# What a task carries must not be among what arrives.
CANARY = "canary-7c40"
ONCE = 'cat; [ -e "$0" ] || { : >"$0"; echo canary-7c40 >&2; exit 1; }'
MOVED = """
receivers: {{otlp: {{protocols: {{grpc: {{endpoint: "{grpc}"}}, http: {{endpoint: "{http}"}}}}}}}}
exporters: {{file: {{path: "{out}", flush_interval: 100ms}}}}
extensions: {{health_check: {{endpoint: "{health}"}}}}
service:
  # Its own metrics would listen on a port that somebody else may have.
  telemetry: {{metrics: {{level: none}}}}
  pipelines:
    traces: {{exporters: [debug, file]}}
    metrics: {{exporters: [debug, file]}}
"""


def plain(attributes):
    """A list of OTLP attributes as a dict."""
    return {one["key"]: next(iter(one["value"].values()), None) for one in attributes}


def arrived(out):
    """Spans and points of metrics that the collector has written, each with the attributes of its resource."""
    spans, points = [], []
    # The last line may not be whole yet.
    for line in out.read_text().split("\n")[:-1] if out.exists() else []:
        batch = json.loads(line)
        for resource in batch.get("resourceSpans", []):
            of = plain(resource["resource"]["attributes"])
            spans += [(of, span) for scope in resource["scopeSpans"] for span in scope["spans"]]
        for resource in batch.get("resourceMetrics", []):
            of = plain(resource["resource"]["attributes"])
            for metric in (metric for scope in resource["scopeMetrics"] for metric in scope["metrics"]):
                [kind] = {"sum", "gauge", "histogram"} & set(metric)
                points += [(of, metric["name"], plain(point.get("attributes", [])), point)
                           for point in metric[kind].get("dataPoints", [])]
    return spans, points


def is_whole(spans, service):
    """Whether all of the task's spans are there, and as docs/observing.md says. A wrong one is a fault at once."""
    own = [span for of, span in spans if of.get("service.name") == service]
    calls = [span for span in own if span["name"] == "ledger.v1.TaskService/EnqueueTask"]
    waits = [span for span in own if span["name"] == "wait a"]
    attempts = sorted((span for span in own if span["name"] == "attempt a"), key=lambda span: int(span["startTimeUnixNano"]))
    if not (len(calls) == 1 and len(waits) == 2 and len(attempts) == 2):
        assert len(calls) < 2 and len(waits) < 3 and len(attempts) < 3, "more spans than there were"
        return False
    [call] = calls
    assert call["kind"] == 2, f"a call is of a server: {call}"
    for span in waits + attempts:
        assert (span["traceId"], span["parentSpanId"]) == (call["traceId"], call["spanId"]), f"out of the trace: {span}"
    first, second = attempts
    said = [plain(span["attributes"]) for span in attempts]
    assert [one["ledgerd.attempt.number"] for one in said] == ["1", "2"], said
    assert said[0].get("error.type") and "error.type" not in said[1], said
    assert (first["status"].get("code"), second["status"].get("code")) == (2, None), "only the first one failed"
    assert [link["spanId"] for link in second.get("links", [])] == [first["spanId"]], "the second is linked to the first"
    return True


def is_counted(points, service):
    """Whether the metrics tell the same."""
    own = [(name, labels, point) for of, name, labels, point in points if of.get("service.name") == service]
    outcomes = {labels["outcome"]: int(point["count"]) for name, labels, point in own
                if name == "ledgerd.attempt.duration" and labels["agent"] == "a"}
    retries = [int(point["asInt"]) for name, labels, point in own if name == "ledgerd.task.retries" and labels["agent"] == "a"]
    calls = [labels for name, labels, _ in own
             if name == "rpc.server.call.duration" and labels["rpc.method"].endswith("TaskService/EnqueueTask")]
    depths = [name for name, _, _ in own if name == "ledgerd.agent.depth"]
    return outcomes == {"failed": 1, "completed": 1} and retries[-1:] == [1] and calls and depths


def told(folder, endpoint, protocol, out, log):
    """A daemon that exports to the collector while a task fails and is done."""
    [port] = held_ports(1)
    service, address = f"ledgerd-{protocol}", f"127.0.0.1:{port}"
    environment = {
        "PATH": "/usr/bin:/bin", "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_SERVICE_NAME": service, "OTEL_METRIC_EXPORT_INTERVAL": "500", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    home = folder / protocol.replace("/", "-")
    client = [BINARY, "--address", address]
    processes = [subprocess.Popen(
        [BINARY, "serve", "--listen", address, "--http-listen", "off", "--data-dir", home], stdout=log, stderr=log,
        env=environment)]
    try:
        host, _, port = address.partition(":")
        eventually("the daemon listens", lambda: socket.create_connection((host, port), timeout=1).close() is None)
        task = subprocess.run(
            [*client, "-o", "json", "task", "enqueue", "a", "t", "--payload", json.dumps(CANARY), "--key", f"{CANARY}-key"],
            check=True, capture_output=True, text=True)
        processes.append(subprocess.Popen(
            [*client, "worker", "exec", "--agent", "a", "--", "sh", "-c", ONCE, home / "failed-once"], stdout=log, stderr=log))
        subprocess.run([*client, "task", "wait", json.loads(task.stdout)["taskId"]], check=True, stdout=log, timeout=60)
        eventually("the trace is whole", lambda: is_whole(arrived(out)[0], service))
        eventually("metrics tell the same", lambda: is_counted(arrived(out)[1], service))
    finally:
        for process in reversed(processes):
            process.terminate()
            assert process.wait(timeout=60) == 0, "it ends well"


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        out = folder / "arrived.json"
        grpc, http, health = (f"127.0.0.1:{port}" for port in held_ports(3))
        (folder / "moved.yaml").write_text(MOVED.format(grpc=grpc, http=http, health=health, out=out))
        with open(folder / "log", "w") as log:
            collector = subprocess.Popen(
                [COLLECTOR, f"--config=file:{ROOT / 'deploy/otel/collector.yaml'}", f"--config=file:{folder / 'moved.yaml'}"],
                stdout=log, stderr=log)
            try:
                eventually("the collector is up", lambda: collector.poll() is not None or urllib.request.urlopen(f"http://{health}", timeout=5).status == 200)
                assert collector.poll() is None, "the collector ended"
                start = time.monotonic()
                told(folder, f"http://{grpc}", "grpc", out, log)
                told(folder, f"http://{http}", "http/protobuf", out, log)
                took = time.monotonic() - start
                # Told to end, it closes the file before the last of its batches is written.
                lines = (folder / "log").read_text().splitlines()
                faults = [line for line in lines if "\terror\t" in line or "\tERROR\t" in line]
            except BaseException:
                print((folder / "log").read_text(), file=sys.stderr)
                raise
            finally:
                collector.terminate()
                collector.wait(timeout=60)
        assert CANARY not in out.read_text(), "what a task carries has arrived"
        assert not faults, faults
        spans, points = arrived(out)
        names = {name for _, name, _, _ in points}
        print(f"collect: {len(spans)} spans and {len(names)} metrics arrived at a real collector, over gRPC and HTTP, "
              f"in {took:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

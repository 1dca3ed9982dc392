"""What watches over a daemon: probes in plaintext on the HTTP port, and the protocol of systemd."""

import contextlib
import socket
import time
import urllib.error
import urllib.request

import grpc
import pytest
from daemon import Daemon
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def manager(tmp_path):
    """A socket as a service manager has one; returns what was said to it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        path = str(tmp_path / "notify")
        listening.bind(path)
        listening.settimeout(20)
        yield path, lambda: listening.recv(4096).decode().split("\n")


def get(address, path):
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_one_port_answers_http_and_grpc(binary, tmp_path):
    with Daemon(binary, tmp_path, http="127.0.0.1:0") as daemon, grpc.insecure_channel(daemon.http) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def check(service):
            return health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10, wait_for_ready=True)

        for service in ["", "liveness", "readiness", "startup", "ledger.v1.TaskService"]:
            assert check(service).status == SERVING, service
        with pytest.raises(grpc.RpcError) as refusal:
            check("nothing.v1.Such")
        assert refusal.value.code() == grpc.StatusCode.NOT_FOUND
        assert get(daemon.http, "/livez") == (200, "ok\n")
        assert get(daemon.http, "/readyz?verbose") == (200, "[+] ledger commits\n[+] not draining\nok\n")
        # Nothing else of gRPC is there.
        listing = channel.unary_unary("/ledger.v1.TaskService/ListTasks")
        with pytest.raises(grpc.RpcError):
            listing(b"", timeout=10)


def test_watches_hear_of_the_drain_and_end(binary, tmp_path):
    with Daemon(binary, tmp_path, http="127.0.0.1:0") as daemon, grpc.insecure_channel(daemon.http) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="readiness"), timeout=30, wait_for_ready=True)
        assert next(watch).status == SERVING
        daemon.terminate()
        assert next(watch).status == NOT_SERVING
        with contextlib.suppress(StopIteration, grpc.RpcError):
            while next(watch).status == NOT_SERVING:
                pass
        assert daemon.exit_code() == 0


def test_a_service_manager_hears_of_start_life_and_drain(binary, tmp_path, manager):
    path, said = manager
    environment = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "300000"}
    with Daemon(binary, tmp_path, environment=environment) as daemon:
        assert health_pb2_grpc.HealthStub(grpc.insecure_channel(daemon.address)).Check(
            health_pb2.HealthCheckRequest(service=""), timeout=10, wait_for_ready=True).status == SERVING
        start, pings, ready = time.monotonic(), 0, False
        while pings < 5 or not ready:
            message = said()
            ready = ready or "READY=1" in message
            pings += "WATCHDOG=1" in message
        assert time.monotonic() - start < 3, "three signs of life in each interval"
        daemon.terminate()
        while "STOPPING=1" not in said():
            pass
        assert daemon.exit_code() == 0

"""KEDA's side of the daemon: what an autoscaler is told follows the load."""

import contextlib
import threading
import time

import grpc
import pytest
from externalscaler import externalscaler_pb2 as keda
from externalscaler import externalscaler_pb2_grpc
from google.rpc import error_details_pb2
from ledger_client import complete, recorded
from test_standards import details

LONG = 30


@pytest.fixture
def scaler(ledger):
    return externalscaler_pb2_grpc.ExternalScalerStub(ledger.channel)


def ref(agent, **metadata):
    # As KEDA does: its own keys come along.
    said = {"scalerAddress": "ledgerd:7420", "agent": agent, **metadata}
    return keda.ScaledObjectRef(name="workers", namespace="agents", scalerMetadata=said)


def eventually(what, look, expected):
    end = time.monotonic() + LONG
    while (seen := look()) != expected:
        assert time.monotonic() < end, f"{what}: {seen}, not {expected}"
        time.sleep(0.05)


def test_activity_metrics_and_stream_follow_the_load(ledger, agent, scaler):
    """Nothing, four waiting, one of them in hand, three done, all done."""
    both, waiting = ref(agent), ref(agent, count="waiting")
    idle_above = ref(agent, activation="3")
    changes = []
    stream = scaler.StreamIsActive(both, timeout=120)

    def listen():
        with contextlib.suppress(grpc.RpcError):
            for answer in stream:
                changes.append(answer.result)

    threading.Thread(target=listen, daemon=True).start()

    def tasks(of):
        answer = scaler.GetMetrics(keda.GetMetricsRequest(scaledObjectRef=of, metricName="tasks"), timeout=10)
        [value] = answer.metricValues
        assert (value.metricName, value.metricValueFloat) == ("tasks", float(value.metricValue))
        return value.metricValue

    def active(of):
        return scaler.IsActive(of, timeout=10).result

    assert (active(both), tasks(both)) == (False, 0)
    eventually("the stream begins with what is", lambda: list(changes), [False])
    ids = [ledger.enqueue(agent) for _ in range(4)]
    eventually("all wait", lambda: (active(both), active(idle_above), tasks(both), tasks(waiting)), (True, True, 4, 4))
    session = ledger.work("w", agent)
    _, lease = session.start(ids[0])
    eventually("one is in hand", lambda: (tasks(both), tasks(waiting)), (4, 3))
    recorded(session.settle(complete(lease)))
    eventually("three are left", lambda: (active(both), active(idle_above), tasks(both)), (True, False, 3))
    for task in ids[1:]:
        _, lease = session.start(task)
        recorded(session.settle(complete(lease)))
    eventually("nothing is left", lambda: (active(both), tasks(both), tasks(waiting)), (False, 0, 0))
    eventually("the stream tells of each change", lambda: list(changes), [False, True, False])
    stream.cancel()


def test_the_spec_is_what_the_trigger_says(scaler):
    wanted = ref("writer", targetPerReplica="2.5")

    [spec] = scaler.GetMetricSpec(wanted, timeout=10).metricSpecs
    pushed = scaler.StreamMetricSpec(wanted, timeout=10)

    assert (spec.metricName, spec.targetSize, spec.targetSizeFloat) == ("tasks", 3, 2.5)
    assert list(next(pushed).metricSpecs) == [spec]
    pushed.cancel()


def test_a_task_that_waits_too_long_asks_for_another_worker(ledger, agent, scaler):
    """A worker is full, and a task waits longer than it is to."""
    said = ref(agent, maxWait="500ms", activation="9")

    def measured(name):
        answer = scaler.GetMetrics(keda.GetMetricsRequest(scaledObjectRef=said, metricName=name), timeout=10)
        [value] = answer.metricValues
        assert value.metricName == name
        return value.metricValueFloat

    def active():
        return scaler.IsActive(said, timeout=10).result

    specs = scaler.GetMetricSpec(said, timeout=10).metricSpecs
    assert [(spec.metricName, spec.targetSizeFloat) for spec in specs] == [("tasks", 1), ("wait", 0.5)]
    assert (measured("wait"), active()) == (0, False)
    ids = [ledger.enqueue(agent) for _ in range(2)]
    session = ledger.work("w", agent)
    _, lease = session.start(ids[0])
    # Two tasks are worth two workers at most, each with half a second.
    eventually("the wait is too long", lambda: (measured("wait"), measured("tasks"), active()), (1, 2, True))
    recorded(session.settle(complete(lease)))
    _, lease = session.start(ids[1])
    eventually("nothing waits", lambda: (measured("wait"), measured("tasks"), active()), (0, 1, False))


@pytest.mark.parametrize("call", ["IsActive", "GetMetricSpec", "StreamIsActive", "StreamMetricSpec", "GetMetrics"])
def test_bad_metadata_is_refused_by_key(scaler, call):
    said = ref("writer", count="leased")
    request = keda.GetMetricsRequest(scaledObjectRef=said) if call == "GetMetrics" else said

    with pytest.raises(grpc.RpcError) as refusal:
        answer = getattr(scaler, call)(request, timeout=10)
        next(answer)

    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    [bad] = details(refusal.value, error_details_pb2.BadRequest)
    assert [violation.field for violation in bad.field_violations] == ["scalerMetadata.count"]

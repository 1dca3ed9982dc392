"""The client of these tests: three stubs, and a Work stream whose frames can be awaited one by one."""

import itertools
import queue
import threading
import time

import grpc
from daemon import CANARY
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from ledger.v1 import admin_pb2, admin_pb2_grpc, task_pb2, task_pb2_grpc, worker_pb2, worker_pb2_grpc

WAIT = 15.0  # no event here takes a second; a loaded machine gets more


class Ledger:
    """A channel and its three services."""

    def __init__(self, address):
        options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200),
                   ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(address, options)
        self.tasks = task_pb2_grpc.TaskServiceStub(self.channel)
        self.workers = worker_pb2_grpc.WorkerServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)
        self.sessions = []

    def close(self):
        for session in self.sessions:
            session.break_off()
        self.channel.close()

    def configure_quick(self, agent):
        """Retries come at once, so that no test sleeps."""
        policy = task_pb2.TaskPolicy(base_delay=Duration(nanos=1_000_000), jitter=task_pb2.JITTER_KIND_NONE)
        request = admin_pb2.ConfigureAgentRequest(agent=agent, settings=admin_pb2.AgentSettings(policy=policy))
        return self.admin.ConfigureAgent(request, timeout=WAIT, wait_for_ready=True).agent

    def enqueue(self, agent, payload=CANARY, request_id="", **more):
        """The id of a new task."""
        answer = self.enqueue_raw(agent, payload, request_id, **more)
        assert answer.created
        return answer.task_id

    def enqueue_raw(self, agent, payload=CANARY, request_id="", **more):
        task = task_pb2.NewTask(agent=agent, payload=payload, **({"task_type": "echo"} | more))
        return self.tasks.EnqueueTask(task_pb2.EnqueueTaskRequest(task=task, request_id=request_id), timeout=WAIT)

    def get(self, task_id):
        request = task_pb2.GetTaskRequest(task_id=task_id, include_data=True)
        return self.tasks.GetTask(request, timeout=WAIT).task

    def history(self, task_id):
        return self.tasks.GetTaskHistory(task_pb2.GetTaskHistoryRequest(task_id=task_id), timeout=WAIT).events

    def wait(self, task_id):
        """The task when it ended."""
        request = task_pb2.WaitTaskRequest(
            task_id=task_id, timeout=Duration(seconds=int(WAIT)), include_data=True)
        return self.tasks.WaitTask(request, timeout=WAIT + 5).task

    def cancel(self, task_id):
        return self.tasks.CancelTask(task_pb2.CancelTaskRequest(task_id=task_id), timeout=WAIT).task

    def settle(self, worker_id, *outcomes):
        """Receipts of a unary settle, for use after a broken stream."""
        request = worker_pb2.SettleTasksRequest(worker_id=worker_id, outcomes=outcomes)
        return list(self.workers.SettleTasks(request, timeout=WAIT).receipts)

    def work(self, worker_id, agent, capacity=1, incarnation=1, held=(), unreceipted=()):
        """A session, after its Welcome."""
        hello = worker_pb2.Hello(
            worker_id=worker_id, incarnation=incarnation, agents=[agent], capacity=capacity,
            sdk="python-test", protocol_version=1, held=held, unreceipted=unreceipted)
        session = Session(self.workers)
        self.sessions.append(session)
        session.send(hello=hello)
        session.welcome = session.take("welcome")
        return session


class StreamEnded(Exception):
    """The stream ended while something was awaited on it."""


class Session:
    """One Work stream. Frames are taken apart as they arrive; what is not asked for waits until it is."""

    def __init__(self, workers):
        self._outbox, self._inbox, self._news = queue.SimpleQueue(), [], threading.Condition()
        self._end, self._sequence = None, itertools.count(1)
        self._call = workers.Work(iter(self._outbox.get, None), wait_for_ready=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            for frame in self._call:
                kind = frame.WhichOneof("frame")
                body = getattr(frame, kind)
                items = list(body.items) if kind in ("assignments", "receipts", "stop") else [body]
                with self._news:
                    self._inbox += [(kind, item) for item in items]
                    self._news.notify_all()
            end = grpc.StatusCode.OK
        except grpc.RpcError as error:
            end = error.code()
        with self._news:
            self._end = end
            self._news.notify_all()

    def send(self, **frame):
        self._outbox.put(worker_pb2.WorkRequest(**frame))

    def take(self, kind, match=lambda item: True):
        """The first item of this kind that matches, awaited if need be."""
        until = time.monotonic() + WAIT
        with self._news:
            while True:
                for index, (found, item) in enumerate(self._inbox):
                    if found == kind and match(item):
                        del self._inbox[index]
                        return item
                if self._end is not None:
                    raise StreamEnded(f"{self._end} while waiting for {kind}")
                if not self._news.wait(until - time.monotonic()):
                    raise TimeoutError(f"no {kind} in {WAIT} s; arrived: {[found for found, _ in self._inbox]}")

    def ended(self):
        """The status the stream ended with."""
        with self._news:
            assert self._news.wait_for(lambda: self._end is not None, WAIT), "the stream goes on"
            return self._end

    def break_off(self):
        """Cancel the RPC, as a lost connection would."""
        self._call.cancel()
        self._outbox.put(None)
        self.ended()

    def assignment(self, task_id):
        return self.take("assignments", lambda item: item.task_id == task_id)

    def receipt(self, lease, kind):
        return self.take("receipts", lambda item: item.lease == lease and item.kind == kind)

    def start(self, task_id):
        """Take the assignment of a task and acknowledge it. Returns assignment and lease."""
        assignment = self.assignment(task_id)
        lease = lease_of(assignment)
        self.send(acks=worker_pb2.Acks(items=[lease]))
        recorded(self.receipt(lease, worker_pb2.RECEIPT_KIND_ACK))
        return assignment, lease

    def settle(self, outcome):
        """Send one outcome and return its receipt."""
        self.send(outcomes=worker_pb2.Outcomes(items=[outcome]))
        return self.receipt(outcome.lease, worker_pb2.RECEIPT_KIND_OUTCOME)

    def beat(self, *held):
        """Send a heartbeat and return its ack."""
        sequence = next(self._sequence)
        self.send(heartbeat=worker_pb2.Heartbeat(held=held, sequence=sequence))
        return self.take("heartbeat_ack", lambda ack: ack.sequence == sequence)


def until(condition):
    """Asks again until it holds: for what the wire has no call that waits for."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


def lease_of(assignment):
    return worker_pb2.Lease(task_id=assignment.task_id, fence=assignment.fence)


def complete(lease, result=b""):
    return worker_pb2.Outcome(lease=lease, complete=worker_pb2.Complete(result=result))


def fail(lease, message="it broke", kind=task_pb2.ERROR_CLASS_TRANSIENT):
    error = task_pb2.TaskError(code="E_TEST", message=message, **{"class": kind})  # `class` is Python's own word
    return worker_pb2.Outcome(lease=lease, fail=worker_pb2.Fail(error=error))


def cancelled(lease):
    return worker_pb2.Outcome(lease=lease, cancelled=worker_pb2.Cancelled())


def release(lease, cause=worker_pb2.RELEASE_CAUSE_DRAIN):
    return worker_pb2.Outcome(lease=lease, release=worker_pb2.Release(cause=cause))


def recorded(receipt):
    """The receipt, which is no refusal."""
    assert not receipt.HasField("error"), receipt
    return receipt


def refused(receipt, reason):
    """The receipt, which is the refusal of this name."""
    assert receipt.HasField("error"), receipt
    assert receipt.error.reason == reason, receipt
    assert receipt.error.message
    return receipt


def fields(message):
    """Every field of a message, unset ones too: what two equal answers are compared by."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)

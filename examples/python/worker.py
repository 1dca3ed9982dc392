"""A ledgerd producer and worker on nothing but stock grpcio: everything a client needs is in proto/.

Generate the stubs once (Python 3.11, pip install grpcio grpcio-tools), from the root of the repository; then
run it against a daemon on 127.0.0.1:7420, or --address, or LEDGERD_ADDRESS:

    mkdir -p target/stubs && python -m grpc_tools.protoc -Iproto --python_out=target/stubs \
        --grpc_python_out=target/stubs proto/ledger/v1/*.proto
    export PYTHONPATH=target/stubs
    python examples/python/worker.py work --agent demo
    python examples/python/worker.py enqueue --agent demo --type echo --wait '{"hello": "world"}'

The rules a worker keeps, and where: Hello names all it holds (`frames`), it beats (`beat`), repeats acks and
outcomes until they are receipted (`on_welcome`), ends work on Stop or LOST (`heed`), reconnects when the
stream ends or goes silent (`stay_connected`), finishes or gives back before it leaves (`run`).
"""

import argparse
import asyncio
import itertools
import os
import random
import signal
import time
import uuid

import grpc

from ledger.v1 import task_pb2 as t, task_pb2_grpc, worker_pb2 as w, worker_pb2_grpc

# What a verdict on a lease means to a job, and which errors of a handler no further attempt will mend.
ENDS = {w.LEASE_STATE_STOP: "stop", w.LEASE_STATE_LOST: "lost"}
PERMANENT = (LookupError, TypeError, ValueError)


class Job:
    """One assignment being worked on; handlers get it."""

    def __init__(self, given):
        self.type, self.payload = given.task_type, given.payload
        self.checkpoint, self.key = given.checkpoint, (given.task_id, given.fence)
        self.lease = w.Lease(task_id=given.task_id, fence=given.fence)
        self.news = {}  # what the next beat tells
        self.acked, self.ended_by, self.runner = False, None, None

    def report(self, fraction, checkpoint):
        """Tell people how far it is, and the next attempt where to go on."""
        self.checkpoint = checkpoint
        self.news = {"progress": t.Progress(fraction=fraction), "checkpoint": checkpoint}

    def end(self, why):
        """End the handler: "stop" (asked to), "lost" (no longer ours) or "drain" (we are leaving)."""
        self.ended_by = self.ended_by or why
        self.runner.cancel()


async def echo(job):
    return job.payload


async def sleep(job):
    """Sleeps payload seconds in ten steps and, after a loss, goes on from its checkpoint."""
    for step in range(int(job.checkpoint or 0), 10):
        await asyncio.sleep(float(job.payload) / 10)
        job.report((step + 1) / 10, str(step + 1).encode())
    return b"slept"


async def unknown(job):
    raise LookupError(f"no handler for task type {job.type}")


HANDLERS = {"echo": echo, "sleep": sleep}


class Worker:
    def __init__(self, channel, worker_id, agents, capacity=4, drain=10.0):
        self.stub = worker_pb2_grpc.WorkerServiceStub(channel)
        self.worker_id, self.agents, self.capacity, self.drain = worker_id, agents, capacity, drain
        self.incarnation = time.time_ns() // 1_000_000  # rises with each start of this process
        self.jobs, self.unreceipted = {}, {}  # by (task_id, fence): what runs, what ended without a receipt
        self.outbox = asyncio.Queue()  # frames for the current stream; None closes our half of it
        self.silence, self.pause, self.beats = 10.0, 0.1, None
        self.on = {"welcome": self.on_welcome, "assignments": self.on_assignments, "receipts": self.on_receipts,
                   "stop": lambda it: self.heed(it.items), "heartbeat_ack": lambda it: self.heed(it.leases)}
        self.leaving, self.free, self.longest = asyncio.Event(), asyncio.Event(), 5.0
        self.free.set()

    async def run(self):
        """Work until SIGTERM or SIGINT, then finish what is held or give it back."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.leaving.set)
        connection = asyncio.create_task(self.stay_connected())
        await self.leaving.wait()
        self.send(capacity=w.Capacity(capacity=0))
        await asyncio.wait([free := asyncio.create_task(self.free.wait())], timeout=self.drain)
        for job in self.jobs.values():
            job.end("drain")
        await asyncio.wait([free], timeout=5)  # a daemon that is away learns the rest when the leases run out
        self.send(goodbye=w.Goodbye())
        self.outbox.put_nowait(None)
        await asyncio.wait([connection], timeout=5)
        connection.cancel()

    async def stay_connected(self):
        """One session after another. The end of a stream means nothing: leases go on, and so do jobs."""
        while not (self.leaving.is_set() and self.free.is_set()):
            try:
                await self.session()
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                print("stream ended:", error.details() if hasattr(error, "details") else "silence", flush=True)
            await asyncio.sleep(random.uniform(0, self.pause))
            self.pause = min(self.pause * 2, self.longest)

    async def session(self):
        self.outbox, self.silence = asyncio.Queue(), 10.0
        call = self.stub.Work(self.frames(self.outbox))
        try:
            while True:
                async with asyncio.timeout(self.silence):
                    frame = await call.read()
                if frame is grpc.aio.EOF:
                    return
                kind = frame.WhichOneof("frame")
                if kind in self.on:  # Idle, Drain, and kinds newer than us, need no answer
                    self.on[kind](getattr(frame, kind))
        finally:
            call.cancel()
            if self.beats:
                self.beats.cancel()

    async def frames(self, outbox):
        """What we send: Hello, which names all we hold, then the outbox."""
        yield w.WorkRequest(hello=w.Hello(
            worker_id=self.worker_id, incarnation=self.incarnation, agents=self.agents,
            capacity=0 if self.leaving.is_set() else self.capacity,
            sdk="python-example", protocol_version=1, held=[job.lease for job in self.jobs.values()],
            unreceipted=[outcome.lease for outcome in self.unreceipted.values()]))
        while (frame := await outbox.get()) is not None:
            yield frame

    def send(self, **frame):
        self.outbox.put_nowait(w.WorkRequest(**frame))

    def on_welcome(self, welcome):
        print(f"session {welcome.session_id} with ledgerd {welcome.server_version}", flush=True)
        self.silence, self.pause = 2 * welcome.idle_interval.ToMilliseconds() / 1000 + 5, 0.1
        self.heed(welcome.leases)
        if unacked := [job.lease for job in self.jobs.values() if not job.acked]:
            self.send(acks=w.Acks(items=unacked))
        for outcome in self.unreceipted.values():
            self.send(outcomes=w.Outcomes(items=[outcome]))
        interval = welcome.heartbeat_interval.ToMilliseconds() / 1000
        # A daemon that comes back gives each lease its whole length again: knock as often as you would beat.
        self.longest = min(5.0, interval)
        self.beats = asyncio.create_task(self.beat(interval))

    def on_assignments(self, assignments):
        self.free.clear()
        jobs = [Job(given) for given in assignments.items]
        for job in jobs:
            self.jobs[job.key] = job
            job.runner = asyncio.create_task(HANDLERS.get(job.type, unknown)(job))
            job.runner.add_done_callback(lambda _, job=job: self.settle(job))
        self.send(acks=w.Acks(items=[job.lease for job in jobs]))

    def settle(self, job):
        """The handler ended: turn how it ended into an outcome, and keep that until it is receipted."""
        outcome = w.Outcome(lease=job.lease)
        if not job.runner.cancelled() and (error := job.runner.exception()):
            kind = t.ERROR_CLASS_PERMANENT if isinstance(error, PERMANENT) else t.ERROR_CLASS_UNKNOWN
            what = {"class": kind, "code": type(error).__name__, "message": str(error)[:1000]}
            outcome.fail.error.CopyFrom(t.TaskError(**what))
        elif not job.runner.cancelled():
            outcome.complete.result = job.runner.result()
        elif job.ended_by == "stop":
            outcome.cancelled.SetInParent()
        elif job.ended_by == "drain":
            outcome.release.CopyFrom(w.Release(cause=w.RELEASE_CAUSE_DRAIN, checkpoint=job.checkpoint or None))
        del self.jobs[job.key]
        if outcome.WhichOneof("outcome") and job.ended_by != "lost":  # then it would be refused
            self.unreceipted[job.key] = outcome
            self.send(outcomes=w.Outcomes(items=[outcome]))
        print(job.lease.task_id, outcome.WhichOneof("outcome") or "lost", flush=True)
        self.look()

    def on_receipts(self, receipts):
        for receipt in receipts.items:
            key = (receipt.lease.task_id, receipt.lease.fence)
            if receipt.HasField("error"):
                print(key[0], "refused:", receipt.error.reason, receipt.error.message, flush=True)
            if receipt.kind == w.RECEIPT_KIND_OUTCOME:
                self.unreceipted.pop(key, None)
            elif job := self.jobs.get(key):
                job.acked = True
                if receipt.HasField("error"):
                    job.end("lost")
        self.look()

    def look(self):
        if not self.jobs and not self.unreceipted:
            self.free.set()

    def heed(self, verdicts):
        for verdict in verdicts:
            job = self.jobs.get((verdict.lease.task_id, verdict.lease.fence))
            if job and verdict.state in ENDS:
                job.end(ENDS[verdict.state])

    async def beat(self, interval):
        for sequence in itertools.count(1):
            await asyncio.sleep(interval)
            held = [w.Held(lease=job.lease, **job.news) for job in self.jobs.values()]
            self.send(heartbeat=w.Heartbeat(held=held, sequence=sequence))
            for job in self.jobs.values():
                job.news = {}


async def enqueue(channel, args):
    stub = task_pb2_grpc.TaskServiceStub(channel)
    task = t.NewTask(agent=args.agent, task_type=args.type, payload=args.payload.encode(), idempotency_key=args.key)
    # With a request_id the same call can be repeated after any error: the first answer comes again.
    answer = await stub.EnqueueTask(t.EnqueueTaskRequest(task=task, request_id=str(uuid.uuid4())), timeout=10)
    print(answer.task_id, "created" if answer.created else "known already", flush=True)
    while args.wait:
        found = (await stub.WaitTask(t.WaitTaskRequest(task_id=answer.task_id, include_data=True), timeout=70)).task
        if found.state >= t.TASK_STATE_DONE:  # or FAILED, or CANCELLED
            print(t.TaskState.Name(found.state), found.result.decode(errors="replace"), flush=True)
            break


async def main():
    parser = argparse.ArgumentParser(description="ledgerd producer and worker on stock grpcio")
    parser.add_argument("--address", default=os.environ.get("LEDGERD_ADDRESS", "127.0.0.1:7420"))
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("enqueue", help="enqueue one task")
    one.add_argument("--agent", required=True)
    one.add_argument("--type", default="echo", help="one of " + ", ".join(HANDLERS))
    one.add_argument("--key", default="", help="idempotency key")
    one.add_argument("--wait", action="store_true", help="print how it ended")
    one.add_argument("payload", nargs="?", default="")
    work = commands.add_parser("work", help="work until SIGTERM")
    work.add_argument("--agent", action="append", required=True)
    work.add_argument("--worker-id", default=f"{os.uname().nodename}/python/0")
    args = parser.parse_args()
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
    async with grpc.aio.insecure_channel(args.address, options) as channel:
        if args.command == "enqueue":
            return await enqueue(channel, args)
        await Worker(channel, args.worker_id, args.agent).run()


if __name__ == "__main__":
    asyncio.run(main())

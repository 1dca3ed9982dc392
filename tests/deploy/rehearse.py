#!/usr/bin/env python3
"""Rolls daemons over and over as a cluster would, with a load on them, and counts afterwards. No cluster is needed.

They are started as the manifest of an overlay says: its arguments and environment, its user and group, a root that cannot be
written, nothing of a capability, TLS and callers; and probed as a kubelet does, over gRPC in plaintext on the HTTP port. Callers
show a token on `sqlite`, and on `postgres`, which has the component for KEDA, a certificate: each may do its own work and no more.
The certificate of the daemon is renewed between rounds, as a Secret changes. Each round ends one with
SIGTERM while producers enqueue and workers work. On `sqlite` (the default) the next gets the same volume; on `postgres`, inside
of `.ci/postgres`, there are two, and a third is ready before the oldest goes. At the end every task whose enqueue was
acknowledged is DONE, once, and no lease was lost on the way.

Needs openssl. LEDGERD_REHEARSALS says how many rounds, 3 unless said. Where this runs without root, user and root file system
are its own, and it says so.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import grpc
from credentials import Credentials
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ports import held_ports

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/python"))
import conftest  # noqa: E402: it knows how stubs are made

conftest.pytest_configure(None)
from ledger.v1 import task_pb2, task_pb2_grpc, worker_pb2_grpc  # noqa: E402,F401

ROUNDS = int(os.environ.get("LEDGERD_REHEARSALS", "3"))
AGENT, BATCH, WORKERS, SLOTS = "rehearsal", 10, 3, 4
# What tasks carry, which no log may.
CANARY = b'{"canary":"of-the-rehearsal"}'
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def manifest(overlay):
    """The pod of an overlay."""
    python, components = ROOT / "target/deploy/venv/bin/python", ["keda"] if overlay == "postgres" else []
    told = subprocess.run([python, ROOT / "tests/deploy/check.py", "--pod", overlay, *components], check=True,
                          capture_output=True, text=True)
    return json.loads(told.stdout)


class Pod:
    """A daemon, one process after the other with the same volume and ports."""

    def __init__(self, overlay, pod, folder):
        self.folder, self.overlay = folder, overlay
        [self.spec] = pod["containers"]
        self.user, self.group = pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]
        self.grace = pod["terminationGracePeriodSeconds"]
        grpc_port, http_port = held_ports(2)
        self.address, self.http = f"127.0.0.1:{grpc_port}", f"127.0.0.1:{http_port}"
        self.ports = {"LEDGERD_LISTEN": grpc_port, "LEDGERD_HTTP_LISTEN": http_port}
        self.mounts = {"data": folder / "volume", "tls": folder / "tls", "callers": folder / "callers"}
        self.volume = folder / "volume"
        self.binary = folder / "ledgerd"
        self.confined = os.geteuid() == 0 and all(map(shutil.which, ("setpriv", "unshare")))
        self.process = None

    @staticmethod
    def prepare(folder, group):
        """The image and the volume."""
        shutil.copy(os.environ.get("LEDGERD_BIN", ROOT / "target/debug/ledgerd"), folder / "ledgerd")
        (folder / "volume").mkdir()
        if os.geteuid() == 0:
            # As fsGroup does.
            os.chown(folder / "volume", 0, group)
            (folder / "volume").chmod(0o2770)

    def environment(self):
        """The manifest's variables, with what a rehearsal has in other places."""
        said = {one["name"]: one.get("value", "") for one in self.spec["env"]}
        for mount in self.spec["volumeMounts"]:
            path, place = mount["mountPath"] + "/", f"{self.mounts.get(mount['name'], mount['mountPath'])}/"
            said = {name: place + value.removeprefix(path) if value.startswith(path) else value for name, value in said.items()}
        if self.overlay == "postgres":
            # From a Secret.
            said["LEDGERD_STORE"] = os.environ["LEDGERD_TEST_POSTGRES_URL"]
        # Only the ports are others: several daemons have one network here.
        said |= {name: f"{said[name].rpartition(':')[0]}:{port}" for name, port in self.ports.items()}
        return said | {"PATH": "/usr/bin:/bin"}

    def command(self):
        plain = [str(self.binary), *self.spec["args"]]
        if not self.confined:
            return plain
        confine = [
            "setpriv", f"--reuid={self.user}", f"--regid={self.group}", f"--groups={self.group}", "--no-new-privs",
            "--bounding-set=-all", "--inh-caps=-all", *plain]
        # In a mount namespace of its own: read-only everywhere but on the volume.
        script = f'mount --make-rprivate / && mount --bind "{self.volume}" "{self.volume}" && mount -o remount,bind,ro / '
        script += '&& exec "$@"'
        return ["unshare", "--mount", "sh", "-c", script, "sh", *confine]

    def start(self):
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(self.command(), env=self.environment(), stdout=log, stderr=log)
        self.channel = grpc.insecure_channel(self.http, [("grpc.use_local_subchannel_pool", 1)])
        self.health = health_pb2_grpc.HealthStub(self.channel)
        end = time.monotonic() + 30
        while not (self.probe("startup") and self.probe("readiness")):
            assert self.process.poll() is None, f"it ended\n{self.log()}"
            assert time.monotonic() < end, f"it does not start\n{self.log()}"
            time.sleep(0.05)

    def probe(self, service):
        try:
            return self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=3).status == SERVING
        except grpc.RpcError:
            return False

    @property
    def runs(self):
        return self.process is not None and self.process.poll() is None

    def stop(self):
        """SIGTERM; how long the end took, and whether who watches readiness heard of it."""
        watch = self.health.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=60)
        assert next(watch).status == SERVING
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        heard = next(watch).status == NOT_SERVING
        code = self.process.wait(timeout=self.grace)
        self.channel.close()
        assert code == 0, f"exit code {code}\n{self.log()}"
        return time.monotonic() - start, heard

    def log(self):
        return (self.folder / "log").read_text(errors="replace")[-4000:]


class Producer(threading.Thread):
    """Enqueues until it is told to stop; a batch that got no answer is repeated under its request id until it does."""

    def __init__(self, addresses, credentials):
        super().__init__(daemon=True)
        self.stubs = [task_pb2_grpc.TaskServiceStub(credentials.channel("producer", one)) for one in addresses]
        self.enough, self.ids, self.repeats, self.fault = threading.Event(), [], 0, None

    def run(self):
        number = 0
        while not self.enough.is_set():
            number += 1
            tasks = [task_pb2.NewTask(agent=AGENT, task_type="echo", payload=CANARY) for _ in range(BATCH)]
            request = task_pb2.EnqueueTasksRequest(tasks=tasks, request_id=f"rehearsal-{number}")
            while True:
                try:
                    # Another daemon each time, also for a repetition.
                    answer = self.stubs[(number + self.repeats) % len(self.stubs)].EnqueueTasks(request, timeout=5)
                    break
                except grpc.RpcError as error:
                    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN,
                                            grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
                        self.fault = error
                        return
                    self.repeats += 1
                    time.sleep(0.02)
            self.ids += [result.task_id for result in answer.results]
            time.sleep(0.1)


def worker(folder, addresses, number, credentials):
    everywhere = ",".join(f"https://{address}" for address in addresses)
    return subprocess.Popen(
        [ROOT / "target/debug/ledgerd", "--address", everywhere, "worker", "exec", "--agent", AGENT,
         "--worker-id", f"rehearsal-{number}", "--capacity", str(SLOTS), "--", "sh", "-c", "sleep 0.1; cat"],
        env=credentials.environment("worker") | {"PATH": os.environ["PATH"]},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open(folder / "workers", "ab"))


def roll(pods):
    """One goes and one comes; in which order is the overlay's. How the end of the one went."""
    if len(pods) == 1:
        [pod] = pods
        ended = pod.stop()
        pod.start()
        return ended
    # The oldest first.
    idle = next(pod for pod in pods if not pod.runs)
    idle.start()
    oldest = next(pod for pod in pods if pod is not idle)
    ended = oldest.stop()
    pods.sort(key=lambda pod: (pod is oldest, pod is idle))
    return ended


def main():
    overlay = sys.argv[1] if len(sys.argv) > 1 else "sqlite"
    if overlay == "postgres" and "LEDGERD_TEST_POSTGRES_URL" not in os.environ:
        sys.exit("rehearsal: run it inside of .ci/postgres")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ledgerd-rehearsal-"))
    folder.chmod(0o755)
    spec = manifest(overlay)
    group = spec["securityContext"]["fsGroup"]
    Pod.prepare(folder, group)
    credentials = Credentials(folder, group, AGENT, by_certificate=overlay == "postgres")
    pods = [Pod(overlay, spec, folder) for _ in range(1 if overlay == "sqlite" else 3)]
    addresses = [pod.address for pod in pods]
    print(f"rehearsal on {overlay}: {ROUNDS} rounds", "as user 65532 on a read-only root" if pods[0].confined else
          "NOT CONFINED: without root, setpriv and unshare, user and root file system are ours",
          f"over TLS, callers known by {credentials.kind}", sep="; ")
    for pod in pods[:2]:
        pod.start()
    strangers_are_refused(pods[0], credentials)
    producer = Producer(addresses, credentials)
    workers = [worker(folder, addresses, number, credentials) for number in range(WORKERS)]
    producer.start()
    ends, unheard, dead = [], 0, 0
    try:
        for _ in range(ROUNDS):
            credentials.renew()
            end = time.monotonic() + 2
            while time.monotonic() < end:
                dead += sum(not pod.probe("liveness") for pod in pods if pod.runs)
                time.sleep(0.2)
            for pod in pods:
                while pod.runs and credentials.presented(pod.address) != credentials.newest():
                    assert time.monotonic() < end + 10, f"a renewed certificate is not shown\n{pod.log()}"
                    time.sleep(0.2)
            took, heard = roll(pods)
            ends.append(took)
            unheard += not heard
        producer.enough.set()
        producer.join(30)
        assert producer.fault is None, producer.fault
        running = next(number for number, address in enumerate(addresses)
                       if any(pod.runs and pod.address == address for pod in pods))
        count(pods[0], producer.stubs[running], producer, ends, unheard, dead)
    finally:
        for process in workers:
            process.terminate()
        for process in workers:
            process.wait(timeout=60)
        for pod in pods:
            if pod.runs:
                pod.process.terminate()
                pod.process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
        conftest.pytest_unconfigure(None)


def strangers_are_refused(pod, credentials):
    """Nobody without credentials, nobody in the clear, and no caller beyond its role or agents."""
    ours = task_pb2.NewTask(agent=AGENT, task_type="echo", payload=b"{}")
    theirs = task_pb2.NewTask(agent="other", task_type="echo", payload=b"{}")
    refused = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE)
    for who, channel, task, codes in [
        ("a stranger", credentials.channel(None, pod.address), ours, refused),
        ("one in the clear", grpc.insecure_channel(pod.address), ours, (grpc.StatusCode.UNAVAILABLE,)),
        ("the worker", credentials.channel("worker", pod.address), ours, (grpc.StatusCode.PERMISSION_DENIED,)),
        ("the producer", credentials.channel("producer", pod.address), theirs, (grpc.StatusCode.PERMISSION_DENIED,)),
    ]:
        try:
            task_pb2_grpc.TaskServiceStub(channel).EnqueueTask(task_pb2.EnqueueTaskRequest(task=task), timeout=10)
        except grpc.RpcError as error:
            assert error.code() in codes, f"{who} is refused with {error.code()}: {error.details()}"
        else:
            raise AssertionError(f"{who} enqueues")
        channel.close()


def count(pod, stub, producer, ends, unheard, dead):
    """What was acknowledged against what is there."""
    acknowledged = set(producer.ids)
    assert len(acknowledged) == len(producer.ids), "a task was acknowledged twice"
    # In the order they came; each has a minute after the one before.
    for task in producer.ids:
        end, request = time.monotonic() + 60, task_pb2.WaitTaskRequest(task_id=task)
        while stub.WaitTask(request, timeout=70).task.state != task_pb2.TASK_STATE_DONE:
            why = stub.ExplainTask(task_pb2.ExplainTaskRequest(task_id=task), timeout=10)
            assert time.monotonic() < end, f"{task} does not end: {why}\n{pod.log()}"
    stored, token = {}, ""
    while True:
        page = stub.ListTasks(task_pb2.ListTasksRequest(agent=AGENT, page_size=500, page_token=token), timeout=10)
        stored |= {task.task_id: task for task in page.tasks}
        token = page.next_page_token
        if not token:
            break
    lost = sum(event.event in ("LOST", "ACK_TIMEOUT") for task in acknowledged
               for event in stub.GetTaskHistory(task_pb2.GetTaskHistoryRequest(task_id=task), timeout=10).events)
    ends.sort()
    print(f"rehearsal: {len(acknowledged)} tasks acknowledged, {len(stored)} stored, all DONE; {lost} deliveries lost; "
          f"{producer.repeats} calls repeated; {dead} liveness probes failed; {unheard} drains unheard; "
          f"an end took {ends[len(ends) // 2]:.2f} s, {ends[-1]:.2f} s at most")
    assert set(stored) == acknowledged, "something was enqueued twice, or is gone"
    assert (lost, dead, unheard) == (0, 0, 0)
    log = (pod.folder / "log").read_bytes()
    assert b"canary" not in log and b"ldg_" not in log, "a log has what a task carries, or a token"


if __name__ == "__main__":
    main()

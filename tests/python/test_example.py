"""examples/python/worker.py works as its first lines say."""

import os
import queue
import signal
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, STUBS, new_agent
from ledger.v1 import admin_pb2, task_pb2
from ledger_client import WAIT, until

SCRIPT = ROOT / "examples/python/worker.py"


class Example:
    """worker.py as a child process whose printed lines can be awaited."""

    def __init__(self, daemon, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, "--address", daemon.address, *arguments], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": STUBS})
        self._lines, self.printed = queue.SimpleQueue(), []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        with self.process.stdout as stdout:
            for line in stdout:
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def line(self, start):
        """The next line that starts so."""
        while True:
            try:
                line = self._lines.get(timeout=WAIT)
            except queue.Empty:
                line = None
            assert line is not None, f"no line {start!r} after {self.printed}"
            self.printed.append(line)
            if line.startswith(start):
                return line

    def leave(self):
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=WAIT)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=WAIT)


@pytest.fixture
def run():
    """Returns `run(daemon, *arguments)`: an Example, killed when the test ends."""
    running = []

    def run(*arguments):
        running.append(Example(*arguments))
        return running[-1]

    yield run
    for example in running:
        example.close()


def test_example_enqueues_works_and_leaves(run, shared_daemon, ledger, agent):
    worker = run(shared_daemon, "work", "--agent", agent, "--worker-id", agent)
    worker.line("session ")

    producer = run(shared_daemon, "enqueue", "--agent", agent, "--type", "echo", "--wait", '{"hello": "world"}')

    task_id = producer.line("t").split()[0]
    assert producer.line("TASK_STATE_DONE") == 'TASK_STATE_DONE {"hello": "world"}'
    assert producer.process.wait(timeout=WAIT) == 0
    worker.line(f"{task_id} complete")
    assert worker.leave() == 0
    request = admin_pb2.ListWorkersRequest(agent=agent)
    until(lambda: not ledger.admin.ListWorkers(request, timeout=WAIT).workers)


def test_example_fails_an_unknown_task_type_for_good(run, shared_daemon, ledger, agent):
    worker = run(shared_daemon, "work", "--agent", agent, "--worker-id", agent)
    task_id = ledger.enqueue(agent, task_type="unheard-of")

    task = ledger.wait(task_id)

    worker.line(f"{task_id} fail")
    assert (task.state, task.reason) == (task_pb2.TASK_STATE_FAILED, "PERMANENT")
    assert task.last_error.message == "no handler for task type unheard-of"


def test_example_ends_a_cancelled_task(run, shared_daemon, ledger, agent):
    worker = run(shared_daemon, "work", "--agent", agent, "--worker-id", agent)
    task_id = ledger.enqueue(agent, b"3600", task_type="sleep")
    until(lambda: ledger.get(task_id).attempt == 1)

    ledger.cancel(task_id)

    worker.line(f"{task_id} cancelled")
    task = ledger.wait(task_id)
    assert (task.state, task.attempt) == (task_pb2.TASK_STATE_CANCELLED, 1)


def test_example_finishes_its_task_over_a_killed_daemon(run, own_daemon, connect):
    ledger = connect(own_daemon)
    agent = new_agent(ledger)
    worker = run(own_daemon, "work", "--agent", agent)
    worker.line("session ")
    task_id = ledger.enqueue(agent, b"2", task_type="sleep")
    until(lambda: ledger.get(task_id).attempt == 1)

    own_daemon.kill()
    worker.line("stream ended")
    own_daemon.start()
    worker.line("session ")

    task = connect(own_daemon).wait(task_id)
    assert (task.state, task.result) == (task_pb2.TASK_STATE_DONE, b"slept")
    assert (task.delivery, task.attempt, task.losses) == (1, 1, 0)
    assert worker.leave() == 0

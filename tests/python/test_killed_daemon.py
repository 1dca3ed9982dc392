"""A restart is a non-event, and no answer is older than its commit."""

import grpc
from conftest import new_agent
from ledger.v1 import task_pb2, worker_pb2
from ledger_client import complete, fields, recorded


def test_worker_settles_what_it_held_when_the_daemon_was_killed(own_daemon, connect):
    ledger = connect(own_daemon)
    agent = new_agent(ledger)
    session = ledger.work("w", agent)
    held, waiting = ledger.enqueue(agent, b"held"), ledger.enqueue(agent, b"waiting")
    _, lease = session.start(held)

    own_daemon.kill()
    assert session.ended() != grpc.StatusCode.OK
    own_daemon.start()
    resumed = connect(own_daemon).work("w", agent, held=[lease])

    verdicts = [(verdict.lease, verdict.state) for verdict in resumed.welcome.leases]
    assert verdicts == [(lease, worker_pb2.LEASE_STATE_EXTENDED)]
    assert recorded(resumed.settle(complete(lease, b"out"))).state == task_pb2.TASK_STATE_DONE
    assert resumed.start(waiting)[0].payload == b"waiting"
    task = connect(own_daemon).get(held)
    assert (task.result, task.delivery, task.losses) == (b"out", 1, 0)


def test_receipts_and_answers_survive_the_kill(own_daemon, connect):
    ledger = connect(own_daemon)
    agent = new_agent(ledger)
    session = ledger.work("w", agent)
    answer = ledger.enqueue_raw(agent, b"in", request_id="call", idempotency_key="key")
    _, lease = session.start(answer.task_id)
    receipt = recorded(session.settle(complete(lease, b"out")))

    own_daemon.kill()
    own_daemon.start()
    ledger = connect(own_daemon)
    resumed = ledger.work("w", agent)

    assert fields(resumed.settle(complete(lease, b"out"))) == fields(receipt)
    assert ledger.enqueue_raw(agent, b"in", request_id="call", idempotency_key="key") == answer
    by_key = ledger.enqueue_raw(agent, b"in", idempotency_key="key")
    assert (by_key.task_id, by_key.created) == (answer.task_id, False)
    assert ledger.get(answer.task_id).result == b"out"


def test_drained_daemon_exits_zero_and_starts_again(own_daemon, connect):
    ledger = connect(own_daemon)
    agent = new_agent(ledger)
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    _, lease = session.start(task_id)

    own_daemon.terminate()
    session.take("drain")
    session.break_off()  # as a worker does that moves on
    assert own_daemon.exit_code() == 0
    own_daemon.start()

    resumed = connect(own_daemon).work("w", agent, held=[lease])
    assert recorded(resumed.settle(complete(lease))).state == task_pb2.TASK_STATE_DONE

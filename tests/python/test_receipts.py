"""One outcome per (task, fence): repeats get the first receipt, anything else is refused by name."""

import pytest
from google.protobuf.duration_pb2 import Duration
from ledger.v1 import task_pb2, worker_pb2
from ledger_client import complete, fail, fields, lease_of, recorded, refused


@pytest.fixture
def by_stream(ledger):
    return lambda session, worker_id, outcome: session.settle(outcome)


@pytest.fixture
def by_call(ledger):
    return lambda session, worker_id, outcome: ledger.settle(worker_id, outcome)[0]


@pytest.fixture(params=["by_stream", "by_call"])
def settle(request):
    """Outcomes mean the same on the stream and in SettleTasks."""
    return request.getfixturevalue(request.param)


def test_repeated_outcome_gets_the_first_receipt(ledger, agent, settle):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    _, lease = session.start(task_id)
    first = recorded(session.settle(complete(lease, b"out")))

    again = settle(session, "w", complete(lease, b"out"))

    assert fields(again) == fields(first)
    assert ledger.get(task_id).version == first.version


def test_repeated_outcome_gets_the_first_receipt_after_a_newer_claim(ledger, agent, settle):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    _, lease = session.start(task_id)
    first = recorded(session.settle(fail(lease)))
    assert first.state == task_pb2.TASK_STATE_RETRY
    _, newer = session.start(task_id)

    again = settle(session, "w", fail(lease))

    assert fields(again) == fields(first)
    assert ledger.get(task_id).fence == newer.fence, "the newer claim is untouched"
    recorded(session.settle(complete(newer)))
    assert fields(settle(session, "w", fail(lease))) == fields(first)
    assert ledger.get(task_id).state == task_pb2.TASK_STATE_DONE


def test_other_outcome_for_a_settled_fence_is_a_conflict(ledger, agent, settle):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    _, lease = session.start(task_id)
    recorded(session.settle(complete(lease, b"one")))

    receipt = refused(settle(session, "w", complete(lease, b"two")), "OUTCOME_CONFLICT")

    assert receipt.error.code == 9
    assert ledger.get(task_id).result == b"one"


def test_outcome_with_a_stale_fence_is_refused(ledger, agent, settle):
    slow = ledger.work("slow", agent)
    policy = task_pb2.TaskPolicy(ack_timeout=Duration(nanos=100_000_000))
    task_id = ledger.enqueue(agent, policy=policy)
    stale = lease_of(slow.assignment(task_id))
    quick = ledger.work("quick", agent)
    _, newer = quick.start(task_id)  # arrives when the ack timeout of the slow one has passed

    receipt = refused(settle(slow, "slow", complete(stale, b"zombie")), "LEASE_LOST")

    assert receipt.error.code == 9
    assert newer.fence > stale.fence
    assert ledger.get(task_id).worker_id == "quick"
    recorded(quick.settle(complete(newer, b"good")))
    assert ledger.wait(task_id).result == b"good"


def test_outcome_of_another_worker_is_refused(ledger, agent, settle):
    holder, other = ledger.work("holder", agent), ledger.work("other", agent, capacity=0)
    task_id = ledger.enqueue(agent)
    _, lease = holder.start(task_id)

    refused(settle(other, "other", complete(lease, b"stolen")), "NOT_HOLDER")

    recorded(holder.settle(complete(lease, b"own")))
    assert ledger.wait(task_id).result == b"own"


def test_refusal_of_one_outcome_spares_the_others(ledger, agent):
    session = ledger.work("w", agent, capacity=2)
    good, done = ledger.enqueue(agent), ledger.enqueue(agent)
    _, done_lease = session.start(done)
    _, good_lease = session.start(good)
    recorded(session.settle(complete(done_lease, b"one")))

    receipts = ledger.settle("w", complete(done_lease, b"two"), complete(good_lease))

    assert [receipt.lease for receipt in receipts] == [done_lease, good_lease]
    refused(receipts[0], "OUTCOME_CONFLICT")
    recorded(receipts[1])


def test_repeated_ack_starts_no_second_attempt(ledger, agent):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    _, lease = session.start(task_id)

    session.send(acks=worker_pb2.Acks(items=[lease]))

    recorded(session.receipt(lease, worker_pb2.RECEIPT_KIND_ACK))
    assert ledger.get(task_id).attempt == 1

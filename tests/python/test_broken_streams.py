"""The end of a stream means nothing: leases go on, and the worker resumes."""

import grpc
from ledger.v1 import task_pb2, worker_pb2
from ledger_client import complete, fields, recorded


def states(welcome):
    return [(verdict.lease, verdict.state) for verdict in welcome.leases]


def test_worker_resumes_what_it_holds_on_a_new_stream(ledger, agent):
    broken = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    _, lease = broken.start(task_id)
    broken.break_off()

    resumed = ledger.work("w", agent, held=[lease])

    assert states(resumed.welcome) == [(lease, worker_pb2.LEASE_STATE_EXTENDED)]
    assert recorded(resumed.settle(complete(lease))).state == task_pb2.TASK_STATE_DONE
    task = ledger.get(task_id)
    assert (task.delivery, task.attempt, task.losses) == (1, 1, 0)


def test_what_hello_does_not_name_is_handed_out_again(ledger, agent):
    broken = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    first, _ = broken.start(task_id)
    broken.break_off()

    forgetful = ledger.work("w", agent)
    second, lease = forgetful.start(task_id)

    assert second.fence > first.fence
    recorded(forgetful.settle(complete(lease)))
    assert ledger.wait(task_id).losses == 1


def test_newer_stream_of_the_same_process_ends_the_older(ledger, agent):
    older = ledger.work("w", agent)
    ledger.work("w", agent)

    assert older.ended() == grpc.StatusCode.ABORTED


def test_outcome_is_settled_by_a_call_after_a_broken_stream(ledger, agent):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    _, lease = session.start(task_id)
    session.break_off()

    [receipt] = ledger.settle("w", complete(lease, b"out"))

    assert recorded(receipt).state == task_pb2.TASK_STATE_DONE
    assert (receipt.lease, receipt.kind) == (lease, worker_pb2.RECEIPT_KIND_OUTCOME)
    assert ledger.wait(task_id).result == b"out"


def test_unreceipted_outcome_is_sent_again_on_the_new_stream(ledger, agent):
    broken = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    _, lease = broken.start(task_id)
    first = recorded(broken.settle(complete(lease, b"out")))  # let it be that this answer never arrived
    broken.break_off()

    resumed = ledger.work("w", agent, unreceipted=[lease])

    assert fields(resumed.settle(complete(lease, b"out"))) == fields(first)

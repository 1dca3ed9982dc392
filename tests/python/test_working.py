"""What a worker is promised while its stream holds."""

import itertools

from google.protobuf.duration_pb2 import Duration
from ledger.v1 import task_pb2, worker_pb2
from ledger_client import cancelled, complete, fail, recorded, refused, release


def test_worker_completes_a_task_and_the_history_tells_it(ledger, agent):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent, b"in", traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01")

    assignment, lease = session.start(task_id)
    receipt = recorded(session.settle(complete(lease, b"out")))

    assert assignment.payload == b"in"
    assert assignment.traceparent == "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
    assert (assignment.fence, assignment.delivery, assignment.attempt) == (1, 1, 1)
    assert assignment.ack_timeout.ToMilliseconds() > 0
    assert receipt.state == task_pb2.TASK_STATE_DONE
    task = ledger.get(task_id)
    assert (task.state, task.result, task.version) == (task_pb2.TASK_STATE_DONE, b"out", receipt.version)
    events = ledger.history(task_id)
    assert [event.event for event in events] == ["ENQUEUED", "ASSIGNED", "STARTED", "COMPLETED"]
    assert [event.version for event in events] == [1, 2, 3, 4]
    assert all(before.to == getattr(after, "from") for before, after in itertools.pairwise(events))
    assert events[2].worker_id == "w"


def test_outcome_without_an_ack_stands_for_both(ledger, agent):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)

    assignment = session.assignment(task_id)
    lease = worker_pb2.Lease(task_id=task_id, fence=assignment.fence)
    recorded(session.settle(complete(lease)))

    task = ledger.get(task_id)
    assert (task.state, task.attempt) == (task_pb2.TASK_STATE_DONE, 1)
    assert [event.event for event in ledger.history(task_id)] == ["ENQUEUED", "ASSIGNED", "COMPLETED"]


def test_beat_keeps_the_lease_and_stores_progress_and_checkpoint(ledger, agent):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    _, lease = session.start(task_id)
    before = ledger.get(task_id)

    progress = task_pb2.Progress(fraction=0.5, note="half way")
    ack = session.beat(worker_pb2.Held(lease=lease, progress=progress, checkpoint=b"page 3"))

    assert [(verdict.lease, verdict.state) for verdict in ack.leases] == [(lease, worker_pb2.LEASE_STATE_EXTENDED)]
    after = ledger.get(task_id)
    assert (after.progress.fraction, after.progress.note) == (0.5, "half way")
    assert after.lease_until.ToMilliseconds() >= before.lease_until.ToMilliseconds()
    assert after.version == before.version, "a beat is no transition"
    recorded(session.settle(fail(lease)))
    assert session.assignment(task_id).checkpoint == b"page 3"


def test_beat_with_an_unknown_lease_is_told_that_it_is_lost(ledger, agent):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    _, lease = session.start(task_id)
    recorded(session.settle(complete(lease)))

    ack = session.beat(worker_pb2.Held(lease=lease))

    assert [verdict.state for verdict in ack.leases] == [worker_pb2.LEASE_STATE_LOST]


def test_failed_attempt_is_tried_again_with_a_higher_fence(ledger, agent):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    first, lease = session.start(task_id)

    receipt = recorded(session.settle(fail(lease, "connection reset")))
    second, newer = session.start(task_id)

    assert (receipt.state, receipt.reason) == (task_pb2.TASK_STATE_RETRY, "BACKOFF")
    assert receipt.HasField("run_at")
    assert (second.fence, second.delivery, second.attempt) == (first.fence + 1, 2, 2)
    assert (second.last_error.code, second.last_error.message) == ("E_TEST", "connection reset")
    recorded(session.settle(complete(newer)))
    assert ledger.wait(task_id).retry_count == 1


def test_permanent_failure_is_not_tried_again(ledger, agent):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    _, lease = session.start(task_id)

    receipt = recorded(session.settle(fail(lease, kind=task_pb2.ERROR_CLASS_PERMANENT)))

    assert (receipt.state, receipt.reason) == (task_pb2.TASK_STATE_FAILED, "PERMANENT")
    assert ledger.get(task_id).last_error.message == "it broke"


def test_released_task_goes_to_another_worker_without_a_retry_spent(ledger, agent):
    leaving = ledger.work("leaving", agent)
    task_id = ledger.enqueue(agent)
    _, lease = leaving.start(task_id)

    leaving.send(capacity=worker_pb2.Capacity(capacity=0))
    receipt = recorded(leaving.settle(release(lease)))
    assert receipt.state == task_pb2.TASK_STATE_QUEUED
    staying = ledger.work("staying", agent)
    _, lease = staying.start(task_id)
    recorded(staying.settle(complete(lease)))

    assert ledger.wait(task_id).retry_count == 0


def test_cancelled_running_task_is_stopped_and_its_worker_agrees(ledger, agent):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    _, lease = session.start(task_id)

    asked = ledger.cancel(task_id)
    stop = session.take("stop", lambda verdict: verdict.lease == lease)
    again = session.beat(worker_pb2.Held(lease=lease)).leases[0]
    receipt = recorded(session.settle(cancelled(lease)))

    assert (asked.state, asked.stop_cause) == (task_pb2.TASK_STATE_RUNNING, task_pb2.STOP_CAUSE_USER)
    for verdict in (stop, again):
        assert (verdict.state, verdict.stop_cause) == (worker_pb2.LEASE_STATE_STOP, task_pb2.STOP_CAUSE_USER)
        assert 0 < verdict.stop_grace.ToMilliseconds() <= 30_000
    assert receipt.state == task_pb2.TASK_STATE_CANCELLED


def test_complete_within_the_stop_grace_still_counts(ledger, agent):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent)
    _, lease = session.start(task_id)
    ledger.cancel(task_id)
    session.take("stop", lambda verdict: verdict.lease == lease)

    assert recorded(session.settle(complete(lease, b"just in time"))).state == task_pb2.TASK_STATE_DONE


def test_complete_after_the_cancellation_is_refused(ledger, agent):
    session = ledger.work("w", agent)
    task_id = ledger.enqueue(agent, policy=task_pb2.TaskPolicy(stop_grace=Duration()))
    _, lease = session.start(task_id)
    ledger.cancel(task_id)
    ended = ledger.wait(task_id)
    assert (ended.state, ended.reason) == (task_pb2.TASK_STATE_CANCELLED, "ABANDONED")

    receipt = refused(session.settle(complete(lease, b"too late")), "TASK_TERMINAL")

    assert receipt.error.code == 9
    assert ledger.get(task_id).state == task_pb2.TASK_STATE_CANCELLED


def test_worker_never_holds_more_than_its_capacity(ledger, agent):
    tasks = [ledger.enqueue(agent) for _ in range(3)]
    session = ledger.work("w", agent, capacity=2)

    leases = [session.start(task_id)[1] for task_id in tasks[:2]]
    session.beat(*[worker_pb2.Held(lease=lease) for lease in leases])  # an answer later than any third assignment
    assert ledger.get(tasks[2]).state == task_pb2.TASK_STATE_QUEUED
    recorded(session.settle(complete(leases[0])))

    session.start(tasks[2])


def test_goodbye_gives_back_what_is_held(ledger, agent):
    session = ledger.work("leaving", agent)
    task_id = ledger.enqueue(agent)
    session.start(task_id)

    session.send(goodbye=worker_pb2.Goodbye())

    ledger.work("staying", agent).start(task_id)
    assert ledger.get(task_id).worker_id == "staying"

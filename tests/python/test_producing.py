"""What a producer is promised."""

import grpc
import pytest
from ledger.v1 import task_pb2


def test_enqueued_task_is_stored_as_given(ledger, agent):
    task_id = ledger.enqueue(agent, b"\x00input\xff", task_type="resize", labels={"it's": 'a "label"; --'}, priority=7)

    task = ledger.get(task_id)

    assert task.task_id == task_id
    assert (task.agent, task.task_type, task.payload) == (agent, "resize", b"\x00input\xff")
    assert (task.state, task.priority, task.fence, task.attempt) == (task_pb2.TASK_STATE_QUEUED, 7, 0, 0)
    assert dict(task.labels) == {"it's": 'a "label"; --'}
    assert task.payload_bytes == 7


def test_known_idempotency_key_returns_the_earlier_task(ledger, agent):
    first = ledger.enqueue_raw(agent, b"same", idempotency_key="order-7")
    again = ledger.enqueue_raw(agent, b"same", idempotency_key="order-7", priority=9)

    assert first.created and not again.created
    assert again.task_id == first.task_id


def test_known_idempotency_key_with_other_content_is_refused(ledger, agent):
    first = ledger.enqueue_raw(agent, b"one", idempotency_key="order-8")

    with pytest.raises(grpc.RpcError) as refusal:
        ledger.enqueue_raw(agent, b"two", idempotency_key="order-8")

    assert refusal.value.code() == grpc.StatusCode.ALREADY_EXISTS
    assert ledger.get(first.task_id).payload == b"one"


def test_repeated_request_id_returns_the_first_answer(ledger, agent):
    first = ledger.enqueue_raw(agent, b"once", request_id=f"call-of-{agent}")
    again = ledger.enqueue_raw(agent, b"once", request_id=f"call-of-{agent}")

    assert again == first


def test_batch_answers_item_by_item(ledger, agent):
    tasks = [task_pb2.NewTask(agent=agent, task_type="echo"), task_pb2.NewTask(agent="../x", task_type="echo"),
             task_pb2.NewTask(agent=agent, task_type="echo")]

    results = ledger.tasks.EnqueueTasks(task_pb2.EnqueueTasksRequest(tasks=tasks), timeout=15).results

    assert [result.created for result in results] == [True, False, True]
    assert results[1].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert results[1].error.reason


def test_waiting_task_is_cancelled_at_once(ledger, agent):
    task_id = ledger.enqueue(agent)

    assert ledger.cancel(task_id).state == task_pb2.TASK_STATE_CANCELLED
    assert ledger.get(task_id).state == task_pb2.TASK_STATE_CANCELLED

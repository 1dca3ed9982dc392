"""Stock gRPC tools work: health, reflection, rich error details."""

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from ledger.v1 import admin_pb2, task_pb2, worker_pb2

SERVICES = ["ledger.v1.TaskService", "ledger.v1.WorkerService", "ledger.v1.AdminService"]


def details(error, kind):
    """The details of this type in an error; the standard ones travel in grpc-status-details-bin."""
    status = rpc_status.from_call(error)
    assert status is not None, "no details"
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found = []
    for detail in status.details:
        message = kind()
        if detail.Unpack(message):
            found.append(message)
    return found


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_health_check_says_serving(ledger, service):
    stub = health_pb2_grpc.HealthStub(ledger.channel)

    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=15, wait_for_ready=True)

    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_health_check_of_an_unknown_service_is_not_found(ledger):
    stub = health_pb2_grpc.HealthStub(ledger.channel)

    with pytest.raises(grpc.RpcError) as refusal:
        stub.Check(health_pb2.HealthCheckRequest(service="nothing.v1.Such"), timeout=15, wait_for_ready=True)

    assert refusal.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_the_services(ledger, version):
    # The two versions differ by name alone, so the messages of one serve for both.
    call = ledger.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString)

    answer = next(call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=15))

    listed = {service.name for service in answer.list_services_response.service}
    assert listed >= {*SERVICES, "grpc.health.v1.Health"}


def test_reflection_describes_what_proto_says(ledger):
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(ledger.channel))

    for file in (task_pb2, worker_pb2, admin_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            reflected = pool.FindServiceByName(service.full_name)
            assert [method.name for method in reflected.methods] == [method.name for method in service.methods]


def test_unknown_agent_is_named_in_the_error(ledger):
    with pytest.raises(grpc.RpcError) as refusal:
        ledger.admin.GetAgent(admin_pb2.GetAgentRequest(agent="nobody-is-called-so"), timeout=15)

    assert refusal.value.code() == grpc.StatusCode.NOT_FOUND
    [info] = details(refusal.value, error_details_pb2.ErrorInfo)
    assert info.domain == "ledgerd"
    assert info.reason and info.reason == info.reason.upper()


def test_bad_field_is_named_in_the_error(ledger):
    with pytest.raises(grpc.RpcError) as refusal:
        ledger.enqueue_raw("../x")

    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    [info] = details(refusal.value, error_details_pb2.ErrorInfo)
    [bad] = details(refusal.value, error_details_pb2.BadRequest)
    assert info.domain == "ledgerd"
    [violation] = bad.field_violations
    assert violation.field.endswith("agent")
    assert violation.description


@pytest.mark.parametrize("task_id", ["", "no such id!", "t" * 300])
def test_malformed_task_id_is_refused(ledger, task_id):
    with pytest.raises(grpc.RpcError) as refusal:
        ledger.get(task_id)

    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    [info] = details(refusal.value, error_details_pb2.ErrorInfo)
    assert info.domain == "ledgerd"

"""The wire is plain protobuf: a generated stub talks to our server, our client talks to a generated servicer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
import torch
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import attnd
from attnd.v1 import attention_pb2, attention_pb2_grpc, cache_pb2, capabilities_pb2, status_pb2, step_pb2, tensor_pb2
from tests.attention import dense_attention

SERVICE = "attnd.v1.AttentionService"


def message(tensor: torch.Tensor) -> tensor_pb2.Tensor:
    dtype = {torch.float32: tensor_pb2.DTYPE_FLOAT32, torch.int32: tensor_pb2.DTYPE_INT32}[tensor.dtype]
    return tensor_pb2.Tensor(dtype=dtype, shape=tensor.shape, data=tensor.numpy().tobytes())


def tensor(message: tensor_pb2.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(message.data), dtype=torch.float32).view(*message.shape)


def step(cache: cache_pb2.CacheRef, step_id: int, num_tokens: int) -> step_pb2.Step:
    return step_pb2.Step(
        id=step_id,
        cache=cache,
        kind=step_pb2.STEP_KIND_PREFILL,
        cu_seqlens_q=message(torch.tensor([0, num_tokens], dtype=torch.int32)),
        context_lens=message(torch.tensor([0], dtype=torch.int32)),
        page_tables=message(torch.tensor([[2]], dtype=torch.int32)),
        slot_mapping=message(torch.arange(32, 32 + num_tokens, dtype=torch.int32)),
        mask=step_pb2.MASK_CAUSAL,
    )


@pytest.fixture
def stub(server_address: str) -> Iterator[attention_pb2_grpc.AttentionServiceStub]:
    with grpc.insecure_channel(server_address) as channel:
        yield attention_pb2_grpc.AttentionServiceStub(channel)


@pytest.fixture
def cache(stub: attention_pb2_grpc.AttentionServiceStub) -> Iterator[cache_pb2.CacheRef]:
    config = cache_pb2.CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=8, page_size=16, num_pages=4, dtype=tensor_pb2.DTYPE_FLOAT32
    )
    created = stub.CreateCache(cache_pb2.CreateCacheRequest(config=config)).cache.cache
    yield created
    stub.DeleteCache(cache_pb2.DeleteCacheRequest(cache=created))


def test_generated_stub_attends_unary(stub: attention_pb2_grpc.AttentionServiceStub, cache: cache_pb2.CacheRef) -> None:
    q, k, v = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    call = step_pb2.Call(q=message(q), k=message(k), v=message(v))
    reply = stub.Prefill(attention_pb2.PrefillRequest(step=step(cache, 0, 3), call=call)).reply
    torch.testing.assert_close(tensor(reply.output), dense_attention(q, k, v))


def test_generated_stub_attends_on_the_stream(
    stub: attention_pb2_grpc.AttentionServiceStub, cache: cache_pb2.CacheRef
) -> None:
    q, k, v = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    call = step_pb2.Call(step_id=1, q=message(q), k=message(k), v=message(v))
    lost = step_pb2.Call(step_id=9, q=message(q), k=message(k), v=message(v))
    requests = [
        attention_pb2.AttendRequest(step=step(cache, 1, 3)),
        attention_pb2.AttendRequest(call=lost),
        attention_pb2.AttendRequest(call=call),
    ]
    opened, refused, answered = stub.Attend(iter(requests))
    assert opened.step.step_id == 1
    assert refused.error.message == "call.step_id is 9, but the stream's open steps are: 1"
    torch.testing.assert_close(tensor(answered.call.output), dense_attention(q, k, v))


def test_generated_stub_sends_what_changed(
    stub: attention_pb2_grpc.AttentionServiceStub, cache: cache_pb2.CacheRef
) -> None:
    q, k, v = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    first, second = step(cache, 1, 3), step(cache, 2, 3)
    second.ClearField("page_tables")
    second.page_table_delta.CopyFrom(
        step_pb2.PageTableDelta(
            base_step_id=1,
            source_rows=message(torch.tensor([0], dtype=torch.int32)),
            max_pages=2,
            indices=message(torch.tensor([1], dtype=torch.int32)),
            pages=message(torch.tensor([3], dtype=torch.int32)),
        )
    )
    call = step_pb2.Call(step_id=2, q=message(q), k=message(k), v=message(v))
    requests = [attention_pb2.AttendRequest(step=opened) for opened in (first, second)]
    *opened, answered = stub.Attend(iter([*requests, attention_pb2.AttendRequest(call=call)]))
    assert [reply.step.step_id for reply in opened] == [1, 2]
    assert all(reply.step.takes_deltas for reply in opened)
    torch.testing.assert_close(tensor(answered.call.output), dense_attention(q, k, v))


def test_generated_stub_stores_and_reads(
    stub: attention_pb2_grpc.AttentionServiceStub, cache: cache_pb2.CacheRef
) -> None:
    k, slots = torch.randn(2, 1, 8), message(torch.tensor([5, 63], dtype=torch.int32))
    chunk = attention_pb2.StoreKvRequest(cache=cache, slot_mapping=slots, k=message(k), v=message(2 * k))
    assert [reply.num_slots for reply in stub.StoreKv(iter([chunk]))] == [2]
    (read,) = stub.ReadKv(attention_pb2.ReadKvRequest(cache=cache, slot_mapping=slots))
    assert torch.equal(tensor(read.v), 2 * k)


def test_errors_carry_details(stub: attention_pb2_grpc.AttentionServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        stub.CreateCache(cache_pb2.CreateCacheRequest())
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(attnd.errors.from_rpc(raised.value), attnd.InvalidRequest)


class PlainServicer(attention_pb2_grpc.AttentionServiceServicer):
    """Answers with k, computed by nobody's code but protobuf's own."""

    def GetCapabilities(self, request: object, context: object) -> capabilities_pb2.GetCapabilitiesResponse:
        return capabilities_pb2.GetCapabilitiesResponse(version="plain", epoch=5)

    def CreateCache(self, request: cache_pb2.CreateCacheRequest, context: object) -> cache_pb2.CreateCacheResponse:
        info = cache_pb2.CacheInfo(cache=cache_pb2.CacheRef(id=b"plain", epoch=5), config=request.config, ttl_s=60)
        return cache_pb2.CreateCacheResponse(cache=info)

    def DeleteCache(self, request: object, context: object) -> cache_pb2.DeleteCacheResponse:
        return cache_pb2.DeleteCacheResponse()

    def Decode(self, request: attention_pb2.DecodeRequest, context: object) -> attention_pb2.DecodeResponse:
        assert request.step.cache.id == b"plain"
        return attention_pb2.DecodeResponse(reply=step_pb2.CallReply(output=request.call.k))

    def Attend(
        self, requests: Iterator[attention_pb2.AttendRequest], context: object
    ) -> Iterator[attention_pb2.AttendResponse]:
        for request in requests:
            if request.HasField("step"):
                yield attention_pb2.AttendResponse(step=attention_pb2.StepReply(step_id=request.step.id))
            else:
                call = request.call
                reply = step_pb2.CallReply(step_id=call.step_id, layer=call.layer, output=call.k, lse=call.v)
                yield attention_pb2.AttendResponse(call=reply)

    def StoreKv(self, requests: Iterator[attention_pb2.StoreKvRequest], context: object) -> Iterator[object]:
        for request in requests:
            assert request.k.data == request.v.data
            yield attention_pb2.StoreKvResponse(num_slots=request.slot_mapping.shape[0])


def test_our_client_talks_to_a_generated_servicer() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    attention_pb2_grpc.add_AttentionServiceServicer_to_server(PlainServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    k = torch.randn(1, 2, 8)
    metadata = attnd.StepMetadata([1], [3], [[0]], [3], kind="decode")
    try:
        with attnd.connect(f"127.0.0.1:{port}") as client:
            assert client.epoch == 5
            geometry = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 8, "num_pages": 1}
            with client.create_cache(**geometry) as cache, cache.session() as session:
                assert torch.equal(client.decode(cache, metadata, 0, k, k, k), k)
                output, lse = session.step(metadata).attend(0, k, k, 2 * k, attnd.AttentionOptions(return_lse=True))
                assert torch.equal(output, k)
                assert torch.equal(lse, 2 * k)
                assert cache.store_kv(0, [1], k, k) == 1
    finally:
        server.stop(0).wait()


def test_generated_stub_asks_what_the_server_does(
    stub: attention_pb2_grpc.AttentionServiceStub, cache: cache_pb2.CacheRef
) -> None:
    told = stub.GetStatus(status_pb2.GetStatusRequest())
    assert told.epoch == cache.epoch
    assert sum(row.num_caches for row in told.principals) >= 1


def test_health_and_reflection_answer(server_address: str) -> None:
    with grpc.insecure_channel(server_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            status = health.Check(health_pb2.HealthCheckRequest(service=name)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
        (answer,) = reflection.ServerReflectionInfo(iter([asked]))
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(data)
            for data in answer.file_descriptor_response.file_descriptor_proto
        ]
    methods = {method.name for file in files for service in file.service for method in service.method}
    assert {"Attend", "Decode", "Prefill", "CreateCache", "ReadKv"} <= methods

"""Everything that can go wrong says what, and changes nothing on the server."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch

import attnd
from attnd.protocol import frames
from attnd.v1 import attention_pb2, cache_pb2, step_pb2
from tests.servers import wait_for

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.ones(5, 6, 16), torch.ones(5, 2, 16), torch.ones(5, 2, 16)
SOUND = {"query_lens": [5], "context_lens": [0], "page_tables": [[0, 1]], "slot_mapping": [0, 1, 2, 3, 4]}


@pytest.fixture
def cache(any_client: attnd.Client) -> Iterator[attnd.Cache]:
    with any_client.create_cache(**GEOMETRY) as created:
        yield created


def everything(cache: attnd.Cache) -> list[torch.Tensor]:
    return [part for layer in range(2) for part in cache.read_kv(layer, list(range(32)), like=K)]


REFUSED_STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "page past the end": ({"page_tables": [[0, 8]]}, "page_tables[0, 1] is 8, but the cache has pages 0..7"),
    "page below -1": ({"page_tables": [[-2, 1]]}, "page_tables[0, 0] is -2"),
    "slot past the end": ({"slot_mapping": [0, 1, 2, 3, 32]}, "slot_mapping[4] is 32"),
    "slot twice": ({"slot_mapping": [0, 1, 2, 3, 3]}, "slot_mapping[4] is 3"),
    "slot that is read": ({"context_lens": [1]}, "slot_mapping[0] is 0"),
    "slots of another length": ({"slot_mapping": [0, 1]}, "slot_mapping"),
    "context without pages": ({"context_lens": [9], "slot_mapping": None}, "context_lens[0] is 9"),
    "context below 0": ({"context_lens": [-1]}, "context_lens[0] is -1"),
    "lengths that do not add up": ({"context_lens": [0, 0]}, "context_lens"),
    "valid past the end": ({"valid_lens": [6]}, "valid_lens[0] is 6"),
    "no block size": ({"mask": "block_causal"}, "block_size is 0"),
    "uneven decode": (
        {"kind": "decode", "query_lens": [2, 3], "context_lens": [0, 0], "page_tables": [[0], [1]]},
        "cu_seqlens_q gives 3 new tokens to request 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED_STEPS)
def test_refused_step_names_the_field_and_changes_nothing(cache: attnd.Cache, name: str) -> None:
    changes, told = REFUSED_STEPS[name]
    before = everything(cache)
    with cache.session() as session:
        step = session.step(attnd.StepMetadata(**{**SOUND, **changes}))
        for _ in range(2):  # the second call of a refused step says the same
            with pytest.raises(attnd.InvalidRequest) as raised:
                step.attend(0, Q, K, V)
            assert told in str(raised.value)
            assert raised.value.field
        assert all(torch.equal(a, b) for a, b in zip(before, everything(cache), strict=True))
        session.step(attnd.StepMetadata(**SOUND)).attend(0, Q, K, V)  # the session goes on


REFUSED_CALLS: dict[str, tuple[tuple[Any, ...], str]] = {
    "layer past the end": ((2, Q, K, V), "layer is 2, but the cache has layers 0..1"),
    "wrong dtype": ((0, Q.half(), K, V), "q has dtype float16, but must be float32"),
    "wrong head dim": ((0, Q[..., :8], K, V), "q has shape [5, 6, 8]"),
    "wrong number of tokens": ((0, Q[:4], K, V), "q has shape [4, 6, 16]"),
    "wrong KV heads": ((0, Q, K[:, :1], V), "k has shape [5, 1, 16]"),
    "heads that do not divide": ((0, Q[:, :5], K, V), "q has 5 heads"),
    "no keys": ((0, Q, None, V), "k "),
}


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_refused_call_names_the_field_and_changes_nothing(cache: attnd.Cache, name: str) -> None:
    arguments, told = REFUSED_CALLS[name]
    before = everything(cache)
    with cache.session() as session:
        step = session.step(attnd.StepMetadata(**SOUND))
        with pytest.raises(attnd.InvalidRequest) as raised:
            step.attend(*arguments)
        assert told in str(raised.value)
        assert all(torch.equal(a, b) for a, b in zip(before, everything(cache), strict=True))
        step.attend(0, Q, K, V)  # the step goes on


def test_named_backend_that_cannot_says_why(cache: attnd.Cache) -> None:
    with cache.session() as session, pytest.raises(attnd.Unsupported, match=r"sdpa .*softcap"):
        session.step(attnd.StepMetadata(**SOUND)).attend(
            0, Q, K, V, attnd.AttentionOptions(softcap=3.0, backend="sdpa")
        )


def test_refused_geometry(any_client: attnd.Client) -> None:
    refusals = {"head_dim": 12, "num_kv_heads": 0, "page_size": 2000, "num_layers": 5000}
    for field, value in refusals.items():
        with pytest.raises(attnd.InvalidRequest, match=f"{field} is {value}, but must be"):
            any_client.create_cache(**{**GEOMETRY, field: value})


def test_full_server_says_how_much_is_free(any_client: attnd.Client) -> None:
    before = len(any_client.list_caches())
    with pytest.raises(
        attnd.Exhausted, match=r"num_pages is 1000000000, .* bytes are .*free|num_pages is 1000000000, .* are free"
    ):
        any_client.create_cache(**{**GEOMETRY, "num_pages": 1_000_000_000})
    assert len(any_client.list_caches()) == before


def test_deleted_cache_is_lost(cache: attnd.Cache) -> None:
    with cache.session() as session:
        step = session.step(attnd.StepMetadata(**SOUND))
        step.attend(0, Q, K, V)
        cache.delete()
        with pytest.raises(attnd.CacheLost):
            step.attend(1, Q, K, V)  # an open step does not keep a deleted cache
        with pytest.raises(attnd.CacheLost, match=cache.ref.id.hex()):
            session.step(attnd.StepMetadata(**SOUND)).attend(0, Q, K, V)
    for gone in (cache.delete, cache.renew, lambda: cache.read_kv(0, [0], like=K)):
        with pytest.raises(attnd.CacheLost):
            gone()


def test_lease_ends_without_renewal(any_client: attnd.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnd.renewal.Renewal.add", lambda renewal, cache: None)
    cache = any_client.create_cache(**GEOMETRY, ttl_s=1.0)
    assert 1.0 in [info.ttl_s for info in any_client.list_caches()]
    wait_for(lambda: 1.0 not in [info.ttl_s for info in any_client.list_caches()], "the lease never ended")
    with pytest.raises(attnd.CacheLost):
        cache.renew()


def test_lease_is_renewed_in_the_background(any_client: attnd.Client) -> None:
    with any_client.create_cache(**GEOMETRY, ttl_s=1.5) as cache:
        time.sleep(2.5)
        assert cache.info().expires_in_s > 0


def test_another_epoch_is_refused(any_client: attnd.Client, cache: attnd.Cache) -> None:
    cache.ref.epoch += 1
    try:
        with cache.session() as session, pytest.raises(attnd.EpochMismatch, match=str(cache.ref.epoch)):
            session.step(attnd.StepMetadata(**SOUND)).attend(0, Q, K, V)
        with pytest.raises(attnd.EpochMismatch):
            cache.renew()
    finally:
        cache.ref.epoch -= 1


def test_dead_address() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(attnd.Disconnected, match=f"no answer from 127.0.0.1:{port} within 0.5 s"):
        attnd.connect(f"127.0.0.1:{port}", connect_timeout_s=0.5)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("address", ["nothing://", "http://localhost"])
def test_wrong_address(address: str) -> None:
    with pytest.raises(attnd.InvalidRequest, match=f"address is {address}, but must be"):
        attnd.connect(address)


class Raw:
    """Sends bytes that no client would."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)

    def unary(self, method: str, data: bytes) -> grpc.StatusCode:
        try:
            self._channel.unary_unary(f"/attnd.v1.AttentionService/{method}")(data, timeout=10)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    def stream(self, method: str, messages: list[bytes]) -> list[bytes]:
        return list(self._channel.stream_stream(f"/attnd.v1.AttentionService/{method}")(iter(messages), timeout=10))

    def close(self) -> None:
        self._channel.close()


@pytest.fixture
def raw(server_address: str) -> Iterator[Raw]:
    connection = Raw(server_address)
    yield connection
    connection.close()


def test_messages_cut_short_are_invalid_and_change_nothing(raw: Raw, client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY) as cache:
        before = everything(cache)
        metadata = attnd.StepMetadata(**SOUND)
        encode: dict[str, Callable[[], bytes]] = {
            "Prefill": lambda: attnd.protocol.requests.unary_call(
                "prefill", metadata, cache.ref, 0, Q, K, V, attnd.AttentionOptions()
            ),
            "RenewCache": lambda: cache_pb2.RenewCacheRequest(cache=cache.ref).SerializeToString(),
        }
        for method, whole in encode.items():
            data = whole()
            for length in {1, 2, 5, len(data) // 2, len(data) - 1}:
                assert raw.unary(method, data[:length]) == grpc.StatusCode.INVALID_ARGUMENT, (method, length)
        step = frames.step_request(metadata.to_message(1, cache.ref))
        call = attnd.protocol.requests.attend_call(1, 0, Q, K, V, attnd.AttentionOptions())
        answers = [
            attention_pb2.AttendResponse.FromString(answer)
            for answer in raw.stream("Attend", [step[:-1], call[:-1], b"", b"\xff" * 40, step])
        ]
        assert [answer.WhichOneof("message") for answer in answers] == ["error"] * 4 + ["step"]
        assert "is not a whole AttendRequest" in answers[0].error.message
        assert all(torch.equal(a, b) for a, b in zip(before, everything(cache), strict=True))


def test_tensor_whose_bytes_do_not_fit_its_shape(raw: Raw, client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY) as cache:
        step = frames.step_request(attnd.StepMetadata(**SOUND).to_message(1, cache.ref))
        call = attention_pb2.AttendRequest.FromString(
            attnd.protocol.requests.attend_call(1, 0, Q, K, V, attnd.AttentionOptions())
        )
        for shape in ([2**62, 4, 16], [-5, 6, 16], [5, 6, 17], []):
            call.call.q.shape[:] = shape
            _, answer = raw.stream("Attend", [step, call.SerializeToString()])
            error = attention_pb2.AttendResponse.FromString(answer).error
            assert error.field == "q", error
        huge = step_pb2.Step.FromString(attnd.StepMetadata(**SOUND).to_message(2, cache.ref).SerializeToString())
        huge.page_tables.shape[:] = [2**31, 2**31]
        (answer,) = raw.stream("Attend", [frames.step_request(huge)])
        assert attention_pb2.AttendResponse.FromString(answer).error.field == "page_tables"


def test_unknown_method_is_unsupported(raw: Raw) -> None:
    assert raw.unary("Forget", b"") == grpc.StatusCode.UNIMPLEMENTED


def test_plane_that_cannot_be_had_says_why(client: attnd.Client) -> None:
    from attnd.v1 import plane_pb2

    request = plane_pb2.OpenPlaneRequest(plane=plane_pb2.PLANE_CUDA).SerializeToString()
    with pytest.raises(attnd.Unsupported, match="plane is cuda, but the server was started without --socket-dir"):
        client.transport.unary("OpenPlane", request, 10)
    best = client.transport.unary("OpenPlane", b"", 10)
    answer = plane_pb2.OpenPlaneResponse.FromString(best)
    assert answer.plane == plane_pb2.PLANE_INLINE
    assert {refusal.plane for refusal in answer.refusals} == {plane_pb2.PLANE_SHM, plane_pb2.PLANE_CUDA}

"""Equal requests get equal bits wherever their bytes lie, and what a client gives out is aligned."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import attnd
from attnd.protocol import frames, requests
from attnd.protocol.requests import kv_transfers, results
from attnd.protocol.tensors import Array, from_array, torch_tensor
from attnd.v1 import attention_pb2
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.inproc import InprocTransport
from attnd_server.service.validation import calls as validated_calls

HEADS, KV_HEADS, HEAD_DIM, PAGE = 9, 3, 64, 16
GEOMETRY = {
    "num_layers": 1,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_pages": 8,
    "page_size": PAGE,
    "dtype": "float32",
}
SHIFTS = range(64)
# Objects of Python begin at multiples of 16 bytes, so 64 shifts in a row meet every remainder of 16.
LEAST_PLACES = 16
UNKNOWN_FIELD = bytes([0xFA, 0x7F])  # field 2047, of any length; no message has it
SEVERAL_PAGES = pytest.mark.parametrize("pages", [[7, 2, 5, 4], [2, 3, 4, 5]], ids=["scattered", "side by side"])
BACKENDS = pytest.mark.parametrize("backend", ["sdpa", "naive"])


def shifted(request: bytes, shift: int) -> bytes:
    """The same request, whose fields lie 3 bytes and `shift` further behind its beginning."""
    return UNKNOWN_FIELD + bytes([shift]) + bytes(shift) + request


@pytest.fixture
def transport() -> Iterator[InprocTransport]:
    made = InprocTransport(build_service(ServerConfig(device="cpu")))
    yield made
    made.close()


@pytest.fixture
def cache(transport: InprocTransport) -> Iterator[attnd.Cache]:
    with attnd.Client(transport, timeout_s=60).create_cache(**GEOMETRY) as made:
        yield made


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Where the tensors of calls lay, modulo 64: filled as the server makes tensors of received bytes."""
    seen: set[int] = set()

    def noting(array: Array) -> torch.Tensor:
        tensor = torch_tensor(array)
        seen.add(tensor.data_ptr() % 64)
        return tensor

    monkeypatch.setattr(validated_calls, "torch_tensor", noting)
    return seen


def decode_of_50_keys(cache: attnd.Cache, pages: list[int]) -> tuple[attnd.StepMetadata, list[torch.Tensor]]:
    """A step of one request, whose first 49 keys are stored, and q, k and v of its last."""
    slots = [pages[i // PAGE] * PAGE + i % PAGE for i in range(50)]
    k, v = torch.randn(2, 50, KV_HEADS, HEAD_DIM)
    cache.store_kv(0, slots[:49], k[:49], v[:49])
    metadata = attnd.StepMetadata([1], [49], [pages], slots[49:], kind="decode")
    return metadata, [torch.randn(1, HEADS, HEAD_DIM), k[49:], v[49:]]


@BACKENDS
@SEVERAL_PAGES
def test_a_unary_call_has_the_same_bits_wherever_it_lies(
    transport: InprocTransport, cache: attnd.Cache, places: set[int], backend: str, pages: list[int]
) -> None:
    metadata, tensors = decode_of_50_keys(cache, pages)
    options = attnd.AttentionOptions(backend=backend)
    request = requests.unary_call("decode", metadata, cache.ref, 0, *tensors, options)

    def output(shift: int) -> bytes:
        answer = transport.unary("Decode", shifted(request, shift), 60)
        return bytes(frames.DECODE_RESPONSE.decode(answer).tensors["output"].data)

    assert len({output(shift) for shift in SHIFTS}) == 1
    assert len(places) >= LEAST_PLACES


@BACKENDS
@SEVERAL_PAGES
def test_a_call_of_a_stream_has_the_same_bits_wherever_it_lies(
    transport: InprocTransport, cache: attnd.Cache, places: set[int], backend: str, pages: list[int]
) -> None:
    metadata, tensors = decode_of_50_keys(cache, pages)
    stream = transport.attend()
    stream.send(frames.step_request(metadata.to_message(1, cache.ref)))
    assert stream.receive(60).kind == "step"
    request = requests.attend_call(1, 0, *tensors, attnd.AttentionOptions(backend=backend))

    def output(shift: int) -> bytes:
        stream.send(shifted(request, shift))
        return bytes(stream.receive(60).tensors["output"].data)

    assert len({output(shift) for shift in SHIFTS}) == 1
    assert len(places) >= LEAST_PLACES


def test_k_and_v_are_stored_whole_wherever_they_lie(
    transport: InprocTransport, cache: attnd.Cache, places: set[int]
) -> None:
    slots = list(range(10, 15))
    for shift in SHIFTS:
        k, v = torch.randn(2, 5, KV_HEADS, HEAD_DIM)
        (request,) = requests.store_kv(cache.ref, 0, slots, k, v)
        (answer,) = transport.store_kv([shifted(request, shift)], 60)
        assert attention_pb2.StoreKvResponse.FromString(answer).num_slots == 5
        assert all(map(torch.equal, cache.read_kv(0, slots, like=k), (k, v)))
    assert len(places) >= LEAST_PLACES


def address(value: Any) -> int:
    return int(value.data_ptr() if isinstance(value, torch.Tensor) else value.ctypes.data)


KINDS = pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray], ids=["torch", "numpy"])
LENGTHS = range(1, 25)


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the tensors of replies lay, modulo 64, before the client made of them what it gives out."""
    seen: list[int] = []

    def noting(array: Any, like: Any) -> Any:
        seen.append(torch_tensor(array).data_ptr() % 64)
        return from_array(array, like)

    monkeypatch.setattr(results, "from_array", noting)
    monkeypatch.setattr(kv_transfers, "from_array", noting)
    return seen


def step_of(length: int, kind: Callable[[np.ndarray], Any]) -> tuple[attnd.StepMetadata, list[Any], list[int]]:
    slots = list(range(length))
    shapes = ((length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return attnd.StepMetadata([length], [0], [[0, 1]], slots), [kind(np.ones(s, np.float32)) for s in shapes], slots


WITH_LSE = attnd.AttentionOptions(return_lse=True)


@KINDS
def test_what_the_client_gives_is_aligned(client: attnd.Client, received: list[int], kind: Any) -> None:
    given = []
    with client.create_cache(**GEOMETRY) as cache, cache.session(plane="inline") as session:
        for length in LENGTHS:
            metadata, tensors, slots = step_of(length, kind)
            given += [session.step(metadata).attend(0, *tensors)]
            given += client.prefill(cache, metadata, 0, *tensors, WITH_LSE)
            given += cache.read_kv(0, slots, like=tensors[0])
    assert [address(value) % 64 for value in given] == [0] * len(given)
    assert (len(received), len(given)) == (5 * len(LENGTHS),) * 2
    assert sum(place != 0 for place in received) > len(LENGTHS)


@KINDS
def test_what_the_asyncio_client_gives_is_aligned(server_address: str, received: list[int], kind: Any) -> None:
    given = []

    async def calls_and_reads() -> None:
        async with await attnd.aio.connect(server_address, plane="inline") as client:
            async with await client.create_cache(**GEOMETRY) as cache:
                async with cache.session() as session:
                    for length in LENGTHS:
                        metadata, tensors, slots = step_of(length, kind)
                        given.append(await (await session.step(metadata)).attend(0, *tensors))
                        given.extend(await client.prefill(cache, metadata, 0, *tensors, WITH_LSE))
                        given.extend(await cache.read_kv(0, slots, like=tensors[0]))

    asyncio.run(calls_and_reads())
    assert [address(value) % 64 for value in given] == [0] * len(given)
    assert (len(received), len(given)) == (5 * len(LENGTHS),) * 2
    assert sum(place != 0 for place in received) > len(LENGTHS)

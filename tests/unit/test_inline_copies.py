"""Where the elements of a call lie on the inline plane, traced from worker to server and back: one copy each way.

That one makes the message, which gRPC takes in one piece. What gRPC itself copies is not ours to count: the transport
here hands messages over as they are.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attnd
from attnd.protocol.alignment import ALIGNMENT
from attnd.protocol.frames import Frame, Stripped
from attnd.protocol.regions import Region
from attnd.protocol.requests import attend_call
from attnd.protocol.tensors import Array
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.execution.step import Call, Result
from attnd_server.inproc import InprocTransport

GEOMETRY = {"num_layers": 2, "num_kv_heads": 8, "head_dim": 64, "num_pages": 64, "dtype": "float32"}
NUM_TOKENS = 512
OPTIONS = attnd.AttentionOptions(backend="naive", return_lse=True)
# Bytes that may come and go beside elements: headers, and the objects of a call.
SLACK = 64 << 10


def place(buffer: Any) -> range:
    """The addresses of a buffer's or a tensor's bytes."""
    if isinstance(buffer, torch.Tensor):
        start = buffer.data_ptr()
        return range(start, start + buffer.nbytes)
    start = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return range(start, start + memoryview(buffer).nbytes)


def lies_in(inner: range, outer: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


@dataclass
class Trace:
    """Where elements were seen, in the order in which they travel.

    Attributes:
        framed: by field, what was copied into a message.
        messages: whole messages with elements, as they were sent: the request, then the reply.
        read: by field, what a message's reader made of it.
        attended: by field, what the executor got and gave.
    """

    framed: dict[str, range] = field(default_factory=dict)
    messages: list[range] = field(default_factory=list)
    read: dict[str, range] = field(default_factory=dict)
    attended: dict[str, range] = field(default_factory=dict)


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    """Looks over the shoulder of whoever makes and reads messages."""
    traced = Trace()
    encode, stripped = Frame.encode, Frame.stripped

    def traced_encode(self: Frame, holder: Any, tensors: Mapping[str, Array], outer: bytes = b"") -> bytes:
        data = encode(self, holder, tensors, outer)
        traced.framed |= {name: place(array.data) for name, array in tensors.items()}
        traced.messages.append(place(data))
        return data

    def traced_stripped(self: Frame, data: bytes, region: Region | None = None, *limits: int) -> Stripped:
        taken_apart = stripped(self, data, region, *limits)
        traced.read |= {name: place(array.data) for name, array in taken_apart.tensors.items()}
        return taken_apart

    monkeypatch.setattr(Frame, "encode", traced_encode)
    monkeypatch.setattr(Frame, "stripped", traced_stripped)
    return traced


@pytest.fixture
def session(trace: Trace) -> Iterator[attnd.Session]:
    service = build_service(ServerConfig(device="cpu"))
    attend = service.executor.runner.attend

    def traced_attend(call: Call) -> Result:
        result = attend(call)
        tensors = {"q": call.q, "k": call.k, "v": call.v, "output": result.output, "lse": result.lse}
        trace.attended |= {name: place(tensor) for name, tensor in tensors.items()}
        return result

    service.executor.runner.attend = traced_attend  # type: ignore[method-assign]
    with attnd.Client(InprocTransport(service)) as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as opened:
            yield opened


def new_tokens() -> dict[str, torch.Tensor]:
    return {name: torch.randn(NUM_TOKENS, heads, 64) for name, heads in (("q", 32), ("k", 8), ("v", 8))}


def test_each_way_elements_are_copied_into_the_message_and_once_more_only_to_be_aligned(
    session: attnd.Session, trace: Trace
) -> None:
    tensors = new_tokens()
    step = session.step(attnd.StepMetadata([NUM_TOKENS], [0], [list(range(64))]))
    pending = step.submit(0, *tensors.values(), OPTIONS)
    output, lse = pending.wait()
    request, reply = trace.messages
    for name, tensor in tensors.items():
        assert trace.framed[name] == place(tensor)
        assert trace.read[name] == trace.attended[name]
        assert lies_in(trace.attended[name], request)
    for name, tensor in (("output", output), ("lse", lse)):
        assert trace.framed[name] == trace.attended[name]
        assert lies_in(trace.read[name], reply)
        assert place(tensor).start % ALIGNMENT == 0
        if trace.read[name].start % ALIGNMENT == 0:
            assert trace.read[name] == place(tensor)


def test_nothing_as_big_as_a_tensor_comes_and_goes_beside_the_messages(session: attnd.Session, trace: Trace) -> None:
    tensors = new_tokens()
    step = session.step(attnd.StepMetadata([NUM_TOKENS], [0], [list(range(64))]))
    step.attend(0, *tensors.values(), OPTIONS)  # what is made once and kept
    trace.messages.clear()
    tracemalloc.start()
    try:
        pending = step.submit(1, *tensors.values(), OPTIONS)
        _, submitted = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        pending.wait()
        _, answered = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    request, reply = (len(message) for message in trace.messages)
    assert request > sum(tensor.nbytes for tensor in tensors.values())
    assert submitted < request + SLACK
    assert answered < request + reply + SLACK


class Copies(TorchDispatchMode):
    """Notes what torch copies or allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.__name__ != "detach.default":
            self.names.append(func.__name__)
        return result


def qkv(num_tokens: int) -> list[torch.Tensor]:
    """Slices of one projection."""
    return [part.unflatten(1, (-1, 64)) for part in torch.randn(num_tokens, 48 * 64).split([2048, 512, 512], 1)]


def test_rows_that_lie_apart_are_copied_straight_into_the_message() -> None:
    tensors = dict(zip("qkv", qkv(NUM_TOKENS), strict=True))
    with Copies() as copies:
        attend_call(1, 0, *tensors.values(), OPTIONS)
    assert copies.names == ["copy_.default"] * 3
    tracemalloc.start()
    request = attend_call(1, 0, *tensors.values(), OPTIONS)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(request) < most < len(request) + SLACK
    assert request == attend_call(1, 0, *(tensor.contiguous() for tensor in tensors.values()), OPTIONS)


@pytest.mark.parametrize("which", range(3))
def test_arrays_whose_rows_lie_apart_make_the_message_of_dense_ones(which: int) -> None:
    dense = [tensor.contiguous().numpy() for tensor in qkv(5)]
    given: list[Any] = list(dense)
    given[which] = qkv(5)[which].numpy()
    given[which][...] = dense[which]
    assert not given[which].flags.c_contiguous
    assert attend_call(1, 0, *given, OPTIONS) == attend_call(1, 0, *dense, OPTIONS)
    view = [memoryview(each) if index == which else each for index, each in enumerate(given)]
    assert attend_call(1, 0, *view, OPTIONS) == attend_call(1, 0, *dense, OPTIONS)


def test_a_message_holds_what_it_was_given_then() -> None:
    q, k, v = qkv(NUM_TOKENS)
    requests = [attend_call(1, layer, q, k, v, OPTIONS) for layer in range(2)]
    before = [bytes(bytearray(request)) for request in requests]
    q.zero_()
    assert requests == before
    assert hash(requests[0]) == hash(before[0])


def test_types_that_the_wire_does_not_have_are_refused_by_name() -> None:
    q, k, v = qkv(3)
    with pytest.raises(attnd.InvalidRequest, match=r"k has dtype torch\.float64, but must be one of float32"):
        attend_call(1, 0, q, k.double(memory_format=torch.preserve_format), v, OPTIONS)
    with pytest.raises(attnd.InvalidRequest, match="v has format 'd', but must be one of float32"):
        attend_call(1, 0, q, k, np.zeros((3, 8, 128))[..., ::2], OPTIONS)

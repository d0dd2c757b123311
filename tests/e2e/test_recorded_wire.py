"""The wire of a release by its bytes: today's client and server against what those of 0.1.0 were recorded to send.

Where one of these tests fails, a client and a server of the two versions may not understand each other. What a later
version adds is named in a list here; the recordings stay as they are (see `tests/record_wire.py`).
"""

from __future__ import annotations

import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from attnd.protocol.shm import framing
from attnd.v1 import attention_pb2, error_pb2, plane_pb2, tensor_pb2
from tests.record_wire import record, running
from tests.servers import ROOT
from tests.wire.calls import Results, ask_with_wrong_ticket, make_calls
from tests.wire.grpc_proxy import serving
from tests.wire.messages import Changes, changed
from tests.wire.recording import METHODS, read, write
from tests.wire.replay_client import Replayed, replay
from tests.wire.replay_server import RecordedPlane, RecordedService
from tests.wire.shm_relay import REPLY, REQUEST, Frame

RECORDED = read(ROOT / "tests" / "data" / "0.1.0" / "wire")
RPCS = sorted({exchange.rpc for exchange in RECORDED.exchanges})
(REFUSED,) = (connection for connection in RECORDED.connections if not connection.frames)
(PLANE,) = (connection for connection in RECORDED.connections if connection.frames)
REQUEST_FRAMES = [frame for frame in PLANE.frames if frame.sender == "client"]
REPLY_FRAMES = [frame for frame in PLANE.frames if frame.sender == "server"]
KINDS = {"client": {"step", "call", "repeated call"}, "server": {"step", "call", "error", "repeated reply"}}

# RPCs of today's that 0.1.0 did not have.
RPCS_SINCE = {"GetStatus"}
# Fields of today's, by their full names, with which a server answers what 0.1.0 asks: 0.1.0 does not see them. A client
# sends none that 0.1.0 did not have, as long as it says nothing new.
ANSWERED_SINCE = {"attnd.v1.GetCapabilitiesResponse.features"}

# A client makes it up; nothing else of what it sends is its own.
MADE_UP: Changes = {
    "attnd.v1.CreateCacheRequest.key": lambda value: bytes(len(value)),
}
# Ids and epochs in the text of errors.
NAMES = re.compile(rb"[0-9a-f]{32}|[0-9]{9,}")
# What a server answers otherwise each time, or on another machine.
VARYING: Changes = {
    "attnd.v1.CacheRef.id": lambda value: bytes(len(value)),
    "attnd.v1.CacheRef.epoch": lambda _: 1,
    "attnd.v1.CacheInfo.expires_in_s": lambda value: bytes(len(value)),
    "attnd.v1.GetCapabilitiesResponse.version": lambda _: b"",
    "attnd.v1.GetCapabilitiesResponse.epoch": lambda _: 1,
    "attnd.v1.GetCapabilitiesResponse.devices": lambda _: b"",
    "attnd.v1.BackendState.available": None,
    "attnd.v1.BackendState.reason": None,
    "attnd.v1.Limits.principal_kv_bytes": lambda _: 1,
    "attnd.v1.WarmUpResponse.seconds": None,
    "attnd.v1.OpenPlaneResponse.id": lambda _: 1,
    "attnd.v1.ShmPlane.ticket": lambda value: bytes(len(value)),
    "attnd.v1.ShmPlane.socket_path": lambda _: b"",
    "attnd.v1.Region.id": lambda _: 1,
    "attnd.v1.CallReply.queue_us": None,
    "attnd.v1.CallReply.kernel_us": None,
    "attnd.v1.CallReply.copy_in_us": None,
    "attnd.v1.CallReply.copy_out_us": None,
    "attnd.v1.Error.message": lambda value: NAMES.sub(b"...", value),
    "attnd.v1.Status.message": lambda value: NAMES.sub(b"...", value),
    **dict.fromkeys(ANSWERED_SINCE),
}


class Asked(NamedTuple):
    """What today's client sent to a server that answers as recorded, and made of the answers."""

    requests: dict[str, list[bytes]]
    ticket: bytes
    frames: list[Frame]
    results: Results


@pytest.fixture(scope="module")
def asked() -> Asked:
    service = RecordedService(RECORDED.exchanges)
    replies = [plane_pb2.OpenPlaneResponse.FromString(exchange.reply or b"") for exchange in exchanges_of("OpenPlane")]
    (opened,) = (reply for reply in replies if reply.shm.ticket == PLANE.ticket)
    with tempfile.TemporaryDirectory() as folder, serving(service) as address:
        plane = RecordedPlane(PLANE, opened, Path(folder))
        results = make_calls(address, Path(folder), lambda: None)
        plane.close()
    return Asked(service.asked, plane.ticket, plane.asked, results)


@pytest.fixture(scope="module")
def answered() -> Iterator[tuple[Replayed, bytes]]:
    """What today's server answers to the recorded requests, and to a wrong ticket."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as servers:
        refusal = ask_with_wrong_ticket(servers.socket_path)
        yield replay(RECORDED, servers), refusal


def exchanges_of(rpc: str) -> list[Any]:
    return [exchange for exchange in RECORDED.exchanges if exchange.rpc == rpc]


def test_every_rpc_and_kind_of_frame_is_recorded() -> None:
    assert set(RPCS) | RPCS_SINCE == set(METHODS)
    assert {frame.kind for frame in REQUEST_FRAMES} == KINDS["client"]
    assert {frame.kind for frame in REPLY_FRAMES} == KINDS["server"]


@pytest.mark.parametrize("rpc", RPCS)
def test_client_sends_what_was_recorded(asked: Asked, rpc: str) -> None:
    descriptor = METHODS[rpc].input_type
    expected = [changed(exchange.request, descriptor, MADE_UP).hex() for exchange in exchanges_of(rpc)]
    assert [changed(request, descriptor, MADE_UP).hex() for request in asked.requests[rpc]] == expected


def test_client_sends_the_frames_that_were_recorded(asked: Asked) -> None:
    assert asked.ticket == PLANE.ticket
    assert asked.frames == REQUEST_FRAMES


def test_client_reads_what_was_recorded(asked: Asked) -> None:
    assert asked.results == RECORDED.results


@pytest.mark.parametrize("rpc", RPCS)
def test_server_answers_what_was_recorded(answered: tuple[Replayed, bytes], rpc: str) -> None:
    replayed = [exchange for exchange in answered[0].exchanges if exchange.rpc == rpc]
    for exchange, recorded in zip(replayed, exchanges_of(rpc), strict=True):
        assert exchange.code == recorded.code, exchange
        if recorded.reply is None or exchange.reply is None:
            assert exchange.reply is recorded.reply
            status = error_pb2.Status.DESCRIPTOR
            assert changed(exchange.status, status, VARYING) == changed(recorded.status, status, VARYING)
        else:
            assert_alike(exchange.reply, recorded.reply, METHODS[rpc].output_type)


def test_server_answers_the_frames_that_were_recorded(answered: tuple[Replayed, bytes]) -> None:
    replayed, refusal = answered
    assert refusal == REFUSED.answer
    times = dict.fromkeys(("queue_us", "copy_in_us", "kernel_us", "copy_out_us"), 0)
    for frame, recorded in zip(replayed.replies, REPLY_FRAMES, strict=True):
        assert bool(frame.message) == bool(recorded.message)
        assert frame.numbers | times == recorded.numbers | times
        assert_alike(frame.message, recorded.message, attention_pb2.AttendResponse.DESCRIPTOR)
        for offset, data in recorded.region.items():
            torch.testing.assert_close(floats(frame.region[offset]), floats(data))


@pytest.mark.parametrize("frame", PLANE.frames, ids=lambda frame: f"{frame.sender}'s {frame.kind}")
def test_frames_are_laid_out_as_recorded(frame: Frame) -> None:
    is_request, numbers = frame.sender == "client", frame.numbers
    if is_request and frame.message:
        encoded = framing.request_bytes(frame.message, numbers["lane"])
    elif is_request:
        encoded = framing.repeated_call(**numbers)
    else:
        encoded = framing.reply_bytes(frame.message) if frame.message else framing.repeated_reply(**numbers)
    assert encoded.hex() == frame.data.hex()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(frame.data)
        received = framing.Requests(ours).receive() if is_request else framing.Replies(ours).receive()
    assert received is not None
    assert received._asdict() == {**numbers, "message": frame.message}


def test_numbers_of_frames_lie_where_they_did() -> None:
    """Most of the recorded ones are 0, and could be in each other's places."""
    assert framing.repeated_call(layer=1, step_id=2**40, lane=3) == REQUEST.pack(0, 1, 2**40, 3)
    times = {"queue_us": 3, "copy_in_us": 4, "kernel_us": 5, "copy_out_us": 6}
    assert framing.repeated_reply(layer=1, step_id=2**40, **times) == REPLY.pack(0, 1, 2**40, 3, 4, 5, 6)


def test_recorder_records_every_rpc_and_kind_of_frame(tmp_path: Path) -> None:
    write(record(), tmp_path)
    recording = read(tmp_path)
    assert {exchange.rpc for exchange in recording.exchanges} == set(METHODS)
    for sender, kinds in KINDS.items():
        frames = [frame for connection in recording.connections for frame in connection.frames]
        assert {frame.kind for frame in frames if frame.sender == sender} == kinds


def assert_alike(data: bytes, recorded: bytes, descriptor: Any) -> None:
    """Holds if two replies differ in what varies alone, and the results of attention by no more than rounding."""
    held, tensors = without_results(data, descriptor)
    recorded_held, recorded_tensors = without_results(recorded, descriptor)
    assert held.hex() == recorded_held.hex()
    for tensor, recorded_tensor in zip(tensors, recorded_tensors, strict=True):
        torch.testing.assert_close(floats(tensor), floats(recorded_tensor))


def without_results(data: bytes, descriptor: Any) -> tuple[bytes, list[bytes]]:
    """A reply without what varies and without the elements of its results, and these."""
    tensors: list[bytes] = []

    def take(elements: bytes) -> bytes:
        tensors.append(elements)
        return b""

    def emptied(tensor: bytes) -> bytes:
        return changed(tensor, tensor_pb2.Tensor.DESCRIPTOR, {"attnd.v1.Tensor.data": take, **VARYING})

    results = {"attnd.v1.CallReply.output": emptied, "attnd.v1.CallReply.lse": emptied}
    return changed(data, descriptor, {**VARYING, **results}), tensors


def floats(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)

"""A client that sends what another one was recorded to send, with the ids of the server that it talks to."""

from __future__ import annotations

import mmap
import os
import queue
import socket
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc

from attnd.v1 import attention_pb2, plane_pb2
from tests.record_wire import Servers
from tests.wire.grpc_proxy import SERVICE, STATUS, Exchange
from tests.wire.messages import changed
from tests.wire.recording import METHODS, Recording
from tests.wire.shm_relay import ANSWER_BYTES, REPLY, REQUEST, Connection, Frame

TIMEOUT_S = 30
# By the full name of a field, whose name it is that a server gives.
NAMES = {
    "attnd.v1.CacheRef.id": "cache",
    "attnd.v1.CacheRef.epoch": "epoch",
    "attnd.v1.GetCapabilitiesResponse.epoch": "epoch",
    "attnd.v1.OpenPlaneResponse.id": "plane",
    "attnd.v1.ClosePlaneRequest.id": "plane",
    "attnd.v1.Region.id": "plane",
}


class Replayed(NamedTuple):
    """What another server answered to what was recorded, in the recorded order.

    Attributes:
        exchanges: of all RPCs.
        replies: frames of shm planes from the server.
    """

    exchanges: list[Exchange]
    replies: list[Frame]


class _Names:
    """Which names the server of now has for what the recorded one had others for."""

    def __init__(self) -> None:
        self._own: dict[str, dict[Any, Any]] = defaultdict(dict)

    def learn(self, recorded: bytes, own: bytes, descriptor: Any) -> None:
        """From two answers to the same request."""
        for (kind, old), (_, new) in zip(_names(recorded, descriptor), _names(own, descriptor), strict=True):
            self._own[kind][old] = new

    def put_in(self, data: bytes, descriptor: Any) -> bytes:
        """The message with the names of now."""

        def own(kind: str) -> Callable[[Any], Any]:
            return lambda value: self._own[kind].get(value, value)

        return changed(data, descriptor, {field: own(kind) for field, kind in NAMES.items()})


def replay(recording: Recording, servers: Servers) -> Replayed:
    """Sends all requests of `recording` in their order, each when the one before was answered."""
    names, replayed, rpc = _Names(), Replayed([], []), None
    for exchange in recording.exchanges:
        method = METHODS[exchange.rpc]
        if rpc is None or rpc.stream != exchange.stream:
            if rpc is not None:
                rpc.end()
            if exchange.code == "FAILED_PRECONDITION":  # the first that was asked after the restart
                servers.restart()
            rpc = _Rpc(servers.process.address, exchange)
        answered = rpc.answer(names.put_in(exchange.request, method.input_type))
        replayed.exchanges.append(answered)
        if exchange.reply is None or answered.reply is None:
            continue
        names.learn(exchange.reply, answered.reply, method.output_type)
        if exchange.rpc == "OpenPlane":
            recorded = plane_pb2.OpenPlaneResponse.FromString(exchange.reply)
            opened = plane_pb2.OpenPlaneResponse.FromString(answered.reply)
            for connection in recording.connections:
                if connection.ticket == recorded.shm.ticket:
                    replayed.replies.extend(_replay_frames(connection, opened, names))
    if rpc is not None:
        rpc.end()
    return replayed


class _Rpc:
    """One RPC under way."""

    def __init__(self, address: str, first: Exchange) -> None:
        self.stream = first.stream
        self._name = first.rpc
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(address)
        method: Any = self._channel.stream_stream(f"/{SERVICE}/{first.rpc}")
        self._call = method(iter(self._requests.get, None), timeout=TIMEOUT_S)

    def answer(self, request: bytes) -> Exchange:
        self._requests.put(request)
        if not METHODS[self._name].client_streaming:
            self._requests.put(None)
        answered = Exchange(self._name, 0, self.stream, request)
        try:
            answered.reply = next(self._call)
        except grpc.RpcError as error:
            answered.code = error.code().name
            metadata: Any = error.trailing_metadata() or ()
            answered.status = dict(metadata).get(STATUS, b"")
        return answered

    def end(self) -> None:
        self._requests.put(None)
        self._call.cancel()
        self._channel.close()


def _replay_frames(connection: Connection, opened: plane_pb2.OpenPlaneResponse, names: _Names) -> list[Frame]:
    """The replies to the frames of a connection."""
    replies = []
    with socket.socket(socket.AF_UNIX) as plane:
        plane.settimeout(TIMEOUT_S)
        plane.connect(opened.shm.socket_path)
        plane.sendall(opened.shm.ticket)
        _, (descriptor,), _, _ = socket.recv_fds(plane, ANSWER_BYTES, 1)
        region = mmap.mmap(descriptor, opened.shm.num_bytes)
        os.close(descriptor)
        expected = [frame for frame in connection.frames if frame.sender == "server"]
        asked = [frame for frame in connection.frames if frame.sender == "client"]
        for request, recorded in zip(asked, expected, strict=True):
            for offset, data in request.region.items():
                region[offset : offset + len(data)] = data
            message = names.put_in(request.message, attention_pb2.AttendRequest.DESCRIPTOR)
            plane.sendall(REQUEST.pack(len(message), *request.numbers.values()) + message)
            data = plane.recv(REPLY.size, socket.MSG_WAITALL)
            data += plane.recv(REPLY.unpack(data)[0], socket.MSG_WAITALL)
            tensors = {offset: region[offset : offset + len(tensor)] for offset, tensor in recorded.region.items()}
            replies.append(Frame("server", recorded.kind, data, tensors))
    return replies


def _names(data: bytes, descriptor: Any) -> list[tuple[str, Any]]:
    """The names in a message, with what kind of name each is."""
    found: list[tuple[str, Any]] = []

    def keep(kind: str) -> Callable[[Any], Any]:
        def kept(value: Any) -> Any:
            found.append((kind, value))
            return value

        return kept

    changed(data, descriptor, {field: keep(kind) for field, kind in NAMES.items()})
    return found

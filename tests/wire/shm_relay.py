"""A Unix socket between a client and a server of shm planes, that writes down each frame.

How frames are made up is said at ShmPlane in plane.proto, and written here a second time.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnd.v1 import attention_pb2, tensor_pb2

TICKET_BYTES = 32
ANSWER_BYTES = 4
REQUEST = struct.Struct("<IIQI")
REQUEST_NUMBERS = ("layer", "step_id", "lane")
REPLY = struct.Struct("<IIQIIII")
REPLY_NUMBERS = ("layer", "step_id", "queue_us", "copy_in_us", "kernel_us", "copy_out_us")
FLOAT_BYTES = 4


@dataclass
class Frame:
    """What one side sent.

    Attributes:
        sender: "client" or "server".
        kind: the field that is set in the message, or "repeated call" or "repeated reply".
        data: numbers and message.
        region: by offset, the bytes of the call's, or the reply's, tensors in the region.
    """

    sender: str
    kind: str
    data: bytes
    region: dict[int, bytes]

    @property
    def layout(self) -> struct.Struct:
        """Of its numbers."""
        return REQUEST if self.sender == "client" else REPLY

    @property
    def numbers(self) -> dict[str, int]:
        """All but the length."""
        names = REQUEST_NUMBERS if self.sender == "client" else REPLY_NUMBERS
        return dict(zip(names, self.layout.unpack_from(self.data)[1:], strict=True))

    @property
    def message(self) -> bytes:
        """Behind the numbers."""
        return self.data[self.layout.size :]


@dataclass
class Connection:
    """What went over one connection.

    Attributes:
        ticket: that the client showed.
        answer: of the server to it, with a refusal's Error.
        frames: in their order.
    """

    ticket: bytes
    answer: bytes
    frames: list[Frame] = field(default_factory=list)


class Relay:
    """Listens in a folder under the name of the server's socket; clients find it with `socket_dir`.

    Attributes:
        folder: where it listens.
        connections: so far.
    """

    def __init__(self, server_path: Path, folder: Path) -> None:
        """Goes to the server's socket at `server_path`."""
        self.folder = folder
        self.connections: list[Connection] = []
        self._server_path = str(server_path)
        self._recorded: list[_Recorded] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / server_path.name))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accepts nobody any more, and waits until those that are connected have hung up."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for recorded in self._recorded:
            recorded.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._server_path)
            ticket = client.recv(TICKET_BYTES, socket.MSG_WAITALL)
            server.sendall(ticket)
            answer, descriptors, _, _ = socket.recv_fds(server, 1 << 16, 1)
            self.connections.append(Connection(ticket, answer))
            if not descriptors:
                client.sendall(answer)
                client.close()
                server.close()
                continue
            region = mmap.mmap(descriptors[0], os.fstat(descriptors[0]).st_size)
            self._recorded.append(_Recorded(self.connections[-1].frames, region, client, server))
            socket.send_fds(client, [answer], descriptors)
            os.close(descriptors[0])


class _Recorded:
    """The frames of one connection, both ways at once."""

    def __init__(self, frames: list[Frame], region: mmap.mmap, client: socket.socket, server: socket.socket) -> None:
        self._frames = frames
        self._region = region
        self._places: dict[tuple[str, int], list[tuple[int, int]]] = {}  # of the last call or reply of a lane
        self._unanswered: deque[int] = deque()  # lanes; -1: a step
        self._sockets = client, server
        ways = (client, server, self._request), (server, client, self._reply)
        self._threads = [threading.Thread(target=self._pump, args=way, daemon=True) for way in ways]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        for thread in self._threads:
            thread.join(timeout=20)
        for connection in self._sockets:
            connection.close()
        self._region.close()

    def _pump(self, source: socket.socket, target: socket.socket, take: Callable[[bytes], int]) -> None:
        received = b""
        try:
            while chunk := source.recv(1 << 16):
                received += chunk
                while size := take(received):
                    frame, received = received[:size], received[size:]
                    target.sendall(frame)
        except OSError:
            pass  # one of both has gone
        finally:
            try:
                target.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # so has the other

    def _request(self, received: bytes) -> int:
        if not (size := _frame_size(received, REQUEST)):
            return 0
        frame = Frame("client", "repeated call", received[:size], {})
        lane = frame.numbers["lane"]
        if frame.message:
            message = attention_pb2.AttendRequest.FromString(frame.message)
            frame.kind = str(message.WhichOneof("message"))
            call = message.call
            self._places["call", lane] = _places(call, "q", "k", "v")
        self._unanswered.append(-1 if frame.kind == "step" else lane)
        self._add(frame, [] if frame.kind == "step" else self._places["call", lane])
        return size

    def _reply(self, received: bytes) -> int:
        if not (size := _frame_size(received, REPLY)):
            return 0
        frame = Frame("server", "repeated reply", received[:size], {})
        lane = self._unanswered.popleft()
        if frame.message:
            message = attention_pb2.AttendResponse.FromString(frame.message)
            frame.kind = str(message.WhichOneof("message"))
            if frame.kind == "call":
                self._places["reply", lane] = _places(message.call, "output", "lse")
        self._add(frame, self._places["reply", lane] if frame.kind in ("call", "repeated reply") else [])
        return size

    def _add(self, frame: Frame, places: list[tuple[int, int]]) -> None:
        frame.region = {offset: self._region[offset : offset + size] for offset, size in places}
        self._frames.append(frame)


def _frame_size(received: bytes, layout: struct.Struct) -> int:
    """Bytes of the first frame; 0: it is not there as a whole."""
    if len(received) < layout.size:
        return 0
    size = layout.size + int(layout.unpack_from(received)[0])
    return size if len(received) >= size else 0


def _places(message: Any, *names: str) -> list[tuple[int, int]]:
    """Offset and size of the tensors of float32 that lie in the region."""
    tensors: list[tensor_pb2.Tensor] = [getattr(message, name) for name in names if message.HasField(name)]
    places = []
    for tensor in tensors:
        size = FLOAT_BYTES
        for extent in tensor.shape:
            size *= extent
        places.append((tensor.region.offset, size))
    return places

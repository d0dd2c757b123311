"""The messages of a shm plane on its Unix socket: small ones, because tensors lie in the region.

A call of which only the step and the layer are new is a few numbers and no message at all. What lanes are, and how the
numbers lie, is said at ShmPlane in plane.proto.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from attnd.errors import InvalidRequest
from attnd.protocol import frames

_REQUEST = struct.Struct("<IIQI")
_REPLY = struct.Struct("<IIQIIII")
# Of a reply that is like the last one.
REPLY_BYTES = _REPLY.size
# Bytes that one receive asks for: more than nearly all messages have, so that one is enough.
_CHUNK_BYTES = 1 << 16


class Request(NamedTuple):
    """What a client sends.

    Attributes:
        layer: of a call that is like the last one of its lane.
        step_id: likewise.
        lane: of any call.
        message: an AttendRequest; empty for a call that is like the last one of its lane.
    """

    layer: int
    step_id: int
    lane: int
    message: bytes


class Reply(NamedTuple):
    """What a server sends.

    Attributes:
        layer: of a reply that is like the last one to a call of the same lane.
        step_id: likewise.
        queue_us: likewise.
        copy_in_us: likewise.
        kernel_us: likewise.
        copy_out_us: likewise.
        message: an AttendResponse; empty for a reply that is like the last one.
    """

    layer: int
    step_id: int
    queue_us: int
    copy_in_us: int
    kernel_us: int
    copy_out_us: int
    message: bytes


def request_bytes(message: bytes, lane: int = 0) -> bytes:
    """An AttendRequest for the socket; of a call, in `lane`."""
    return _REQUEST.pack(len(message), 0, 0, lane) + message


def repeated_call(layer: int, step_id: int, lane: int) -> bytes:
    """The last call of `lane` again, of another step or layer, for the socket."""
    return _REQUEST.pack(0, layer, step_id, lane)


def reply_bytes(message: bytes) -> bytes:
    """An AttendResponse for the socket."""
    return _REPLY.pack(len(message), 0, 0, 0, 0, 0, 0) + message


def repeated_reply(layer: int, step_id: int, queue_us: int, copy_in_us: int, kernel_us: int, copy_out_us: int) -> bytes:
    """The last reply of a lane again with other numbers, for the socket."""
    return _REPLY.pack(0, layer, step_id, queue_us, copy_in_us, kernel_us, copy_out_us)


class Requests:
    """The requests that come from a socket."""

    def __init__(self, connection: socket.socket) -> None:
        """Reads from `connection` alone."""
        self._frames = _Frames(connection, _REQUEST)

    @property
    def has_unread(self) -> bool:
        """Whether more was received than requests that were given: others, or a part of one."""
        return bool(self._frames.received)

    def receive(self, flags: int = 0) -> Request | None:
        """The next one, or None at the end. Waits as long as the socket's timeout or `flags` say; see `_Frames`."""
        frame = self._frames.receive(flags)
        if frame is None:
            return None
        (layer, step_id, lane), message = frame
        return Request(layer, step_id, lane, message)


class Replies:
    """The replies that come from a socket."""

    def __init__(self, connection: socket.socket) -> None:
        """Reads from `connection` alone."""
        self._frames = _Frames(connection, _REPLY)

    def receive(self) -> Reply | None:
        """The next one, or None at the end. Waits as long as the socket's timeout says; see `_Frames.receive`."""
        frame = self._frames.receive()
        if frame is None:
            return None
        (layer, step_id, queue_us, copy_in_us, kernel_us, copy_out_us), message = frame
        return Reply(layer, step_id, queue_us, copy_in_us, kernel_us, copy_out_us, message)


class _Frames:
    """Numbers, the first of which is how many bytes follow, and these bytes.

    Attributes:
        received: and not given yet.
    """

    def __init__(self, connection: socket.socket, numbers: struct.Struct) -> None:
        self._connection = connection
        self._numbers = numbers
        self.received = b""

    def receive(self, flags: int = 0) -> tuple[list[int], bytes] | None:
        """The numbers but the first, and the bytes; None if the socket ended.

        Args:
            flags: of `recv`.

        Raises:
            InvalidRequest: longer than a message may be.
            OSError: of the socket; BlockingIOError or TimeoutError if nothing came in time. What came in part is kept
                for the next call.
        """
        received = self.received
        while len(received) < self._numbers.size:
            chunk = self._connection.recv(_CHUNK_BYTES, flags)
            if not chunk:
                return None
            received = self.received = received + chunk if received else chunk
        num_bytes, *numbers = self._numbers.unpack_from(received)
        if num_bytes > frames.MAX_MESSAGE_BYTES:
            raise InvalidRequest(f"a message has {num_bytes} bytes, but must have at most {frames.MAX_MESSAGE_BYTES}")
        end = self._numbers.size + num_bytes
        if len(received) < end:
            # Memory is taken as bytes come, whatever length was announced.
            chunks, missing = [received], end - len(received)
            try:
                while missing > 0:
                    chunk = self._connection.recv(_CHUNK_BYTES, flags)
                    if not chunk:
                        return None
                    chunks.append(chunk)
                    missing -= len(chunk)
            finally:
                received = self.received = b"".join(chunks)
        self.received = received[end:]
        return numbers, received[self._numbers.size : end]

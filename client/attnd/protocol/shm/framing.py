"""The messages of a shm plane on its Unix socket: small ones, because tensors lie in the region.

A call of which only the step and the layer are new is a few numbers and no message at all. What lanes are, and how the
numbers lie, is said at ShmPlane in plane.proto.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from attnd.errors import DeadlineExceeded, InvalidRequest
from attnd.protocol import frames
from attnd.protocol.shm import sockets

_REQUEST = struct.Struct("<IIQI")
_REPLY = struct.Struct("<IIQIIII")
# Of a reply that is like the last one.
REPLY_BYTES = _REPLY.size
# Bytes that one receive asks for: more than nearly all messages have, so that one is enough.
_CHUNK_BYTES = 1 << 16
# Most bytes by which the buffer of a longer message grows, ahead of what has come of it.
_MAX_GROWTH_BYTES = 1 << 20
# Seconds from the first byte of a message to its last. Whoever sends one sends it at once.
MESSAGE_S = 10.0


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

    def __init__(self, connection: socket.socket, max_bytes: int = frames.MAX_MESSAGE_BYTES) -> None:
        """Reads from `connection` alone, messages of at most `max_bytes`."""
        self._frames = _Frames(connection, _REQUEST, max_bytes)

    @property
    def has_unread(self) -> bool:
        """Whether more was received than requests that were given: others, or a part of one."""
        return self._frames.has_unread

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
        self._frames = _Frames(connection, _REPLY, frames.MAX_MESSAGE_BYTES)

    def receive(self) -> Reply | None:
        """The next one, or None at the end. Waits as long as the socket's timeout says; see `_Frames.receive`."""
        frame = self._frames.receive()
        if frame is None:
            return None
        (layer, step_id, queue_us, copy_in_us, kernel_us, copy_out_us), message = frame
        return Reply(layer, step_id, queue_us, copy_in_us, kernel_us, copy_out_us, message)


class _Frames:
    """Numbers, the first of which is how many bytes follow, and these bytes."""

    def __init__(self, connection: socket.socket, numbers: struct.Struct, max_bytes: int) -> None:
        self._connection = connection
        self._numbers = numbers
        self._max_bytes = max_bytes
        self._received = b""  # and not given yet
        # Of a message that did not come at once: its bytes, how many there are, and until when it must be whole.
        self._part = bytearray()
        self._num_in_part = 0
        self._deadline = 0.0

    @property
    def has_unread(self) -> bool:
        """Whether something was received and not given yet."""
        return bool(self._received or self._num_in_part)

    def receive(self, flags: int = 0) -> tuple[list[int], bytes] | None:
        """The numbers but the first, and the bytes; None if the socket ended.

        Args:
            flags: of `recv`.

        Raises:
            InvalidRequest: longer than a message may be.
            DeadlineExceeded: it has begun, and is not whole after `MESSAGE_S`. So it is then for ever.
            OSError: of the socket; BlockingIOError or TimeoutError if nothing came in time. What came in part is kept
                for the next call.
        """
        if not self._num_in_part:
            received = self._received
            if not received:
                received = self._received = self._connection.recv(_CHUNK_BYTES, flags)
                if not received:
                    return None
            if len(received) >= self._numbers.size:
                num_bytes, *numbers = self._numbers.unpack_from(received)
                self._refuse_if_long(num_bytes)
                end = self._numbers.size + num_bytes
                if len(received) >= end:
                    self._received = received[end:]
                    return numbers, received[self._numbers.size : end]
            self._part, self._received = bytearray(received), b""
            self._num_in_part, self._deadline = len(received), time.monotonic() + MESSAGE_S
        whole = self._rest(flags)
        return None if whole is None else (list(self._numbers.unpack_from(whole)[1:]), whole[self._numbers.size :])

    def _refuse_if_long(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise InvalidRequest(f"a message has {num_bytes} bytes, but must have at most {self._max_bytes}")

    def _rest(self, flags: int) -> bytes | None:
        """A message that did not come at once; None if the socket ended.

        Memory is taken as bytes come, whatever length was announced, and however few come at a time.
        """
        end = size = self._numbers.size
        may_wait: Callable[[], None] | None = None
        while True:
            num_here = self._num_in_part
            if num_here >= size:
                (num_bytes, *_) = self._numbers.unpack_from(self._part)
                self._refuse_if_long(num_bytes)
                end = size + num_bytes
                if num_here == end:
                    break
            if time.monotonic() > self._deadline:
                raise DeadlineExceeded(f"a message was not whole within {MESSAGE_S:g} s of its first byte")
            if num_here == len(self._part):
                self._part.extend(bytes(min(end - num_here, max(num_here, size), _MAX_GROWTH_BYTES)))
            with memoryview(self._part) as view, view[num_here:] as free:
                try:
                    count = self._connection.recv_into(free, 0, flags | socket.MSG_DONTWAIT)
                except BlockingIOError:
                    if may_wait is None:
                        may_wait = self._waits(flags)
                    may_wait()
                    continue
            if not count:
                return None
            self._num_in_part += count
        whole, self._part, self._num_in_part = bytes(self._part), bytearray(), 0
        return whole

    def _waits(self, flags: int) -> Callable[[], None]:
        """What waits for more of a message, for as long as `receive` may and the message has; raises as `receive`."""
        timeout_s = self._connection.gettimeout()
        blocks = not flags & socket.MSG_DONTWAIT and timeout_s != 0
        receive_s = timeout_s or sockets.receive_timeout(self._connection)
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)

        def wait() -> None:
            if not blocks:
                raise BlockingIOError(errno.EAGAIN, "the message has not come whole")
            left_s = max(0.0, self._deadline - time.monotonic())
            if not poll.poll(min(left_s, receive_s or left_s) * 1e3) and 0 < receive_s < left_s:
                raise TimeoutError("timed out") if timeout_s else BlockingIOError(errno.EAGAIN, "nothing came in time")

        return wait

"""Unix sockets over which one process lets another, of which it knows the user, into a piece of its memory."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
import time
from typing import NamedTuple

from google.protobuf.message import DecodeError

from attnd.errors import AttndError, PermissionDenied, ServerFault, from_message, to_message
from attnd.v1 import error_pb2

# Bytes of a ticket: what nobody guesses.
TICKET_BYTES = 32
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group
_LENGTH = struct.Struct("<I")
# Bytes of an Error that says why somebody may not come in.
MAX_REFUSAL_BYTES = 64 << 10
_TIMEVAL = struct.Struct("ll")  # struct timeval: seconds, microseconds


class Peer(NamedTuple):
    """Who is at the other end, as the kernel says: whoever connected or listened, at that moment."""

    process: int
    user: int


def peer_of(connection: socket.socket) -> Peer:
    """The other end of a connected Unix socket."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(data)
    return Peer(process, user)


def set_timeouts(connection: socket.socket, *, receive_s: float = 0.0, send_s: float = 0.0) -> None:
    """How long a blocking socket may block, in seconds; 0 is for ever. What takes longer raises BlockingIOError.

    The kernel watches, while Python's own timeout costs a system call each time.
    """
    for option, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
        microseconds = max(1, int(seconds * 1e6)) if seconds else 0
        connection.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(microseconds, 1_000_000)))


def receive_timeout(connection: socket.socket) -> float:
    """What `set_timeouts` was given as `receive_s`."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.size)
    seconds, microseconds = _TIMEVAL.unpack(data)
    return float(seconds + microseconds / 1e6)


def _wanted_seals() -> int:
    """Neither shorter nor longer, and no other seals. Linux alone has them."""
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def sealed_memory(num_bytes: int) -> int:
    """A file of `num_bytes` zeros that lies in memory, has no name and keeps its size; returns its descriptor.

    Because it cannot shrink, nobody who maps it can be killed by somebody else who shrinks it.
    """
    descriptor = os.memfd_create("attnd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _wanted_seals())
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def map_memory(descriptor: int, num_bytes: int) -> mmap.mmap:
    """Maps a sealed file whole; closes the descriptor, whatever happens.

    Raises:
        ServerFault: it is not sealed, or not of that size.
    """
    try:
        seals, size = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS), os.fstat(descriptor).st_size
        wanted = _wanted_seals()
        if seals & wanted != wanted or size != num_bytes:
            raise ServerFault(f"the region has {size} bytes and seals {seals}, but must have {num_bytes} and {wanted}")
        return mmap.mmap(descriptor, num_bytes)
    except OSError as error:
        raise ServerFault(f"the region cannot be mapped: {error}") from None
    finally:
        os.close(descriptor)


def send_memory(connection: socket.socket, *descriptors: int) -> None:
    """Lets the peer in."""
    socket.send_fds(connection, [_LENGTH.pack(0)], list(descriptors))


def send_refusal(connection: socket.socket, error: AttndError) -> None:
    """Tells the peer why it may not come in, unless it reads nothing. Raises OSError: it has gone."""
    message = to_message(error).SerializeToString()
    connection.send(_LENGTH.pack(len(message)) + message, socket.MSG_DONTWAIT)


def receive_memories(connection: socket.socket, count: int) -> list[int]:
    """The descriptors that the peer sent with `send_memory`, within the connection's timeout for all that comes.

    Raises:
        AttndError: what it sent with `send_refusal`.
        OSError: the connection broke or timed out.
    """
    timeout_s = connection.gettimeout()
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    data, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, count)
    try:
        if data:
            data = _received(connection, data, _LENGTH.size, deadline)
        if len(data) < _LENGTH.size:
            raise ConnectionResetError("the server hung up")
        (num_bytes,) = _LENGTH.unpack(data)
        if num_bytes:
            raise _refusal(connection, num_bytes, deadline)
        if len(descriptors) != count:
            told = f"sent {len(descriptors) or 'no'} descriptors, and must send {count}"
            raise ServerFault(f"the server let the client in, but {told}")
        received, descriptors = list(descriptors), []
        return received
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _refusal(connection: socket.socket, num_bytes: int, deadline: float | None) -> AttndError:
    if num_bytes > MAX_REFUSAL_BYTES:
        return ServerFault(f"the server's refusal has {num_bytes} bytes, but must have at most {MAX_REFUSAL_BYTES}")
    received = _received(connection, b"", num_bytes, deadline)
    if len(received) < num_bytes:
        return PermissionDenied("the server hung up")
    try:
        return from_message(error_pb2.Error.FromString(received))
    except DecodeError as error:
        return ServerFault(f"the server's refusal cannot be read: {error}")


def _received(connection: socket.socket, begun: bytes, num_bytes: int, deadline: float | None) -> bytes:
    """`begun` and what comes after it, `num_bytes` together, or fewer at the end. Raises TimeoutError at `deadline`."""
    received = bytearray(begun)
    while len(received) < num_bytes:
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 1e-6))
        chunk = connection.recv(num_bytes - len(received))
        if not chunk:
            break
        received += chunk
    return bytes(received)

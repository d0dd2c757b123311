"""Connections of clients that speak as much HTTP/2 as they like, and then stop."""

from __future__ import annotations

import select
import socket
import struct
import time

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 4, 6, 8
_ACK = 1
_END_HEADERS = 4


def frame(kind: int, flags: int, stream: int, payload: bytes, num_bytes: int | None = None) -> bytes:
    """A frame (RFC 9113, section 4.1) that says it has `num_bytes` of payload; None: as many as it has."""
    length = len(payload) if num_bytes is None else num_bytes
    return struct.pack(">I", length)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field without indexing, with a new name (RFC 7541, section 6.2.2)."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def request(method: str, *headers: tuple[bytes, bytes], stream: int = 1) -> bytes:
    """The beginning of an RPC: its headers, and no message yet."""
    path = (method if method.startswith("/") else f"/attnd.v1.AttentionService/{method}").encode()
    fields = [
        b"\x83\x86",  # POST, http: from the static table
        _literal(b":path", path),
        _literal(b":authority", b"localhost"),
        _literal(b"content-type", b"application/grpc"),
        _literal(b"te", b"trailers"),
        *[_literal(name, value) for name, value in headers],
    ]
    return frame(_HEADERS, _END_HEADERS, stream, b"".join(fields))


OPENING = PREFACE + frame(_SETTINGS, 0, 0, b"")
# gRPC's prefix promises 1000 bytes, HTTP/2's 105, and 15 come.
HALF_A_MESSAGE = frame(_DATA, 0, 1, b"\0" + struct.pack(">I", 1000) + bytes(10), num_bytes=105)


def connected(address: str, data: bytes = b"") -> socket.socket:
    """A connection on which `data` was sent."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(data)
    return connection


def wait_for_end(connections: list[socket.socket], timeout_s: float) -> int:
    """Reads until the server has ended the connections, or the time is up. Returns how many it has not."""
    deadline = time.monotonic() + timeout_s
    open_ones = {connection.fileno(): connection for connection in connections}
    poll = select.poll()
    for number in open_ones:
        poll.register(number, select.POLLIN)
    while open_ones and time.monotonic() < deadline:
        for number, _ in poll.poll(100):
            try:
                data = open_ones[number].recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                poll.unregister(number)
                del open_ones[number]
    return len(open_ones)


class Flood:
    """A connection whose RPCs each send as much of one message as the server takes, and not its end.

    Attributes:
        sent: bytes of their messages.
    """

    def __init__(self, address: str, methods: list[str], num_bytes: int, *headers: tuple[bytes, bytes]) -> None:
        """Begins an RPC of each method, with a message that says it has `num_bytes`."""
        self._socket = connected(address, OPENING)
        self._num_bytes = num_bytes
        self._rest = b""
        self._window, self._initial = 65_535, 65_535  # RFC 9113, section 6.9.2
        self._grown: dict[int, int] = {}
        self._sent = {1 + 2 * index: 0 for index in range(len(methods))}
        for stream, method in zip(self._sent, methods, strict=True):
            self._socket.sendall(request(method, *headers, stream=stream))

    @property
    def sent(self) -> int:
        return sum(self._sent.values())

    def push(self) -> bool:
        """Sends what the windows allow at once. Whether that was anything, or anything came."""
        came, pushed = self._take(), False
        for stream, sent in self._sent.items():
            room = self._initial + self._grown.get(stream, 0) - sent
            size = min(room, self._window, 1 << 14, self._num_bytes + 4 - sent)  # never the last byte
            if size > 0:
                prefix = b"" if sent else b"\0" + struct.pack(">I", self._num_bytes)
                self._socket.sendall(frame(_DATA, 0, stream, (prefix + bytes(size))[:size]))
                self._sent[stream] += size
                self._window -= size
                pushed = True
        return pushed or came

    def close(self) -> None:
        self._socket.close()

    def _take(self) -> bool:
        if not select.select([self._socket], [], [], 0)[0]:
            return False
        data = self._rest + self._socket.recv(1 << 16)
        while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3], "big"):
            end = 9 + int.from_bytes(data[:3], "big")
            self._took(data[3], data[4], int.from_bytes(data[5:9], "big"), data[9:end])
            data = data[end:]
        self._rest = data
        return True

    def _took(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _WINDOW_UPDATE and not stream:
            self._window += int.from_bytes(payload, "big")
        elif kind == _WINDOW_UPDATE:
            self._grown[stream] = self._grown.get(stream, 0) + int.from_bytes(payload, "big")
        elif kind == _PING and not flags & _ACK:
            self._socket.sendall(frame(_PING, _ACK, 0, payload))
        elif kind == _SETTINGS and not flags & _ACK:
            for start in range(0, len(payload), 6):
                setting, value = struct.unpack(">HI", payload[start : start + 6])
                self._initial = value if setting == 4 else self._initial
            self._socket.sendall(frame(_SETTINGS, _ACK, 0, b""))


class Frames:
    """Looks for what RPCs send in the bytes of one direction, however they are cut, among pings and the like."""

    def __init__(self) -> None:
        self._rest = b""  # the beginning of a frame's nine bytes
        self._skip = 0  # bytes of a payload that are still to come

    def hold_an_answer(self, data: bytes) -> bool:
        """Whether headers or data begin in what comes next."""
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        left, found = self._rest + data[skipped:], False
        while len(left) >= 9:
            found = found or left[3] in (_HEADERS, _DATA)
            end = 9 + int.from_bytes(left[:3], "big")
            self._skip = max(0, end - len(left))
            left = left[end:]
        self._rest = left
        return found

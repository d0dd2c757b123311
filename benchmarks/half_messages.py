"""gRPC messages that are begun and never ended, as fast as a server's flow control (RFC 9113) lets them come."""

from __future__ import annotations

import select
import socket
import struct
import time
from dataclasses import dataclass

_DATA, _HEADERS, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 4, 6, 7, 8
_ACK, _END_HEADERS = 1, 4
_INITIAL_WINDOW_SIZE, _INITIAL_WINDOW = 4, 65_535
_FRAME_BYTES = 16_384
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _headers(path: str) -> bytes:
    """POST, http, then literal fields with new names (RFC 7541, section 6.2.2)."""
    fields = {":path": path, ":authority": "localhost", "content-type": "application/grpc", "te": "trailers"}
    literals = [
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    ]
    return b"\x83\x86" + b"".join(literals)


@dataclass
class _Stream:
    """A message under way: bytes that are still to be sent, and that the server takes now."""

    left: int
    window: int


class HalfMessages:
    """Messages of one connection, each announced with all its bytes, and sent without the last one."""

    def __init__(self, address: str, num_messages: int, num_bytes: int) -> None:
        """Connects. Raises OSError."""
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=10)
        self._num_bytes = num_bytes
        self._window = self._initial_window = _INITIAL_WINDOW
        self._streams = {2 * index + 1: _Stream(num_bytes - 1, _INITIAL_WINDOW) for index in range(num_messages)}
        self._received = b""
        self._zeros = memoryview(bytes(_FRAME_BYTES))

    def send(self, path: str, seconds: float) -> int:
        """Sends what the server takes, for so long or until it ends the connection. Returns how many bytes it took."""
        prefix = b"\0" + struct.pack(">I", self._num_bytes)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, b""))
        num_sent, deadline = 0, time.monotonic() + seconds
        with self._socket:
            for stream in self._streams:
                self._socket.sendall(
                    _frame(_HEADERS, _END_HEADERS, stream, _headers(path)) + _frame(_DATA, 0, stream, prefix)
                )
                self._spend(stream, len(prefix))
            while self._streams and time.monotonic() < deadline:
                sent = self._send_some()
                num_sent += sent
                if not self._read(0 if sent else 0.1):
                    break
        return num_sent

    def _spend(self, stream: int, num_bytes: int) -> None:
        self._window -= num_bytes
        self._streams[stream].window -= num_bytes

    def _send_some(self) -> int:
        """One frame of each stream that may send."""
        num_sent = 0
        for number, stream in self._streams.items():
            size = min(_FRAME_BYTES, self._window, stream.window, stream.left)
            if size <= 0:
                continue
            self._socket.sendall(_frame(_DATA, 0, number, bytes(self._zeros[:size])))
            self._spend(number, size)
            stream.left -= size
            num_sent += size
        return num_sent

    def _read(self, timeout_s: float) -> bool:
        """Takes in what the server says. False: it has ended the connection."""
        while select.select([self._socket], [], [], timeout_s)[0]:
            data = self._socket.recv(1 << 16)
            if not data:
                return False
            self._received += data
            while len(self._received) >= 9:
                end = 9 + int.from_bytes(self._received[:3], "big")
                if len(self._received) < end:
                    break
                frame, self._received = self._received[:end], self._received[end:]
                self._take(frame[3], frame[4], int.from_bytes(frame[5:9], "big"), frame[9:])
            timeout_s = 0
        return True

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _WINDOW_UPDATE:
            increment = int.from_bytes(payload, "big")
            if stream == 0:
                self._window += increment
            elif stream in self._streams:
                self._streams[stream].window += increment
        elif kind == _SETTINGS and not flags & _ACK:
            for key, value in struct.iter_unpack(">HI", payload):
                if key == _INITIAL_WINDOW_SIZE:
                    for each in self._streams.values():
                        each.window += value - self._initial_window
                    self._initial_window = value
            self._socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._socket.sendall(_frame(_PING, _ACK, 0, payload))
        elif stream in self._streams and (kind == 3 or (kind == _HEADERS and flags & 1)):  # reset, or ended
            del self._streams[stream]

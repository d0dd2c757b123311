"""What a client needs of each way to a server: unary methods, bulk KV, and Attend streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from attnd.protocol import frames, requests
from attnd.protocol.attention_options import AttentionOptions
from attnd.v1 import step_pb2


class Stream(Protocol):
    """An Attend stream. One thread at a time. Classes that derive from it carry tensors in the messages themselves.

    Attributes:
        plane: how the tensors of calls travel.
        room: bytes that the tensors of a call and its reply may take, each beginning at a multiple of 64; None: as many
            as a message may have.
    """

    plane: str = "inline"
    room: int | None = None

    def step_request(self, step: step_pb2.Step) -> bytes:
        """What opens a step, for `send`."""
        return frames.step_request(step)

    def call_request(self, step_id: int, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions) -> bytes:
        """A call, for `send`, before the next call is made. Raises InvalidRequest for what cannot be sent."""
        return requests.attend_call(step_id, layer, q, k, v, options)

    def send(self, request: bytes) -> None:
        """Sends a message; does not wait."""

    def receive(self, timeout_s: float) -> requests.AttendReply:
        """The next message from the server."""

    def stop(self) -> None:
        """Ends the stream while another thread is inside, which is told."""
        self.close()

    def close(self) -> None:
        """Ends the stream."""


class Transport(Protocol):
    """A connection to one server. Any thread may call it.

    Whatever is called after `close`, or in a process that was forked from the one that connected, raises Disconnected.
    """

    def may_close(self) -> bool:
        """Whether it is this process that has connected, and may end what it has."""

    def unary(self, method: str, request: bytes, timeout_s: float, wait: bool = False) -> bytes:
        """Calls a unary method; with `wait`, an unreachable server is waited for until the timeout.

        What the server refused without starting it is sent again, and what was lost with a connection, for a moment:
        see `attnd.planes.retry_deadline`.
        """

    def attend(self) -> Stream:
        """Opens an Attend stream."""

    def store_kv(self, requests: Iterable[bytes], timeout_s: float) -> Iterator[bytes]:
        """Calls StoreKv."""

    def read_kv(self, request: bytes, timeout_s: float) -> Iterator[bytes]:
        """Calls ReadKv."""

    def close(self) -> None:
        """Ends the connection."""

"""What a handler of the servicer sees of gRPC."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from tests.fuzz.world import CALLER


class Ended(Exception):
    """An RPC was ended with a status."""


class Context:
    """What a handler sees of gRPC."""

    def __init__(self, *messages: bytes) -> None:
        """Of the caller, who sends these."""
        self.principal = CALLER
        self._messages = deque(messages)
        self.answers: list[bytes] = []
        self.code: grpc.StatusCode | None = None
        self._at_the_end: list[Callable[[Any], None]] = []

    def invocation_metadata(self) -> tuple[()]:
        """None."""
        return ()

    def time_remaining(self) -> None:
        """For ever."""

    def peer(self) -> str:
        """Where the caller is."""
        return "ipv4:127.0.0.1:1"

    async def read(self) -> Any:
        """The next message."""
        return self._messages.popleft() if self._messages else grpc.aio.EOF

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """To be called once the RPC has ended."""
        self._at_the_end.append(callback)

    def end(self) -> None:
        """The RPC has ended, and its answers were taken."""
        callbacks, self._at_the_end = self._at_the_end, []
        for callback in callbacks:
            callback(self)

    async def write(self, answer: bytes) -> None:
        """Keeps an answer."""
        self.answers.append(answer)

    async def abort(self, code: grpc.StatusCode, details: str, trailing: Any = ()) -> None:
        """Ends the RPC."""
        assert details
        self.code = code
        raise Ended

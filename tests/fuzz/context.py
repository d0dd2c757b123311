"""What a handler of the servicer sees of gRPC."""

from __future__ import annotations

from typing import Any

import grpc

from tests.fuzz.world import CALLER


class Ended(Exception):
    """An RPC was ended with a status."""


class Context:
    """What a handler sees of gRPC."""

    def __init__(self) -> None:
        """Of the caller."""
        self.principal = CALLER
        self.answers: list[bytes] = []
        self.code: grpc.StatusCode | None = None

    def invocation_metadata(self) -> tuple[()]:
        """None."""
        return ()

    def time_remaining(self) -> None:
        """For ever."""

    async def write(self, answer: bytes) -> None:
        """Keeps an answer."""
        self.answers.append(answer)

    async def abort(self, code: grpc.StatusCode, details: str, trailing: Any = ()) -> None:
        """Ends the RPC."""
        assert details
        self.code = code
        raise Ended

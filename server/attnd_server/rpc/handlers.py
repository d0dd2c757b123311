"""Handlers that gRPC calls at an RPC's headers, before it collects anything of a message."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

Unary = Callable[[bytes, Any], Awaitable[Any]]


class LateReading(grpc.RpcMethodHandler):  # type: ignore[type-arg]
    """A method with one request that is read when its handler asks for it.

    Of a method with one request gRPC collects the message first, however large, and calls its handler then. A stream's
    handler is called at the headers: until it asks for a message, no more than HTTP/2's window comes in. On the wire
    both are the same.

    Attributes:
        unary_unary: what answers a request that was read; None: it answers with a stream.
        unary_stream: likewise with a stream; None: it answers with a message.
    """

    request_streaming = True
    request_deserializer = response_serializer = None
    unary_unary: Any = None
    unary_stream: Any = None
    stream_unary: Any = None
    stream_stream: Any = None

    def __init__(self, answer: Unary, read: Callable[[Any], Awaitable[bytes]], streams: bool = False) -> None:
        """Answers with `answer` what `read` has read.

        Args:
            answer: gets the request and gRPC's context.
            read: gets gRPC's context; ends the RPC if there is no request to be had.
            streams: whether it writes a stream of answers, and returns none.
        """

        async def at_the_headers(_: AsyncIterator[bytes], context: Any) -> Any:
            return await answer(await read(context), context)

        self.response_streaming = streams
        if streams:
            self.stream_stream, self.unary_stream = at_the_headers, answer
        else:
            self.stream_unary, self.unary_unary = at_the_headers, answer

"""How handlers meet gRPC: they are called at an RPC's headers, before anything of a message is collected."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

# What gRPC's context raises once there is nobody to write to: the client has gone, or the server has stopped, and gRPC
# has not cancelled the handler yet.
GONE = (grpc.aio.InternalError, grpc.aio.UsageError)
# Whoever logs what a handler raised, or gRPC could not send after it.
GRPC_LOGGER = "grpc._cython.cygrpc"


def reads_late(
    answer: Callable[[bytes, Any], Awaitable[Any]], read: Callable[[Any], Awaitable[bytes]], *, streams: bool = False
) -> Any:
    """A method with one request that is read when its handler asks for it.

    Of a method with one request gRPC collects the message first, however large, and calls its handler then. A stream's
    handler is called at the headers: until it asks for a message, no more than HTTP/2's window comes in. On the wire
    both are the same.

    Args:
        answer: gets the request and gRPC's context.
        read: gets gRPC's context; ends the RPC if there is no request to be had.
        streams: whether it writes a stream of answers, and returns none.
    """

    async def at_the_headers(_: AsyncIterator[bytes], context: Any) -> Any:
        with until_client_goes():
            return await answer(await read(context), context)

    make: Any = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
    return make(at_the_headers)


@contextmanager
def until_client_goes() -> Iterator[None]:
    """Around what is done with gRPC's context.

    Raises:
        asyncio.CancelledError: there is nobody to write to. Other errors gRPC would log as faults.
    """
    try:
        yield
    except GONE:
        raise asyncio.CancelledError from None


def is_worth_telling(record: logging.LogRecord) -> bool:
    """A filter of gRPC's log: all but that a client went before it got its RPC's status, which is no fault.

    gRPC sends the status after the handler has returned, so that no handler can catch what comes of it.
    """
    error = record.exc_info[1] if record.exc_info else None
    text = f"{record.getMessage()} {error!r}"
    return not ("ExecuteBatchError" in text and "SendStatusFromServerOperation" in text)

"""A bare gRPC echo: what the same bytes cost both ways when nobody looks at them.

`python -m benchmarks.echo` serves; `UnaryEcho` and `StreamEcho` call. Options, allocator and interpreter are set as
attnd's are, messages are raw bytes. The first four bytes of a message say how many bytes of it come back.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from attnd.planes.grpc_options import grpc_options
from attnd.tuning import tune_process

SERVICE = "attnd.benchmarks.Echo"
TIMEOUT_S = 60.0
# Bytes of the answer to what opens a step; those to calls are longer.
STEP_REPLY_BYTES = 8


def message(num_bytes: int, num_reply_bytes: int) -> bytes:
    """A request of `num_bytes` whose answer has `num_reply_bytes`."""
    if not 4 <= num_reply_bytes <= num_bytes:
        raise ValueError(f"num_reply_bytes is {num_reply_bytes}, but must be 4..{num_bytes}, a part of the request")
    return num_reply_bytes.to_bytes(4, "little").ljust(num_bytes, b"\1")


def reply(data: bytes) -> bytes:
    """The answer to a request."""
    return data[: int.from_bytes(data[:4], "little")]


class UnaryEcho:
    """Calls the echo, a request at a time."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._call: Any = channel.unary_unary(f"/{SERVICE}/Unary", None, None)

    def call(self, data: bytes) -> bytes:
        """Sends and receives."""
        return self._call(data, timeout=TIMEOUT_S)  # type: ignore[no-any-return]


class StreamEcho:
    """Calls the echo over one stream. Close it."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method: Any = channel.stream_stream(f"/{SERVICE}/Stream", None, None)
        self._replies = method(iter(self._requests.get, None))

    def send(self, data: bytes) -> None:
        """Sends; does not wait."""
        self._requests.put(data)

    def receive(self) -> bytes:
        """The next answer."""
        return next(self._replies)  # type: ignore[no-any-return]

    def call(self, data: bytes) -> bytes:
        """Sends and receives."""
        self.send(data)
        return self.receive()

    def close(self) -> None:
        """Ends the stream."""
        self._requests.put(None)
        self._replies.cancel()


def connect(address: str) -> grpc.Channel:
    """A channel with attnd's options."""
    return grpc.insecure_channel(address, options=grpc_options())


async def _unary(data: bytes, context: Any) -> bytes:
    return reply(data)


async def serve(work: Callable[[], None] = lambda: None) -> None:
    """Serves on a port that the system picks, until the process is ended; answers a stream's calls after `work`."""
    from attnd_server import app
    from attnd_server.config import ServerConfig

    async def stream(requests: AsyncIterator[bytes], context: Any) -> None:
        async for data in requests:
            answer = reply(data)
            if len(answer) > STEP_REPLY_BYTES:
                work()
            await context.write(answer)

    tune_process()
    server = grpc.aio.server(options=app.grpc_options(ServerConfig()))
    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(_unary),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"echo serves 127.0.0.1:{port} on nothing", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve())

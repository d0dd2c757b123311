"""The transport over gRPC: bytes to a server and back."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

import grpc

from attnd import forks
from attnd.credentials import NO_CREDENTIALS, Credentials, metadata_after
from attnd.errors import AttndError, Disconnected, Unauthenticated, ended
from attnd.planes import call_threads
from attnd.planes.channels import ALL_WHY_S, WHY_S, open_channel
from attnd.planes.grpc_errors import explained, translate
from attnd.planes.grpc_options import KEEPALIVE_S, grpc_options
from attnd.planes.grpc_stream import GrpcStream, StreamingCall
from attnd.planes.retries import retried
from attnd.planes.targets import parse_target
from attnd.planes.transport import Stream

SERVICE = "/attnd.v1.AttentionService/"
# Seconds in which a channel is made, which waits for nobody.
OPENING_S = 10.0
# Chunks of StoreKv that are sent before the first is answered: the server takes one while the next comes.
CHUNKS_AHEAD = 2


class GrpcTransport:
    """A channel to a server. What is gRPC's own is used on threads of `attnd.planes.call_threads` alone."""

    def __init__(
        self, address: str, credentials: Credentials = NO_CREDENTIALS, keepalive_s: float = KEEPALIVE_S
    ) -> None:
        """Connects lazily."""
        self._target = parse_target(address)
        self._address = self._target.shown
        self._credentials = credentials
        self._metadata = credentials.metadata
        opening = partial(open_channel, grpc, self._target, credentials, grpc_options(keepalive_s))
        self._made = forks.generation
        self._channel: Any = call_threads.run(opening, OPENING_S)
        self._unary: dict[str, Any] = {}
        self._end = weakref.finalize(self, _close, self._channel, self._made)
        self._end.atexit = False

    def unary(self, method: str, request: bytes, timeout_s: float, wait: bool = False) -> bytes:
        """Calls a unary method."""

        def send(left_s: float) -> bytes:
            self._refuse_if_ended()
            metadata = self._metadata()
            ask = partial(self._ask, method, request, left_s, wait, timeout_s if wait else 0)
            try:
                return call_threads.run(partial(ask, metadata), left_s + ALL_WHY_S)
            except Unauthenticated:
                renewed = metadata_after(metadata, self._metadata)
                if renewed is None:
                    raise
            return call_threads.run(partial(ask, renewed), left_s + ALL_WHY_S)

        return retried(send, timeout_s, gone=b"" if method == "DeleteCache" else None)

    def _ask(self, method: str, request: bytes, timeout_s: float, wait: bool, waited_s: float, metadata: Any) -> bytes:
        """One attempt, on a thread of its own."""
        try:
            call = self._unary.get(method)
            if call is None:
                call = self._unary[method] = self._channel.unary_unary(SERVICE + method)
            return call(request, timeout=timeout_s, metadata=metadata, wait_for_ready=wait)  # type: ignore[no-any-return]
        except grpc.RpcError as error:
            told = translate(error, self._address, waited_s)
        except ValueError:  # a channel that was closed meanwhile
            self._refuse_if_ended()
            raise
        raise self._explained(told) if wait else told

    def _explained(self, told: AttndError) -> AttndError:
        """Adds why there is no connection: a call that waits for one hears nothing of handshakes that fail."""
        if isinstance(told, Disconnected):
            call: Any = self._channel.unary_unary(SERVICE + "GetCapabilities")
            try:
                call(b"", timeout=WHY_S)
            except grpc.RpcError as error:
                return explained(told, error, self._target, self._credentials)
        return told

    def attend(self) -> Stream:
        """Opens an Attend stream."""
        self._refuse_if_ended()
        return GrpcStream(self._method("stream_stream", "Attend"), self._address, self._metadata())

    def store_kv(self, requests: Iterable[bytes], timeout_s: float) -> Iterator[bytes]:
        """Calls StoreKv, some chunks ahead of their answers."""
        self._refuse_if_ended()
        sending: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method, metadata = self._method("stream_stream", "StoreKv"), self._metadata()
        sent, chunks = iter(sending.get, None), iter(requests)
        call = StreamingCall(
            lambda came: method(came)(sent, timeout=timeout_s, metadata=metadata), self._address, sending
        )
        try:
            for chunk in islice(chain(chunks, [None]), CHUNKS_AHEAD):
                sending.put(chunk)  # None says that there are no more
            while (data := call.receive(timeout_s + call_threads.GRACE_S)) is not None:
                yield data  # first: who makes the chunks may want to know of answers
                sending.put(next(chunks, None))
        finally:
            call.cancel()

    def read_kv(self, request: bytes, timeout_s: float) -> Iterator[bytes]:
        """Calls ReadKv."""
        self._refuse_if_ended()
        method, metadata = self._method("unary_stream", "ReadKv"), self._metadata()
        call = StreamingCall(lambda came: method(came)(request, timeout=timeout_s, metadata=metadata), self._address)
        try:
            while (data := call.receive(timeout_s + call_threads.GRACE_S)) is not None:
                yield data
        finally:
            call.cancel()

    def _method(self, kind: str, name: str) -> Callable[..., Any]:
        """Gives a method of gRPC's, when it is given what reads its responses."""
        channel = self._channel
        return lambda came: getattr(channel, kind)(SERVICE + name, response_deserializer=came)

    def _refuse_if_ended(self) -> None:
        forks.refuse("client", self._made)
        if not self._end.alive:
            raise ended("the client was closed; connect again")

    def may_close(self) -> bool:
        """Whether it is this process that has connected."""
        return self._made == forks.generation

    def close(self) -> None:
        """Closes the channel; calls under way end."""
        self._end()


def _close(channel: Any, made: int) -> None:
    if made == forks.generation:
        call_threads.start_last(channel.close)
    else:
        forks.keep(channel)

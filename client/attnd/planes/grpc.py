"""Bytes to a server and back: gRPC, or whatever a scheme of the entry point group `attnd.transports` names."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from typing import Any, Protocol

import grpc

from attnd.credentials import NO_CREDENTIALS, Credentials
from attnd.errors import AttndError, DeadlineExceeded, Disconnected, InvalidRequest, Unsupported, from_rpc
from attnd.planes.retries import patiently
from attnd.protocol import frames, requests
from attnd.protocol.attention_options import AttentionOptions
from attnd.v1 import step_pb2

SERVICE = "/attnd.v1.AttentionService/"

# Seconds in which a peer that vanished without a word is noticed.
KEEPALIVE_S = 10.0
# Less, and the server would take a client's pings for an attack.
MIN_KEEPALIVE_S = 1.0


def grpc_options(keepalive_s: float = KEEPALIVE_S) -> list[tuple[str, int]]:
    """Options of a gRPC channel.

    Raises:
        InvalidRequest: keepalive_s is too short.
    """
    if not keepalive_s >= MIN_KEEPALIVE_S:
        rule = f"must be at least {MIN_KEEPALIVE_S:g} seconds"
        raise InvalidRequest(f"keepalive_s is {keepalive_s:g}, but {rule}", field="keepalive_s")
    return [
        ("grpc.max_receive_message_length", frames.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", frames.MAX_MESSAGE_BYTES),
        *keepalive_options(keepalive_s),
        # A restarted server is found again at once instead of after gRPC's minutes of backoff.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # How long one attempt may take, in spite of its name: a handshake with a busy server far away takes a while.
        ("grpc.min_reconnect_backoff_ms", 5_000),
        # Retries are ours to decide: the contract says what may be sent twice.
        ("grpc.enable_retries", 0),
    ]


def keepalive_options(keepalive_s: float) -> list[tuple[str, int]]:
    """Options of gRPC, of either side, for noticing within `keepalive_s` seconds that the other one has vanished."""
    return [
        ("grpc.keepalive_time_ms", int(keepalive_s * 600)),
        ("grpc.keepalive_timeout_ms", int(keepalive_s * 400)),
        # The same again for newer versions of gRPC, whose pings have a timeout of their own, a minute.
        ("grpc.http2.ping_timeout_ms", int(keepalive_s * 400)),
        ("grpc.keepalive_permit_without_calls", 1),
        # A stream may be silent for as long as it likes; gRPC's own rule is two pings, and then one in five minutes.
        ("grpc.http2.max_pings_without_data", 0),
    ]


# Seconds for asking why there is no connection.
WHY_S = 0.5


class Stream(Protocol):
    """An Attend stream. One thread at a time. Classes that derive from it carry tensors in the messages themselves.

    Attributes:
        plane: how the tensors of calls travel.
    """

    plane: str = "inline"

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

    def close(self) -> None:
        """Ends the stream."""


class Transport(Protocol):
    """A connection to one server. Any thread may call it."""

    def unary(self, method: str, request: bytes, timeout_s: float, wait: bool = False) -> bytes:
        """Calls a unary method; with `wait`, an unreachable server is waited for until the timeout.

        What the server refused without starting it is sent again, and what was lost with a connection, for a moment:
        see `attnd.planes.retries`.
        """

    def attend(self) -> Stream:
        """Opens an Attend stream."""

    def store_kv(self, requests: Iterable[bytes], timeout_s: float) -> Iterator[bytes]:
        """Calls StoreKv."""

    def read_kv(self, request: bytes, timeout_s: float) -> Iterator[bytes]:
        """Calls ReadKv."""

    def close(self) -> None:
        """Ends the connection."""


def open_transport(address: str, credentials: Credentials | None = None, keepalive_s: float = KEEPALIVE_S) -> Transport:
    """The transport of "host:port", or of "scheme://" as an installed package defines it.

    Args:
        address: which.
        credentials: for "host:port"; None: it is not encrypted, and nobody's.
        keepalive_s: for "host:port": seconds in which a server that vanished is noticed.

    Raises:
        InvalidRequest: nothing like that.
        Unsupported: the package that it needs is not installed.
    """
    scheme, separator, _ = address.partition("://")
    if not separator:
        return GrpcTransport(address, credentials or NO_CREDENTIALS, keepalive_s)
    if credentials is not None:
        rule = "must be absent: there is no connection to protect, and nobody else to be told from"
        raise InvalidRequest(f"credentials are given for {address}, but {rule}", field="credentials")
    for entry in entry_points(group="attnd.transports"):
        if entry.name == scheme:
            try:
                connect = entry.load()
            except ModuleNotFoundError as error:
                raise Unsupported(f"{address} needs the package {error.name}: pip install 'attnd[server]'") from None
            return connect()  # type: ignore[no-any-return]
    raise InvalidRequest(
        f'address is {address}, but must be "host:port", or "inproc://" where attnd[server] is installed',
        field="address",
    )


class GrpcTransport:
    """A channel to a server."""

    def __init__(
        self, address: str, credentials: Credentials = NO_CREDENTIALS, keepalive_s: float = KEEPALIVE_S
    ) -> None:
        """Connects lazily."""
        self._address = address
        self._metadata = credentials.metadata
        options = grpc_options(keepalive_s)
        if credentials.tls:
            secure = [*options, *credentials.channel_options()]
            self._channel = grpc.secure_channel(address, credentials.channel_credentials(), options=secure)
        else:
            self._channel = grpc.insecure_channel(address, options=options)
        self._unary: dict[str, Any] = {}
        self._attend: Any = self._channel.stream_stream(SERVICE + "Attend")
        self._store_kv: Any = self._channel.stream_stream(SERVICE + "StoreKv")
        self._read_kv: Any = self._channel.unary_stream(SERVICE + "ReadKv")

    def unary(self, method: str, request: bytes, timeout_s: float, wait: bool = False) -> bytes:
        """Calls a unary method."""
        call = self._unary.get(method)
        if call is None:
            call = self._unary[method] = self._channel.unary_unary(SERVICE + method)

        def send(left_s: float) -> bytes:
            try:
                return call(  # type: ignore[no-any-return]
                    request, timeout=left_s, metadata=self._metadata(), wait_for_ready=wait
                )
            except grpc.RpcError as error:
                told = translate(error, self._address, timeout_s if wait else 0)
            raise self._explained(told) if wait else told

        return patiently(send, timeout_s, gone=b"" if method == "DeleteCache" else None)

    def _explained(self, told: AttndError) -> AttndError:
        """Adds why there is no connection: a call that waits for one hears nothing of handshakes that fail."""
        if isinstance(told, Disconnected):
            call: Any = self._channel.unary_unary(SERVICE + "GetCapabilities")
            try:
                call(b"", timeout=WHY_S)
            except grpc.RpcError as error:
                return explained(told, error)
        return told

    def attend(self) -> Stream:
        """Opens an Attend stream."""
        return GrpcStream(self._attend, self._address, self._metadata())

    def store_kv(self, requests: Iterable[bytes], timeout_s: float) -> Iterator[bytes]:
        """Calls StoreKv."""
        return self._responses(self._store_kv(iter(requests), timeout=timeout_s, metadata=self._metadata()))

    def read_kv(self, request: bytes, timeout_s: float) -> Iterator[bytes]:
        """Calls ReadKv."""
        return self._responses(self._read_kv(request, timeout=timeout_s, metadata=self._metadata()))

    def _responses(self, call: Iterator[bytes]) -> Iterator[bytes]:
        try:
            yield from call
        except grpc.RpcError as error:
            raise translate(error, self._address) from None

    def close(self) -> None:
        """Closes the channel; calls under way end."""
        self._channel.close()


def translate(error: grpc.RpcError, address: str, waited_s: float = 0) -> AttndError:
    """Our exception for gRPC's, with the address where that helps.

    Args:
        error: what gRPC raised.
        address: of the server.
        waited_s: seconds that the call waited for a server that may not be there; 0: it did not wait.
    """
    told = from_rpc(error)
    if isinstance(told, Disconnected):
        return Disconnected(f"no connection to {address}: {told}")
    if waited_s and isinstance(told, DeadlineExceeded):
        return Disconnected(f"no answer from {address} within {waited_s:g} s")
    return told


def explained(told: AttndError, error: grpc.RpcError) -> AttndError:
    """`told`, with what a call that did not wait for the server was told."""
    return Disconnected(f"{told}: {error.details()}") if error.code() is grpc.StatusCode.UNAVAILABLE else told


class GrpcStream(Stream):
    """An Attend stream over gRPC. gRPC reads the requests on a thread of its own, from a queue."""

    def __init__(self, method: Any, address: str, metadata: Any = None) -> None:
        """Opens the stream."""
        self._address = address
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = method(iter(self._requests.get, None), metadata=metadata)
        self._overdue = False

    def send(self, request: bytes) -> None:
        """Sends a message."""
        self._requests.put(request)

    def receive(self, timeout_s: float) -> requests.AttendReply:
        """The next message from the server.

        Raises:
            DeadlineExceeded: none came in time. The stream is over then.
            Disconnected: the stream ended.
        """
        return requests.attend_reply(self._receive(timeout_s))

    def _receive(self, timeout_s: float) -> bytes:
        WATCHDOG.watch(self, time.monotonic() + timeout_s)
        try:
            return next(self._call)  # type: ignore[no-any-return]
        except grpc.RpcError as error:
            if self._overdue:
                raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
            raise translate(error, self._address) from None
        except StopIteration:
            raise Disconnected("the server ended the stream") from None
        finally:
            WATCHDOG.forget(self)

    def expire(self) -> None:
        """Ends a `receive` that waits too long. From the watchdog's thread."""
        self._overdue = True
        self._call.cancel()

    def close(self) -> None:
        """Half-closes, then cancels what is left."""
        self._requests.put(None)
        self._call.cancel()


class Watchdog:
    """Ends waits that are overdue.

    gRPC's blocking stream has no timeout for one message, and a thread between would cost each message a switch. So
    the waiting thread only writes its deadline down, and one thread of the process looks at the deadlines now and then.
    """

    PERIOD_S = 0.05

    def __init__(self) -> None:
        """The thread starts with the first wait."""
        self._deadlines: dict[GrpcStream, float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, stream: GrpcStream, deadline: float) -> None:
        """Expires `stream` at `deadline` (`time.monotonic`), unless it is forgotten before."""
        self._deadlines[stream] = deadline
        if self._thread is None or not self._thread.is_alive():
            with self._lock:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._run, name="attnd-watchdog", daemon=True)
                    self._thread.start()

    def forget(self, stream: GrpcStream) -> None:
        """The wait is over."""
        self._deadlines.pop(stream, None)

    def _run(self) -> None:
        while True:
            time.sleep(self.PERIOD_S)
            now = time.monotonic()
            for stream, deadline in list(self._deadlines.items()):
                if now > deadline:
                    self.forget(stream)
                    stream.expire()


WATCHDOG = Watchdog()

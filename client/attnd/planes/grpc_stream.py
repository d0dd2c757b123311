"""An Attend stream over gRPC, and the deadlines of its waits."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import grpc

from attnd.errors import DeadlineExceeded, Disconnected
from attnd.planes.grpc_errors import translate
from attnd.planes.transport import Stream
from attnd.protocol import requests


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

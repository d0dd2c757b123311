"""Streaming calls of gRPC's, each on a thread of its own, whose messages come out of a queue."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable
from typing import Any

import grpc

from attnd import forks
from attnd.errors import AttndError, DeadlineExceeded, Disconnected, ended
from attnd.planes import call_threads
from attnd.planes.grpc_errors import translate
from attnd.planes.transport import Stream
from attnd.protocol import requests
from attnd.threads import taken

Opening = Callable[[Callable[[bytes], bytes]], Any]
"""Begins a call of gRPC's, whose responses it has read by the function that it is given."""
# Seconds after which a message is asked for that no request is answered with: the server is going away.
UNASKED_S = 0.01


class StreamingCall:
    """A streaming call. Its owner reads the queue, and never touches gRPC's own objects.

    gRPC gives each message to `_came` on a thread of its own, which puts it into the queue: whoever waits there is
    woken at once. The call's thread behind it only asks gRPC for the next one.
    """

    def __init__(
        self,
        opening: Opening,
        address: str,
        sending: queue.SimpleQueue[bytes | None] | None = None,
        sent: queue.SimpleQueue[None] | None = None,
    ) -> None:
        """Begins it.

        Args:
            opening: of the call.
            address: of the server, for errors.
            sending: from which gRPC reads requests, up to None; None: it reads them elsewhere.
            sent: has an item for each request that has gone out and will be answered; None: messages come without.
        """
        self._address = address
        self._sending = sending
        self._sent = sent
        self._received: queue.SimpleQueue[bytes | AttndError | None] = queue.SimpleQueue()
        self._call: Any = None
        self._is_cancelled = False
        self._made = forks.generation
        call_threads.start(lambda: self._read(opening))

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message; None when the server has ended the stream in good order.

        Raises:
            DeadlineExceeded: none came in time. The stream is over then.
            AttndError: the stream broke.
        """
        try:
            received = taken(self._received, timeout_s)
        except queue.Empty:
            self.cancel()
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
        if received is None or isinstance(received, AttndError):
            self._received.put(received)  # for whoever asks again
            if received is not None:
                raise received
        return received

    def cancel(self) -> None:
        """Ends the call. Does not wait: gRPC's lock may be held, and then nobody else has to wait for it."""
        if self._made != forks.generation:
            return  # it is the parent's
        self._is_cancelled = True
        if self._sending is not None:
            self._sending.put(None)
        if self._call is not None:
            call_threads.start_last(self._cancel)

    def _cancel(self) -> None:
        call = self._call
        if call is not None:
            call.cancel()

    def _came(self, message: bytes) -> bytes:
        self._received.put(message)
        return message

    def _ask(self, call: Any) -> None:
        """Asks for one message after the other, until the end.

        To ask takes the interpreter for some time, and makes whoever has the last answer wait for it. So an answer is
        asked for once its request has gone out, while the server is at it.
        """
        sent = self._sent
        if sent is None:
            for _ in call:
                pass
            return
        while True:
            is_answer = _takes(sent, UNASKED_S)
            if next(call, None) is None:
                return
            if not is_answer:
                _takes(sent, 0)  # that of the request which it answers, if it answers one

    def _read(self, opening: Opening) -> None:
        """The thread: asks for messages until the end."""
        told: AttndError | None = None
        try:
            self._call = call = opening(self._came)
            if self._is_cancelled:
                call.cancel()
            self._ask(call)
        except grpc.RpcError as error:
            told = translate(error, self._address)
            # The error is the call itself. By its traceback it would hold itself, until whichever thread collects
            # garbage takes the lock of gRPC's that the end of a call takes.
            error.with_traceback(None)
        except ValueError:  # gRPC's word for a channel that was closed
            told = ended("the client was closed")
        self._call = None
        if self._sending is not None:
            self._sending.put(None)  # gRPC's thread that reads it may go
        self._received.put(told)


def _takes(items: queue.SimpleQueue[None], timeout_s: float) -> bool:
    """Whether an item came in time, and was taken."""
    try:
        taken(items, timeout_s)
    except queue.Empty:
        return False
    return True


class _Requests:
    """Requests as gRPC reads them, on a thread of its own: it asks for one when the one before has gone out."""

    def __init__(self, sending: queue.SimpleQueue[bytes | None], sent: queue.SimpleQueue[None]) -> None:
        """Those of `sending`, up to None; each is noted in `sent` when it has gone out."""
        self._sending, self._sent = sending, sent
        self._is_first = True

    def __iter__(self) -> _Requests:
        """Itself."""
        return self

    def __next__(self) -> bytes:
        """The next one."""
        if not self._is_first:
            self._sent.put(None)
        self._is_first = False
        request = self._sending.get()
        if request is None:
            raise StopIteration
        return request


class GrpcStream(Stream):
    """An Attend stream over gRPC. It ends when it is closed or gone."""

    def __init__(self, method: Callable[..., Any], address: str, metadata: Any = None) -> None:
        """Opens the stream.

        Args:
            method: gives gRPC's Attend method, when it is given what reads responses.
            address: of the server, for errors.
            metadata: of the call.
        """
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        sent: queue.SimpleQueue[None] = queue.SimpleQueue()
        read = _Requests(self._requests, sent)
        self._call = StreamingCall(lambda came: method(came)(read, metadata=metadata), address, self._requests, sent)
        self._end = weakref.finalize(self, self._call.cancel)
        self._end.atexit = False

    def send(self, request: bytes) -> None:
        """Sends a message."""
        self._requests.put(request)

    def receive(self, timeout_s: float) -> requests.AttendReply:
        """The next message from the server.

        Raises:
            DeadlineExceeded: none came in time. The stream is over then.
            Disconnected: the stream ended.
        """
        data = self._call.receive(timeout_s)
        if data is None:
            raise Disconnected("the server ended the stream")
        return requests.attend_reply(data)

    def close(self) -> None:
        """Half-closes, and cancels what is left."""
        self._end()

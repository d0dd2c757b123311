"""A small HTTP server for a port that asks nobody who they are: one thread, and bounds on all that a client may hold.

Whoever connects may be slow, silent, greedy or many. Each has a deadline for its request and one for taking its answer;
there are so many places, and a newcomer gets that of who has been there longest; and what is computed for all together
takes a small part of the processor's time.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from attnd_server.observe.http_messages import (
    MAX_REQUEST_BYTES,
    METHODS,
    HttpRefused,
    HttpRequest,
    answer_bytes,
    read_request,
)

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
# Seconds: from a connection, or the first byte of a later request, to its last; from the beginning of an answer to the
# last byte that the client takes; between two requests; for reading what comes behind a request that was refused.
REQUEST_S, ANSWER_S, IDLE_S, LINGER_S = 5.0, 10.0, 120.0, 1.0
# An answer is computed no sooner than so many times as long as the one before took: others have the time between.
PACE = 9
# Seconds to wait where the system has no descriptor for one more.
PAUSE_S = 0.05

Answer = Callable[[HttpRequest], bytes]
"""Computes the bytes of an answer."""


@dataclass(eq=False)
class _Connection:
    """One client.

    Attributes:
        socket: that does not block.
        host: where it is.
        since: when it came, or began to be idle, `time.monotonic`.
        deadline: until when it must have done what it is to do next, likewise.
        received: and not answered yet.
        request: that waits for its answer.
        to_send: the rest of an answer.
        is_last: whether the connection ends after that.
        is_idle: whether it has sent nothing since its last answer.
    """

    socket: socket.socket
    host: str
    since: float
    deadline: float
    received: bytearray = field(default_factory=bytearray)
    request: HttpRequest | None = None
    to_send: memoryview | None = None
    is_last: bool = False
    is_idle: bool = False


class HttpServer:
    """The server, on a thread of its own."""

    def __init__(self, listener: socket.socket, answer: Answer) -> None:
        """Owns `listener`, and answers what comes with `answer`, on the thread."""
        self._listener = listener
        self._answer = answer
        self._connections: dict[_Connection, None] = {}
        self._asking: deque[_Connection] = deque()
        self._next_at = 0.0  # when an answer may be computed, `time.monotonic`
        self._selector = selectors.DefaultSelector()
        self._is_closing = False
        self._wakes, self._waker = socket.socketpair()
        listener.setblocking(False)
        for each in (listener, self._wakes):
            self._selector.register(each, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it, and all connections."""
        self._is_closing = True
        self._waker.send(b"x")
        self._thread.join()
        for connection in list(self._connections):
            self._end(connection)
        self._selector.close()
        for each in (self._listener, self._wakes, self._waker):
            each.close()

    def _run(self) -> None:
        while not self._is_closing:
            try:
                self._serve()
            except Exception:  # the thread must live
                log.exception("clients of the metrics were not looked at")
                time.sleep(PAUSE_S)

    def _serve(self) -> None:
        """Waits for something, and does it."""
        for key, _ in self._selector.select(self._patience_s()):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(connection := key.data, _Connection) and connection in self._connections:
                if connection.to_send is not None:
                    self._send(connection)
                else:
                    self._read(connection)
        now = time.monotonic()
        if self._asking and now >= self._next_at:
            self._answer_one(self._asking.popleft())
        for connection in [each for each in self._connections if each.deadline <= now]:
            self._end(connection)

    def _patience_s(self) -> float | None:
        """Seconds until something is to be done in any case; None: there is nothing."""
        times = [each.deadline for each in self._connections]
        if self._asking:
            times.append(self._next_at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _accept(self) -> None:
        try:
            accepted, address = self._listener.accept()
        except BlockingIOError:
            return  # it has gone
        except OSError:  # too many open files, which pass
            if self._connections:
                self._end(next(iter(self._connections)))
            time.sleep(PAUSE_S)
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            self._end(self._least_entitled())
        accepted.setblocking(False)
        now = time.monotonic()
        connection = _Connection(accepted, str(address[0]), now, now + REQUEST_S)
        self._connections[connection] = None
        self._selector.register(accepted, selectors.EVENT_READ, connection)

    def _least_entitled(self) -> _Connection:
        """That which has been there longest, of the host that has most: Prometheus gets in whatever others do."""
        count = Counter(each.host for each in self._connections)
        most = max(count.values())
        return min((each for each in self._connections if count[each.host] == most), key=lambda each: each.since)

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(MAX_REQUEST_BYTES - len(connection.received))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end(connection)
        elif not connection.is_last:  # else nobody wants to know
            if connection.is_idle:
                connection.is_idle, connection.deadline = False, time.monotonic() + REQUEST_S
            connection.received += data
            self._look(connection)

    def _look(self, connection: _Connection) -> None:
        """Takes the next request, if it is whole."""
        try:
            found = read_request(connection.received)
        except HttpRefused as refusal:
            connection.is_last = True
            headers = [("Allow", ", ".join(METHODS))] if refusal.status.startswith("405") else []
            self._begin(connection, answer_bytes(refusal.status, headers, b""))
            return
        if found is not None:
            connection.request, num_bytes = found
            del connection.received[:num_bytes]
            connection.is_last = not connection.request.keeps_open
            connection.deadline = float("inf")  # it is not the client's turn
            self._selector.unregister(connection.socket)
            self._asking.append(connection)

    def _answer_one(self, connection: _Connection) -> None:
        assert connection.request is not None
        started = time.monotonic()
        try:
            answer = self._answer(connection.request)
        except Exception:
            log.exception("the metrics cannot be told")
            answer, connection.is_last = answer_bytes("500 Internal Server Error", [], b""), True
        now = time.monotonic()
        self._next_at = now + PACE * (now - started)
        connection.request = None
        self._selector.register(connection.socket, selectors.EVENT_WRITE, connection)
        self._begin(connection, answer)

    def _begin(self, connection: _Connection, answer: bytes) -> None:
        """Begins to send an answer."""
        connection.to_send, connection.deadline = memoryview(answer), time.monotonic() + ANSWER_S
        self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)
        self._send(connection)

    def _send(self, connection: _Connection) -> None:
        assert connection.to_send is not None
        try:
            connection.to_send = connection.to_send[connection.socket.send(connection.to_send) :]
        except BlockingIOError:
            return
        except OSError:
            self._end(connection)
            return
        if not connection.to_send:
            self._sent(connection)

    def _sent(self, connection: _Connection) -> None:
        """After an answer: the next request, or the end once the client has read the answer."""
        connection.to_send = None
        self._selector.modify(connection.socket, selectors.EVENT_READ, connection)
        now = time.monotonic()
        if connection.is_last:
            # To close where something was not read would take the answer back.
            connection.received.clear()
            connection.deadline = now + LINGER_S
            try:
                connection.socket.shutdown(socket.SHUT_WR)
            except OSError:
                self._end(connection)
            return
        connection.since, connection.is_idle = now, not connection.received
        connection.deadline = now + (IDLE_S if connection.is_idle else REQUEST_S)
        if connection.received:
            self._look(connection)

    def _end(self, connection: _Connection) -> None:
        """Closes a connection, once."""
        del self._connections[connection]
        if connection.request is None:
            self._selector.unregister(connection.socket)
        else:
            self._asking.remove(connection)
        connection.socket.close()

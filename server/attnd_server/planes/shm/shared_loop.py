"""One thread that answers the short requests of all shm planes, as soon as there are several.

With a thread for each client, as a lone one has, the interpreter's lock goes from hand to hand with every call: from
one thread 16 clients get twice the small calls (`docs/benchmarks.md`). So one waits for all sockets, takes a request
of each that has one, and runs the short calls itself, those together that can share a launch. Whatever may take long is
left to the thread of the client that sent it, and the other clients wait for none of it: a message that has not come as
a whole, a large step, a long call, any call while the device is busy, an answer that is not read.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
import time
from functools import partial

from attnd.errors import AttndError
from attnd_server.execution.executor import Executor
from attnd_server.execution.queue import Job
from attnd_server.execution.step import Call
from attnd_server.planes.shm.connection import AnswerSocket, Begun, ShmConnection

log = logging.getLogger(__name__)


class LoopClient:
    """A client's place at the loop, and the way back to its own thread.

    Attributes:
        line: its requests.
        answers: where their answers go.
        descriptor: of the socket of both.
        left: what the loop leaves to its thread: what it began, and is to be finished and sent; None: to read on.
    """

    def __init__(self, line: ShmConnection, answers: AnswerSocket, descriptor: int) -> None:
        """Nothing is left yet."""
        self.line = line
        self.answers = answers
        self.descriptor = descriptor
        self.left: queue.SimpleQueue[Begun | None] = queue.SimpleQueue()


class SharedLoop:
    """The thread, and the clients that it serves."""

    def __init__(self, executor: Executor) -> None:
        """Sleeps until there are two clients."""
        self._executor = executor
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._lock = threading.Lock()
        self._num_clients = 0
        self._is_closed = False
        self._given: list[LoopClient] = []
        self._seats: dict[int, LoopClient] = {}  # that the loop reads, by descriptor
        self._thread = threading.Thread(target=self._run, name="shm-loop", daemon=True)
        self._thread.start()

    @property
    def is_shared(self) -> bool:
        """Whether there are several clients. A lone one is better off with its own thread: it saves a system call."""
        return self._num_clients > 1

    def enter(self) -> None:
        """There is one client more. On its thread, which serves it as long as it is alone."""
        with self._lock:
            self._num_clients += 1

    def leave(self) -> None:
        """There is one fewer, and if another is alone now, its own thread goes on with it."""
        with self._lock:
            self._num_clients -= 1
            self._ring()

    def serve(self, seat: LoopClient) -> Begun | None:
        """Lets the loop answer a client's short requests, until there is one for the client's own thread.

        Returns:
            What was begun, and is to be finished and sent; None: read the next request, and wait for it if need be.
        """
        with self._lock:
            if self._is_closed:
                return None
            self._given.append(seat)
            self._ring()
        return seat.left.get()

    def close(self) -> None:
        """Gives all clients back to their threads. Again does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self._ring()
            self._is_closed = True
        self._thread.join()
        self._epoll.close()
        os.close(self._bell)

    def _ring(self) -> None:
        """Wakes the thread. With the lock."""
        if not self._is_closed:
            os.eventfd_write(self._bell, 1)

    def _run(self) -> None:
        self._executor.prepare_thread()
        unread: dict[LoopClient, None] = {}  # of which something was received that is not answered yet
        while not self._is_closed:
            ready = unread
            for descriptor, _ in self._epoll.poll(0 if unread else None):
                if descriptor == self._bell:
                    ready |= dict.fromkeys(self._take_seats())
                elif descriptor in self._seats:
                    ready[self._seats[descriptor]] = None
            unread = self._serve(ready)
        self._take_seats()
        for seat in list(self._seats.values()):
            self._leave(seat, None)

    def _take_seats(self) -> list[LoopClient]:
        """Seats those that were given, and returns which of them have sent more; a lone client gets its seat back."""
        with self._lock:
            given, self._given = self._given, []
            try:
                os.eventfd_read(self._bell)
            except BlockingIOError:
                pass  # nobody has rung: it is the end
        for seat in given:
            try:
                self._epoll.register(seat.descriptor, select.EPOLLIN)
            except OSError:  # no memory, or too many watches: its own thread can do without
                seat.left.put(None)
            else:
                self._seats[seat.descriptor] = seat
        if not self.is_shared:
            for seat in list(self._seats.values()):
                self._leave(seat, None)
        return [seat for seat in given if self._has(seat) and seat.line.has_unread]

    def _serve(self, ready: dict[LoopClient, None]) -> dict[LoopClient, None]:
        """Takes a request of each, and answers what can be answered now. Returns who has sent more."""
        try:
            calls = [(seat, begun) for seat in ready if (begun := self._begin(seat)) is not None]
            if len(calls) == 1:
                self._run_alone(*calls[0])
            elif calls:
                self._run_together(calls)
        except Exception:  # the thread must live: it answers everybody
            log.exception("the shm planes that had sent something are ended")
            for seat in ready:
                seat.answers.end()
        return {seat: None for seat in ready if self._has(seat) and seat.line.has_unread}

    def _begin(self, seat: LoopClient) -> Call | None:
        """Reads and checks a client's next request; a short call is to be run yet, all else was answered or left."""
        if not self._has(seat):
            return None
        request = None
        try:
            request = seat.line.read_now()
        except BlockingIOError:
            if not seat.line.has_unread:
                return None
        except (AttndError, OSError):
            pass  # its own thread learns it too
        if request is None:
            self._leave(seat, None)
            return None
        begun = seat.line.begin(request)
        if isinstance(begun, Call) and begun.step.is_small:
            return begun
        if isinstance(begun, bytes):
            self._answer(seat, begun)
        else:
            self._leave(seat, begun)
        return None

    def _run_alone(self, seat: LoopClient, call: Call) -> None:
        try:
            answer = self._executor.run_now(call)
        except Exception as error:
            answer = seat.line.told(error)
        if answer is None:
            self._leave(seat, call)
        else:
            self._answer(seat, answer)

    def _run_together(self, calls: list[tuple[LoopClient, Call]]) -> None:
        now = time.perf_counter()
        jobs = {Job(call, partial(self._settled, seat), float("inf"), now): (seat, call) for seat, call in calls}
        for job in self._executor.settle_now(list(jobs)):
            self._leave(*jobs[job])

    def _settled(self, seat: LoopClient, answer: bytes | None, error: BaseException | None) -> None:
        if isinstance(error, Exception):
            answer = seat.line.told(error)
        self._answer(seat, answer or b"")

    def _answer(self, seat: LoopClient, answer: bytes) -> None:
        try:
            if not seat.answers.send_now(answer):
                self._leave(seat, b"")
        except OSError:
            self._leave(seat, None)  # its own thread learns it too

    def _has(self, seat: LoopClient) -> bool:
        return self._seats.get(seat.descriptor) is seat

    def _leave(self, seat: LoopClient, begun: Begun | None) -> None:
        """Gives a client back to its own thread."""
        del self._seats[seat.descriptor]
        self._epoll.unregister(seat.descriptor)
        seat.left.put(begun)

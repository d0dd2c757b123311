"""Which clients of shm planes the shared loop serves, and how they pass between it and their own threads."""

from __future__ import annotations

import os
import queue
import select
import threading

from attnd.protocol.shm import framing
from attnd_server.execution.joined.repeat import Repeat
from attnd_server.planes.answer_socket import AnswerSocket
from attnd_server.planes.shm.connection import Begun, ShmConnection
from attnd_server.service.repeated_lane import RepeatedLane


class LoopClient:
    """A client that the loop may serve, and the way back to its own thread.

    Attributes:
        connection: its requests.
        answers: where their answers go.
        descriptor: of the socket of both.
        left: what the loop leaves to its thread: what it began, and is to be finished and sent; None: to read on.
        lane: of the last call that the loop has read.
        repeated: what its repeats are, once it was answered; None: they are to be looked at.
    """

    def __init__(self, connection: ShmConnection, answers: AnswerSocket, descriptor: int) -> None:
        """Nothing is left yet."""
        self.connection = connection
        self.answers = answers
        self.descriptor = descriptor
        self.left: queue.SimpleQueue[Begun | None] = queue.SimpleQueue()
        self.lane = 0
        self.repeated: RepeatedLane | None = None

    def repeat_of(self, request: framing.Request) -> Repeat | None:
        """What a request repeats; None: it is to be looked at."""
        if self.repeated is None or request.message:
            return None
        return self.repeated.repeat(request.layer, request.step_id, request.lane)


class LoopClients:
    """The clients of the loop.

    Their threads call `enter`, `serve` and `leave`; the loop's thread calls `wait`, `has`, `has_unread` and
    `give_back`.

    Attributes:
        is_closed: whether the loop is to end.
    """

    def __init__(self) -> None:
        """None yet."""
        self.is_closed = False
        self._epoll = select.epoll()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # wakes the loop
        self._epoll.register(self._event, select.EPOLLIN)
        self._lock = threading.Lock()
        self._num_clients = 0
        self._given: list[LoopClient] = []
        self._read: dict[int, LoopClient] = {}  # that the loop reads, by descriptor

    @property
    def are_several(self) -> bool:
        """Whether there are several. A lone one is better off with its own thread: it saves a system call."""
        return self._num_clients > 1

    def enter(self) -> None:
        """There is one client more. On its thread, which serves it as long as it is alone."""
        with self._lock:
            self._num_clients += 1

    def leave(self) -> None:
        """There is one fewer, and if another is alone now, its own thread goes on with it."""
        with self._lock:
            self._num_clients -= 1
            self._wake()

    def serve(self, client: LoopClient) -> Begun | None:
        """Lets the loop answer a client's short requests, until there is one for the client's own thread.

        Returns:
            What was begun, and is to be finished and sent; None: read the next request, and wait for it if need be.
        """
        with self._lock:
            if self.is_closed:
                return None
            self._given.append(client)
            self._wake()
        return client.left.get()

    def wait(self, ready: dict[LoopClient, None]) -> dict[LoopClient, None]:
        """Waits until a client has sent something, unless some are `ready`. Returns these and those that have."""
        for descriptor, _ in self._epoll.poll(0 if ready else None):
            if descriptor == self._event:
                ready |= dict.fromkeys(self._take())
            elif descriptor in self._read:
                ready[self._read[descriptor]] = None
        return ready

    def has(self, client: LoopClient) -> bool:
        """Whether the loop reads this client."""
        return self._read.get(client.descriptor) is client

    def has_unread(self, client: LoopClient) -> bool:
        """Whether the loop reads this client, and has received something of it that is not answered yet."""
        return self.has(client) and client.connection.has_unread

    def give_back(self, client: LoopClient, begun: Begun | None) -> None:
        """Gives a client back to its own thread."""
        client.repeated = None
        del self._read[client.descriptor]
        self._epoll.unregister(client.descriptor)
        client.left.put(begun)

    def give_back_all(self) -> None:
        """Gives all back, those that have just come too."""
        self._take()
        for client in list(self._read.values()):
            self.give_back(client, None)

    def end(self) -> bool:
        """Tells the loop to end, and takes no more clients. False: it was told before."""
        with self._lock:
            if self.is_closed:
                return False
            self._wake()
            self.is_closed = True
            return True

    def close(self) -> None:
        """Once the loop has ended."""
        self._epoll.close()
        os.close(self._event)

    def _wake(self) -> None:
        """Wakes the loop. With the lock."""
        if not self.is_closed:
            os.eventfd_write(self._event, 1)

    def _take(self) -> list[LoopClient]:
        """Takes those that were given, and returns which of them have sent more; a lone client is given back."""
        with self._lock:
            given, self._given = self._given, []
            try:
                os.eventfd_read(self._event)
            except BlockingIOError:
                pass  # nobody has woken the loop: it is the end
        for client in given:
            try:
                self._epoll.register(client.descriptor, select.EPOLLIN)
            except OSError:  # no memory, or too many watches: its own thread can do without
                client.left.put(None)
            else:
                self._read[client.descriptor] = client
        if not self.are_several:
            for client in list(self._read.values()):
                self.give_back(client, None)
        return [client for client in given if self.has_unread(client)]

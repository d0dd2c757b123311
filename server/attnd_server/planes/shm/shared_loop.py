"""One thread that answers the short requests of all shm planes, as soon as there are several.

With a thread for each client, as a lone one has, the interpreter's lock goes from hand to hand with every call: from
one thread 16 clients get twice the small calls (`docs/benchmarks.md`). So one waits for all sockets, takes a request
of each that has one, and runs the short calls itself, those together that can share a launch. Whatever may take long is
left to the thread of the client that sent it, and the other clients wait for none of it: a message that has not come as
a whole, a large step, a long call, any call while the device is busy, an answer that is not read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from attnd.errors import AttndError
from attnd.protocol.shm import framing
from attnd_server.execution.executor import Executor
from attnd_server.execution.joined.repeat import Repeat
from attnd_server.execution.step import Call
from attnd_server.execution.work import Job
from attnd_server.planes.shm.loop_clients import LoopClient, LoopClients

log = logging.getLogger(__name__)


class _Repeating(NamedTuple):
    """A request that repeats a call."""

    client: LoopClient
    request: framing.Request
    repeat: Repeat


class SharedLoop:
    """The thread.

    Attributes:
        clients: that it serves.
    """

    def __init__(self, executor: Executor) -> None:
        """Sleeps until there are two clients."""
        self.clients = LoopClients()
        self._executor = executor
        self._thread = threading.Thread(target=self._run, name="shm-loop", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives all clients back to their threads. Again does nothing."""
        if self.clients.end():
            self._thread.join()
            self.clients.close()

    def _run(self) -> None:
        self._executor.prepare_thread()
        unread: dict[LoopClient, None] = {}  # of which something was received that is not answered yet
        while not self.clients.is_closed:
            unread = self._serve(self.clients.wait(unread))
        self.clients.give_back_all()

    def _serve(self, ready: dict[LoopClient, None]) -> dict[LoopClient, None]:
        """Takes a request of each, and answers what can be answered now. Returns who has sent more."""
        try:
            calls, repeats = self._read(ready)
            if len(repeats) < 2 or not self._run_repeats(repeats):
                begun = ((each.client, self._begin(each.client, each.request)) for each in repeats)
                calls += [(client, call) for client, call in begun if call is not None]
            if len(calls) == 1:
                self._run_alone(*calls[0])
            elif calls:
                self._run_together(calls)
        except Exception:  # the thread must live: it answers everybody
            log.exception("the shm planes that had sent something are ended")
            for client in ready:
                client.answers.end()
        return {client: None for client in ready if self.clients.has_unread(client)}

    def _read(self, ready: Iterable[LoopClient]) -> tuple[list[tuple[LoopClient, Call]], list[_Repeating]]:
        """Reads a request of each: short calls, which are to be run yet, and those that only repeat one."""
        calls: list[tuple[LoopClient, Call]] = []
        repeats: list[_Repeating] = []
        for client in ready:
            request = self._next_request(client)
            if request is None:
                continue
            repeat = client.repeat_of(request)
            if repeat is not None:
                repeats.append(_Repeating(client, request, repeat))
            elif (call := self._begin(client, request)) is not None:
                calls.append((client, call))
        return calls, repeats

    def _next_request(self, client: LoopClient) -> framing.Request | None:
        if not self.clients.has(client):
            return None
        request = None
        try:
            request = client.connection.read_now()
        except BlockingIOError:
            if not client.connection.has_unread:
                return None
        except (AttndError, OSError):
            pass  # its own thread learns it too
        if request is None:
            self.clients.give_back(client, None)
        return request

    def _begin(self, client: LoopClient, request: framing.Request) -> Call | None:
        """Checks a client's request; a short call is to be run yet, all else was answered or left."""
        client.repeated, client.lane = None, request.lane
        client.answers.expect()
        begun = client.connection.begin(request)
        if isinstance(begun, Call) and begun.is_small:
            return begun
        if isinstance(begun, bytes):
            self._answer(client, begun)
        else:
            self.clients.give_back(client, begun)
        return None

    def _run_repeats(self, repeats: list[_Repeating]) -> bool:
        """Runs calls that repeat others, and answers them. False: each is to be looked at by itself."""
        result = self._executor.repeat_now([each.repeat for each in repeats])
        if result is None:
            return False
        for client, request, _ in repeats:
            layer, step_id = request.layer, request.step_id
            times = (0, result.copies.in_us, result.kernel_us, result.copies.out_us)
            client.answers.expect()
            if client.repeated is not None:
                client.repeated.answered(layer)
            self._answer(client, framing.repeated_reply(layer, step_id, *times))
        return True

    def _run_alone(self, client: LoopClient, call: Call) -> None:
        try:
            answer = self._executor.run_now(call)
        except Exception as error:
            self._settled(client, None, error)
            return
        if answer is None:
            self.clients.give_back(client, call)
        else:
            self._settled(client, answer, None)

    def _run_together(self, calls: list[tuple[LoopClient, Call]]) -> None:
        now = time.perf_counter()
        jobs = {Job(call, partial(self._settled, client), float("inf"), now): (client, call) for client, call in calls}
        for job in self._executor.settle_now(list(jobs)):
            self.clients.give_back(*jobs[job])

    def _settled(self, client: LoopClient, answer: bytes | None, error: BaseException | None) -> None:
        if isinstance(error, Exception):
            answer = client.connection.told(error)
        else:
            client.repeated = client.connection.repeated_lane(client.lane)  # known from now on
        self._answer(client, answer or b"")

    def _answer(self, client: LoopClient, answer: bytes) -> None:
        try:
            if not client.answers.send_now(answer):
                self.clients.give_back(client, b"")
        except OSError:
            self.clients.give_back(client, None)  # its own thread learns it too

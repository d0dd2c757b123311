"""One client of a shm plane: its requests as they come from its socket, and their answers."""

from __future__ import annotations

import queue
import select
import socket

from attnd.protocol.shm import framing
from attnd.v1 import attention_pb2
from attnd_server.execution.step import Call
from attnd_server.execution.work import Cancelled, Work
from attnd_server.service.repeated_lane import RepeatedLane
from attnd_server.service.service import AttentionService, error_response
from attnd_server.service.session import AttendSession, BigStep

Begun = bytes | Work | BigStep
"""What is left to do for a request that was read and checked: send the answer, run a call, check a step."""


class ShmConnection:
    """Reads and answers one request after the other. One thread at a time.

    Where several calls are under way, their tensors lie in the region and their requests in the socket, so that the
    next one is found without a sleep. To read ahead would hide its check too, a few microseconds, but then no call
    could run on the thread that reads, which saves small ones two switches.
    """

    def __init__(self, service: AttentionService, session: AttendSession, connection: socket.socket) -> None:
        """Of a client whose steps and calls are `session`'s, and whose requests come from `connection`."""
        self._service = service
        self._session = session
        self._socket = connection
        self._requests = framing.Requests(connection, service.config.max_header_bytes)

    @property
    def has_unread(self) -> bool:
        """Whether something was received and not read yet: requests, or a part of one."""
        return self._requests.has_unread

    def read(self) -> framing.Request | None:
        """Waits for the next request; None: the client has gone."""
        return self._requests.receive()

    def read_now(self) -> framing.Request | None:
        """As `read`, but raises BlockingIOError if the next request has not come as a whole."""
        return self._requests.receive(socket.MSG_DONTWAIT)

    def repeated_lane(self, lane: int) -> RepeatedLane | None:
        """What requests of a lane without a message may be; see `AttendSession.repeated_lane`."""
        return self._session.repeated_lane(lane)

    def begin(self, request: framing.Request) -> Begun:
        """Checks a request. A wrong one has its answer already."""
        try:
            if request.message:
                begun = self._session.request_in_parts(request.message, request.lane)
            else:
                begun = self._session.repeat(request.layer, request.step_id, request.lane)
            return framing.reply_bytes(begun) if isinstance(begun, bytes) else begun
        except Exception as error:
            return self.told(error)

    def finish(self, begun: Begun) -> bytes:
        """Does what is left of a request, however long that takes. Returns the answer, for the socket."""
        if isinstance(begun, bytes):
            return begun
        try:
            # A step is a message yet, a call is already what goes to the socket.
            return framing.reply_bytes(begun.answer()) if isinstance(begun, BigStep) else self._run(begun)
        except Cancelled:
            return b""  # nobody reads it, and the socket's end is what comes next
        except Exception as error:
            return self.told(error)

    def told(self, error: Exception) -> bytes:
        """The answer that tells of an error."""
        return framing.reply_bytes(error_response(attention_pb2.AttendResponse, self._session.told(error)))

    def _run(self, work: Work) -> bytes:
        executor, timeout_s = self._service.executor, None
        if isinstance(work, Call):
            result = executor.run_now(work) if work.is_small else None
            if result is not None:
                return result
            timeout_s = work.step.call_timeout_s
        results: queue.SimpleQueue[tuple[bytes | None, BaseException | None]] = queue.SimpleQueue()
        executor.submit(work, lambda *settled: results.put(settled), timeout_s, is_wanted=self._is_wanted)
        result, error = results.get()
        try:
            if error is not None:
                raise error
            return result or b""
        finally:
            del error  # its traceback has this frame, and so the call with its region, until garbage is collected

    def _is_wanted(self) -> bool:
        """Whether the client's end of the socket is open, whatever it has sent. From any thread.

        Raises:
            Unauthenticated: its token has gone.
        """
        if self._session.is_wanted is not None:
            self._session.is_wanted()
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return not poll.poll(0)

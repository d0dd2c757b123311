"""The server's end of cuda planes: a step is a message of the socket, and is answered when its last layer is done.

One thread checks and enqueues steps as they come, the next while one runs, so that the worker never waits for that.
Another sleeps until the stream is done with a step, and answers it. Any error ends the plane, because the two sides'
words may not agree afterwards.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable

from attnd.protocol.shm import framing
from attnd.v1 import attention_pb2
from attnd_server.planes.answer_socket import AnswerSocket
from attnd_server.planes.cuda.planes import CudaPlanes
from attnd_server.planes.cuda.session import CudaSession, StepUnderWay
from attnd_server.planes.open_planes import Plane
from attnd_server.planes.socket_ends import end
from attnd_server.service.service import AttentionService, error_response

# Steps of a session that are enqueued at once: one that runs, and one that runs after it. Graphs have room for two.
MAX_STEPS_UNDER_WAY = 2


def serve_cuda(
    service: AttentionService,
    planes: CudaPlanes,
    plane: Plane,
    connection: socket.socket,
    let_in: Callable[[list[int]], None],
    answers: AnswerSocket,
) -> None:
    """Serves a cuda plane until its socket ends or a step fails.

    Args:
        service: what it serves.
        planes: that give it what it computes on.
        plane: that was claimed.
        connection: its socket.
        let_in: sends the descriptors of its memory, and closes them.
        answers: the sending side of the socket.
    """
    service.executor.prepare_thread()
    channel = planes.open(plane.worker_gpu)
    try:
        let_in(channel.descriptors())
        session = CudaSession(service, plane.principal, channel, connection)
        _serve(service, session, connection, answers)
    finally:
        planes.close(channel)


def _serve(
    service: AttentionService, session: CudaSession, connection: socket.socket, socket_answers: AnswerSocket
) -> None:
    """Begins steps as they come, while a thread waits for those that were begun and answers them."""
    answers = _Answers(service, session, connection, socket_answers)
    try:
        requests = framing.Requests(connection, service.config.max_header_bytes)
        while (request := requests.receive()) is not None and answers.begin(request.message):
            pass
    finally:
        answers.close()
        session.close()


class _Answers:
    """Answers steps in order, on a thread of its own, until one fails."""

    def __init__(
        self,
        service: AttentionService,
        session: CudaSession,
        connection: socket.socket,
        answers: AnswerSocket,
    ) -> None:
        """Starts the thread."""
        self._service, self._session, self._connection, self._answers = service, session, connection, answers
        self._under_way: queue.SimpleQueue[StepUnderWay | Exception | None] = queue.SimpleQueue()
        self._places = threading.Semaphore(MAX_STEPS_UNDER_WAY)
        self._thread = threading.Thread(target=self._run, name="cuda-plane-answers", daemon=True)
        self._thread.start()

    def begin(self, data: bytes) -> bool:
        """Begins the step of a message, once not too many are under way. False: there was an error, the last answer."""
        self._answers.expect()
        self._places.acquire()
        try:
            self._under_way.put(self._session.begin(data))
        except Exception as error:
            self._under_way.put(error)
            return False
        return True

    def close(self) -> None:
        """Waits until all that was begun is over."""
        self._under_way.put(None)
        self._thread.join()

    def _run(self) -> None:
        self._service.executor.prepare_thread()
        failed = False
        while (under_way := self._under_way.get()) is not None:
            if failed:
                if not isinstance(under_way, Exception):
                    self._session.drop(under_way)
            else:
                failed = not self._answered(under_way)
            del under_way  # holds the step's tensors
            self._places.release()

    def _answered(self, under_way: StepUnderWay | Exception) -> bool:
        """Answers a step; False: with an error, and the plane has ended."""
        error = under_way if isinstance(under_way, Exception) else None
        try:
            if not isinstance(under_way, Exception):
                self._answers.send(framing.reply_bytes(self._session.finish(under_way)))
                return True
        except Exception as failure:
            error = failure
        assert error is not None
        try:
            self._answers.send(
                framing.reply_bytes(error_response(attention_pb2.AttendResponse, self._session.told(error)))
            )
        except OSError:
            pass  # the worker has gone
        end(self._connection)
        return False

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
from typing import NamedTuple

from attnd.protocol.shm import framing
from attnd.v1 import attention_pb2
from attnd_server.planes.answer_socket import AnswerSocket
from attnd_server.planes.cuda.channel import Channel
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
    assert plane.worker is not None
    channel = planes.open(plane.worker)
    try:
        let_in(channel.descriptors())
        _serve(service, plane.principal, channel, connection, answers)
    finally:
        planes.close(channel)


def _serve(
    service: AttentionService, principal: str, channel: Channel, connection: socket.socket, socket_answers: AnswerSocket
) -> None:
    """Begins steps as they come, while a thread waits for those that were begun and answers them."""
    answers = _Answers(service, connection, socket_answers)
    answers.session = session = CudaSession(service, principal, channel, connection, answers.tell)
    socket_answers.is_under_way = lambda: session.is_under_way
    answers.start()
    try:
        requests = framing.Requests(connection, service.config.max_header_bytes)
        while (request := requests.receive()) is not None and answers.begin(request.message):
            pass
    finally:
        answers.close()
        session.close()


class _News(NamedTuple):
    """What answers nothing, and has no place among the steps under way.

    Attributes:
        news: to be sent; or why the plane ends.
    """

    news: bytes | Exception


class _Answers:
    """Answers steps in order, on a thread of its own, until one fails."""

    session: CudaSession

    def __init__(self, service: AttentionService, connection: socket.socket, answers: AnswerSocket) -> None:
        """Starts nothing; the session comes before `start`."""
        self._service, self._connection, self._answers = service, connection, answers
        self._under_way: queue.SimpleQueue[StepUnderWay | bytes | Exception | _News | None] = queue.SimpleQueue()
        self._places = threading.Semaphore(MAX_STEPS_UNDER_WAY)
        self._thread = threading.Thread(target=self._run, name="cuda-plane-answers", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def begin(self, data: bytes) -> bool:
        """Begins the step of a message, once not too many are under way. False: there was an error, the last answer."""
        self._answers.expect()
        self._places.acquire()
        try:
            self._under_way.put(self.session.begin(data))
        except Exception as error:
            self._under_way.put(error)
            return False
        return True

    def tell(self, news: attention_pb2.AttendResponse | Exception) -> None:
        """Sends what answers nothing, after what was begun; an exception ends the plane. Any thread; does not wait."""
        self._under_way.put(_News(news if isinstance(news, Exception) else news.SerializeToString()))

    def close(self) -> None:
        """Waits until all that was begun is over."""
        self._under_way.put(None)
        self._thread.join()

    def _run(self) -> None:
        self._service.executor.prepare_thread()
        failed = False
        while (taken := self._under_way.get()) is not None:
            under_way = taken.news if isinstance(taken, _News) else taken
            if isinstance(taken, _News) and not failed:
                self._answers.expect()
            if failed:
                if isinstance(under_way, StepUnderWay):
                    self.session.drop(under_way)
            else:
                failed = not self._answered(under_way)
            if not isinstance(taken, _News):
                self._places.release()
            del taken, under_way  # hold the step's tensors

    def _answered(self, under_way: StepUnderWay | bytes | Exception) -> bool:
        """Answers a step; False: with an error, and the plane has ended."""
        error = under_way if isinstance(under_way, Exception) else None
        try:
            if not isinstance(under_way, Exception):
                answer = under_way if isinstance(under_way, bytes) else self.session.finish(under_way)
                self._answers.send(framing.reply_bytes(answer))
                return True
        except Exception as failure:
            error = failure
        assert error is not None
        try:
            self._answers.send(
                framing.reply_bytes(error_response(attention_pb2.AttendResponse, self.session.told(error)))
            )
        except OSError:
            pass  # the worker has gone
        end(self._connection)
        return False

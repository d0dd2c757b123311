"""The worker's end of a cuda plane: memory of the server's GPU, mapped here, and what waits for the server's streams.

Tensors are copied to and fro in the order of the worker's own stream; nothing here waits for it. A thread reads the
server's answers from the socket, and lets the worker's stream go on if the server goes away or fails a step.
"""

from __future__ import annotations

import queue
import select
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from attnd import forks
from attnd.errors import AttndError, DeadlineExceeded, Disconnected, ServerFault, ended, from_message
from attnd.planes.cuda import forked
from attnd.planes.cuda.ending import end_socket
from attnd.planes.cuda.layers import PlaneLayers
from attnd.protocol import requests
from attnd.protocol.cuda.driver import Device
from attnd.protocol.cuda.gate_flags import GateFlags
from attnd.protocol.cuda.host_flags import HostFlags, HostWords
from attnd.protocol.cuda.memory import DeviceMemory
from attnd.protocol.shm import framing
from attnd.threads import start_thread, taken
from attnd.v1 import attention_pb2


class Answer(NamedTuple):
    """What the server said of a step.

    Attributes:
        reply: if the step is done.
        error: if it failed.
    """

    reply: attention_pb2.CudaStepReply | None
    error: AttndError | None


class CudaPlane(PlaneLayers):
    """One plane. One thread at a time.

    Attributes:
        going_away: why the server takes no more steps; "" while it does.
    """

    # Seconds between two looks at the clock and, once nothing is to wait any more, between two tries to let go.
    PERIOD_S, STOP_PERIOD_S = 0.25, 0.001
    # Seconds for reading what a server said before it hung up.
    LAST_WORDS_S = 1.0

    def __init__(
        self,
        connection: socket.socket,
        gpu: Device,
        memory: list[DeviceMemory],
        flags: HostFlags | GateFlags,
        path: str,
        words: HostWords | None = None,
    ) -> None:
        """Owns all of it; starts the thread.

        Args:
            connection: to the server.
            gpu: the worker's.
            memory: the region, and that of results if there is one.
            flags: the worker's side of the hand-overs.
            path: of the server's socket.
            words: of the host, where a resident step is told too; None: there are no resident steps.
        """
        super().__init__(gpu, memory, flags, words)
        self.going_away = ""
        self._connection = connection
        self._path = path
        self._replies = framing.Replies(connection)
        # By a step's id, until when it must be answered (`time.monotonic`); then what was answered.
        self._deadlines: dict[int, float] = {}
        self._answers: dict[int, Answer] = {}
        self._told: dict[str, Any] = {}  # by its kind, what came last that answers no step
        # Queues and flags, not conditions, which an interrupt of the caller leaves locked for the thread.
        self._failures: list[AttndError] = []
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()  # of answers and failures, for who waits
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_closed = False
        forked.PLANES.add(self)
        start_thread(self._read, "attnd-cuda-plane")

    def send(self, step: attention_pb2.CudaStep, timeout_s: float) -> None:
        """Sends a step, which the server must have answered after `timeout_s`. Does not wait.

        Raises:
            AttndError: the plane failed before.
        """
        if self.failure is not None:
            raise self.failure
        self._deadlines[step.step.id] = time.monotonic() + timeout_s
        self._send(attention_pb2.AttendRequest(cuda_step=step))

    def ask(self, request: attention_pb2.AttendRequest, timeout_s: float) -> Any:
        """Sends what is no step, and waits for the message that answers it.

        Raises:
            AttndError: the plane failed, or the answer did not come in time.
        """
        kind = request.WhichOneof("message")
        assert kind is not None
        self._told.pop(kind, None)
        self._send(request)
        return self.told(kind, timeout_s)

    def told(self, kind: str, timeout_s: float) -> Any:
        """The last message of a kind that is no answer to a step, once it is there. Raises as `ask`."""
        self._waited(lambda: kind in self._told or self.failure is not None, timeout_s)
        if kind in self._told:
            return self._told.pop(kind)
        raise self.failure or DeadlineExceeded(f"the server sent no {kind} within {timeout_s:g} s")

    def await_failure(self, timeout_s: float) -> None:
        """Waits until the plane has failed, as the server lets it know. Raises DeadlineExceeded: it does not."""
        if not self._waited(lambda: self.failure is not None, timeout_s):
            raise DeadlineExceeded(f"a resident step was not done, and nobody said why in {timeout_s:g} s")

    def _send(self, request: attention_pb2.AttendRequest) -> None:
        try:
            self._connection.sendall(framing.request_bytes(request.SerializeToString()))
        except OSError as error:
            self._waited(lambda: self.failure is not None, self.LAST_WORDS_S)  # why the server hung up
            self._fail(Disconnected(f"no connection to the server at {self._path}: {error}"))
            raise self._failures[0] from None

    def _waited(self, is_so: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until something is so of what the thread reads; False: it is not within so many seconds."""
        deadline = time.monotonic() + timeout_s
        while not is_so():
            try:
                taken(self._news, max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return is_so()
        return True

    def answer(self, step_id: int, wait: bool) -> Answer | None:
        """What the server said of a step that was sent, once; None if nothing yet, and it is not to be waited for.

        A failure of the plane is that of all its steps.
        """
        while step_id not in self._answers and self.failure is None:
            if not wait:
                return None
            taken(self._news)
        return self._answers.pop(step_id, Answer(None, self.failure))

    @property
    def failure(self) -> AttndError | None:
        """Why the plane is of no use any more; None: it is."""
        return self._failures[0] if self._failures else None

    def disown(self) -> None:
        """For a child that was forked: the plane is the parent's. Nothing of CUDA's may be touched, not even let go."""
        forks.keep(self)
        self._is_closed = True
        self._failures.insert(0, ended("the session was made in another process; connect again after the fork"))

    def close(self) -> None:
        """Ends the plane. Waits until the worker's GPU is idle; what waits for the server there is let go first."""
        if self._is_closed:
            return
        self._fail(Disconnected("the session was closed"))
        try:
            self.gpu.synchronize()
        finally:
            self._is_closed = True
            end_socket(self._connection)
            taken(self._ended)
            self._connection.close()
            with self.gpu.current():
                self.free()

    def _fail(self, failure: AttndError) -> None:
        """From any thread: the first failure is the plane's; its thread lets go of what waits."""
        self._failures.append(failure)
        self._flags.stop()
        self._tell()

    def _tell(self) -> None:
        """Wakes who waits, after what is looked at then has changed. Once is enough, however often it did."""
        if self._news.empty():
            self._news.put(None)

    def _read(self) -> None:
        """The thread: answers, until the plane fails; then lets go of whatever waits, until it is closed."""
        try:
            self._read_answers()
        except AttndError as error:
            self._fail(error)
        except OSError as error:
            self._fail(Disconnected(f"no connection to the server at {self._path}: {error}"))
        except Exception as error:
            self._fail(ServerFault(f"the server's answer cannot be read: {error}"))
        while not self._is_closed:
            time.sleep(self.STOP_PERIOD_S)
            self._flags.stop()
        self._ended.put(None)

    def _read_answers(self) -> None:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        while self.failure is None:
            if poll.poll(self.PERIOD_S * 1e3):
                reply = self._replies.receive()
                if reply is None:
                    raise Disconnected(f"no connection to the server at {self._path}: end of file")
                self._take(requests.attend_reply(reply.message))
            late = [step_id for step_id, deadline in list(self._deadlines.items()) if time.monotonic() > deadline]
            if late:
                raise DeadlineExceeded(f"step {late[0]} was not done in time: by the server, or by this worker")

    def _take(self, reply: requests.AttendReply) -> None:
        if reply.kind == "going_away":
            self.going_away = reply.message.reason
        elif reply.kind == "error":
            raise from_message(reply.message)
        elif reply.kind == "cuda_step":
            self._deadlines.pop(reply.message.step_id, None)
            self._answers[reply.message.step_id] = Answer(reply.message, None)
            self._tell()
        elif reply.kind in ("resident_steps", "resident_refusal", "resident_resume"):
            self._told[reply.kind] = reply.message
            self._tell()
        else:
            raise ServerFault(f"the server answered a step on a cuda plane with {reply.kind}")

"""The worker's end of a cuda plane: memory of the server's GPU, mapped here, and what waits for the server's streams.

Tensors are copied to and fro in the order of the worker's own stream; nothing here waits for it. A thread reads the
server's answers from the socket, and lets the worker's stream go on if the server goes away or fails a step.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

from attnd import forks
from attnd.errors import AttndError, DeadlineExceeded, Disconnected, ServerFault, ended, from_message
from attnd.planes.cuda.tensors import check_capture, copy_in
from attnd.protocol import requests
from attnd.protocol.cuda.copies import Copier, Copy, CopyAndWrite, HandOver
from attnd.protocol.cuda.driver import Device, call
from attnd.protocol.cuda.gate_flags import Counter, GateFlags
from attnd.protocol.cuda.host_flags import HostFlags
from attnd.protocol.cuda.layout import Place
from attnd.protocol.cuda.memory import DeviceMemory
from attnd.protocol.shm import framing
from attnd.threads import start_thread
from attnd.v1 import attention_pb2


class Answer(NamedTuple):
    """What the server said of a step.

    Attributes:
        reply: if the step is done.
        error: if it failed.
    """

    reply: attention_pb2.CudaStepReply | None
    error: AttndError | None


class CudaPlane:
    """One plane. One thread at a time.

    Attributes:
        num_bytes: of the region.
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
    ) -> None:
        """Owns all of it; starts the thread. `memory`: the region, and that of results if there is one."""
        self.num_bytes = min(each.num_bytes for each in memory)
        self.going_away = ""
        self._connection = connection
        self._gpu = gpu
        self._memory = memory
        self._flags = flags
        self._kernel: HandOver | None = None
        if isinstance(flags, GateFlags):
            self._kernel = HandOver(gpu, *flags.addresses)
        else:
            self._copier, self._counter = Copier(gpu), Counter(gpu)
            self._writer = CopyAndWrite(gpu, self._counter.address)
        self._path = path
        self._replies = framing.Replies(connection)
        # By a step's id, until when it must be answered (`time.monotonic`); then what was answered.
        self._deadlines: dict[int, float] = {}
        self._answers: dict[int, Answer] = {}
        # Queues and flags, not conditions, which an interrupt of the caller leaves locked for the thread.
        self._failures: list[AttndError] = []
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()  # of answers and failures, for who waits
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_closed = False
        _planes.add(self)
        start_thread(self._read, "attnd-cuda-plane")

    def send(self, step: attention_pb2.CudaStep, timeout_s: float) -> None:
        """Sends a step, which the server must have answered after `timeout_s`. Does not wait.

        Raises:
            AttndError: the plane failed before.
        """
        if self.failure is not None:
            raise self.failure
        self._deadlines[step.step.id] = time.monotonic() + timeout_s
        message = attention_pb2.AttendRequest(cuda_step=step).SerializeToString()
        try:
            self._connection.sendall(framing.request_bytes(message))
        except OSError as error:
            self._await_last_words()
            self._fail(Disconnected(f"no connection to the server at {self._path}: {error}"))
            raise self._failures[0] from None

    def _await_last_words(self) -> None:
        """Waits a moment: the thread may yet read why the server hung up."""
        deadline = time.monotonic() + self.LAST_WORDS_S
        while self.failure is None and (left_s := deadline - time.monotonic()) > 0:
            try:
                self._news.get(timeout=left_s)
            except queue.Empty:
                return

    def answer(self, step_id: int, wait: bool) -> Answer | None:
        """What the server said of a step that was sent, once; None if nothing yet, and it is not to be waited for.

        A failure of the plane is that of all its steps.
        """
        while step_id not in self._answers and self.failure is None:
            if not wait:
                return None
            self._news.get()
        return self._answers.pop(step_id, Answer(None, self.failure))

    def hand_over(
        self, stream: int, layer: int, is_last: bool, inputs: list[tuple[Place, Any]], outputs: list[tuple[Place, Any]]
    ) -> None:
        """Enqueues one layer: tensors to the region, their hand-over, and the server's tensors back. Raises CudaError.

        Args:
            stream: of the worker's GPU, which is the current one.
            layer: of the step.
            is_last: whether it is the step's last.
            inputs: places, and torch tensors that go there.
            outputs: places, and dense torch tensors that come from there.
        """
        there, by_driver = [], []
        for place, tensor in inputs:
            copy = copy_in(self._address(place), tensor)
            if copy is None or not copy.is_possible:
                by_driver.append((place, tensor.contiguous()))
            else:
                there.append(copy)
        for place, tensor in by_driver:
            self._copy(self._address(place), tensor.data_ptr(), place.num_bytes, stream)
        back, by_driver = [], []
        for place, tensor in outputs:
            copy = Copy(tensor.data_ptr(), self._address(place), 1, place.num_bytes, place.num_bytes)
            if copy.is_possible:
                back.append(copy)
            else:
                by_driver.append((place, tensor))
        if self._kernel is not None:
            self._kernel.run(stream, there, back)
        else:
            assert isinstance(self._flags, HostFlags)
            self._writer.run(stream, there, *self._flags.signal_of(layer))
            self._flags.wait(stream, layer, is_last)
            if back:
                self._copier.copy(stream, back)
        for place, tensor in by_driver:
            self._copy(tensor.data_ptr(), self._address(place), place.num_bytes, stream)

    def _address(self, place: Place) -> int:
        return self._memory[-1 if place.is_result else 0].address + place.offset

    def _copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        if num_bytes:
            call("cuMemcpyAsync", target, source, num_bytes, stream)

    @cached_property
    def torch_device(self) -> Any:
        """Where the worker's tensors are."""
        return sys.modules["torch"].device("cuda", self._gpu.index)

    @property
    def takes_turns(self) -> bool:
        """Whether worker and server take turns on one GPU, for want of CUDA's Multi-Process Service."""
        return self._kernel is None and not self._gpu.attribute("MPS_ENABLED")

    def current_stream(self) -> int | None:
        """Torch's current stream, if it is of the worker's GPU; None: another GPU is the thread's current one."""
        cuda = sys.modules["torch"].cuda
        return cuda.current_stream().cuda_stream if cuda.current_device() == self._gpu.index else None

    @contextmanager
    def stream(self) -> Iterator[int]:
        """As `current_stream`, whatever GPU is current before. Raises as `check_capture` does."""
        cuda = sys.modules["torch"].cuda
        check_capture(cuda, self._gpu.index)
        with cuda.device(self._gpu.index):
            yield cuda.current_stream().cuda_stream

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
            self._gpu.synchronize()
        finally:
            self._is_closed = True
            _end(self._connection)
            self._ended.get()
            self._connection.close()
            with self._gpu.current():
                self._flags.close()
                if self._kernel is None:
                    self._counter.close()
                for each in self._memory:
                    each.close()

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
        else:
            raise ServerFault(f"the server answered a step on a cuda plane with {reply.kind}")


# For a child that was forked, where none is of use.
_planes: weakref.WeakSet[CudaPlane] = weakref.WeakSet()


def _forked() -> None:
    for plane in list(_planes):
        plane.disown()


os.register_at_fork(after_in_child=_forked)


def _end(connection: socket.socket) -> None:
    """Ends both directions, whoever reads."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # ended already

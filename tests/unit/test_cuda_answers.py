"""What a cuda plane's socket carries: answers of steps in order, and news that answers none."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from attnd.errors import AttndError, CacheLost, InvalidRequest, from_message
from attnd.protocol.shm import framing
from attnd.v1 import attention_pb2
from attnd_server.planes.answer_socket import AnswerSocket
from attnd_server.planes.connection import PlaneConnection
from attnd_server.planes.cuda.serve import MAX_STEPS_UNDER_WAY, _Answers
from attnd_server.planes.cuda.session import StepUnderWay
from tests.servers import wait_for

# Seconds: longer than anything here should take.
PATIENCE_S = 20.0
REFUSAL = attention_pb2.AttendResponse(resident_refusal=attention_pb2.ResidentRefusal(step=7))


def reply(step_id: int) -> bytes:
    return attention_pb2.AttendResponse(cuda_step=attention_pb2.CudaStepReply(step_id=step_id)).SerializeToString()


class Session:
    """Steps that end when the test says so. The first byte of a message says which kind it is."""

    def __init__(self) -> None:
        self.may_end: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.begun: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.dropped: list[StepUnderWay] = []

    def begin(self, data: bytes) -> StepUnderWay | bytes:
        if data.startswith(b"!"):
            raise InvalidRequest("it breaks a rule", field="step")
        if data.startswith(b"?"):
            return reply(int(data[1:]))
        self.begun.put(int(data))
        return StepUnderWay(*[int(data)] * len(StepUnderWay._fields))  # type: ignore[arg-type]

    def finish(self, under_way: StepUnderWay) -> bytes:
        number = self.may_end.get(timeout=PATIENCE_S)
        if number < 0:
            raise CacheLost("it has gone")
        return reply(number)

    def drop(self, under_way: StepUnderWay) -> None:
        self.dropped.append(under_way)

    def told(self, error: Exception) -> AttndError:
        return error if isinstance(error, AttndError) else AttndError(str(error))


class Rig:
    """Answers to a worker, whose end of the socket is `worker`."""

    def __init__(self, servers: socket.socket, worker: socket.socket) -> None:
        service: Any = SimpleNamespace(executor=SimpleNamespace(prepare_thread=lambda: None))
        self.socket, self.session = AnswerSocket(servers), Session()
        self.answers = _Answers(service, servers, self.socket)
        self.answers.session = self.session  # type: ignore[assignment]
        self.answers.start()
        self.worker = worker
        self._replies = framing.Replies(worker)

    def received(self) -> attention_pb2.AttendResponse | None:
        """The next message; None: the plane has ended."""
        received = self._replies.receive()
        return None if received is None else attention_pb2.AttendResponse.FromString(received.message)

    def numbers(self, count: int) -> list[int]:
        """Those of the next messages: of steps, and minus those of refused ones."""
        messages = [self.received() for _ in range(count)]
        return [
            0 if each is None else each.cuda_step.step_id if each.HasField("cuda_step") else -each.resident_refusal.step
            for each in messages
        ]


@pytest.fixture
def rig() -> Iterator[Rig]:
    servers, worker = socket.socketpair()
    with servers, worker:
        worker.settimeout(PATIENCE_S)
        rig = Rig(servers, worker)
        try:
            yield rig
        finally:
            rig.session.may_end.put(-1)  # nothing waits any more
            rig.session.may_end.put(-1)
            rig.answers.close()


def error_of(response: attention_pb2.AttendResponse | None) -> AttndError:
    assert response is not None
    assert response.HasField("error")
    return from_message(response.error)


def test_news_comes_after_what_was_begun_and_answers_nothing(rig: Rig) -> None:
    assert rig.answers.begin(b"1")
    rig.answers.tell(REFUSAL)
    assert rig.answers.begin(b"2")
    rig.session.may_end.put(1)
    assert rig.numbers(2) == [1, -7]
    wait_for(lambda: rig.socket.num_due == 1, "the answer that was sent is still due")
    rig.session.may_end.put(2)
    assert rig.numbers(1) == [2]
    rig.answers.close()
    assert rig.socket.num_due == 0


def test_news_comes_at_once_where_no_step_is_under_way(rig: Rig) -> None:
    rig.answers.tell(REFUSAL)
    assert rig.numbers(1) == [-7]
    assert rig.answers.begin(b"?5")  # a message that is no step is answered without one, too
    assert rig.numbers(1) == [5]


def test_news_takes_no_place_of_a_step_and_gives_none_back(rig: Rig) -> None:
    """Graphs have room for so many steps and no more."""
    for _ in range(5):
        rig.answers.tell(REFUSAL)
    assert rig.numbers(5) == [-7] * 5
    for number in range(MAX_STEPS_UNDER_WAY):
        assert rig.answers.begin(b"%d" % number)
        assert rig.session.begun.get(timeout=PATIENCE_S) == number
    rig.answers.tell(REFUSAL)
    begins = threading.Thread(target=rig.answers.begin, args=(b"9",), daemon=True)
    begins.start()
    with pytest.raises(queue.Empty):
        rig.session.begun.get(timeout=0.05)
    rig.session.may_end.put(1)
    assert rig.session.begun.get(timeout=PATIENCE_S) == 9
    begins.join(PATIENCE_S)
    rig.session.may_end.put(2)
    rig.session.may_end.put(3)
    assert rig.numbers(4) == [1, 2, -7, 3]


def test_an_error_that_is_told_ends_the_plane(rig: Rig) -> None:
    rig.answers.tell(CacheLost("the cache was deleted"))
    error = error_of(rig.received())
    assert isinstance(error, CacheLost)
    assert "the cache was deleted" in str(error)
    assert rig.received() is None
    rig.answers.tell(REFUSAL)  # nobody hears it
    assert rig.answers.begin(b"1")
    rig.answers.close()
    assert [step[0] for step in rig.session.dropped] == [1]  # its pages are let go


def test_an_error_that_is_told_comes_after_the_steps_before_it(rig: Rig) -> None:
    assert rig.answers.begin(b"1")
    rig.answers.tell(CacheLost("the cache was deleted"))
    rig.session.may_end.put(1)
    assert rig.numbers(1) == [1]
    assert isinstance(error_of(rig.received()), CacheLost)
    assert rig.received() is None


@pytest.mark.parametrize("fails", [b"!", b"1"])
def test_a_step_that_fails_ends_the_plane_and_news_is_told_no_more(rig: Rig, fails: bytes) -> None:
    rig.answers.begin(fails)
    rig.answers.tell(REFUSAL)
    rig.session.may_end.put(-1)
    assert isinstance(error_of(rig.received()), (CacheLost, InvalidRequest))
    assert rig.received() is None


def test_a_worker_that_has_gone_is_no_error_of_who_tells(rig: Rig) -> None:
    rig.worker.close()
    rig.answers.tell(REFUSAL)
    rig.answers.tell(CacheLost("the cache was deleted"))
    rig.answers.close()
    assert not rig.answers._thread.is_alive()


def test_a_drain_waits_for_what_no_answer_is_due_for() -> None:
    """A resident step has no message, and a server that drains lets it end."""
    one, other = socket.socketpair()
    nothing: Any = None
    with one, other:
        connection = PlaneConnection(nothing, nothing, nothing, nothing, nothing, nothing, one, {})
        assert not connection.is_under_way

        connection._answers.is_under_way = lambda: True
        assert connection.is_under_way
        connection._answers.is_under_way = lambda: False
        assert not connection.is_under_way
        connection._answers.expect()
        assert connection.is_under_way

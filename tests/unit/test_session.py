"""What a session makes of a stream's messages, on a stream that says what the test wants."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

import attnd
from attnd.planes.choice import PlaneOptions
from attnd.planes.open_stream import OpenedStream
from attnd.planes.transport import Stream
from attnd.protocol.requests import AttendReply
from attnd.timings import KEPT_CALLS
from attnd.v1 import attention_pb2, cache_pb2, error_pb2, step_pb2

METADATA = attnd.StepMetadata([1], [0], [[0]], [0], store_only=True)


class Script(Stream):
    """Gives what the test put into it."""

    def __init__(self) -> None:
        self.answers: deque[tuple[str, Any] | BaseException] = deque()
        self.is_closed = False
        self.has_hung_up = False

    def send(self, request: bytes) -> None:
        assert not self.is_closed
        if self.has_hung_up:
            self.answers.append(attnd.Disconnected("end of file"))
            raise attnd.Disconnected("broken pipe")

    def receive(self, timeout_s: float) -> AttendReply:
        answer = self.answers.popleft()
        if isinstance(answer, BaseException):
            raise answer
        return AttendReply(*answer, {}, 10)

    def close(self) -> None:
        self.is_closed = True


def opened(step_id: int) -> tuple[str, Any]:
    return "step", attention_pb2.StepReply(step_id=step_id)


def answered(step_id: int, layer: int, **times: int) -> tuple[str, Any]:
    return "call", step_pb2.CallReply(step_id=step_id, layer=layer, **times)


GOING_AWAY = "going_away", attention_pb2.GoingAway(reason="the server is draining")


@pytest.fixture
def streams() -> list[Script]:
    return []


@pytest.fixture
def session(streams: list[Script]) -> attnd.Session:
    def open_stream(wanted: PlaneOptions, timeout_s: float) -> OpenedStream:
        streams.append(Script())
        return OpenedStream(streams[-1], {})

    ref, config = cache_pb2.CacheRef(id=b"x", epoch=1), cache_pb2.CacheConfig(num_layers=1, head_dim=16)
    cache: Any = SimpleNamespace(ref=ref, config=config, open_stream=open_stream, missing=None)
    return attnd.Session(cache, 1.0, PlaneOptions())


def test_times_are_summed_exactly_and_kept_for_the_last_calls(session: attnd.Session, streams: list[Script]) -> None:
    step = session.step(METADATA)
    streams[0].answers.append(opened(1))
    num_calls = KEPT_CALLS + 7
    times = {"queue_us": 1, "copy_in_us": 2, "kernel_us": 3, "copy_out_us": 4}
    streams[0].answers.extend(answered(1, 0, **times) for _ in range(num_calls))
    for _ in range(num_calls):
        step.attend(0, None, None, None)
    timings = session.timings()
    assert timings.num_calls == num_calls
    assert len(timings.call_us) == KEPT_CALLS
    assert timings.total_us > sum(timings.call_us) > 0
    served = [timings.queue_us, timings.copy_in_us, timings.kernel_us, timings.copy_out_us]
    assert served == [num_calls, 2 * num_calls, 3 * num_calls, 4 * num_calls]
    assert timings.wire_us == max(0.0, timings.total_us - sum(served))
    assert timings.bytes_received == 10 * (num_calls + 1)
    session.reset_timings()
    assert session.timings() == attnd.Timings()


def test_a_call_counts_once_however_often_it_is_waited_for(session: attnd.Session, streams: list[Script]) -> None:
    step = session.step(METADATA)
    calls = [step.submit(layer, None, None, None) for layer in (0, 1)]
    streams[0].answers.extend([opened(1), answered(1, 0, kernel_us=5), answered(1, 1, kernel_us=6)])
    for call in (calls[1], calls[0], calls[1]):
        assert call.wait() is None
    assert (session.timings().num_calls, session.timings().kernel_us) == (2, 11)


@pytest.mark.parametrize("wrong", [answered(1, 2), answered(2, 1), opened(1)])
def test_an_answer_to_another_call_is_a_fault_that_ends_the_stream(
    session: attnd.Session, streams: list[Script], wrong: tuple[str, Any]
) -> None:
    step = session.step(METADATA)
    first, second, third = (step.submit(layer, None, None, None) for layer in (0, 1, 2))
    streams[0].answers.extend([opened(1), answered(1, 0), wrong])
    with pytest.raises(attnd.ServerFault, match=r"the server answered layer 1 of step 1 with (call|step)"):
        third.wait()
    assert streams[0].is_closed
    assert first.wait() is None
    for call in (second, third):
        with pytest.raises(attnd.Disconnected):
            call.wait()


def test_a_call_for_an_answer_to_a_step_is_a_fault(session: attnd.Session, streams: list[Script]) -> None:
    step = session.step(METADATA)
    streams[0].answers.append(answered(1, 0))
    with pytest.raises(attnd.ServerFault, match="the server answered step 1 with call"):
        step.attend(0, None, None, None)
    assert streams[0].is_closed


def test_an_interrupted_wait_ends_the_stream(session: attnd.Session, streams: list[Script]) -> None:
    step = session.step(METADATA)
    calls = [step.submit(layer, None, None, None) for layer in (0, 1)]
    streams[0].answers.extend([opened(1), KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        calls[0].wait()
    assert streams[0].is_closed
    for call in calls:
        with pytest.raises(attnd.Disconnected, match="ended before the call was answered"):
            call.wait()
    again = session.step(METADATA)
    streams[1].answers.extend([opened(2), answered(2, 0)])
    assert again.attend(0, None, None, None) is None


def test_calls_under_way_are_answered_before_a_draining_server_is_left(
    session: attnd.Session, streams: list[Script]
) -> None:
    step = session.step(METADATA)
    first, second, third = (step.submit(layer, None, None, None) for layer in (0, 1, 2))
    refusal = error_pb2.Error(reason=error_pb2.ERROR_REASON_EXHAUSTED, message="full")
    streams[0].answers.extend([opened(1), GOING_AWAY, answered(1, 0), ("error", refusal), answered(1, 2)])
    assert first.wait() is None
    with pytest.raises(attnd.Disconnected, match="the server is draining; the next step reconnects"):
        session.step(METADATA)
    assert streams[0].is_closed
    assert third.wait() is None
    with pytest.raises(attnd.Exhausted, match="full"):
        second.wait()
    session.step(METADATA)
    assert len(streams) == 2


@pytest.mark.parametrize("is_told", [True, False])
def test_what_was_answered_before_the_server_hung_up_is_there(
    session: attnd.Session, streams: list[Script], is_told: bool
) -> None:
    """The client learns of it when it sends, and has not read yet what came before."""
    step = session.step(METADATA)
    first, second = (step.submit(layer, None, None, None) for layer in (0, 1))
    streams[0].answers.extend([opened(1), answered(1, 0), *[GOING_AWAY] * is_told])
    streams[0].has_hung_up = True
    told = "the server is draining; the next step reconnects" if is_told else "broken pipe"
    with pytest.raises(attnd.Disconnected, match=told):
        session.step(METADATA)
    assert streams[0].is_closed
    assert first.wait() is None
    with pytest.raises(attnd.Disconnected, match="ended before the call was answered"):
        second.wait()
    session.step(METADATA)
    assert len(streams) == 2

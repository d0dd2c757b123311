"""When a client sends a request again."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from attnd.errors import AttndError, CacheLost, Disconnected, EpochMismatch, Exhausted, InvalidRequest
from attnd.planes.retries import retried, until_answered
from attnd.planes.retry_deadline import RECONNECT_PAUSE_S, RECONNECT_S, RetryDeadline


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time passes in sleeps only; each of them. For `retries` alone: other tests' threads live on in this process."""
    sleeps: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(sleeps), sleep=sleeps.append)
    for module in ("retries", "retry_deadline"):
        monkeypatch.setattr(f"attnd.planes.{module}.time", clock)
    return sleeps


def test_it_comes_back_no_sooner_than_told_and_has_less_time_then(clock: list[float]) -> None:
    given: list[float] = []
    refusals = [Exhausted("full", retry_after_s=2.0), Exhausted("full", retry_after_s=1.0)]

    def send(left_s: float) -> str:
        given.append(left_s)
        if refusals:
            raise refusals.pop(0)
        return "answer"

    assert retried(send, 10.0) == "answer"
    assert [2.0 <= clock[0] <= 3.0, 1.0 <= clock[1] <= 1.5] == [True, True]
    assert given == [10.0, pytest.approx(10 - clock[0]), pytest.approx(10 - sum(clock))]


@pytest.mark.parametrize(
    "refusal", [Exhausted("no memory"), InvalidRequest("wrong"), Exhausted("full", retry_after_s=10.0)]
)
def test_what_waiting_does_not_help_is_raised_at_once(clock: list[float], refusal: AttndError) -> None:
    def send(left_s: float) -> None:
        raise refusal

    with pytest.raises(type(refusal)) as raised:
        retried(send, 10.0)
    assert raised.value is refusal
    assert clock == []


def test_refused_again_and_again_it_ends_in_time(clock: list[float]) -> None:
    with pytest.raises(Exhausted):
        retried(lambda left_s: (_ for _ in ()).throw(Exhausted("full", retry_after_s=0.4)), 3.0)
    assert 2.0 < sum(clock) < 3.0
    assert RetryDeadline(3.0).left_s == pytest.approx(3.0)  # now + 3 - now is rounded


def test_a_server_that_ends_is_waited_for_until_another_answers(clock: list[float]) -> None:
    given: list[float] = []

    def send(left_s: float) -> str:
        given.append(left_s)
        if len(given) < 3:
            raise Disconnected("the server is draining")
        return "answer"

    assert until_answered(send, 10.0) == "answer"
    assert given == [10.0, pytest.approx(10 - RECONNECT_PAUSE_S), pytest.approx(10 - 2 * RECONNECT_PAUSE_S)]


def test_nobody_is_waited_for_longer_than_allowed(clock: list[float]) -> None:
    def send(left_s: float) -> None:
        clock.append(left_s)  # as long as it may take
        raise Disconnected("nobody there")

    with pytest.raises(Disconnected):
        until_answered(send, 10.0)
    assert clock == [10.0]
    with pytest.raises(InvalidRequest):
        until_answered(lambda left_s: (_ for _ in ()).throw(InvalidRequest("wrong")), 10.0)


def failing(*errors: AttndError) -> Callable[[float], bytes]:
    """Raises each error once, then answers."""
    left = list(errors)

    def send(left_s: float) -> bytes:
        if left:
            raise left.pop(0)
        return b"answer"

    return send


def test_what_was_lost_with_its_connection_is_sent_again(clock: list[float]) -> None:
    assert retried(failing(Disconnected("reset"), Disconnected("refused")), 30.0) == b"answer"
    assert 0 < clock[0] < clock[1]


def test_a_server_that_stays_away_is_given_up_long_before_the_timeout(clock: list[float]) -> None:
    with pytest.raises(Disconnected, match="refused"):
        retried(failing(*[Disconnected("refused") for _ in range(99)]), 30.0)
    assert 0.8 * RECONNECT_S < sum(clock) <= RECONNECT_S


def test_what_was_lost_is_not_sent_again_after_the_timeout(clock: list[float]) -> None:
    with pytest.raises(Disconnected):
        retried(failing(*[Disconnected("refused") for _ in range(99)]), 0.3)
    assert sum(clock) < 0.3


@pytest.mark.parametrize("gone", [CacheLost("unknown"), EpochMismatch("another life")])
def test_a_deletion_that_finds_nothing_the_second_time_is_done(clock: list[float], gone: CacheLost) -> None:
    assert retried(failing(Disconnected("reset"), gone), 30.0, gone=b"done") == b"done"
    with pytest.raises(CacheLost):  # of anything else the caller wants to know
        retried(failing(Disconnected("reset"), gone), 30.0)
    with pytest.raises(CacheLost):  # and so of a deletion that nobody sent before
        retried(failing(gone), 30.0, gone=b"done")
    with pytest.raises(CacheLost):
        retried(failing(Exhausted("busy", retry_after_s=0.1), gone), 30.0, gone=b"done")


def test_a_refusal_is_told_where_too_little_time_is_left_to_try_again() -> None:
    refusal = Exhausted("the queue is full", retry_after_s=0.01)
    assert RetryDeadline(0.04).pause_s(refusal) is None
    assert RetryDeadline(0.5).pause_s(refusal) is not None

"""Who looks after the resident steps of all sessions: how often, from when, and until when."""

from __future__ import annotations

import queue
import threading

import pytest

from attnd_server.planes.cuda.resident import keeper as keeper_module
from attnd_server.planes.cuda.resident.keeper import Keeper
from tests.resident_rig import PATIENCE_S, Doing
from tests.servers import wait_for


class Kept:
    """A session that only counts how it is looked after."""

    def __init__(self, is_parked: bool) -> None:
        self.is_parked, self.num_done = is_parked, 0
        self.num_looks = self.num_checks = 0
        self.was_checked = threading.Event()

    def look(self, now: float) -> None:
        self.num_looks += 1

    def check(self) -> None:
        self.num_checks += 1
        self.was_checked.set()


class Clock:
    """Time that passes only while somebody sleeps; notes for how long."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, duration_s: float) -> None:
        self.now += duration_s
        self.slept.append(duration_s)
        threading.Event().wait(0.0001)  # for the others


def test_a_keeper_looks_after_all_sessions_until_they_are_forgotten() -> None:
    keeper, sessions = Keeper(), [Kept(True), Kept(False)]
    for session in sessions:
        keeper.keep(session)
    for session in sessions:
        assert session.was_checked.wait(PATIENCE_S)
        session.was_checked.clear()
        assert session.was_checked.wait(PATIENCE_S)
        assert session.num_looks > session.num_checks  # which come less often
    thread = keeper._thread
    assert thread is not None
    for session in sessions:
        keeper.forget(session)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    num_looks = sessions[0].num_looks
    keeper.keep(sessions[1])
    sessions[1].was_checked.clear()
    assert sessions[1].was_checked.wait(PATIENCE_S)
    assert sessions[0].num_looks == num_looks
    keeper.forget(sessions[1])


def test_a_keeper_looks_often_only_while_somebody_may_have_to_be_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(keeper_module, "time", clock)
    monkeypatch.setattr(keeper_module, "IDLE_S", 0.5)
    keeper, session = Keeper(), Kept(is_parked=False)

    def until_sleeps(duration_s: float) -> None:
        clock.slept.clear()
        wait_for(lambda: clock.slept[-3:] == [duration_s] * 3, f"it does not sleep {duration_s} s")

    keeper.keep(session)
    until_sleeps(keeper_module.LONG_PERIOD_S)
    session.is_parked, session.num_done = True, 1
    until_sleeps(keeper_module.PERIOD_S)
    before = clock.now
    until_sleeps(keeper_module.LONG_PERIOD_S)  # nothing has happened for some time
    assert clock.now > before
    session.num_done = 2
    until_sleeps(keeper_module.PERIOD_S)
    thread = keeper._thread
    keeper.forget(session)
    assert thread is not None
    thread.join(PATIENCE_S)  # with this clock
    assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_is_looked_at_who_was_forgotten() -> None:
    """The first one's look takes a moment in which the second's session ends, and gives back the words it wakes by."""

    class Slow(Kept):
        is_looked_at, may_go_on = threading.Event(), threading.Event()

        def look(self, now: float) -> None:
            self.is_looked_at.set()
            self.may_go_on.wait(PATIENCE_S)

    keeper, slow, second, looks = Keeper(), Slow(True), Kept(True), queue.SimpleQueue[bool]()
    is_forgotten = threading.Event()

    def forget() -> None:
        keeper.forget(second)
        is_forgotten.set()

    second.look = lambda now: looks.put(is_forgotten.is_set())  # type: ignore[method-assign]
    with keeper._lock:  # so that the first look is at both
        keeper._kept += [second]
    keeper._kept.insert(0, slow)
    keeper.keep(Kept(True))
    assert slow.is_looked_at.wait(PATIENCE_S)
    forgetting = Doing(forget)
    forgetting.is_over.wait(0.05)
    slow.may_go_on.set()
    forgetting.result()
    was_forgotten = [looks.get(timeout=PATIENCE_S)]
    for session in list(keeper._kept):
        keeper.forget(session)
    while looks.qsize():
        was_forgotten.append(looks.get())
    assert not any(was_forgotten)

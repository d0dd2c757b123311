"""Moments in which no step waits in a GPU: who is held back for them, for how long, and what is put off until one."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from attnd_server.device import quiet as quiet_module
from attnd_server.device.quiet import QuietGpu, quiet_gpu
from tests.servers import wait_for

# Seconds: longer than anything here should take.
PATIENCE_S = 20.0


class Waiting:
    """A thread that is inside `waits` until it is let go."""

    def __init__(self, quiet: QuietGpu, leave: Callable[[], None] | None = None) -> None:
        self.has_begun, self._may_end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(quiet, leave), daemon=True)
        self._thread.start()

    def _run(self, quiet: QuietGpu, leave: Callable[[], None] | None) -> None:
        with quiet.waits(leave):
            self.has_begun.set()
            self._may_end.wait(PATIENCE_S)

    def end(self) -> None:
        self._may_end.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


def begun(quiet: QuietGpu) -> Waiting:
    waiting = Waiting(quiet)
    assert waiting.has_begun.wait(PATIENCE_S)
    return waiting


class Leaving:
    """Waits for something to begin whenever nobody minds, as resident steps do; leaves when it is asked to, or not."""

    def __init__(self, quiet: QuietGpu, leaves: bool = True) -> None:
        self.num_asked = self.num_turns = 0
        self._quiet, self._leaves = quiet, leaves
        self._changed = threading.Condition()
        self._is_to_leave = self._is_over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.until(1)

    def _run(self) -> None:
        while not self._is_over:
            with self._quiet.waits(self._leave), self._changed:
                self.num_turns += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: (self._is_to_leave and self._leaves) or self._is_over, PATIENCE_S)
                self._is_to_leave = False

    def _leave(self) -> None:
        with self._changed:
            self.num_asked += 1
            self._is_to_leave = True
            self._changed.notify_all()

    def until(self, num_turns: int) -> None:
        """Waits until it has come back so many times."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.num_turns >= num_turns, PATIENCE_S)

    def end(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


def have_gone_on(now: list[int], before: list[int]) -> bool:
    return all(count > then + 1 for count, then in zip(now, before, strict=True))


def test_it_is_quiet_until_something_waits() -> None:
    quiet = QuietGpu()
    with quiet.moment(0) as is_quiet:
        assert is_quiet
    waiting = begun(quiet)
    with quiet.moment(0) as is_quiet:
        assert not is_quiet
    assert not quiet.are_over(0)
    waiting.end()
    assert quiet.are_over(0)
    with quiet.moment(0) as is_quiet:
        assert is_quiet


def test_a_moment_comes_when_what_waits_is_over() -> None:
    quiet = QuietGpu()
    waits = [begun(quiet) for _ in range(3)]
    threading.Timer(0.05, lambda: [waiting.end() for waiting in waits]).start()
    with quiet.moment(PATIENCE_S) as is_quiet:
        assert is_quiet
        assert quiet.are_over(0)


def test_nothing_begins_to_wait_within_a_moment() -> None:
    quiet = QuietGpu()
    with quiet.moment(0) as is_quiet:
        assert is_quiet
        held_back = Waiting(quiet)
        assert not held_back.has_begun.wait(0.05)
    assert held_back.has_begun.wait(PATIENCE_S)
    held_back.end()


def test_what_is_held_back_goes_on_where_no_moment_comes() -> None:
    quiet = QuietGpu()
    waiting = begun(quiet)
    with quiet.moment(0.02) as is_quiet:
        assert not is_quiet
        begun(quiet).end()
    waiting.end()


def test_nobody_is_held_back_for_what_has_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet_module, "_STALLED_S", 0.05)
    quiet = QuietGpu()
    waiting = begun(quiet)
    began = time.monotonic()
    with quiet.moment(PATIENCE_S) as is_quiet:
        assert not is_quiet
    assert 0.04 < time.monotonic() - began < PATIENCE_S / 2
    with quiet.moment(PATIENCE_S) as is_quiet:
        assert not is_quiet
    waiting.end()


def test_what_waits_for_something_to_begin_leaves_for_a_moment_and_comes_back() -> None:
    quiet = QuietGpu()
    leaving = [Leaving(quiet) for _ in range(3)]
    assert not quiet.are_over(0)
    assert [each.num_asked for each in leaving] == [0, 0, 0]  # nobody has looked for a moment yet
    for number in range(1, 4):
        with quiet.moment(PATIENCE_S) as is_quiet:
            assert is_quiet
            assert quiet.are_over(0)
            assert [each.num_asked for each in leaving] == [number] * 3
            assert [each.num_turns for each in leaving] == [number] * 3
        for each in leaving:
            each.until(number + 1)
    for each in leaving:
        each.end()


def test_who_waits_for_something_to_begin_has_not_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet_module, "_STALLED_S", 0.0)
    quiet = QuietGpu()
    leaving = Leaving(quiet)
    assert not quiet.has_stalled()
    waiting = begun(quiet)
    assert quiet.has_stalled()
    waiting.end()
    assert not quiet.has_stalled()
    leaving.end()


def test_who_was_asked_to_leave_and_does_not_has_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet_module, "_STALLED_S", 0.05)
    quiet = QuietGpu()
    staying = Leaving(quiet, leaves=False)
    assert not quiet.has_stalled()
    began = time.monotonic()
    with quiet.moment(PATIENCE_S) as is_quiet:
        assert not is_quiet
        begun(quiet).end()  # nobody is held back for it
    assert time.monotonic() - began < PATIENCE_S / 2
    assert quiet.has_stalled()
    with quiet.moment(PATIENCE_S) as is_quiet:
        assert not is_quiet
    assert staying.num_asked == 1  # once is enough
    staying.end()
    with quiet.moment(0) as is_quiet:
        assert is_quiet


def test_who_leaves_late_leaves_a_moment_to_the_next_who_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a step does that came just before."""
    monkeypatch.setattr(quiet_module, "_STALLED_S", PATIENCE_S)
    quiet, asked = QuietGpu(), []
    waiting = Waiting(quiet, lambda: asked.append(1))
    assert waiting.has_begun.wait(PATIENCE_S)
    with quiet.moment(0.01) as is_quiet:
        assert not is_quiet
    threading.Timer(0.02, waiting.end).start()
    with quiet.moment(PATIENCE_S) as is_quiet:
        assert is_quiet
    assert len(asked) == 1


def test_an_error_of_who_is_asked_to_leave_holds_nobody_back() -> None:
    quiet = QuietGpu()
    waiting = Waiting(quiet, lambda: [][0])
    assert waiting.has_begun.wait(PATIENCE_S)
    with pytest.raises(IndexError), quiet.moment(PATIENCE_S):
        pass
    begun(quiet).end()
    waiting.end()
    with quiet.moment(0) as is_quiet:
        assert is_quiet


def test_work_that_was_put_off_is_done_though_somebody_always_waits_for_something_to_begin() -> None:
    quiet, done = QuietGpu(), threading.Event()
    leaving = Leaving(quiet)
    for _ in range(5):
        done.clear()
        quiet.later(lambda: done.set() if quiet.are_over(0) else None)
        assert done.wait(PATIENCE_S)
    assert leaving.num_asked > 0
    leaving.end()
    quiet.close(1)


def test_new_ones_are_held_back_while_others_go_on() -> None:
    quiet = QuietGpu()
    waiting = begun(quiet)
    with quiet.holding_back():
        held_back = Waiting(quiet)
        assert not held_back.has_begun.wait(0.05)
        waiting.end()
        assert quiet.are_over(0)
    assert held_back.has_begun.wait(PATIENCE_S)
    held_back.end()
    with pytest.raises(ZeroDivisionError), quiet.holding_back():
        raise ZeroDivisionError
    begun(quiet).end()


def test_a_failure_within_a_moment_ends_it() -> None:
    quiet = QuietGpu()
    with pytest.raises(ZeroDivisionError), quiet.moment(0):
        raise ZeroDivisionError
    with quiet.moment(0) as is_quiet:
        assert is_quiet
    begun(quiet).end()


def test_one_moment_at_a_time() -> None:
    quiet = QuietGpu()
    with quiet.moment(0), ThreadPoolExecutor(1) as pool:

        def other() -> bool:
            with quiet.moment(0.02) as is_quiet:
                return is_quiet

        assert not pool.submit(other).result(PATIENCE_S)


def test_sessions_that_always_have_a_step_under_way_leave_moments() -> None:
    """Two of them, each with two steps, of which the next begins before the last ends."""
    quiet, ended = QuietGpu(), threading.Event()
    steps = [0] * 4

    def run(index: int) -> None:
        while not ended.is_set():
            with quiet.waits():
                time.sleep(0.002)
            steps[index] += 1

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        with quiet.moment(PATIENCE_S) as is_quiet:
            assert is_quiet
            before = list(steps)
            time.sleep(0.005)
            assert sum(steps) - sum(before) <= 4  # each may have been about to count
        wait_for(lambda before=before: have_gone_on(steps, before), "a step never began")
    ended.set()
    for thread in threads:
        thread.join(PATIENCE_S)


def test_work_is_put_off_until_a_moment_comes_and_done_in_order() -> None:
    quiet, done = QuietGpu(), []
    first, second = begun(quiet), begun(quiet)
    for number in range(5):
        quiet.later(lambda number=number: done.append((number, quiet.are_over(0))))
    time.sleep(0.15)  # several tries
    assert done == []
    first.end()
    time.sleep(0.02)
    assert done == []
    second.end()
    wait_for(lambda: len(done) == 5, "what was put off is not done")
    assert done == [(number, True) for number in range(5)]
    quiet.close(1)


def test_what_held_back_goes_before_the_next_piece_of_work() -> None:
    quiet, order = QuietGpu(), []
    is_running, may_end = threading.Event(), threading.Event()

    def first() -> None:
        is_running.set()
        may_end.wait(PATIENCE_S)
        order.append("first")

    quiet.later(first)
    quiet.later(lambda: order.append("second"))
    assert is_running.wait(PATIENCE_S)

    def step() -> None:
        with quiet.waits():
            order.append("step")

    thread = threading.Thread(target=step)
    thread.start()
    wait_for(lambda: quiet._num_held_back == 1, "the step is not held back")
    may_end.set()
    wait_for(lambda: len(order) == 3, "something was left")
    assert order == ["first", "step", "second"]
    thread.join()
    quiet.close(1)


def test_a_piece_of_work_that_fails_is_told_and_the_next_is_done(caplog: pytest.LogCaptureFixture) -> None:
    quiet, done = QuietGpu(), threading.Event()
    with caplog.at_level(logging.ERROR):
        quiet.later(lambda: [][0])
        quiet.later(done.set)
        assert done.wait(PATIENCE_S)
    assert "put off" in caplog.text
    quiet.close(1)


def test_work_is_not_kept_once_it_is_done() -> None:
    class Held:
        pass

    quiet, held = QuietGpu(), Held()
    is_there = weakref.ref(held)
    quiet.later(lambda held=held: None)
    del held
    wait_for(lambda: is_there() is None, "the work is still there")
    quiet.close(1)


def test_it_closes_without_waiting_for_ever() -> None:
    quiet, done = QuietGpu(), []
    waiting = begun(quiet)
    quiet.later(lambda: done.append(1))
    began = time.monotonic()
    quiet.close(0.1)
    assert time.monotonic() - began < PATIENCE_S / 2
    waiting.end()
    assert quiet._thread is not None
    quiet._thread.join(PATIENCE_S)
    assert not quiet._thread.is_alive()
    assert done == []


def test_a_device_has_one() -> None:
    assert quiet_gpu(torch.device("cuda", 1)) is quiet_gpu(torch.device("cuda", 1))
    assert quiet_gpu(torch.device("cuda", 1)) is not quiet_gpu(torch.device("cuda", 0))

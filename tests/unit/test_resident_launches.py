"""Launches of resident steps that are queued ahead: when they are, when they leave, and who is told; without a GPU."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pytest

from attnd.errors import AttndError, CacheLost, DeadlineExceeded, Unauthenticated
from attnd_server.device import quiet as quiet_module
from attnd_server.planes.cuda.resident import books as words
from attnd_server.planes.cuda.resident import launches as launches_module
from attnd_server.planes.cuda.resident.books import Books
from attnd_server.planes.cuda.resident.keeper import Keeper
from attnd_server.planes.cuda.resident.launches import AHEAD, IDLE_S
from attnd_server.planes.cuda.resident.told import StepsDone
from tests.resident_rig import NUM_REQS, PATIENCE_S, Doing, Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    try:
        yield rig
    finally:
        rig.close()


def told(news: queue.SimpleQueue[Any]) -> list[Any]:
    """What was told by now."""
    return [news.get() for _ in range(news.qsize())]


def has_none_waiting(rig: Rig) -> bool:
    """Whether the GPU is left alone; a moment in which it would be otherwise is given, too."""
    return not rig.gpu.num_waiting and not rig.gpu.was_enqueued.wait(0.03)


def test_nothing_is_launched_before_a_step_comes(rig: Rig) -> None:
    assert rig.is_ready.wait(PATIENCE_S)
    for _ in range(3):
        rig.launches.look(time.monotonic() + 2 * IDLE_S)
        rig.launches.check()
    assert rig.launches.is_parked
    assert has_none_waiting(rig)
    assert rig.quiet.are_over(0)
    rig.launches.close()
    assert rig.gpu.num_enqueued == 0


def test_a_step_wakes_its_session(rig: Rig) -> None:
    rig.gpu.count()
    rig.launches.look(time.monotonic())
    assert not rig.launches.is_parked
    assert rig.done.get(timeout=PATIENCE_S) == StepsDone(1, NUM_REQS, 7)
    assert rig.launches.num_done == 1
    rig.park()
    rig.step()
    assert rig.gpu.served == [1, 2]


def test_a_keeper_wakes_and_parks_sessions_by_itself(rig: Rig) -> None:
    keeper = Keeper()
    keeper.keep(rig.launches)
    for number in range(1, 4):
        rig.gpu.count()
        rig.until_done(number)
        rig.gpu.until(lambda: not rig.gpu._waiting, "an idle session is not parked")
        assert rig.quiet.are_over(PATIENCE_S)
    keeper.forget(rig.launches)
    assert rig.gpu.served == [1, 2, 3]


def test_a_session_goes_on_where_the_one_before_has_ended() -> None:
    """With a number of more than 32 bits, of which these alone wake a session."""
    num_done = (1 << 32) + 7
    rig = Rig(num_done)
    rig.launches.look(time.monotonic())
    assert rig.launches.is_parked
    assert rig.launches.num_done == num_done
    rig.step(2)
    assert rig.gpu.served == [num_done + 1, num_done + 2]
    rig.close()


def test_books_of_a_session_begin_anew() -> None:
    memory = bytearray(256)
    view = memoryview(memory).cast("Q")
    other, books = Books(view[:16], 4096), Books(view[16:], 4224)
    books.revoke(9)
    assert books.read(words.REVOKED) == 9
    assert not any(memory[:128])
    books.start((1 << 40) + 3)
    assert [books.read(word) for word in range(8)] == [0, (1 << 40) + 3, (1 << 40) + 3, 0, 0, 0, 0, 0]
    assert not any(memory[:128])
    assert other.address == 4096
    assert books.address == 4224


def test_no_more_launches_are_queued_than_one_that_waits_and_some_behind_it(rig: Rig) -> None:
    rig.step(50)
    rig.gpu.until(lambda: len(rig.gpu._waiting) == AHEAD, "too few are queued")
    assert rig.gpu.most_waiting == AHEAD
    assert rig.gpu.served == [*range(1, 51)]
    assert rig.gpu.num_enqueued == 50 + AHEAD


def test_an_idle_session_holds_up_nobody(rig: Rig) -> None:
    before = time.monotonic()
    rig.step()
    rig.launches.look(before)  # that a step came is not long ago
    assert not rig.launches.is_parked
    assert not rig.quiet.are_over(0)
    assert rig.cache._num_holders == 2
    rig.park()
    assert rig.cache._num_holders == 1
    assert rig.gpu.num_waiting == 0
    assert not rig.failed.qsize()


def test_a_step_that_ended_renews_the_lease(rig: Rig) -> None:
    rig.cache.expires_at = 0.0
    rig.step()
    assert rig.cache.expires_at > time.monotonic()


def test_a_moment_is_found_while_a_session_waits_for_a_step(rig: Rig) -> None:
    rig.step()
    for number in range(2, 5):
        with rig.quiet.moment(PATIENCE_S) as is_quiet:
            assert is_quiet
            assert rig.gpu.num_waiting == 0
            rig.gpu.was_enqueued.clear()
            rig.gpu.count()
            rig.launches.look(time.monotonic())
            assert has_none_waiting(rig)
        rig.until_done(number)
    assert rig.gpu.served == [1, 2, 3, 4]


def test_a_moment_waits_for_the_end_of_a_step_that_has_come(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet_module, "_STALLED_S", PATIENCE_S)
    rig.begun_but_held()
    found = threading.Event()

    def look_for_a_moment() -> None:
        with rig.quiet.moment(PATIENCE_S) as is_quiet:
            assert is_quiet
            assert rig.gpu.served == [1]
            found.set()

    looking = Doing(look_for_a_moment)
    rig.gpu.until(lambda: rig.books.read(words.REVOKED), "launches are not asked to leave")
    rig.gpu.count()  # the next comes too late for the launch behind the first
    assert not found.wait(0.03)
    rig.gpu.let_end()
    looking.result()
    rig.until_done(2)


def test_a_pause_waits_for_the_steps_before_it(rig: Rig) -> None:
    rig.step()
    rig.begun_but_held(2)
    pausing = Doing(lambda: rig.launches.pause(after=3))
    assert not pausing.is_over.wait(0.03)
    rig.gpu.let_end()
    rig.until_done(2)
    assert not pausing.is_over.wait(0.03)
    rig.gpu.count()
    pausing.result()
    assert rig.gpu.served == [1, 2, 3]
    assert rig.launches.num_done == 3
    assert rig.quiet.are_over(0)
    rig.gpu.was_enqueued.clear()
    rig.gpu.count()
    rig.launches.look(time.monotonic())
    assert has_none_waiting(rig)
    rig.launches.go_on()
    rig.until_done(4)


def test_a_pause_that_is_for_no_step_lets_waiting_launches_leave(rig: Rig) -> None:
    rig.step()
    rig.launches.pause(after=1)
    assert rig.gpu.num_waiting == 0
    assert rig.quiet.are_over(0)
    rig.launches.go_on()
    rig.step()
    assert rig.gpu.served == [1, 2]


def test_a_pause_wakes_a_session_whose_step_nobody_has_seen_yet(rig: Rig) -> None:
    rig.gpu.count()
    rig.launches.pause(after=1)  # no keeper looks at it
    assert rig.gpu.served == [1]
    rig.launches.go_on()


def test_a_pause_waits_for_a_step_that_comes_before_its_launch_is_revoked(rig: Rig) -> None:
    rig.begun_but_held()
    pausing = Doing(lambda: rig.launches.pause(after=0))
    rig.gpu.until(lambda: rig.books.read(words.REVOKED), "the launch behind is not revoked")
    assert not pausing.is_over.wait(0.03)
    rig.gpu.let_end()
    pausing.result()
    assert rig.launches.num_done == 1
    rig.launches.go_on()


def test_pauses_within_each_other_end_with_the_last(rig: Rig) -> None:
    rig.launches.pause(after=0)
    rig.launches.pause(after=0)
    rig.launches.go_on()
    rig.gpu.count()
    rig.launches.look(time.monotonic())
    assert has_none_waiting(rig)
    rig.launches.go_on()
    rig.until_done(1)


def test_a_pause_learns_at_once_that_its_step_is_done(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's message comes when it has the output, and that is before the launches' thread has seen the end."""
    monkeypatch.setattr(launches_module, "_PERIOD_S", PATIENCE_S)
    rig.begun_but_held()
    pausing = Doing(lambda: rig.launches.pause(after=1))
    assert not pausing.is_over.wait(0.03)
    rig.gpu.let_end()
    rig.until_done(1)
    is_over = pausing.is_over.wait(1)
    with rig.launches._changed:
        rig.launches._changed.notify_all()
    pausing.result()
    rig.launches.go_on()
    assert is_over


def test_a_pause_for_a_step_that_never_comes_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches_module, "STEP_S", 0.05)
    rig.step()
    with pytest.raises(DeadlineExceeded, match="resident step 3 is to come before this one, but only 1 are") as refused:
        rig.launches.pause(after=3)
    assert refused.value.field == "after_resident"
    rig.step()  # it was no pause
    assert not rig.failed.qsize()


def test_a_session_that_fails_is_let_go_and_told_once(rig: Rig) -> None:
    rig.begun_but_held()
    pausing = Doing(lambda: rig.launches.pause(after=2))
    first = CacheLost("it has gone")
    rig.launches.fail(first)
    rig.launches.fail(Unauthenticated("and nobody is heard"))
    assert rig.flags.is_stopped
    assert rig.failed.get(timeout=PATIENCE_S) is first
    assert not rig.failed.qsize()
    with pytest.raises(CacheLost, match="it has gone"):
        pausing.result()
    with pytest.raises(CacheLost, match="it has gone"):
        rig.launches.pause(after=0)
    assert rig.quiet.are_over(PATIENCE_S)
    assert rig.gpu.num_waiting == 0
    rig.gpu.was_enqueued.clear()
    rig.gpu.count()
    rig.launches.look(time.monotonic())
    assert has_none_waiting(rig)


def test_a_pause_of_a_session_whose_waits_were_ended_is_refused(rig: Rig) -> None:
    rig.flags.stop()
    with pytest.raises(DeadlineExceeded, match="the worker has gone, or took too long"):
        rig.launches.pause(after=1)


def test_a_session_that_may_not_go_on_ends_with_the_reason(rig: Rig) -> None:
    rig.step()
    rig.launches.check()
    assert not rig.failed.qsize()

    def refuse() -> None:
        raise Unauthenticated("the token was removed")

    rig.refuse = refuse
    rig.launches.check()
    with pytest.raises(Unauthenticated, match="the token was removed"):
        raise rig.failed.get(timeout=PATIENCE_S)
    assert rig.quiet.are_over(PATIENCE_S)


def test_a_cache_that_is_deleted_ends_the_session_and_lets_the_pages_go(rig: Rig) -> None:
    rig.step()
    assert not rig.quiet.are_over(0)
    rig.table.delete(rig.cache.info().cache, "a")
    with pytest.raises(CacheLost, match="was deleted"):
        raise rig.failed.get(timeout=PATIENCE_S)
    assert rig.quiet.are_over(PATIENCE_S)
    assert rig.cache._num_holders == 0
    assert rig.flags.is_stopped


def test_pages_of_a_deleted_cache_stay_until_the_step_that_stores_there_is_done(rig: Rig) -> None:
    rig.begun_but_held()
    rig.table.delete(rig.cache.info().cache, "a")
    assert rig.cache._num_holders == 1
    rig.gpu.let_end()
    assert isinstance(rig.failed.get(timeout=PATIENCE_S), CacheLost)
    assert rig.cache._num_holders == 0
    assert rig.gpu.served == [1]


def test_a_cache_that_is_deleted_ends_a_parked_session_too(rig: Rig) -> None:
    rig.step()
    rig.park()
    rig.table.delete(rig.cache.info().cache, "a")
    assert not rig.failed.qsize()
    rig.launches.check()
    assert isinstance(rig.failed.get(timeout=PATIENCE_S), CacheLost)


def test_launches_that_made_way_come_back_after_the_work_that_has_the_device(rig: Rig) -> None:
    rig.step()
    with rig.device:
        rig.launches.make_way()
        rig.gpu.until(lambda: not rig.gpu._waiting, "launches have not left")
        assert rig.comes_after.wait(PATIENCE_S)
        rig.gpu.was_enqueued.clear()
        rig.gpu.count()
        rig.launches.look(time.monotonic())
        assert has_none_waiting(rig)
        assert rig.num_came_after == 0
    rig.until_done(2)
    assert rig.num_came_after == 1
    rig.step()
    assert rig.num_came_after == 1


def test_who_made_way_while_it_was_parked_comes_after_the_work_once_it_is_woken(rig: Rig) -> None:
    with rig.device:
        rig.launches.make_way()
        rig.gpu.count()
        rig.launches.look(time.monotonic())
        assert rig.comes_after.wait(PATIENCE_S)
        assert has_none_waiting(rig)
    rig.until_done(1)
    assert rig.num_came_after == 1


def test_work_that_begins_while_launches_wait_for_other_work_is_waited_for_as_well(rig: Rig) -> None:
    rig.step()
    with rig.device:
        rig.launches.make_way()
        assert rig.comes_after.wait(PATIENCE_S)
        rig.launches.make_way()
        rig.gpu.was_enqueued.clear()
    rig.gpu.count()
    rig.until_done(2)
    assert rig.num_came_after == 2


def test_a_step_that_has_come_is_done_before_its_launches_make_way(rig: Rig) -> None:
    rig.begun_but_held()
    rig.launches.make_way()
    assert not rig.comes_after.wait(0.03)
    rig.gpu.let_end()
    assert rig.comes_after.wait(PATIENCE_S)
    assert rig.gpu.served == [1]


def test_a_session_that_cannot_come_after_others_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise CacheLost("nothing comes after that")

    monkeypatch.setattr(rig.launches, "_come_after", lost)
    rig.launches.make_way()
    rig.gpu.count()
    rig.launches.look(time.monotonic())
    assert isinstance(rig.failed.get(timeout=PATIENCE_S), CacheLost)
    assert rig.gpu.num_enqueued == 0


def test_a_step_that_does_not_end_in_time_ends_the_session(rig: Rig) -> None:
    rig.begun_but_held()
    now = time.monotonic()
    rig.launches.look(now)
    rig.launches.look(now + launches_module.STEP_S - 1)
    assert not rig.failed.qsize()
    for _ in range(2):
        rig.launches.look(now + launches_module.STEP_S + 1)
    with pytest.raises(DeadlineExceeded, match=r"resident step 1 has not ended, but must: .*every layer within 60 s"):
        raise rig.failed.get(timeout=PATIENCE_S)
    assert not rig.failed.qsize()
    assert rig.quiet.are_over(PATIENCE_S)  # it ended, as nothing waits any more


def test_each_step_has_the_whole_time(rig: Rig) -> None:
    rig.begun_but_held()
    now = time.monotonic()
    rig.launches.look(now)
    rig.gpu.let_end()
    rig.until_done(1)
    rig.begun_but_held(2)
    rig.launches.look(now + launches_module.STEP_S + 1)  # the first look at it
    rig.launches.look(now + 2 * launches_module.STEP_S)
    assert not rig.failed.qsize()


def test_a_step_that_came_while_its_session_was_parked_has_no_more_time_than_others(rig: Rig) -> None:
    """Of a worker that counts steps where the GPU looks, but not where a parked session is woken."""
    rig.step()
    rig.gpu.hold()
    rig.launches._wake = lambda: 1

    def come_just_before() -> None:
        rig.books.about_to_revoke = lambda: None
        rig.gpu.count()
        rig.gpu.until_begun(2)

    rig.books.about_to_revoke = come_just_before
    now = time.monotonic() + 2 * IDLE_S
    for later in (0, 1, launches_module.STEP_S + 2):
        rig.launches.look(now + later)
    assert [type(error) for error in told(rig.failed)] == [DeadlineExceeded]


def test_launches_whose_step_was_counted_are_not_revoked_because_the_gpu_is_busy(rig: Rig) -> None:
    rig.step()
    rig.launches._wake = lambda: 2  # the step was counted, but the launch's first gate has no turn on the GPU yet
    rig.launches.look(time.monotonic() + 2 * IDLE_S)
    assert rig.books.read(words.REVOKED) == 0


def test_a_session_whose_step_took_long_is_not_idle_when_it_ends(rig: Rig) -> None:
    """Its thread looks every few milliseconds, and the keeper may look in between."""
    rig.launches._look_s = PATIENCE_S
    rig.begun_but_held()
    now = time.monotonic() + 2 * IDLE_S
    rig.launches.look(now)
    rig.gpu.let_end()
    rig.gpu.until_served(1)
    rig.launches.look(now + IDLE_S / 2)
    assert not rig.launches.is_parked


def test_a_step_that_runs_is_told_to_be_under_way(rig: Rig) -> None:
    assert not rig.launches.is_under_way
    rig.begun_but_held()
    assert rig.launches.is_under_way
    rig.launches.look(time.monotonic() + 2 * IDLE_S)
    assert not rig.launches.is_parked  # nor is it idle
    rig.gpu.let_end()
    rig.until_done(1)
    assert not rig.launches.is_under_way


def test_refused_steps_are_told_once_until_the_refusal_was_taken_back(rig: Rig) -> None:
    rig.step(2)
    rig.gpu.refused = 3
    rig.step(3)
    assert rig.refused.get(timeout=PATIENCE_S) == 3
    rig.launches.pause(after=5)
    rig.launches.go_on()  # of a step by message, which takes nothing back
    rig.step()
    rig.launches.pause(after=6)
    assert not rig.refused.qsize()
    rig.gpu.refused = 0
    rig.books.write(words.REFUSED, 0)
    rig.launches.go_on(resumed=True)
    rig.step()
    rig.launches.pause(after=7)
    assert not rig.refused.qsize()
    rig.launches.go_on()
    rig.gpu.refused = 8
    rig.step(2)
    assert rig.refused.get(timeout=PATIENCE_S) == 8
    assert not rig.refused.qsize()
    assert rig.gpu.served == [*range(1, 10)]  # refused ones are done, too


def test_a_launch_that_fails_ends_the_session(rig: Rig) -> None:
    rig.gpu.to_fail_at = 1
    rig.gpu.count()
    rig.launches.look(time.monotonic())
    assert isinstance(rig.failed.get(timeout=PATIENCE_S), ZeroDivisionError)
    assert rig.flags.is_stopped
    assert rig.quiet.are_over(PATIENCE_S)
    with pytest.raises(ZeroDivisionError):
        rig.launches.pause(after=0)


def test_pages_are_held_until_all_launches_of_a_session_that_failed_have_left(rig: Rig) -> None:
    """The first launch has its step when the one behind it cannot be enqueued."""
    rig.gpu.hold()
    rig.gpu.count()
    rig.gpu.to_fail_at = 2
    holders: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()
    rig.gpu.ends = lambda: holders.put((rig.cache._num_holders, rig.quiet.are_over(0)))
    rig.launches.look(time.monotonic())
    assert isinstance(rig.failed.get(timeout=PATIENCE_S), ZeroDivisionError)
    assert holders.get(timeout=PATIENCE_S) == (2, False)


def test_an_error_of_who_is_told_ends_the_session(rig: Rig) -> None:
    def fails(done: StepsDone) -> None:
        raise ZeroDivisionError

    rig.told_done = fails
    rig.gpu.count()
    rig.launches.look(time.monotonic())
    assert isinstance(rig.failed.get(timeout=PATIENCE_S), ZeroDivisionError)
    rig.until_parked()
    assert rig.gpu.num_waiting == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pause_ends_though_no_launch_can_be_waited_for(rig: Rig) -> None:
    """As after a fault of the GPU: whatever is asked of the driver fails."""
    rig.begun_but_held()

    def fails() -> None:
        raise ZeroDivisionError

    rig.gpu.ends = fails
    pausing = Doing(lambda: rig.launches.pause(after=0))
    rig.gpu.let_end()
    assert isinstance(rig.failed.get(timeout=PATIENCE_S), ZeroDivisionError)
    assert pausing.is_over.wait(1)
    with pytest.raises(ZeroDivisionError):
        pausing.result()


def test_a_session_whose_waits_were_ended_does_not_turn_in_circles(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, num_turns, turns_in_circles = rig.quiet.waits, 0, threading.Event()

    def counted(leave: Callable[[], None]) -> Any:
        nonlocal num_turns
        num_turns += 1
        if num_turns > 100:
            turns_in_circles.set()
        return waits(leave)

    monkeypatch.setattr(rig.quiet, "waits", counted)
    rig.flags.stop()
    rig.gpu.count()
    rig.launches.look(time.monotonic())
    assert not turns_in_circles.wait(0.1)


def _new(rig: Rig) -> None:
    pass


def _waiting(rig: Rig) -> None:
    rig.step()


def _parked(rig: Rig) -> None:
    rig.step()
    rig.park()


def _paused(rig: Rig) -> None:
    rig.step()
    rig.launches.pause(after=1)


def _failed(rig: Rig) -> None:
    rig.step()
    rig.launches.fail(CacheLost("it has gone"))


def _cache_closed(rig: Rig) -> None:
    rig.step()
    rig.table.delete(rig.cache.info().cache, "a")


def _left(rig: Rig) -> None:
    rig.step()
    rig.launches.leave()


def _under_way(rig: Rig) -> None:
    """As `Channel.drain` does before: nothing waits any more."""
    rig.begun_but_held()
    rig.flags.stop()


@pytest.mark.parametrize("state", [_new, _waiting, _parked, _paused, _failed, _cache_closed, _left, _under_way])
def test_closing_ends_the_thread_whatever_it_does(state: Callable[[Rig], None]) -> None:
    rig = Rig()
    state(rig)
    Doing(rig.launches.close).result()
    assert not rig.launches._thread.is_alive()
    assert rig.gpu.num_waiting == 0
    assert rig.quiet.are_over(0)
    assert rig.cache._num_holders == (0 if rig.cache.is_closed else 1)
    rig.gpu.count()
    rig.launches.look(time.monotonic())
    assert rig.gpu.num_waiting == 0
    rig.close()  # once more does no harm


def test_closing_waits_for_the_end_of_a_moment_and_of_other_work() -> None:
    for make_way in (False, True):
        rig = Rig()
        with rig.quiet.moment(0) as is_quiet, rig.device:
            assert is_quiet
            if make_way:
                rig.launches.make_way()
            rig.gpu.count()
            rig.launches.look(time.monotonic())
            closing = Doing(rig.launches.close)
            assert has_none_waiting(rig)
        closing.result()
        assert rig.quiet.are_over(0)
        rig.close()


class Drawn(NamedTuple):
    """How often random operations of each kind come.

    Attributes:
        weights: of steps, pauses, moments, ways made and idle looks.
        has_keeper: whether a thread looks after the session, too.
    """

    weights: tuple[int, int, int, int, int]
    has_keeper: bool


@pytest.mark.parametrize(
    ("seed", "drawn"),
    [
        (1, Drawn((6, 1, 1, 1, 1), False)),
        (2, Drawn((6, 1, 1, 1, 1), True)),
        (3, Drawn((3, 1, 3, 3, 3), True)),
        (4, Drawn((3, 4, 1, 1, 4), False)),
        (5, Drawn((30, 1, 1, 1, 1), True)),
    ],
)
def test_every_step_is_served_once_and_in_order_whatever_else_happens(
    rig: Rig, seed: int, drawn: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches_module, "_PERIOD_S", 0.001)  # of pauses, of which there are very many
    monkeypatch.setattr(quiet_module, "_STALLED_S", PATIENCE_S)
    chance, launches, gpu, keeper = random.Random(seed), rig.launches, rig.gpu, Keeper()

    def count() -> None:
        if gpu.is_free:
            gpu.count()
            if chance.random() < 0.5:
                launches.look(time.monotonic())

    def step() -> None:
        if chance.random() < 0.8:
            launches.look(time.monotonic())
            gpu.until(lambda: gpu.is_free, "the step before has not begun")
        count()

    def pause() -> None:
        after = chance.randint(max(0, gpu.num_counted - 2), gpu.num_counted)
        launches.pause(after)
        assert launches.num_done >= after
        assert gpu.num_waiting == 0
        num_enqueued = gpu.num_enqueued
        count()
        assert gpu.num_enqueued == num_enqueued
        launches.go_on()

    def moment() -> None:
        with rig.quiet.moment(PATIENCE_S) as is_quiet:
            assert is_quiet
            assert gpu.num_waiting == 0
            num_enqueued = gpu.num_enqueued
            count()
            assert gpu.num_enqueued == num_enqueued

    def make_way() -> None:
        with rig.device:
            launches.make_way()
            num_enqueued = gpu.num_enqueued
            count()
            launches.look(time.monotonic())
            assert gpu.num_enqueued == num_enqueued

    def idle() -> None:
        launches.look(time.monotonic() + 2 * IDLE_S)

    if drawn.has_keeper:
        keeper.keep(launches)
    for work in chance.choices([step, pause, moment, make_way, idle], drawn.weights, k=1500):
        work()
    launches.look(time.monotonic())
    launches.pause(gpu.num_counted)
    if drawn.has_keeper:
        keeper.forget(launches)
    assert gpu.num_counted > 300
    assert gpu.served == [*range(1, gpu.num_counted + 1)]
    assert gpu.most_waiting <= AHEAD
    assert sum(done.count for done in told(rig.done)) == launches.num_done == gpu.num_counted
    assert not rig.failed.qsize()
    launches.go_on()


def test_steps_are_served_while_others_pause_and_look_for_moments_all_the_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, with a thread each, so that things happen in between of one another."""
    monkeypatch.setattr(quiet_module, "_STALLED_S", PATIENCE_S)
    monkeypatch.setattr(launches_module, "_PERIOD_S", 0.001)
    launches, gpu, keeper, is_over, num_steps = rig.launches, rig.gpu, Keeper(), threading.Event(), 300
    keeper.keep(launches)

    def until_over(work: Callable[[random.Random], None], seed: int) -> Doing:
        chance = random.Random(seed)

        def run() -> None:
            while not is_over.wait(chance.random() * 0.002):
                work(chance)

        return Doing(run)

    def pause(chance: random.Random) -> None:
        launches.pause(after=launches.num_done)
        assert gpu.num_waiting == 0
        launches.go_on()

    def moment(chance: random.Random) -> None:
        with rig.quiet.moment(PATIENCE_S) as is_quiet:
            assert is_quiet
            assert gpu.num_waiting == 0

    def make_way(chance: random.Random) -> None:
        with rig.device:
            launches.make_way()
            num_enqueued = gpu.num_enqueued
            is_over.wait(chance.random() * 0.001)
            assert gpu.num_enqueued == num_enqueued

    others = [until_over(work, seed) for seed, work in enumerate((pause, moment, make_way))]
    try:
        for step in range(1, num_steps + 1):
            gpu.until(lambda: gpu.is_free, "the step before has not begun")
            gpu.count()
            if step % 50 == 0:
                gpu.until_served(step)
                launches.look(time.monotonic() + 2 * IDLE_S)
        gpu.until_served(num_steps)
    finally:
        is_over.set()
    for other in others:
        other.result()
    keeper.forget(launches)
    launches.pause(after=num_steps)
    with suppress(AttndError):
        launches.check()
    assert gpu.served == [*range(1, num_steps + 1)]
    assert not rig.failed.qsize()

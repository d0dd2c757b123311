"""What waits for the executor: whose turn it is, and who is refused."""

from __future__ import annotations

import threading
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnd.errors import Exhausted
from attnd_server.execution.queue import MAX_RETRY_S, MIN_RETRY_S, WorkQueue
from attnd_server.execution.work import CacheWork, Job, new_cache


def job(cache: bytes = b"") -> Job:
    def work() -> bytes:
        return cache

    return Job(CacheWork(cache, "", work) if cache else work, lambda result, error: None, float("inf"), 0.0)


def taken(queue: WorkQueue) -> list[Job]:
    jobs = []
    while (each := queue.take(0)) is not None:
        jobs.append(each)
        queue.finished(0.01)
    return jobs


def test_a_flood_makes_others_wait_for_one_call_of_it() -> None:
    queue = WorkQueue(100, 100)
    flood, other, making = [job(b"a") for _ in range(50)], [job(b"b") for _ in range(2)], job()
    for each in [*flood, *other, making]:
        queue.put(each)
    assert taken(queue) == [flood[0], other[0], making, flood[1], other[1], *flood[2:]]


def test_who_was_just_served_stands_behind_who_comes() -> None:
    queue = WorkQueue(100, 100)
    first, second, other = job(b"a"), job(b"a"), job(b"b")
    queue.put(first)
    queue.put(second)
    assert queue.take(0) is first
    queue.put(other)
    queue.finished(0.01)
    assert taken(queue) == [other, second]
    assert queue.depth == 0


def test_who_was_served_some_time_ago_stands_before_who_comes() -> None:
    queue = WorkQueue(100, 100)
    first, second, other = job(b"a"), job(b"a"), job(b"b")
    queue.put(first)
    queue.put(second)
    assert queue.take(0) is first
    queue.finished(0.01)
    queue.put(other)
    assert taken(queue) == [second, other]


def test_a_principal_with_many_caches_makes_another_wait_for_one_call_of_them() -> None:
    queue = WorkQueue(100, 100)
    flood = [owned("alice", bytes([cache])) for cache in range(5) for _ in range(2)]
    bobs = [owned("bob", b"d"), owned("bob", b"d"), owned("bob", b"e")]
    for each in flood:
        queue.put(each)
    assert queue.take(0) is flood[0]
    for each in bobs:  # they come while it runs
        queue.put(each)
    queue.finished(0.01)
    assert taken(queue) == [bobs[0], flood[2], bobs[2], flood[4], bobs[1], *flood[6::2], *flood[1::2]]


def test_the_rest_of_long_work_comes_after_all_others_and_first_of_its_cache() -> None:
    queue = WorkQueue(100, 100)
    long, behind, another, bobs = owned("alice", b"a"), owned("alice", b"a"), owned("alice", b"b"), owned("bob", b"c")
    for each in (long, behind, another, bobs):
        queue.put(each)
    assert queue.take(0) is long
    queue.put_back(long)
    queue.finished(0.01)
    assert taken(queue) == [bobs, another, long, behind]


def test_those_who_joined_have_had_their_turns() -> None:
    queue = WorkQueue(100, 100)
    alices, bobs, carols = ([owned(name, name.encode()) for _ in range(2)] for name in ("alice", "bob", "carol"))
    for each in (*alices, *bobs, *carols):
        queue.put(each)
    assert queue.take(0) is alices[0]
    assert queue.take_others(b"alice", lambda each: each is bobs[0], lambda: True) == [bobs[0]]
    queue.finished(0.01)
    assert taken(queue) == [carols[0], alices[1], bobs[1], carols[1]]
    assert queue.depth == 0
    assert not queue.waiting()


@given(st.lists(st.one_of(st.sampled_from([b"a", b"b", b"c", b""]), st.none()), max_size=60))
def test_order_holds_within_a_cache_and_nobody_is_passed_by_twice(events: list[bytes | None]) -> None:
    queue = WorkQueue(100, 100)
    waiting: dict[bytes, deque[Job]] = {}
    passed: dict[bytes, list[bytes]] = {}  # lanes that were served since a lane's first job came first
    for event in [*events, *[None] * len(events)]:
        if event is not None:
            new = job(event)
            queue.put(new)
            waiting.setdefault(event, deque()).append(new)
            passed.setdefault(event, [])
            continue
        got = queue.take(0)
        if got is None:
            assert not any(waiting.values())
            continue
        queue.finished(0.0)
        assert waiting[got.cache_id].popleft() is got
        for cache, others in passed.items():
            others.append(got.cache_id)
            if cache == got.cache_id or not waiting[cache]:
                others.clear()
            assert len(others) == len(set(others))


@given(st.lists(st.one_of(st.tuples(st.sampled_from("ABC"), st.sampled_from([b"a", b"b"])), st.none()), max_size=60))
def test_no_principal_is_passed_by_twice_whoever_comes_while_one_has_its_turn(
    events: list[tuple[str, bytes] | None],
) -> None:
    queue = WorkQueue(100, 100)
    waiting: dict[str, list[Job]] = {"A": [], "B": [], "C": []}
    passed: dict[str, list[str]] = {"A": [], "B": [], "C": []}  # that had turns since one's first job came
    for event in [*events, *[None] * len(events)]:
        if event is not None:
            new = owned(event[0], event[0].encode() + event[1])
            queue.put(new)
            waiting[event[0]].append(new)
            continue
        queue.finished(0.0)  # what was taken had its turn until now
        got = queue.take(0)
        if got is None:
            assert not any(waiting.values())
            continue
        of_cache = [each for each in waiting[got.principal] if each.cache_id == got.cache_id]
        assert of_cache[0] is got
        waiting[got.principal].remove(got)
        for principal, others in passed.items():
            others.append(got.principal)
            if principal == got.principal or not waiting[principal]:
                others.clear()
            assert len(others) == len(set(others))


def test_limits_name_the_use_and_say_when_to_come_back() -> None:
    queue = WorkQueue(5, 3)
    for _ in range(5):  # what belongs to no cache has no share
        queue.put(job())
    with pytest.raises(Exhausted, match="5 calls wait, but the queue's limit is 5; retry in 1 ms") as refused:
        queue.put(job())
    assert refused.value.retry_after_s == MIN_RETRY_S
    taken(queue)  # 10 ms each
    for _ in range(3):
        queue.put(job(b"a"))
    one_cache = "3 calls of this cache wait, but the limit of one cache is 3; retry in 30 ms"
    with pytest.raises(Exhausted, match=one_cache) as refused:
        queue.put(job(b"a"))
    assert refused.value.retry_after_s == pytest.approx(0.03)
    queue.put(job(b"b"))
    queue.put(job(b"c"))
    with pytest.raises(Exhausted, match="5 calls wait, but the queue's limit is 5; retry in 50 ms"):
        queue.put(job(b"d"))
    queue.put(job(b"a"), always=True)
    assert queue.depth == 6
    assert len(taken(queue)) == 6


def test_the_hint_follows_how_long_calls_take_and_has_an_end() -> None:
    queue = WorkQueue(1, 1)
    hints = []
    for seconds in (0.1, 0.2, 0.2, 1000.0):
        queue.put(job())
        queue.take(0)
        queue.finished(seconds)
        queue.put(job())
        with pytest.raises(Exhausted) as refused:
            queue.put(job())
        hints.append(refused.value.retry_after_s)
        queue.take(0)
        queue.finished(hints[-1])
    assert hints == pytest.approx([0.1, 0.11, 0.119, MAX_RETRY_S])


def test_a_removed_job_leaves_its_place_and_never_comes() -> None:
    queue = WorkQueue(2, 2)
    first, second, third = job(b"a"), job(b"a"), job(b"b")
    queue.put(first)
    queue.put(second)
    assert queue.remove(first)
    queue.put(third)
    assert not queue.remove(first)
    assert queue.depth == 2
    assert [queue.take(0) for _ in range(4)] == [second, third, None, None]
    assert not queue.remove(second)


def test_it_is_idle_once_what_was_taken_is_finished() -> None:
    queue = WorkQueue(2, 2)
    assert queue.is_idle
    queue.put(job())
    assert not queue.is_idle
    queue.take(0)
    assert not queue.is_idle
    queue.finished(0.0)
    assert queue.is_idle


def test_closing_ends_a_wait() -> None:
    queue = WorkQueue(2, 2)
    got: list[Job | None] = []
    waiting = threading.Thread(target=lambda: got.append(queue.take(60)))
    waiting.start()
    queue.close()
    waiting.join(30)
    assert got == [None]


def owned(owner: str, cache: bytes = b"") -> Job:
    def work() -> bytes:
        return cache

    kind = CacheWork(cache, owner, work) if cache else new_cache(owner, work)
    return Job(kind, lambda result, error: None, float("inf"), 0.0)


def test_one_principal_leaves_places_to_another() -> None:
    queue = WorkQueue(6, 6, 3)
    jobs = [owned("alice", b"a"), owned("alice", b"b"), owned("alice")]
    for each in jobs:
        queue.put(each)
    for more in (owned("alice", b"a"), owned("alice", b"c"), owned("alice")):
        with pytest.raises(Exhausted, match="3 calls of this principal wait, but a principal's limit is 3") as refused:
            queue.put(more)
        assert refused.value.retry_after_s is not None
    bobs = [owned("bob", b"d"), owned("bob"), owned("bob")]
    for each in bobs:
        queue.put(each)
    with pytest.raises(Exhausted, match="6 calls wait, but the queue's limit is 6"):
        queue.put(owned("carol", b"e"))
    # Each has its turn: principals, and of each its caches, and what makes one.
    assert taken(queue) == [each for pair in zip(jobs, bobs, strict=True) for each in pair]


def test_a_principal_that_was_served_may_come_again() -> None:
    queue = WorkQueue(4, 4, 1)
    first = owned("alice", b"a")
    queue.put(first)
    assert queue.take(0) is first
    queue.put(owned("alice", b"a"))
    with pytest.raises(Exhausted):
        queue.put(owned("alice", b"a"))


def test_turns_of_warm_ups_are_nobodys() -> None:
    queue = WorkQueue(4, 4, 1)
    queue.put(job(), always=True)
    queue.put(job())
    queue.put(owned("alice", b"a"))
    assert queue.depth == 3

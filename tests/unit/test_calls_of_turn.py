"""Short calls that streams bring in one turn of the event loop run together; what cannot waits for the executor."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from attnd.errors import Exhausted
from attnd_server.attention.metadata import AttentionOptions
from attnd_server.execution.executor import Executor
from attnd_server.execution.step import Call, Step
from attnd_server.execution.work import Job
from attnd_server.rpc.calls_of_turn import CallsOfTurn, in_turns


class FakeCall(Call):
    """A call that has a name."""

    name = b""
    is_small = True
    cache_id = b""
    principal = ""


def call(name: bytes, *, is_small: bool = True) -> Call:
    made = FakeCall(cast(Step, None), 0, cast(AttentionOptions, None), None, None, None)
    made.name, made.is_small, made.cache_id, made.principal = name, is_small, name, "alice"
    return made


class FakeExecutor:
    """Runs what `runs` says at once, and what was submitted on another thread."""

    def __init__(self, runs: Callable[[Job], bool]) -> None:
        self.runs = runs
        self.together: list[list[bytes]] = []
        self.submitted: list[tuple[bytes, float | None]] = []
        self.cancelled: list[bytes] = []

    def settle_now(self, jobs: Sequence[Job], most_s: float) -> Sequence[Job]:
        assert most_s < 0.01
        self.together.append([name_of(job.work) for job in jobs])
        ready = [job for job in jobs if self.runs(job)]
        for job in ready:
            name = name_of(job.work)
            job.done(*((None, ValueError("wrong")) if name == b"wrong" else (name, None)))
        return [job for job in jobs if job not in ready]

    def submit(self, work: Any, done: Any, timeout_s: float | None = None, is_wanted: Any = None) -> Job:
        if work.name == b"full":
            raise Exhausted("the queue is full")
        self.submitted.append((work.name, timeout_s))
        threading.Timer(0.01, done, [work.name + b" later", None]).start()
        return Job(work, done, 0.0, 0.0)

    def cancel(self, job: Job) -> None:
        self.cancelled.append(name_of(job.work))


def name_of(work: Any) -> bytes:
    return cast(bytes, work.name)


def serve(executor: FakeExecutor, *calls: Call, timeout_s: float | None = None) -> list[Any]:
    """What comes of calls that streams have brought by the same turn."""

    async def run() -> list[Any]:
        turn = CallsOfTurn(cast(Executor, executor))

        async def one(each: Call) -> bytes:
            answer = await turn.answer(each, timeout_s, None)
            return answer if isinstance(answer, bytes) else await answer

        return await asyncio.gather(*map(one, calls), return_exceptions=True)

    return asyncio.run(run())


def test_calls_of_one_turn_run_together_and_each_gets_its_own() -> None:
    executor = FakeExecutor(lambda job: True)
    answers = serve(executor, call(b"a"), call(b"wrong"), call(b"b"))
    assert answers[0] == b"a"
    assert isinstance(answers[1], ValueError)
    assert answers[2] == b"b"
    assert executor.together == [[b"a", b"wrong", b"b"]]
    assert executor.submitted == []


def test_what_the_device_has_no_time_for_waits_for_the_executor() -> None:
    executor = FakeExecutor(lambda job: name_of(job.work) == b"a")
    answers = serve(executor, call(b"a"), call(b"b"), call(b"full"), timeout_s=5.0)
    assert answers[:2] == [b"a", b"b later"]
    assert isinstance(answers[2], Exhausted)
    ((name, timeout_s),) = executor.submitted
    assert name == b"b"
    assert timeout_s == pytest.approx(5.0, abs=1.0)


def test_a_long_call_is_none_of_them() -> None:
    executor = FakeExecutor(lambda job: True)
    assert serve(executor, call(b"long", is_small=False)) == [b"long later"]
    assert executor.together == []


def test_a_call_whose_stream_has_gone_is_not_run() -> None:
    executor = FakeExecutor(lambda job: True)

    async def run() -> None:
        turn = CallsOfTurn(cast(Executor, executor))
        gone, other = (asyncio.ensure_future(turn.answer(call(name), None, None)) for name in (b"gone", b"other"))
        await asyncio.sleep(0)  # both have come
        gone.cancel()
        assert await other == b"other"
        with pytest.raises(asyncio.CancelledError):
            await gone

    asyncio.run(run())
    assert executor.together == [[b"other"]]


def test_a_stream_that_goes_when_its_call_was_just_left_to_the_executor_takes_it_back() -> None:
    executor = FakeExecutor(lambda job: False)

    async def run() -> None:
        turn = CallsOfTurn(cast(Executor, executor))
        gone = asyncio.ensure_future(turn.answer(call(b"gone"), None, None))
        while not executor.submitted:
            await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await asyncio.sleep(0.1)  # what was submitted ends, and nobody listens

    asyncio.run(run())
    assert executor.cancelled == [b"gone"]


def test_calls_of_the_next_turn_run_after_those_of_this_one() -> None:
    executor = FakeExecutor(lambda job: True)

    async def run() -> None:
        turn = CallsOfTurn(cast(Executor, executor))
        for name in (b"a", b"b"):
            assert await turn.answer(call(name), None, None) == name

    asyncio.run(run())
    assert executor.together == [[b"a"], [b"b"]]


def test_nobody_waits_for_ever_for_what_cannot_be_run() -> None:
    def fail(job: Job) -> bool:
        raise ZeroDivisionError

    answers = serve(FakeExecutor(fail), call(b"a"), call(b"b"))
    assert [type(each) for each in answers] == [ZeroDivisionError, ZeroDivisionError]


def test_principals_take_turns() -> None:
    def job(principal: str, name: str) -> Job:
        work = cast(Call, SimpleNamespace(name=name))
        made = Job(work, lambda *_: None, 0.0, 0.0)
        made.principal = principal
        return made

    flood = [job("mallory", f"m{number}") for number in range(5)]
    order = in_turns([*flood, job("alice", "a0"), job("bob", "b0"), job("alice", "a1")])
    assert [cast(Any, each.work).name for each in order] == ["m0", "a0", "b0", "m1", "a1", "m2", "m3", "m4"]

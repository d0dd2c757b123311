"""The executor: one piece of work at a time, in turn, on its thread or on that of a caller."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch

import attnd
from attnd.errors import DeadlineExceeded, Disconnected, Exhausted
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.execution import runner
from attnd_server.execution.executor import Executor
from attnd_server.execution.step import Call, Result, Step
from attnd_server.execution.work import CacheWork, Job, Work
from attnd_server.inproc import InprocTransport
from attnd_server.kv.caches import CacheTable

CPU = torch.device("cpu")


@pytest.fixture
def table() -> CacheTable:
    return CacheTable(ServerConfig(), CPU, kv_bytes=1 << 20)


@pytest.fixture
def executor(table: CacheTable) -> Iterator[Executor]:
    running = Executor(CPU, table, ServerConfig(max_queue_depth=2))
    yield running
    running.close()


def test_executor_runs_in_order_and_gives_back_errors(executor: Executor) -> None:
    settled: list[object] = []
    finished = threading.Event()
    executor.submit(lambda: b"one", lambda *result: settled.append(result))
    executor.submit(lambda: bytes(1 // 0), lambda *result: (settled.append(type(result[1])), finished.set()))
    assert finished.wait(5)
    assert settled == [(b"one", None), ZeroDivisionError]


def test_executor_refuses_beyond_its_depth_and_after_the_deadline(executor: Executor) -> None:
    release, settled = threading.Event(), threading.Semaphore(0)
    errors: list[BaseException | None] = []

    def done(result: bytes | None, error: BaseException | None) -> None:
        errors.append(error)
        settled.release()

    executor.submit(lambda: bytes(release.wait(5)), done)
    while executor.queue_depth:
        time.sleep(0.001)
    executor.submit(lambda: b"", done, timeout_s=0.01)
    executor.submit(lambda: b"", done)
    with pytest.raises(Exhausted, match="2 calls wait, but the queue's limit is 2"):
        executor.submit(lambda: b"", done)
    time.sleep(0.02)
    release.set()
    for _ in range(3):
        assert settled.acquire(timeout=5)
    assert [type(error) for error in errors] == [type(None), DeadlineExceeded, type(None)]


def test_a_call_that_comes_during_a_flood_of_many_caches_waits_for_what_runs_alone(table: CacheTable) -> None:
    running = Executor(CPU, table, ServerConfig())
    begun, go_on, last = threading.Event(), threading.Event(), threading.Event()
    ran: list[str] = []

    def work(name: str) -> bytes:
        ran.append(name)
        begun.set()
        go_on.wait(30)
        return b""

    def submit(principal: str, cache: int) -> None:
        name = f"{principal} {cache}"
        done = (lambda *_: last.set()) if name == "alice 4" else lambda *_: None
        running.submit(CacheWork(name.encode(), principal, partial(work, name)), done)

    for cache in range(5):
        submit("alice", cache)
    assert begun.wait(30)
    submit("bob", 0)
    go_on.set()
    assert last.wait(30)
    running.close()
    assert ran == ["alice 0", "bob 0", *(f"alice {cache}" for cache in range(1, 5))]


def test_idle_executor_lends_its_device_and_a_busy_one_does_not(executor: Executor) -> None:
    assert executor.run_now(lambda: b"now") == b"now"
    release, started, settled = threading.Event(), threading.Event(), threading.Event()

    def slow() -> bytes:
        started.set()
        return bytes(release.wait(5))

    executor.submit(slow, lambda *_: settled.set())
    assert started.wait(5)
    assert executor.run_now(lambda: b"now") is None
    release.set()
    assert settled.wait(5)
    with pytest.raises(ZeroDivisionError):
        executor.run_now(lambda: bytes(1 // 0))
    assert executor.run_now(lambda: b"again") == b"again"


class SameKind:
    """Stands for a batch: takes calls whose layers are of one kind, and is worth it from two on."""

    def __init__(self, call: Call, *_: object) -> None:
        self.kind, self.num_calls = call.options, 1

    def takes(self, work: Work) -> bool:
        joins = isinstance(work, Call) and work.options == self.kind
        self.num_calls += joins
        return joins

    @property
    def is_worth_it(self) -> bool:
        return self.num_calls > 1


@pytest.fixture
def launches(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches of calls that `joining_jobs` makes, by the names of their calls."""
    launched: list[str] = []

    def attend(call: Call) -> Result:
        launched.append(call.plane)
        return Result(None, None, None) if call.options != "broken" else 1 // 0

    def attend_together(calls: list[Call]) -> list[Result]:
        launched.append("+".join(call.plane for call in calls))
        return [Result(None, None, None) for _ in calls]

    monkeypatch.setattr(runner, "batch_of", lambda call, *_: None if call.options == "alone" else SameKind(call))
    monkeypatch.setattr(executor.runner, "attend", attend)
    monkeypatch.setattr(executor.runner, "attend_together", attend_together)
    return launched


def joining(kind: str, cache: bytes, name: str) -> Call:
    """A call that joins those of its kind; "alone": none."""
    step = types.SimpleNamespace(cache=types.SimpleNamespace(id=cache, principal="a"), counts=None, trace=None)
    return Call(step, 0, kind, None, None, None, lambda call, *_: call.plane.encode(), name)  # type: ignore[arg-type]


def joining_jobs(calls: Sequence[Call], results: list[tuple[str, object]]) -> list[Job]:
    def done(name: str, result: bytes | None, error: BaseException | None) -> None:
        results.append((name, (result or b"").decode() if error is None else type(error)))

    return [Job(call, partial(done, call.plane), math.inf, time.perf_counter()) for call in calls]


def test_jobs_that_come_together_join_but_never_two_of_a_cache(executor: Executor, launches: list[str]) -> None:
    results: list[tuple[str, object]] = []
    kinds = ["x", "alone", "x", "y", "x", "x", "broken"]
    caches = [b"1", b"2", b"3", b"4", b"1", b"5", b"6"]
    calls = [joining(*each, str(index)) for index, each in enumerate(zip(kinds, caches, strict=True))]
    assert executor.settle_now(joining_jobs(calls, results)) == []
    assert launches == ["0+2+5", "1", "3", "4", "6"]
    assert [name for name, _ in results] == ["0", "2", "5", "1", "3", "4", "6"]
    assert all(result == (ZeroDivisionError if name == "6" else name) for name, result in results)


def test_no_launch_but_the_first_is_begun_once_the_time_is_up(executor: Executor, launches: list[str]) -> None:
    jobs = joining_jobs([joining(kind, kind.encode(), kind) for kind in ("alone", "y", "z")], [])
    assert executor.settle_now(jobs, 0.0) == jobs[1:]
    assert launches == ["alone"]
    assert executor.settle_now(jobs[1:], 60.0) == []
    assert launches == ["alone", "y", "z"]


def test_what_is_before_a_job_in_its_cache_stays_before_it(executor: Executor, launches: list[str]) -> None:
    calls = [
        joining(kind, cache, name)
        for kind, cache, name in (("x", b"1", "a"), ("alone", b"2", "b"), ("x", b"2", "c"), ("x", b"3", "d"))
    ]
    executor.settle_now(joining_jobs(calls, []))
    assert launches == ["a+d", "b", "c"]


@pytest.mark.usefixtures("launches")
def test_jobs_that_come_together_are_left_while_the_device_is_busy(executor: Executor) -> None:
    release, started, settled = threading.Event(), threading.Event(), threading.Event()
    results: list[tuple[str, object]] = []

    def slow() -> bytes:
        started.set()
        return bytes(release.wait(5))

    jobs = joining_jobs([joining("x", b"1", "a"), joining("x", b"2", "b")], results)
    executor.submit(slow, lambda *_: settled.set())
    assert started.wait(5)
    assert executor.settle_now(jobs) == jobs
    release.set()
    assert settled.wait(5)
    assert (executor.settle_now(jobs), len(results)) == ([], 2)
    executor.close()
    assert executor.settle_now(jobs) == jobs


@pytest.mark.parametrize("is_prepared", [True, False])
def test_a_small_step_is_made_ready_on_threads_of_the_server_alone(
    monkeypatch: pytest.MonkeyPatch, is_prepared: bool
) -> None:
    """What a caller does to torch on its own thread (inference mode, a default device) is nothing to plans."""
    threads: list[str] = []
    made = threading.Event()

    def make_ready(step: Step, *_: object) -> None:
        threads.append(threading.current_thread().name)
        made.set()

    monkeypatch.setattr(Step, "make_ready", make_ready)
    service = build_service(ServerConfig(device="cpu"))
    geometry = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "num_pages": 2, "page_size": 4, "dtype": "float32"}
    ones = torch.ones(1, 2, 16)

    def two_steps() -> None:
        if is_prepared:
            service.executor.prepare_thread()
        with attnd.Client(InprocTransport(service), timeout_s=30) as client, client.create_cache(**geometry) as cache:
            with cache.session() as session:
                for _ in range(2):  # the first tells what the second will want
                    step = session.step(attnd.StepMetadata([1], [0], [[0]], [0], kind="decode"))
                    step.attend(0, ones, ones, ones)

    caller = threading.Thread(target=two_steps, name="caller")
    caller.start()
    caller.join()
    assert made.wait(30)
    assert threads == ["caller" if is_prepared else "executor-cpu"]
    service.executor.close()


# Alone in its process: others start threads too.
LARGE_OPERATIONS = """
import os
import threading
import torch
from attnd_server.build import build_service
from attnd_server.config import ServerConfig

def large_operation():
    before = len(os.listdir("/proc/self/task"))
    torch.zeros(1 << 20).add_(1)
    print(len(os.listdir("/proc/self/task")) - before)

def on_another_thread():
    torch.set_num_threads(4)
    large_operation()

executor = build_service(ServerConfig(device="cpu", threads=4)).executor
executor.take_turn(large_operation)
other = threading.Thread(target=on_another_thread)
other.start()
other.join()
executor.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists a process's threads")
def test_a_large_operation_on_the_executors_thread_starts_no_others() -> None:
    """Where the system refuses one, OpenMP ends the process. On a thread that has done nothing yet, three start."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", LARGE_OPERATIONS]
    started = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    assert started == ["0", "3"]


def test_closed_executor_refuses(table: CacheTable) -> None:
    executor = Executor(CPU, table, ServerConfig())
    executor.close()
    with pytest.raises(Disconnected, match="shutting down"):
        executor.submit(lambda: b"", lambda *_: None)
    assert executor.run_now(lambda: b"") is None

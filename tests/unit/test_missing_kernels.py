"""Work whose kernel is not on the device yet: it waits for that kernel, its cache's work behind it, and nobody else."""

from __future__ import annotations

import math
import threading
import time
import types
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from functools import partial

import pytest
import torch

from attnd.errors import DeadlineExceeded, Disconnected, Exhausted
from attnd_server.config import ServerConfig
from attnd_server.device.faults import DeviceFaults
from attnd_server.device.kernels.launch import KernelMissing, for_graphs, launch_kernel
from attnd_server.execution import runner
from attnd_server.execution.executor import Executor
from attnd_server.execution.step import Call, Result
from attnd_server.execution.work import CacheWork, Cancelled, Job, SideWork, WorkInPieces
from attnd_server.kv.caches import CacheTable

CPU = torch.device("cpu")
PATIENCE_S = 30.0


class Kernel:
    """A kernel that can be launched once `ready` is done."""

    def __init__(self) -> None:
        self.ready: Future[None] = Future()
        self.must_compile: Future[bool] = Future()
        self.num_launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[[], None]:
        return self._launch

    def _launch(self) -> None:
        if not self.ready.done() or self.ready.exception():
            raise KernelMissing("kernel", self.ready, self.must_compile)
        self.num_launches += 1


class Variants:
    """A kernel, and a variant of it that is there sooner."""

    def __init__(self) -> None:
        self.itself, self.sooner = Kernel(), Kernel()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda option: (self.sooner if option == "soon" else self.itself)[grid]()

    def launch(self) -> bytes:
        launch_kernel(self, (1,), sooner={"option": "soon"}, option="fast")
        return b"launched"

    @property
    def num_launches(self) -> tuple[int, int]:
        return self.itself.num_launches, self.sooner.num_launches


class Outcomes:
    """What became of jobs, by name, in the order in which they were answered."""

    def __init__(self) -> None:
        self.answers: dict[str, object] = {}
        self._news = threading.Condition()

    def of(self, name: str) -> Callable[[bytes | None, BaseException | None], None]:
        return partial(self._settled, name)

    def _settled(self, name: str, result: bytes | None, error: BaseException | None) -> None:
        with self._news:
            self.answers[name] = result if error is None else type(error)
            self._news.notify_all()

    def wait(self, *names: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: set(names) <= self.answers.keys(), PATIENCE_S), self.answers


@pytest.fixture
def outcomes() -> Outcomes:
    return Outcomes()


@pytest.fixture
def executor() -> Iterator[Executor]:
    config = ServerConfig(device="cpu", max_queue_depth=8, max_cache_queue_depth=3)
    running = Executor(CPU, CacheTable(config, CPU, 1 << 20), config)
    yield running
    running.close()


def launching(kernel: Kernel, cache: bytes = b"a") -> CacheWork:
    def work() -> bytes:
        launch_kernel(kernel, (1,))
        return b"launched"

    return CacheWork(cache, "alice", work)


def plain(cache: bytes = b"a", principal: str = "alice") -> CacheWork:
    return CacheWork(cache, principal, lambda: b"done")


def call(name: str) -> Call:
    """A call of a cache of its own, answered with its name."""
    cost = types.SimpleNamespace(is_long=False)
    cache = types.SimpleNamespace(id=name.encode(), principal="alice")
    step = types.SimpleNamespace(cache=cache, counts=None, trace=None, cost=lambda options: cost)
    return Call(step, 0, None, None, None, None, lambda call, *_: call.plane.encode(), name)  # type: ignore[arg-type]


def all_held(executor: Executor, number: int) -> None:
    """Waits until so many jobs wait, and nothing runs any more."""
    deadline = time.monotonic() + PATIENCE_S
    while not (executor.queue_depth == number and executor._queue.is_idle):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_call_waits_for_its_kernel_alone_and_its_cache_keeps_its_order(
    executor: Executor, outcomes: Outcomes
) -> None:
    kernel = Kernel()
    executor.submit(launching(kernel), outcomes.of("first"))
    executor.submit(plain(), outcomes.of("second"))
    executor.submit(plain(b"b"), outcomes.of("same principal's other cache"))
    executor.submit(plain(b"c", "bob"), outcomes.of("another's"))
    outcomes.wait("same principal's other cache", "another's")
    all_held(executor, 2)
    executor.submit(plain(), outcomes.of("third"))
    assert executor.waiting() == {"alice": 3}
    kernel.ready.set_result(None)
    outcomes.wait("first", "second", "third")
    assert list(outcomes.answers)[2:] == ["first", "second", "third"]
    assert outcomes.answers["first"] == b"launched"
    assert kernel.num_launches == 1


def test_a_call_is_served_by_what_is_there_sooner_until_its_kernel_is(executor: Executor, outcomes: Outcomes) -> None:
    kernel = Variants()
    executor.submit(CacheWork(b"a", "alice", kernel.launch), outcomes.of("first"))
    all_held(executor, 1)
    kernel.itself.must_compile.set_result(True)
    all_held(executor, 1)
    kernel.sooner.ready.set_result(None)
    outcomes.wait("first")
    executor.submit(CacheWork(b"a", "alice", kernel.launch), outcomes.of("second"))
    outcomes.wait("second")
    assert kernel.num_launches == (0, 2)
    kernel.itself.ready.set_result(None)
    executor.submit(CacheWork(b"a", "alice", kernel.launch), outcomes.of("third"))
    outcomes.wait("third")
    assert kernel.num_launches == (1, 2)


def test_a_kernel_that_never_comes_is_an_error_though_something_stood_in(
    executor: Executor, outcomes: Outcomes
) -> None:
    kernel = Variants()
    kernel.itself.must_compile.set_result(True)
    kernel.sooner.ready.set_result(None)
    executor.submit(CacheWork(b"a", "alice", kernel.launch), outcomes.of("first"))
    outcomes.wait("first")
    kernel.itself.ready.set_exception(Exhausted("there is no memory left"))
    executor.submit(CacheWork(b"a", "alice", kernel.launch), outcomes.of("second"))
    outcomes.wait("second")
    assert outcomes.answers == {"first": b"launched", "second": Exhausted}


def test_nothing_stands_in_for_a_kernel_that_need_not_be_compiled(executor: Executor, outcomes: Outcomes) -> None:
    kernel = Variants()
    kernel.sooner.ready.set_result(None)
    executor.submit(CacheWork(b"a", "alice", kernel.launch), outcomes.of("found"))
    all_held(executor, 1)
    kernel.itself.must_compile.set_result(False)
    all_held(executor, 1)
    assert kernel.num_launches == (0, 0)
    kernel.itself.ready.set_result(None)
    outcomes.wait("found")
    assert kernel.num_launches == (1, 0)


def test_nothing_stands_in_where_a_graph_would_keep_it(executor: Executor, outcomes: Outcomes) -> None:
    kernel = Variants()
    kernel.itself.must_compile.set_result(True)
    kernel.sooner.ready.set_result(None)

    def work() -> bytes:
        with for_graphs():
            return kernel.launch()

    executor.submit(CacheWork(b"a", "alice", work), outcomes.of("captured"))
    all_held(executor, 1)
    kernel.itself.ready.set_result(None)
    outcomes.wait("captured")
    executor.submit(CacheWork(b"b", "alice", kernel.launch), outcomes.of("after"))
    outcomes.wait("after")
    assert kernel.num_launches == (2, 0)


def test_nothing_stands_in_for_who_may_wait() -> None:
    kernel = Variants()
    kernel.sooner.ready.set_result(None)
    threading.Timer(0.05, kernel.itself.ready.set_result, (None,)).start()
    assert kernel.launch() == b"launched"
    assert kernel.num_launches == (1, 0)


def test_a_call_of_two_missing_kernels_waits_for_each(executor: Executor, outcomes: Outcomes) -> None:
    kernels = Kernel(), Kernel()

    def work() -> bytes:
        for kernel in kernels:
            launch_kernel(kernel, (1,))
        return b""

    executor.submit(CacheWork(b"a", "alice", work), outcomes.of("both"))
    executor.submit(plain(), outcomes.of("behind"))
    for kernel in kernels:
        all_held(executor, 2)
        kernel.ready.set_result(None)
    outcomes.wait("both", "behind")
    assert list(outcomes.answers) == ["both", "behind"]


def test_a_kernel_that_cannot_be_had_fails_its_call_alone(executor: Executor, outcomes: Outcomes) -> None:
    kernel = Kernel()
    executor.submit(launching(kernel), outcomes.of("call"))
    executor.submit(plain(), outcomes.of("behind"))
    all_held(executor, 2)
    kernel.ready.set_exception(ZeroDivisionError())
    outcomes.wait("call", "behind")
    assert outcomes.answers == {"call": ZeroDivisionError, "behind": b"done"}


def test_held_work_leaves_the_device_idle_for_others_but_not_for_its_own_cache(
    executor: Executor, outcomes: Outcomes
) -> None:
    kernel = Kernel()
    executor.submit(launching(kernel), outcomes.of("held"))
    all_held(executor, 1)
    assert executor.run_now(plain(b"b")) == b"done"
    assert executor.run_now(plain()) is None
    assert executor.run_now(launching(kernel, b"b")) is None  # submit it, that is
    jobs = [
        Job(work, outcomes.of(name), math.inf, 0.0)
        for name, work in (
            ("held", plain()), ("b", plain(b"b")), ("lacking", launching(kernel, b"c")), ("after", plain(b"c")),
        )
    ]  # fmt: skip
    assert executor.settle_now(jobs) == [jobs[0], jobs[2], jobs[3]]
    assert outcomes.answers == {"b": b"done"}
    kernel.ready.set_result(None)
    outcomes.wait("held")
    assert executor.settle_now(jobs[2:]) == []
    assert kernel.num_launches == 2


def test_whoever_may_wait_does_so_in_the_launch(executor: Executor, outcomes: Outcomes) -> None:
    kernel = Kernel()

    def side_work() -> bytes:
        launch_kernel(kernel, (1,))
        return b"launched"

    executor.submit(SideWork("alice", side_work), outcomes.of("side"))
    assert executor.run_now(plain()) == b"done"
    threading.Timer(0.05, kernel.ready.set_result, (None,)).start()
    launch_kernel(kernel, (1,))  # on a thread that lent itself to the executor before
    outcomes.wait("side")
    assert kernel.num_launches == 2


def test_the_turn_of_a_warm_up_waits_and_others_do_not_stand_behind_it(executor: Executor) -> None:
    kernel, turned = Kernel(), threading.Event()

    def take_turn() -> None:
        executor.take_turn(lambda: launch_kernel(kernel, (1,)))
        turned.set()

    threading.Thread(target=take_turn, daemon=True).start()
    all_held(executor, 1)
    executor.take_turn(lambda: None)
    assert not turned.is_set()
    kernel.ready.set_result(None)
    assert turned.wait(PATIENCE_S)


def test_held_jobs_count_for_every_limit(executor: Executor, outcomes: Outcomes) -> None:
    kernel = Kernel()
    for index in range(3):
        executor.submit(launching(kernel), outcomes.of(str(index)))
    all_held(executor, 3)
    with pytest.raises(Exhausted, match="3 calls of this cache wait, but the limit of one cache is 3"):
        executor.submit(plain(), outcomes.of("too much of the cache"))
    for cache in (b"b", b"c"):
        for index in range(2):
            executor.submit(launching(kernel, cache), outcomes.of(f"{cache!r} {index}"))
    executor.submit(launching(kernel, b"d"), outcomes.of("last"))
    all_held(executor, 8)
    with pytest.raises(Exhausted, match="8 calls wait, but the queue's limit is 8"):
        executor.submit(plain(b"e", "bob"), outcomes.of("too much"))
    kernel.ready.set_result(None)
    outcomes.wait("0", "1", "2", "last")
    all_held(executor, 0)


def test_a_cancelled_job_holds_up_nobody(executor: Executor, outcomes: Outcomes) -> None:
    kernel = Kernel()
    first = executor.submit(launching(kernel), outcomes.of("first"))
    second = executor.submit(launching(kernel), outcomes.of("second"))
    executor.submit(plain(), outcomes.of("third"))
    all_held(executor, 3)
    executor.cancel(second)
    assert executor.queue_depth == 2
    executor.cancel(first)
    outcomes.wait("third")
    kernel.ready.set_result(None)
    assert executor.run_now(plain()) == b"done"
    assert outcomes.answers == {"third": b"done"}


def test_held_jobs_are_answered_once_their_time_is_over_or_nobody_wants_them(
    executor: Executor, outcomes: Outcomes
) -> None:
    executor.submit(launching(Kernel()), outcomes.of("late"), timeout_s=0.05)
    leaves = threading.Event()
    executor.submit(launching(Kernel(), b"b"), outcomes.of("unwanted"), is_wanted=lambda: not leaves.is_set())
    executor.submit(launching(Kernel(), b"c"), outcomes.of("waits"))
    all_held(executor, 3)
    leaves.set()
    outcomes.wait("late", "unwanted")
    assert outcomes.answers == {"late": DeadlineExceeded, "unwanted": Cancelled}


@pytest.mark.parametrize("is_told", [True, False])
def test_the_end_of_the_executor_waits_for_no_kernel(executor: Executor, outcomes: Outcomes, is_told: bool) -> None:
    kernel = Kernel()
    executor.submit(launching(kernel), outcomes.of("held"))
    executor.submit(launching(kernel), outcomes.of("behind"))
    all_held(executor, 2)
    if is_told:
        executor.end_running("the drain has ended")
    executor.close(PATIENCE_S)
    assert outcomes.answers == {"held": Disconnected, "behind": Disconnected}
    assert executor.is_quiet()
    kernel.ready.set_result(None)


def test_a_device_fault_ends_the_wait_at_once(outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executor, "EXPIRY_PERIOD_S", 1e6)
    faults, config = DeviceFaults(CPU), ServerConfig(device="cpu")
    executor = Executor(CPU, CacheTable(config, CPU, 1 << 20), config, faults=faults)
    executor.submit(launching(Kernel()), outcomes.of("held"))
    all_held(executor, 1)
    faults.fail("it broke")
    outcomes.wait("held")
    assert outcomes.answers == {"held": Disconnected}
    executor.close()


def test_work_in_pieces_begins_again_before_anybody_else_of_its_cache(executor: Executor, outcomes: Outcomes) -> None:
    kernel, began = Kernel(), []

    def pieces() -> Generator[None, None, bytes]:
        began.append(len(began))
        yield
        launch_kernel(kernel, (1,))
        yield
        return b"whole"

    executor.submit(WorkInPieces(b"a", "alice", pieces), outcomes.of("pieces"))
    executor.submit(plain(), outcomes.of("behind"))
    all_held(executor, 2)
    kernel.ready.set_result(None)
    outcomes.wait("pieces", "behind")
    assert list(outcomes.answers.items()) == [("pieces", b"whole"), ("behind", b"done")]
    assert (began, kernel.num_launches) == ([0, 1], 1)


def test_calls_that_lack_the_kernel_of_a_shared_launch_run_or_wait_each_alone(
    executor: Executor, outcomes: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, alone = Kernel(), {"b": Kernel()}

    def attend(call: Call) -> Result:
        if call.plane in alone:
            launch_kernel(alone[call.plane], (1,))
        return Result(None, None, None)

    def attend_together(calls: list[Call]) -> list[Result]:
        launch_kernel(together, (1,))
        return [Result(None, None, None) for _ in calls]

    everything = types.SimpleNamespace(takes=lambda work: isinstance(work, Call), is_worth_it=True)
    monkeypatch.setattr(runner, "batch_of", lambda *_: everything)
    monkeypatch.setattr(executor.runner, "attend", attend)
    monkeypatch.setattr(executor.runner, "attend_together", attend_together)
    release, started = threading.Event(), threading.Event()
    executor.submit(lambda: (started.set(), bytes(release.wait(PATIENCE_S)))[1], outcomes.of("before"))
    assert started.wait(PATIENCE_S)
    for name in "abc":
        executor.submit(call(name), outcomes.of(name))
    release.set()
    outcomes.wait("a", "c")
    all_held(executor, 1)
    alone["b"].ready.set_result(None)
    outcomes.wait("b")
    assert [outcomes.answers[name] for name in "abc"] == [b"a", b"b", b"c"]

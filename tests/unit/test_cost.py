"""What calls cost, who may run them where, and what is left of those that fail, are given up or are ended."""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import attnd
from attnd.errors import DeadlineExceeded, Disconnected, Exhausted
from attnd.protocol import requests
from attnd.v1 import cache_pb2
from attnd_server.attention.backends import gather, part_costs
from attnd_server.attention.backends.naive import NaiveAttention
from attnd_server.attention.backends.sdpa import SdpaAttention
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.metadata import AttentionOptions, decode_step
from attnd_server.attention.ops import Plan
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.device.memory import is_memory_error
from attnd_server.execution import batch, by_options, cost, kept_plans, turns
from attnd_server.execution.cost import cost_of, most_work
from attnd_server.execution.kept_plans import KeptPlans, Plans, tensor_bytes
from attnd_server.execution.step import Call
from attnd_server.execution.work import Cancelled, Job, Pieces, Work, WorkInPieces
from attnd_server.inproc import PRINCIPAL, InprocTransport
from attnd_server.kv.cache import Cache
from attnd_server.service import kv_requests
from attnd_server.service.service import AttentionService
from tests.shared_calls import HEADS, PAGE, Caller, Waiting, waiting

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
CONFIG = AttentionConfig(num_layers=1, num_kv_heads=8, head_dim=128, num_pages=8)
OUT_OF_MEMORY: list[Exception] = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.fixture
def server() -> Iterator[Waiting]:
    with waiting() as running:
        yield running


def small(
    num_heads: int, device: torch.device = CPU, *, num_reqs: int = 1, context_len: int = 256, **more: Any
) -> bool:
    options = AttentionOptions(num_heads, 1.0, **more)
    return cost_of(CONFIG, decode_step(num_reqs, 1, context_len, 16), options, device).is_small


def test_a_call_is_small_by_all_that_it_asks_for() -> None:
    assert small(32)
    assert small(32, context_len=4_000)
    assert not small(1 << 12)
    assert not small(8, context_len=1 << 20)
    assert not small(8, context_len=0, num_reqs=4_000)
    assert small(32, CUDA, num_reqs=64, context_len=4_096)
    assert not small(1 << 16, CUDA)


def test_v_of_a_latent_row_is_neither_gathered_nor_stored_again() -> None:
    options, metadata = AttentionOptions(16, 1.0), decode_step(4, 1, 512, 16)
    plain = AttentionConfig(1, 1, 512, 128, head_dim_v=256)
    for device in (CPU, CUDA):
        works = [cost_of(replace(plain, latent=latent), metadata, options, device).work for latent in (False, True)]
        of_v = 256 * (cost.GATHERED_WORK * 4 * 516 + cost.COPIED_WORK * 4 * 2)
        assert works[0] - works[1] == of_v


def test_scores_of_few_dims_cost_more_than_their_products() -> None:
    """One token of a million heads of 8 dims takes a processor 2.5 s, of which its products are a fifth."""
    config, options = AttentionConfig(1, 1, 8, 64, dtype=torch.float32), AttentionOptions(1_000_000, 1.0)
    metadata = decode_step(1, 1, 1024, 16)
    costs = part_costs.part_costs(config, options, enable_gqa=True)
    (part,) = gather.split(config, metadata, options, CPU)
    blocks = costs.blocks(part)
    assert len(blocks) >= 1_000_000 * 1025 * (16 + 64) // part_costs.MAX_PRODUCTS
    on_gpu = part_costs.part_costs(config, options, enable_gqa=True, on_processor=False)
    assert len(on_gpu.blocks(part)) < len(blocks) / 5
    wide = AttentionConfig(1, 1, 8, 1)
    assert not cost_of(wide, decode_step(1, 1, 1 << 12, 16), AttentionOptions(1 << 10, 1.0), CPU).is_small
    assert cost_of(wide, decode_step(1, 1, 1 << 12, 16), AttentionOptions(1 << 8, 1.0), CPU).is_small


def test_what_is_looked_at_one_by_one_is_small_if_it_is_few() -> None:
    few, many = 16, 100
    for more in ({"backend": AttentionBackend.NAIVE}, {"softcap": 1.0}, {"return_lse": True}):
        assert small(8, num_reqs=few, context_len=8, **more)
        assert not small(8, num_reqs=many, context_len=8, **more)
    assert small(8, num_reqs=many, context_len=8)


def test_the_cost_is_that_of_what_is_seen() -> None:
    def work(context_len: int, **more: Any) -> int:
        return cost_of(CONFIG, decode_step(1, 1, context_len, 16), AttentionOptions(8, 1.0, **more), CPU).work

    assert work(1 << 20) > 200 * work(1 << 12)
    assert work(1 << 20, window=1 << 12) < 2 * work(1 << 12)
    whole = cost_of(CONFIG, decode_step(2, 1, 1 << 16, 16), AttentionOptions(8, 1.0), CPU).work
    assert whole == 2 * work(1 << 16)


def test_the_specification_has_a_gpu_for_a_moment_only() -> None:
    """377 KB that ask for 12 G scores."""
    step, config = decode_step(1, 256, 1 << 18, 16), AttentionConfig(1, 1, 8, 1)
    naive = AttentionOptions(46, 1.0, backend=AttentionBackend.NAIVE)
    with pytest.raises(Exhausted, match="q asks for"):
        cost_of(config, step, naive, CUDA)
    cost_of(config, step, naive, CPU)
    cost_of(config, step, AttentionOptions(46, 1.0), CUDA)


def test_what_a_call_may_ask_for_follows_the_time_that_it_has() -> None:
    def most(device: torch.device, num_threads: int = 1, *, has_kernels: bool = True, **settings: float) -> float:
        return most_work(ServerConfig(**settings), device, num_threads, has_kernels=has_kernels)  # type: ignore[arg-type]

    assert most(CPU, 2, max_call_s=10) == 20 * cost.CORE_WORK_S
    assert most(CUDA, device_timeout_s=600) == 300 * cost.GPU_WORK_S
    assert most(CUDA, has_kernels=False) < most(CUDA)
    assert most(CUDA, device_timeout_s=0) == math.inf
    # An honest call with the most that a message holds, over the longest context, may run on a GPU.
    config = AttentionConfig(num_layers=1, num_kv_heads=8, head_dim=128, num_pages=8)
    largest = cost_of(config, decode_step(1, 8_192, 1 << 20, 16), AttentionOptions(128, 1.0), CUDA)
    assert largest.work < most(CUDA)
    # One that names a million heads over it may not.
    absurd = cost_of(CONFIG, decode_step(1, 256, 1 << 20, 16), AttentionOptions(1 << 19, 1.0), CUDA)
    assert absurd.work > most(CUDA)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:20] or "MemoryError")
def test_a_lack_of_memory_is_told_as_such_whoever_says_it(server: Waiting, error: Exception) -> None:
    assert is_memory_error(error)
    assert isinstance(server.service.told(error), Exhausted)

    def work() -> bytes:
        raise error

    (told,) = server.together([work])
    assert isinstance(told, Exhausted)
    with pytest.raises(Exhausted):
        server.service.executor.run_now(work)


def test_what_is_no_lack_of_memory() -> None:
    with pytest.raises(MemoryError) as numpys:
        np.empty(1 << 60, np.uint8)
    assert is_memory_error(numpys.value)
    for error in (
        RuntimeError("shape mismatch"),
        ValueError("can't allocate memory"),
        OSError(errno.EMFILE, "too many"),
    ):
        assert not is_memory_error(error)


class Slots:
    """What lies in the slots that a caller's step writes, before and after."""

    def __init__(self, caller: Caller, layer: int) -> None:
        self._caller, self._layer = caller, layer
        self._before = self._read()

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        slots = [slot for slot in self._caller.metadata().slot_mapping if slot >= 0]
        return self._caller.cache.read_kv(self._layer, slots, like=torch.ones(1))

    @property
    def are_as_before(self) -> bool:
        return all(map(torch.equal, self._read(), self._before))


@pytest.mark.parametrize("error", OUT_OF_MEMORY[1:4], ids=["cuda", "no memory", "not enough"])
@pytest.mark.parametrize(
    ("lens", "backend", "query_len"),
    [([3], "sdpa", 1), ([3, 9], "sdpa", 1), ([3], "naive", 1), ([3, 9], "naive", 2), ([0], "sdpa", 5)],
    ids=["in place", "gathered", "naive", "several", "prefill"],
)
def test_a_call_that_finds_no_memory_has_stored_nothing(
    server: Waiting, monkeypatch: pytest.MonkeyPatch, lens: list[int], backend: str, query_len: int, error: Exception
) -> None:
    caller = Caller(server, lens, seed=1, backend=backend, query_len=query_len)
    slots = Slots(caller, 1)
    caller.open()
    good = caller.call(1, attnd.AttentionOptions())
    made = Plan.__post_init__

    def fails(*_: object) -> None:
        raise error

    def broken(plan: Plan) -> None:
        made(plan)
        object.__setattr__(plan, "run", fails)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "__post_init__", broken)
        caller.open()
        (told,) = server.together([caller.call(1, attnd.AttentionOptions())])
    assert isinstance(told, Exhausted)
    assert slots.are_as_before
    assert caller.cache.info().num_pages_written == caller.num_pages
    (answer,) = server.together([good])
    assert isinstance(answer, bytes)
    assert not slots.are_as_before


def test_a_shared_launch_that_finds_no_memory_has_stored_nothing(
    server: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers = [Caller(server, [5], seed=1), Caller(server, [9], seed=2)]
    slots = [Slots(caller, 0) for caller in callers]
    for caller in callers:
        caller.open()

    def fails(*_: object) -> None:
        raise OUT_OF_MEMORY[2]

    monkeypatch.setattr(NaiveAttention, "run", fails)
    told = server.together([caller.call(0, attnd.AttentionOptions()) for caller in callers])
    assert [type(each) for each in told] == [Exhausted, Exhausted]
    assert all(each.are_as_before for each in slots)


def test_a_reply_that_finds_no_memory_has_stored_nothing(server: Waiting) -> None:
    caller = Caller(server, [5, 9], seed=1)
    slots = Slots(caller, 0)
    caller.open()
    call = caller.call(0, attnd.AttentionOptions())
    assert isinstance(call, Call)

    def fails(*_: object) -> bytes:
        raise MemoryError

    (told,) = server.together([call._replace(encode=fails)])
    assert isinstance(told, Exhausted)
    assert slots.are_as_before


@pytest.fixture
def long_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is long, and each turn one piece; a piece is one head of one request."""
    monkeypatch.setattr(cost, "LONG_WORK", 0)
    monkeypatch.setattr(turns, "TURN_S", 0.0)
    monkeypatch.setattr(part_costs, "MAX_PRODUCTS", 1)


class Gate:
    """Stops whoever computes a piece, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Semaphore(0), threading.Semaphore(0)
        pieces = SdpaAttention.pieces

        def stopping(*arguments: Any) -> Iterator[None]:
            for _ in pieces(*arguments):
                self.reached.release()
                assert self.opened.acquire(timeout=60)
                yield

        monkeypatch.setattr(SdpaAttention, "pieces", stopping)

    def wait(self) -> None:
        assert self.reached.acquire(timeout=60)

    def open(self) -> None:
        for _ in range(1_000):
            self.opened.release()


class Outcome:
    """What comes of a job."""

    def __init__(self, service: AttentionService, work: Work, **more: Any) -> None:
        self.settled = threading.Event()
        self.result: bytes | None = None
        self.error: BaseException | None = None
        self.job: Job = service.executor.submit(work, self._done, **more)

    def _done(self, result: bytes | None, error: BaseException | None) -> None:
        self.result, self.error = result, error
        self.settled.set()

    def wait(self) -> BaseException | None:
        assert self.settled.wait(60)
        return self.error


def long_caller(server: Waiting, seed: int = 1) -> tuple[Caller, Slots, Work]:
    caller = Caller(server, [5, 9], seed, backend="sdpa", query_len=2)
    slots = Slots(caller, 0)
    caller.open()
    return caller, slots, caller.call(0, attnd.AttentionOptions())


@pytest.mark.usefixtures("long_calls")
def test_a_long_call_computes_and_stores_what_one_at_once_does(server: Waiting) -> None:
    _, slots, work = long_caller(server)
    outcome = Outcome(server.service, work)
    assert outcome.wait() is None
    assert outcome.job.ran_s > 0
    assert not slots.are_as_before
    assert outcome.result is not None
    at_once = server.service.executor.run_now(work)
    assert at_once is not None
    ours, theirs = (requests.attend_reply(each) for each in (outcome.result, at_once))
    assert torch.allclose(*(torch.tensor(each.tensors["output"].data) for each in (ours, theirs)), atol=1e-5)


@pytest.mark.usefixtures("long_calls")
def test_others_have_turns_between_the_pieces_of_a_call_and_its_own_cache_waits(
    server: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    caller, _, work = long_caller(server)
    order: list[str] = []
    long = Outcome(server.service, work)
    gate.wait()
    own = Outcome(server.service, WorkInPieces(caller.cache.ref.id, PRINCIPAL, lambda: noting("own")))

    def noting(name: str) -> Pieces:
        order.append(name)
        return b""
        yield

    other = Outcome(server.service, lambda: bytes(order.append("other") or 0))
    gate.opened.release()
    assert other.wait() is None
    assert not long.settled.is_set()
    gate.open()
    assert long.wait() is None
    assert own.wait() is None
    assert order == ["other", "own"]


@pytest.mark.usefixtures("long_calls")
@pytest.mark.parametrize("way", ["cancelled", "unwanted", "time", "ended", "deleted"])
def test_a_call_ends_between_its_pieces_and_has_stored_nothing(
    server: Waiting, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    gate = Gate(monkeypatch)
    caller, slots, work = long_caller(server)
    executor, wanted = server.service.executor, [True]
    outcome = Outcome(server.service, work, is_wanted=lambda: wanted[0])
    waits = Outcome(server.service, lambda: b"")
    gate.wait()
    if way == "cancelled":
        executor.cancel(outcome.job)
    elif way == "unwanted":
        wanted[0] = False
    elif way == "time":
        outcome.job.ran_s = 1e6
    elif way == "ended":
        executor.end_running("the drain is over")
        assert not executor.is_quiet(0.0)
    else:
        server.service.caches.delete(caller.cache.ref, PRINCIPAL)
    gate.open()
    error = outcome.wait()
    expected = {"time": DeadlineExceeded, "ended": Disconnected, "deleted": attnd.CacheLost}.get(way, Cancelled)
    assert isinstance(error, expected)
    if way == "time":
        assert "max_call_s is 120" in str(error)
    if way == "ended":
        assert "the drain is over" in str(error)
        assert isinstance(waits.wait(), Disconnected)
        with pytest.raises(Disconnected, match="the drain is over"):
            executor.submit(lambda: b"", lambda *_: None)
        assert executor.run_now(lambda: b"") is None
        assert executor.is_quiet(30)
        (cache,) = server.service.caches.all()  # read here: nothing runs any more
        assert slots_of(cache, caller) == slots_before(slots)
    elif way != "deleted":
        assert waits.wait() is None
        assert slots.are_as_before


@pytest.mark.usefixtures("long_calls")
@pytest.mark.parametrize("first", ["is over", "is cancelled"])
def test_a_principal_has_one_long_call_begun_so_that_what_it_holds_is_bounded(
    server: Waiting, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    gate = Gate(monkeypatch)
    *works, last = [long_caller(server, seed)[2] for seed in range(4)]
    outcomes = [Outcome(server.service, work) for work in works]
    gate.wait()
    for _ in range(3):  # turns of the first: the others' come between and are not begun
        gate.opened.release()
        gate.wait()
    assert [outcome.job.rest is not None for outcome in outcomes] == [True, False, False]
    late = Outcome(server.service, last, timeout_s=0.0)
    if first == "is cancelled":
        server.service.executor.cancel(outcomes[0].job)
    gate.open()
    assert isinstance(late.wait(), DeadlineExceeded)  # it waited, however often its turn came
    expected = Cancelled if first == "is cancelled" else type(None)
    assert [type(outcome.wait()) for outcome in outcomes] == [expected, type(None), type(None)]
    assert all(outcome.job.rest is None for outcome in outcomes)


def slots_of(cache: Cache, caller: Caller) -> list[Any]:
    slots = torch.tensor([slot for slot in caller.metadata().slot_mapping if slot >= 0])
    return [each.tolist() for each in cache.groups[0].read(0, slots)]


def slots_before(slots: Slots) -> list[Any]:
    return [each.tolist() for each in slots._before]


def test_work_in_pieces_goes_on_to_its_end_once_it_was_begun(server: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the pages that are to be copied would be worse than none."""
    monkeypatch.setattr(turns, "TURN_S", 0.0)
    reached, opened = threading.Event(), threading.Event()

    def work() -> Pieces:
        yield
        reached.set()
        assert opened.wait(60)
        yield
        return b"all"

    outcome = Outcome(server.service, WorkInPieces(b"cache", PRINCIPAL, work))
    assert reached.wait(60)
    server.service.executor.cancel(outcome.job)
    server.service.executor.end_running("over")
    opened.set()
    assert outcome.wait() is None
    assert outcome.result == b"all"
    assert WorkInPieces(b"", PRINCIPAL, work)() == b"all"


def test_a_call_with_many_heads_is_left_to_the_executor(server: Waiting) -> None:
    caller = Caller(server, [5], seed=1)
    caller.open()
    few = caller.call(0, attnd.AttentionOptions())
    q, k, v = caller.normal(1, 1 << 17, 32), *caller.kv(1)
    many = caller.session.request(requests.attend_call(caller.step_id, 0, q, k, v, attnd.AttentionOptions()))
    assert isinstance(few, Call)
    assert isinstance(many, Call)
    assert (few.is_small, many.is_small) == (True, False)
    assert few.step.is_small


def test_a_call_that_could_not_end_in_time_is_refused_before_it_waits() -> None:
    service = build_service(ServerConfig(device="cpu", kv_bytes=1 << 20, threads=1, max_call_s=1e-9))
    with attnd.Client(InprocTransport(service), timeout_s=60) as client:
        cache = client.create_cache(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2, page_size=4, dtype="float32")
        ones = torch.ones(4, 1, 8)
        with pytest.raises(Exhausted, match=r"q asks for .* products .* may ask for 137,") as refused:
            client.prefill(cache, attnd.StepMetadata([4], [0], [[0]], [0, 1, 2, 3]), 0, ones, ones, ones)
        assert refused.value.field == "q"
        assert cache.info().num_pages_written == 0


def test_big_calls_share_no_launch(server: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_BYTES", 2 * (HEADS + 2) * 48 * 4)
    callers = [Caller(server, [5], seed=seed) for seed in range(3)]
    for caller in callers:
        caller.open()
    server.launches()
    answers = server.together([caller.call(0, attnd.AttentionOptions()) for caller in callers])
    assert all(isinstance(answer, bytes) for answer in answers)
    assert server.launches() == {1: 1, 2: 1}


def test_plans_of_a_principal_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_plans, "PRINCIPAL_BYTES", 3 * (kept_plans.PLAN_BYTES + 1_000))
    kept, options = KeptPlans(), [AttentionOptions(8, 1.0) for _ in range(5)]
    plan = Plan(NaiveAttention(), None)
    steps = [Plans() for _ in range(5)]
    for plans, each in zip(steps, options, strict=True):
        kept.keep("a", plans, each, plan, 1_000)
    assert [len(plans) for plans in steps] == [0, 0, 1, 1, 1]
    other = Plans()
    kept.keep("b", other, options[0], plan, 1_000)
    assert [len(plans) for plans in [*steps, other]] == [0, 0, 1, 1, 1, 1]
    kept.keep("b", other, options[1], plan, 10**9)  # of which there can be none
    assert list(other) == [options[0]]


def test_the_bytes_of_a_plan_are_those_of_its_tensors() -> None:
    config, metadata = AttentionConfig(1, 2, 16, 64, page_size=4, dtype=torch.float32), decode_step(1, 8, 200, 4)
    plan = SdpaAttention().plan(config, metadata, AttentionOptions(4, 1.0), CPU)
    (part,) = plan.parts
    assert part.mask is not None
    assert part.slots is not None
    unused = 0 if part.unused is None else part.unused.nbytes
    assert tensor_bytes(plan) == part.mask.nbytes + part.slots.nbytes + unused


@pytest.mark.parametrize(("limit", "most"), [("MAX_OPTIONS", 4), ("MAX_OPTION_BYTES", 4 * 4 * HEADS)])
def test_a_step_forgets_options_if_they_are_too_many_or_too_large(
    server: Waiting, monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    monkeypatch.setattr(by_options, limit, most)
    caller = Caller(server, [5], seed=1)
    caller.open()
    for number in range(1, 12):
        call = caller.call(0, attnd.AttentionOptions(scale=1 / number, sinks=torch.full((HEADS,), 1.0)))
        assert isinstance(call, Call)
        assert isinstance(server.together([call])[0], bytes)
        kept = call.step
        assert max(map(len, (kept.costs, kept.graphs, kept.shareable))) <= 4


def test_options_that_are_too_large_are_not_kept(server: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_options, "MAX_OPTION_BYTES", 4 * HEADS - 1)
    caller = Caller(server, [5], seed=1)
    caller.open()
    call = caller.call(0, attnd.AttentionOptions(sinks=torch.full((HEADS,), 1.0)))
    assert isinstance(call, Call)
    assert isinstance(server.together([call])[0], bytes)
    assert [len(kept) for kept in (call.step.costs, call.step.graphs, call.step.shareable)] == [0, 0, 0]


def test_pages_that_were_written_are_counted_as_they_come(server: Waiting) -> None:
    caller = Caller(server, [5], seed=1)
    (cache,) = server.service.caches.all()
    (group,) = cache.groups
    group.page_was_written[:] = False
    group.num_pages_written = 0
    for slots in ([0, 1, PAGE], [2, -1], [PAGE * 3, PAGE * 3 + 1]):
        group.mark_written(torch.tensor(slots))
        assert cache.num_pages_written == len(group.written_pages)
    group.mark_pages_written(torch.tensor([1, 5, 5]))
    assert group.written_pages.tolist() == [0, 1, 3, 5]
    assert cache.num_pages_written == 4
    assert caller.cache.info().num_pages_written == 4


def test_written_pages_of_a_cache_with_very_many_are_looked_for_beside_the_event_loop(
    server: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = Caller(server, [5], seed=1)
    request = cache_pb2.RenewCacheRequest(cache=caller.cache.ref, with_written_pages=True).SerializeToString()
    renew = server.service.unary["RenewCache"]
    at_once = renew(request, PRINCIPAL)
    assert isinstance(at_once, bytes)
    monkeypatch.setattr(kv_requests, "MANY_PAGES", caller.num_pages - 1)
    work = renew(request, PRINCIPAL)
    assert not isinstance(work, bytes)
    (answer,) = server.together([work])
    assert isinstance(answer, bytes)
    told = [cache_pb2.RenewCacheResponse.FromString(each) for each in (at_once, answer)]
    assert told[0].written_pages == told[1].written_pages
    assert told[1].cache.num_pages_written == caller.num_pages
    monkeypatch.setattr(kv_requests, "MAX_TOLD_PAGES", caller.num_pages - 1)
    with pytest.raises(Exhausted, match=f"{caller.num_pages} pages of the cache were written, but an answer tells at"):
        renew(request, PRINCIPAL)
    without = cache_pb2.RenewCacheRequest(cache=caller.cache.ref).SerializeToString()
    assert isinstance(renew(without, PRINCIPAL), bytes)

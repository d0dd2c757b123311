"""Warm-up and what it captures, on a processor: launches are called again instead of replayed by a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import attnd
from attnd.protocol import requests
from attnd_server.attention.backends.base import DecodeShape
from attnd_server.attention.backends.naive import NaiveAttention
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.warming_up import is_warming_up
from attnd_server.config import ServerConfig
from attnd_server.execution import decode_graphs
from attnd_server.execution.executor import Executor
from attnd_server.inproc import InprocTransport
from attnd_server.kv.caches import CacheTable
from attnd_server.planes.negotiation import Planes
from attnd_server.service.service import AttentionService
from attnd_server.service.warm_up import batch_sizes
from tests.servers import wait_for

CPU = torch.device("cpu")
LAYERS, KV_HEADS, HEADS, DIM, DIM_V, PAGE, PAGES = 2, 2, 4, 24, 8, 4, 32
PLAN_BYTES = 1000
KV_BYTES = 4 * LAYERS * KV_HEADS * (DIM + DIM_V) * PAGE * PAGES


class FixedNaivePlan:
    """A fixed plan whose launch is the naive backend's."""

    num_bytes = PLAN_BYTES

    def __init__(self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions) -> None:
        self.shape = shape
        self._config, self._options = config, options
        self._kernel = NaiveAttention()

    def refusal(self, metadata: AttentionMetadata) -> str | None:
        if not metadata.is_decode or metadata.cache_only:
            return "it is something else"
        if metadata.num_reqs > self.shape.num_reqs or metadata.max_context_len > self.shape.max_context_len:
            return "it is too big"
        return None

    def update(self, metadata: AttentionMetadata) -> None:
        self._num_rows = metadata.num_tokens
        self._plan = self._kernel.plan(self._config, metadata, self._options, CPU)

    def launch(self, output: torch.Tensor, lse: torch.Tensor | None, *tensors: Any) -> None:
        rows = self.shape.num_reqs * self.shape.query_len
        assert [tensor.shape[0] for tensor in (output, *tensors[:3])] == [rows] * 4
        q, k, v = (tensor[: self._num_rows] for tensor in tensors[:3])
        result, result_lse = self._kernel.run(self._plan, q, k, v, *tensors[3:])
        output.fill_(torch.nan)[: self._num_rows] = result
        if lse is not None:
            lse.fill_(torch.nan)[: self._num_rows] = result_lse


class FixedNaive(NaiveAttention):
    """The naive backend, with fixed plans."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._before = before
        self.shapes: list[DecodeShape] = []

    def fixed_plan(
        self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, device: torch.device
    ) -> FixedNaivePlan:
        assert is_warming_up()
        self._before()
        self.shapes.append(shape)
        return FixedNaivePlan(config, shape, options)


@dataclass
class Captures:
    """Stands in for CUDA graphs."""

    fails_at: int = -1
    num_captures: int = 0
    replays: list[int] = field(default_factory=list)

    def __call__(self, launches: Callable[[], None]) -> Callable[[], None]:
        assert is_warming_up()
        if self.num_captures == self.fails_at:
            raise RuntimeError("no more of these")
        number = self.num_captures
        self.num_captures += 1

        def replay() -> None:
            assert not is_warming_up()
            self.replays.append(number)
            launches()

        return replay


@dataclass
class Server:
    """A server in this process, its client, and what stands in for a GPU."""

    client: attnd.Client
    caches: CacheTable
    captures: Captures
    kernel: FixedNaive
    executor: Executor


@contextmanager
def serving(
    captures: Captures | None = None, kernel: FixedNaive | None = None, kv_bytes: int = 1 << 22
) -> Iterator[Server]:
    config = ServerConfig(kv_bytes=kv_bytes)
    captures, kernel, caches = captures or Captures(), kernel or FixedNaive(), CacheTable(config, CPU, kv_bytes)
    executor = Executor(CPU, caches, config, captures)
    executor.ops._kernels[AttentionBackend.NAIVE] = kernel
    with attnd.Client(InprocTransport(AttentionService(config, executor, caches, Planes()))) as client:
        yield Server(client, caches, captures, kernel, executor)


def new_cache(client: attnd.Client, backend: str = "naive") -> attnd.Cache:
    return client.create_cache(
        num_layers=LAYERS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        head_dim_v=DIM_V,
        num_pages=PAGES,
        page_size=PAGE,
        dtype="float32",
        backend=backend,
    )


def tensors(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(num_tokens, HEADS, DIM),
        torch.randn(num_tokens, KV_HEADS, DIM),
        torch.randn(num_tokens, KV_HEADS, DIM_V),
    )


def decode(context_lens: list[int], query_len: int = 1, first_page: int = 0, stored: bool = True) -> attnd.StepMetadata:
    """Requests with eight pages each; every third new token is not stored."""
    tables = [list(range(first_page + 8 * r, first_page + 8 * r + 8)) for r in range(len(context_lens))]
    slots = [
        table[position // PAGE] * PAGE + position % PAGE
        for table, context_len in zip(tables, context_lens, strict=True)
        for position in range(context_len, context_len + query_len)
    ]
    slots = [-1 if index % 3 == 2 else slot for index, slot in enumerate(slots)]
    lens = [query_len] * len(context_lens)
    return attnd.StepMetadata(lens, context_lens, tables, slots if stored else None, kind="decode")


def test_sizes_of_batches() -> None:
    assert [batch_sizes(n) for n in (1, 2, 4, 5, 64)] == [[1], [1, 2], [1, 4], [1, 4, 5], [1, 4, 16, 64]]


@pytest.mark.parametrize("is_direct", [False, True], ids=["staged", "direct"])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("query_len", [1, 3])
def test_warm_steps_of_two_sessions_give_what_cold_ones_give(
    query_len: int, return_lse: bool, is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graphs, "_is_direct", lambda tensors: is_direct)  # asks a GPU's driver
    options = attnd.AttentionOptions(scale=0.3, softcap=7.0, return_lse=return_lse)
    generator = torch.Generator().manual_seed(3)
    with serving() as server, new_cache(server.client) as warm, new_cache(server.client) as cold:
        filling = tensors(PAGE * PAGES)[1:]
        for cache in (warm, cold):
            for layer in range(LAYERS):
                cache.store_kv(layer, range(PAGE * PAGES), *filling)
        told = warm.warm_up(num_heads=HEADS, query_len=query_len, max_reqs=3, options=options)
        assert (told.num_graphs, told.backend, told.reason) == (2 * LAYERS, "naive", "")
        assert told.num_bytes > 2 * PLAN_BYTES
        sessions = [[cache.session(), cache.session()] for cache in (warm, cold)]
        for _ in range(4):  # steps of both sessions are open at a time, and their layers take turns
            lens = [torch.randint(0, 20, (n,), generator=generator).tolist() for n in (1, 3, 2, 1)]
            metadata = [decode(lens[0], query_len), decode(lens[1], query_len, 8), decode(lens[2], query_len, 8, False)]
            order = [metadata[0], metadata[1 + int(torch.randint(2, (), generator=generator))]]
            steps = [[session.step(step) for session, step in zip(pair, order, strict=True)] for pair in sessions]
            for layer in range(LAYERS):
                for index, step in enumerate(order):
                    call = tensors(len(step.query_lens) * query_len)
                    outputs = [pair[index].attend(layer, *call, options) for pair in steps]
                    if not return_lse:
                        outputs = [(output,) for output in outputs]
                    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
        assert len(server.captures.replays) == 4 * 2 * LAYERS
        assert {number // LAYERS for number in server.captures.replays} == {0, 1}  # one request, and up to three
        for layer in range(LAYERS):
            stored = [cache.read_kv(layer, range(PAGE * PAGES), like=filling[0]) for cache in (warm, cold)]
            assert all(torch.equal(*pair) for pair in zip(*stored, strict=True))
        assert warm.info().num_pages_written == cold.info().num_pages_written


def test_steps_that_do_not_fit_go_the_old_way() -> None:
    with serving() as server, new_cache(server.client) as cache, cache.session() as session:
        cache.warm_up(num_heads=HEADS, max_reqs=2, max_context_len=6)

        def num_replays(metadata: attnd.StepMetadata, options: Any = requests.DEFAULT_OPTIONS) -> int:
            before = len(server.captures.replays)
            q, k, v = tensors(sum(metadata.query_lens))
            if metadata.cache_only:
                k = v = None
            output = session.step(metadata).attend(1, q, k, v, options)
            assert torch.isfinite(output).all()
            return len(server.captures.replays) - before

        assert num_replays(attnd.StepMetadata([6], [0], [[0, 1]], range(6))) == 0
        assert num_replays(decode([6, 0])) == 1
        assert num_replays(decode([7, 0])) == 0  # context
        assert num_replays(decode([1, 1, 1])) == 0  # requests
        assert num_replays(decode([1], query_len=2)) == 0
        assert num_replays(decode([6]), attnd.AttentionOptions(window=2)) == 0
        assert num_replays(decode([6]), attnd.AttentionOptions(scale=DIM**-0.5)) == 1  # the default, by its value
        assert num_replays(attnd.StepMetadata([1], [6], [[0, 1]], cache_only=True, kind="decode")) == 0
        assert num_replays(attnd.StepMetadata([1], [6], [[0, 1]])) == 0  # may be anything
        assert num_replays(decode([6])) == 1
        server.client.decode(cache, decode([6]), 0, *tensors(1))
        assert server.captures.replays[-1] == 0


def test_replies_do_not_share_memory() -> None:
    with serving() as server, new_cache(server.client) as cache, cache.session() as session:
        cache.warm_up(num_heads=HEADS, max_reqs=1)
        step = session.step(decode([0]))
        calls = [tensors(1) for _ in range(2)]
        for call in calls:
            step.stream.send(requests.attend_call(step.id, 0, *call, requests.DEFAULT_OPTIONS))
        assert step.stream.receive(9).kind == "step"
        replies = [step.stream.receive(9) for _ in calls]
        for (_, _, v), reply in zip(calls, replies, strict=True):
            output = reply.tensors["output"]
            # One token that sees itself alone: the output is its own v.
            assert bytes(output.data) == v.repeat_interleave(HEADS // KV_HEADS, 1).numpy().tobytes()
        assert len(server.captures.replays) == 2


def test_the_same_again_is_free() -> None:
    with serving() as server, new_cache(server.client) as cache:
        first = cache.warm_up(num_heads=HEADS, max_reqs=4, max_context_len=20)
        shapes = [DecodeShape(1, 1, 20), DecodeShape(4, 1, 20)]
        assert server.kernel.shapes == shapes
        used = server.caches.num_bytes
        assert used == KV_BYTES + first.num_bytes
        again = cache.warm_up(num_heads=HEADS, max_reqs=4, max_context_len=10)
        assert (again.num_graphs, again.num_bytes) == (first.num_graphs, first.num_bytes)
        assert server.kernel.shapes == shapes
        assert server.caches.num_bytes == used
        longer = cache.warm_up(num_heads=HEADS, max_reqs=1)
        assert server.kernel.shapes == [*shapes, DecodeShape(1, 1, PAGE * PAGES)]
        assert server.caches.num_bytes == used + longer.num_bytes


def test_a_capture_that_fails_leaves_the_old_way(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Captures(fails_at=3)) as server, new_cache(server.client) as cache, cache.session() as session:
        told = cache.warm_up(num_heads=HEADS, max_reqs=4)
        assert told.reason == "decode steps cannot be captured: no more of these"
        assert told.num_graphs == LAYERS  # those for one request
        assert "decode steps cannot be captured" in caplog.text
        assert server.caches.num_bytes == KV_BYTES + told.num_bytes
        q, k, v = tensors(2)
        assert torch.isfinite(session.step(decode([0, 0])).attend(0, q, k, v)).all()
        assert server.captures.replays == []
        session.step(decode([0])).attend(1, q[:1], k[:1], v[:1])
        assert server.captures.replays == [1]


def test_a_replay_that_fails_can_be_tried_again() -> None:
    with serving() as server, new_cache(server.client) as cache, cache.session() as session:
        cache.warm_up(num_heads=HEADS, max_reqs=1)
        (graphs,) = server.executor.graphs.all()
        replay, graphs._replays[0] = graphs._replays[0], _broken
        q, k, v = tensors(1)
        with pytest.raises(RuntimeError, match="the device is tired"):
            session.step(decode([0])).attend(0, q, k, v)
        graphs._replays[0] = replay
        output = session.step(decode([0])).attend(0, q, k, v)
        assert torch.equal(output, v.repeat_interleave(HEADS // KV_HEADS, 1))


def test_a_backend_without_fixed_plans_runs_once_and_stores_nothing() -> None:
    runs: list[bool] = []

    class Unfixed(FixedNaive):
        def fixed_plan(self, *_: object) -> str:
            return "it has none"

        def run(self, *arguments: Any) -> Any:
            runs.append(is_warming_up())
            return super().run(*arguments)

    with serving(kernel=Unfixed()) as server, new_cache(server.client) as cache, cache.session() as session:
        told = cache.warm_up(num_heads=HEADS, max_reqs=2, query_len=3)
        assert (told.num_graphs, told.num_bytes, told.backend) == (0, 0, "naive")
        assert told.reason == "naive has no fixed plan for batches of 1, and is only compiled: it has none"
        assert server.caches.num_bytes == KV_BYTES
        assert not cache.read_kv(0, range(PAGE * PAGES), like=torch.zeros(1))[0].any()
        session.step(decode([0])).attend(0, *tensors(1))
        assert runs == [True, False]


def test_memory_that_is_not_there_is_refused_and_nothing_changes() -> None:
    with serving(kv_bytes=KV_BYTES + 20_000) as server, new_cache(server.client) as cache:
        too_big = r"max_reqs is 64: a batch of 16 requests of 1 new tokens takes \d+ bytes, but .* are free"
        with pytest.raises(attnd.Exhausted, match=too_big):
            cache.warm_up(num_heads=HEADS, max_reqs=64)
        assert server.caches.num_bytes == KV_BYTES
        told = cache.warm_up(num_heads=HEADS, max_reqs=1)
        assert server.caches.num_bytes == KV_BYTES + told.num_bytes
        with pytest.raises(attnd.Exhausted, match="are free"):
            new_cache(server.client)


def test_a_step_that_was_open_before_the_first_warm_up_uses_its_graphs() -> None:
    with serving() as server, new_cache(server.client) as cache, cache.session() as session:
        step = session.step(decode([0]))
        step.attend(0, *tensors(1), attnd.AttentionOptions(window=3))  # opens it
        cache.warm_up(num_heads=HEADS, max_reqs=1)
        step.attend(1, *tensors(1))
        assert server.captures.replays == [1]


@pytest.mark.parametrize("ends", [False, True], ids=["", "deleted"])
def test_graphs_with_kernels_of_the_second_context_are_captured_again(
    monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    standing_in = [0]
    monkeypatch.setattr("attnd_server.service.warm_up.num_standing_in", lambda device: standing_in[0])
    with serving() as server, new_cache(server.client) as cache, cache.session() as session:
        cache.warm_up(num_heads=HEADS, max_reqs=1)
        quiet, captures = server.executor.quiet, server.captures
        assert captures.num_captures == LAYERS
        standing_in[0] = 1
        with quiet.waits():
            assert cache.warm_up(num_heads=HEADS, max_reqs=4).num_graphs == 2 * LAYERS
            time.sleep(0.05)
            assert captures.num_captures == 2 * LAYERS
            if ends:
                cache.delete()
        if ends:
            done = threading.Event()
            quiet.later(done.set)
            assert done.wait(20)
            time.sleep(0.1)
            assert captures.num_captures == 2 * LAYERS
            return
        wait_for(lambda: captures.num_captures == 3 * LAYERS, "nothing was captured again")
        step = session.step(decode([0, 0, 0, 0]))
        outputs = [step.attend(layer, *tensors(4)) for layer in range(LAYERS)]
        assert all(output.isfinite().all() for output in outputs)
        assert captures.replays[-LAYERS:] == list(range(2 * LAYERS, 3 * LAYERS))  # those alone that came after


def test_a_cache_takes_its_graphs_along() -> None:
    with serving() as server:
        cache = new_cache(server.client)
        cache.warm_up(num_heads=HEADS, max_reqs=4)
        (held,) = server.caches.owned("inproc")
        captured = server.executor.graphs.all()
        session = cache.session()
        step = session.step(decode([0]))
        step.attend(0, *tensors(1))
        cache.delete()
        assert server.caches.num_bytes == 0
        assert not server.executor.graphs.all()
        assert not server.executor.graphs.of(held)
        assert [(graphs.num_graphs, graphs._memory) for graphs in captured] == [(0, None)] * 2
        with pytest.raises(attnd.CacheLost, match="was deleted"):
            step.attend(1, *tensors(1))


def test_others_are_served_while_kernels_compile() -> None:
    compiling, done = threading.Event(), threading.Event()

    def compile_slowly() -> None:
        compiling.set()
        assert done.wait(30)

    with serving(kernel=FixedNaive(compile_slowly)) as server, new_cache(server.client) as cache:
        told: list[attnd.WarmUp] = []
        thread = threading.Thread(target=lambda: told.append(cache.warm_up(num_heads=HEADS, max_reqs=1)))
        thread.start()
        assert compiling.wait(30)
        with cache.session() as session:
            session.step(decode([0])).attend(0, *tensors(1))
        assert not told
        done.set()
        thread.join(30)
        assert told[0].num_graphs == LAYERS


def test_warm_ups_that_wait_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnd_server.execution.side.MAX_SIDE_WORK", 1)
    refused: list[BaseException] = []

    def ask_again() -> None:
        try:
            cache.warm_up(num_heads=HEADS, max_reqs=1)
        except attnd.Exhausted as error:
            refused.append(error)

    with serving(kernel=FixedNaive(ask_again)) as server, new_cache(server.client) as cache:
        for _ in range(2):  # the place is free again after the first
            assert cache.warm_up(num_heads=HEADS, max_reqs=1).num_graphs == LAYERS
    assert [str(error) for error in refused] == [
        "1 warm-ups wait, but the server's limit is 1; 0 are free: retry in a moment"
    ]


def test_graphs_of_a_cache_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnd_server.service.warm_up.MAX_GRAPHS", 3 * LAYERS)
    with serving() as server, new_cache(server.client) as cache:
        assert cache.warm_up(num_heads=HEADS, max_reqs=4).num_graphs == 2 * LAYERS
        told = cache.warm_up(num_heads=HEADS, max_reqs=4, query_len=2)
        assert (told.num_graphs, told.reason) == (LAYERS, "the cache has 6 graphs, and the limit is 6")


def test_a_cache_that_is_deleted_meanwhile_is_lost() -> None:
    with serving() as server:
        cache = new_cache(server.client)
        server.kernel._before = cache.delete
        with pytest.raises(attnd.CacheLost, match="was deleted"):
            cache.warm_up(num_heads=HEADS, max_reqs=1)
        assert server.caches.num_bytes == 0


def test_a_token_that_goes_meanwhile_ends_it_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes once the first of two graphs was captured."""
    gone: list[str] = []

    def refuse(principal: str) -> None:
        if gone:
            raise attnd.Unauthenticated(f"the token of {principal} is no longer known")

    monkeypatch.setattr("attnd_server.service.warm_up.refuse_if_revoked", refuse)
    with serving() as server, new_cache(server.client) as cache:
        used = server.caches.num_bytes
        server.kernel._before = lambda: gone.extend(["gone"] * (len(server.kernel.shapes) == 1))
        with pytest.raises(attnd.Unauthenticated, match="of inproc is no longer known"):
            cache.warm_up(num_heads=HEADS, max_reqs=4)
        assert server.captures.num_captures == LAYERS
        assert server.caches.num_bytes == used
        gone.clear()


def test_a_server_that_ends_meanwhile_says_so() -> None:
    with serving() as server, new_cache(server.client) as cache:
        server.kernel._before = server.client.transport.close
        with pytest.raises(attnd.Disconnected, match="is shutting down"):
            cache.warm_up(num_heads=HEADS, max_reqs=1)


def _broken() -> None:
    raise RuntimeError("the device is tired")

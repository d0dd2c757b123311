"""Which class serves calls that came together, and when one is made; what a class computes is for a GPU to show."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.device.kernels.launch import KernelMissing
from attnd_server.execution.by_options import ShareKey
from attnd_server.execution.joined import graphs
from attnd_server.execution.joined.graph import JoinedGraph
from attnd_server.execution.joined.graphs import JoinedGraphs, margin_of
from attnd_server.execution.step import Call

pytest.importorskip("triton")

PAGE = 16
KEY = ShareKey(False, ("space", "backend", 1, "options"))


def call(num_reqs: int, context_len: int) -> Call:
    metadata = SimpleNamespace(num_reqs=num_reqs, max_context_len=context_len)
    group = SimpleNamespace(config=SimpleNamespace(page_size=PAGE))
    return cast(Call, SimpleNamespace(step=SimpleNamespace(metadata=metadata, group=group)))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Classes are made when they are asked for, but in tests of when they are not."""
    monkeypatch.setattr(graphs, "ASKED_BEFORE", 0)
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(graphs, "time", clock)
    return clock


class Made(JoinedGraphs):
    """Makes what it is told to, and notes for which sizes."""

    def __init__(self, *results: Any, captures: bool = True) -> None:
        super().__init__(cast(TritonAttentionOps, None), (lambda launches: launches) if captures else None)
        self.results, self.sizes = list(results), list[tuple[int, int]]()

    def _made(self, call: Call, max_reqs: int, max_pages: int) -> JoinedGraph | str:
        self.sizes.append((max_reqs, max_pages))
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return cast(JoinedGraph, result)


@dataclass(eq=False)
class FakeGraph:
    num_bytes: int = 1 << 20
    is_over: bool = False


def graph(num_bytes: int = 1 << 20, *, is_over: bool = False) -> Any:
    return FakeGraph(num_bytes, is_over)


def test_one_class_serves_all_sets_of_a_size() -> None:
    first, second, third = graph(), graph(), graph()
    made = Made(first, second, third)
    assert made.find([call(4, 100), call(12, 0)], KEY) is first
    assert made.find([call(1, 7)], KEY) is first
    assert made.find([call(16, 0), call(1, 0)], KEY) is second  # a request more
    longest = 64 * PAGE - margin_of(PAGE) * PAGE
    assert made.find([call(16, longest)], KEY) is first
    assert made.find([call(16, longest + 1)], KEY) is third  # a token more
    assert made.sizes == [(16, 64), (64, 64), (16, 256)]


def test_other_options_are_another_class() -> None:
    made = Made(graph(), graph())
    assert made.find([call(1, 1)], KEY) is not made.find([call(1, 1)], ShareKey(True, ("space", "backend", 1, "more")))


@pytest.mark.parametrize(("num_reqs", "context_len"), [(1025, 1), (1, 4096 * PAGE)])
def test_what_is_larger_than_all_has_none(num_reqs: int, context_len: int) -> None:
    assert Made().find([call(num_reqs, context_len)], KEY) is None


def test_there_is_none_where_nothing_can_be_captured() -> None:
    assert Made(captures=False).find([call(1, 1)], KEY) is None


def test_a_class_that_cannot_be_is_asked_for_once() -> None:
    made = Made("its kernels are planned on the host", torch.OutOfMemoryError("CUDA out of memory"))
    for _ in range(3):
        assert made.find([call(1, 1)], KEY) is None
        assert made.find([call(100, 1)], KEY) is None
    assert made.sizes == [(16, 64), (256, 64)]


def test_a_class_is_made_once_its_kernels_are_there() -> None:
    ready: Future[None] = Future()
    now = graph()
    made = Made(KernelMissing("attend", ready), now)
    for _ in range(3):
        assert made.find([call(1, 1)], KEY) is None
    ready.set_result(None)
    assert made.find([call(1, 1)], KEY) is now
    assert len(made.sizes) == 2


def test_a_fault_is_for_whoever_asked() -> None:
    with pytest.raises(ZeroDivisionError):
        Made(ZeroDivisionError()).find([call(1, 1)], KEY)


def test_the_oldest_go_where_all_would_take_too_much() -> None:
    big = graphs.MOST_BYTES // 2
    made = Made(*(graph(big) for _ in range(4)))
    first, second = made.find([call(1, 1)], KEY), made.find([call(100, 1)], KEY)
    assert made.find([call(1, 1)], KEY) is first  # used last
    third = made.find([call(1000, 1)], KEY)
    assert [made.find([call(n, 1)], KEY) for n in (1, 1000)] == [first, third]
    assert made.find([call(100, 1)], KEY) not in (first, second, third)


def test_classes_of_a_space_that_is_gone_are_forgotten() -> None:
    gone, kept = graph(is_over=True), graph()
    made = Made(gone, kept, graph())
    assert made.find([call(1, 1)], KEY) is gone
    assert made.find([call(100, 1)], KEY) is kept
    made.forget()
    assert made.find([call(100, 1)], KEY) is kept
    assert made.find([call(1, 1)], KEY) not in (gone, kept)


def test_options_that_come_once_get_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "ASKED_BEFORE", 3)
    made = Made(graph())
    for number in range(100):
        assert made.find([call(1, 1)], ShareKey(False, ("space", number))) is None
    for _ in range(3):
        assert made.find([call(1, 1)], KEY) is None
    assert made.find([call(1, 1)], KEY) is not None
    assert len(made.sizes) == 1


def test_who_asks_for_ever_new_classes_costs_others_a_twentieth_of_the_time(clock: SimpleNamespace) -> None:
    class Slow(Made):
        def _made(self, call: Call, max_reqs: int, max_pages: int) -> JoinedGraph | str:
            clock.now += 0.01
            return super()._made(call, max_reqs, max_pages)

    made, began = Slow(*(graph(1) for _ in range(1000))), clock.now
    for number in range(10_000):
        made.find([call(1, 1)], ShareKey(False, ("space", number)))
        clock.now += 0.001
    assert 0.01 * len(made.sizes) == pytest.approx((clock.now - began) / 21, rel=0.05)

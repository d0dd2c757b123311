"""Calls of several callers in one launch: the bits of calls that are alone, and each with its own fate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import attnd
from attnd.errors import CacheLost, DeadlineExceeded
from attnd.v1 import cache_pb2
from attnd_server.attention.config import AttentionBackend
from attnd_server.execution import batch as shared_launch
from attnd_server.execution.batch import SharedLaunches
from attnd_server.execution.work import Cancelled
from tests.servers import wait_for
from tests.shared_calls import HEADS, LAYERS, PAGE, Caller, Waiting, check_same_bits, tensors, waiting
from tests.unit.test_decode_graphs import FixedNaive

PLAIN = attnd.AttentionOptions()
EVERYTHING = attnd.AttentionOptions(
    scale=0.3, softcap=2.0, window=9, alibi_slopes=torch.rand(HEADS), sinks=torch.randn(HEADS), return_lse=True
)


@pytest.fixture
def server() -> Iterator[Waiting]:
    with waiting() as running:
        yield running


@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_callers_at_different_layers_get_the_bits_of_calls_alone(
    server: Waiting, options: attnd.AttentionOptions
) -> None:
    callers = [
        Caller(server, [5, 0, 17], seed=1),
        Caller(server, [30], seed=2, num_layers=5),
        Caller(server, [1, 2], seed=3, num_pages=7),
        Caller(server, [12], seed=4, store=False),
    ]
    check_same_bits(server, callers, options)


@pytest.mark.parametrize(
    "geometry",
    [
        {"layout": "distinct"},
        {"dtype": "float16"},
        {"kv_dtype": "float8_e4m3fn", "k_scales": [0.5, 0.25], "v_scales": 0.5},
        {"kv_dtype": "float8_e4m3fn", "v_dtype": "float32", "k_scales": [0.5, 0.25]},
        {"kv_split": attnd.KVSplit(chunk_size=16)},
        {"groups": [attnd.LayerGroup(range(LAYERS), num_kv_heads=1, latent=True)]},
    ],
    ids=["distinct", "float16", "fp8", "fp8 of k", "chunks", "latent"],
)
def test_other_geometries(server: Waiting, geometry: dict[str, object]) -> None:
    callers = [Caller(server, [5, 9], seed=1, geometry=geometry), Caller(server, [14], seed=2, geometry=geometry)]
    for caller in callers:
        if "kv_dtype" in geometry:  # what is read back is not what was stored
            caller.store = False
    check_same_bits(server, callers, PLAIN)


def test_blocks_share_a_launch_where_their_bits_are_promised(server: Waiting) -> None:
    geometry = {"kv_split": attnd.KVSplit(batch_invariant=True)}
    callers = [Caller(server, [7, 3], seed=seed, query_len=4, geometry=geometry) for seed in (1, 2)]
    check_same_bits(server, callers, PLAIN)
    loose = [Caller(server, [7, 3], seed=seed, query_len=4) for seed in (1, 2)]
    assert calls_per_launch(server, loose) == {1: 2}


def calls_per_launch(
    server: Waiting, callers: list[Caller], options: list[attnd.AttentionOptions] | None = None
) -> dict[int, int]:
    for caller in callers:
        caller.open()
    works = [caller.call(0, each) for caller, each in zip(callers, options or [PLAIN] * len(callers), strict=True)]
    server.launches()
    for answer in server.together(works):
        tensors(answer)
    return server.launches()


def test_what_is_not_alike_runs_alone(server: Waiting) -> None:
    def callers(*changes: dict[str, object]) -> list[Caller]:
        return [Caller(server, [5], seed=1), *(Caller(server, [5], seed=2, **each) for each in changes)]  # type: ignore[arg-type]

    assert calls_per_launch(server, callers({})) == {2: 1}
    assert calls_per_launch(server, callers({"query_len": 2})) == {1: 2}
    assert calls_per_launch(server, callers({"backend": "sdpa"}, {"backend": "sdpa"})) == {1: 3}
    assert calls_per_launch(server, callers({"geometry": {"layout": "distinct"}})) == {1: 2}
    window = attnd.AttentionOptions(window=3)
    assert calls_per_launch(server, callers({}), [PLAIN, window]) == {1: 2}
    assert calls_per_launch(server, callers({}, {}, {}), [PLAIN, window, PLAIN, window]) == {2: 2}


@pytest.mark.parametrize("more", [{"window": 9}, {"store_first": True}, {"first_position": [64, 1000]}], ids=str)
def test_steps_of_engines_share_launches(server: Waiting, more: dict[str, object]) -> None:
    """Pages that a window hides are not there, and cost no launch."""
    callers = [Caller(server, [5, 17], seed=1, more=more), Caller(server, [30, 12], seed=2, more=more)]
    check_same_bits(server, callers, PLAIN)
    assert calls_per_launch(server, callers) == {2: 1}


def test_steps_whose_tokens_are_not_all_keys_run_alone(server: Waiting) -> None:
    def callers(**more: object) -> list[Caller]:
        return [Caller(server, [5, 9], seed=seed, more=more) for seed in (1, 2)]

    assert calls_per_launch(server, callers(attend_new=[1, 0])) == {1: 2}
    rounded = {"kv_dtype": "float8_e4m3fn"}
    both = [Caller(server, [5], seed=seed, geometry=rounded, more={"store_first": True}) for seed in (1, 2)]
    assert calls_per_launch(server, both) == {1: 2}


def test_whoever_has_several_calls_at_once_runs_them_in_one_launch_too(server: Waiting) -> None:
    callers = [Caller(server, [5, 3], seed=1), Caller(server, [9], seed=2), Caller(server, [1], seed=3)]
    for caller in callers:
        caller.open()
    works = [caller.call(layer, EVERYTHING) for layer, caller in enumerate(callers)]
    alone = [tensors(server.together([work])[0]) for work in works]
    server.launches()
    assert [tensors(answer) for answer in server.at_once(works)] == alone
    assert server.launches() == {4: 1}


def test_options_that_compute_the_same_are_alike(server: Waiting) -> None:
    sinks = torch.randn(HEADS)
    options = [attnd.AttentionOptions(sinks=sinks.clone()) for _ in range(2)]
    callers = [Caller(server, [5], seed=1), Caller(server, [6], seed=2)]
    assert calls_per_launch(server, callers, options) == {2: 1}


def test_absent_pages_keep_a_call_alone(server: Waiting) -> None:
    callers = [Caller(server, [5], seed=1), Caller(server, [5], seed=2)]
    for caller in callers:
        caller.open()
    callers[0].open(attnd.StepMetadata([1], [5], [[-1, 3]], [3 * PAGE + 1], kind="decode"))
    server.launches()
    for answer in server.together([caller.call(0, PLAIN) for caller in callers]):
        tensors(answer)
    assert server.launches() == {1: 2}


def test_calls_of_one_cache_run_one_after_the_other(server: Waiting) -> None:
    one, other = Caller(server, [5], seed=1), Caller(server, [6], seed=2)
    one.open()
    other.open()
    works = [one.call(0, PLAIN), one.call(1, PLAIN), other.call(2, PLAIN)]
    server.launches()
    for answer in server.together(works):
        tensors(answer)
    assert server.launches() == {1: 1, 2: 1}


def test_a_set_of_steps_is_planned_once_whatever_the_order(server: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    callers = [Caller(server, [5, 2], seed=seed) for seed in range(4)]
    for caller in callers:
        caller.open()
    kernel = server.service.executor.ops._kernels
    planned = []
    for name, each in kernel.items():
        plan = each.plan

        def counted(config, metadata, *rest, plan=plan):  # type: ignore[no-untyped-def]
            planned.append(metadata.num_reqs)
            return plan(config, metadata, *rest)

        monkeypatch.setattr(kernel[name], "plan", counted)
    for layer in range(LAYERS):
        works = [caller.call(layer, PLAIN) for caller in callers]
        for answer in server.together(works[layer:] + works[:layer]):
            tensors(answer)
    assert [num_reqs for num_reqs in planned if num_reqs > 2] == [8]


def test_together_they_stay_within_the_limits_of_a_step(server: Waiting) -> None:
    executor = server.service.executor
    callers = [Caller(server, [5] * 4, seed=seed) for seed in range(5)]
    executor.runner._limits = replace(executor._config, max_step_tokens=9)
    assert calls_per_launch(server, callers) == {1: 1, 2: 2}
    executor.runner._limits = replace(executor._config, max_step_tokens=99, max_page_table_elements=2 * 12)
    assert calls_per_launch(server, callers) == {2: 1, 4: 1}  # 3 calls, then 2


def test_each_call_has_its_own_fate(server: Waiting) -> None:
    callers = [Caller(server, [5 + seed], seed=seed) for seed in range(6)]
    for caller in callers:
        caller.open()
    works = [caller.call(0, PLAIN) for caller in callers]
    executor, submit = server.service.executor, server.service.executor.submit
    fates = {works[1]: {"timeout_s": -1.0}, works[2]: {"is_wanted": lambda: False}}
    works[3] = works[3]._replace(encode=lambda *_: bytes(1 // 0))
    deleted = callers[4].cache
    executor.submit = lambda work, done: submit(work, done, **fates.get(work, {}))  # type: ignore[method-assign, arg-type]
    lost = server.service.delete_cache(_delete(deleted), "inproc")
    server.launches()
    answers = server.together([works[0], works[1], works[2], works[3], lost, works[4], works[5]])
    assert [type(answer) for answer in answers] == [
        bytes, DeadlineExceeded, Cancelled, ZeroDivisionError, bytes, CacheLost, bytes,
    ]  # fmt: skip
    executor.submit = submit  # type: ignore[method-assign]
    for work, answer in ((works[0], answers[0]), (works[5], answers[6])):
        assert tensors(answer) == tensors(server.together([work])[0])


def _delete(cache: attnd.Cache) -> bytes:
    return cache_pb2.DeleteCacheRequest(cache=cache.ref).SerializeToString()


def test_what_fails_together_is_tried_alone(server: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(launches: SharedLaunches, calls: list[object]) -> None:
        raise RuntimeError("no room for all of them")

    monkeypatch.setattr(SharedLaunches, "attend", fail)
    callers = [Caller(server, [5], seed=seed) for seed in range(3)]
    assert calls_per_launch(server, callers) == {1: 3}


def test_steps_with_graphs_share_a_launch_only_if_they_are_many(
    server: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_launch, "MIN_CALLS_WITH_GRAPHS", 3)
    executor = server.service.executor
    executor.capture = lambda launches: launches
    executor.ops._kernels[AttentionBackend.NAIVE] = FixedNaive()
    callers = [Caller(server, [5 + seed, 3], seed=seed) for seed in range(4)]
    for caller in callers[:3]:
        assert caller.cache.warm_up(num_heads=HEADS, max_reqs=2, options=PLAIN).num_graphs > 0
    assert calls_per_launch(server, callers[:2]) == {1: 2}
    assert calls_per_launch(server, callers[1:]) == {1: 3}  # one of them has no graphs
    check_same_bits(server, callers[:3], PLAIN)


def test_an_idle_executor_keeps_no_steps_of_others(server: Waiting) -> None:
    shared = server.service.executor.runner._shared
    calls_per_launch(server, [Caller(server, [5], seed=seed) for seed in range(2)])
    wait_for(lambda: not shared._sets, "the executor keeps the buffers of calls that are over")

"""GetStatus: what it tells of whom, and that it stays small and quick."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attnd
from attnd.protocol import frames, requests
from attnd.v1 import cache_pb2, error_pb2, plane_pb2, status_pb2
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.device.copy_timer import Copies
from attnd_server.device.kernels.states import KernelStates
from attnd_server.execution import runner
from attnd_server.execution.runner import TIMED_EVERY
from attnd_server.execution.step import Call
from attnd_server.observe import callers as callers_module
from attnd_server.observe.callers import Callers, SessionCounts
from attnd_server.service import status as status_module
from attnd_server.service.service import AttentionService
from attnd_server.service.status import MAX_ROWS, WrittenPages
from tests.held_device import held

GEOMETRY: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 8, "num_pages": 6, "page_size": 4}
Q, K, V = torch.ones(3, 2, 8), torch.ones(3, 1, 8), torch.ones(3, 1, 8)
PREFILL = attnd.StepMetadata([3], [0], [[1, 2]], [4, 5, 6])


@pytest.fixture
def service() -> Iterator[AttentionService]:
    """A server that asks who calls; olga operates it."""
    config = ServerConfig(device="cpu", kv_bytes=1 << 20, tokens="a file", operators=frozenset({"olga"}))
    made = build_service(config)
    yield made
    made.close()


def status(service: AttentionService, principal: str) -> status_pb2.GetStatusResponse:
    answer = service.unary["GetStatus"](b"", principal)
    assert isinstance(answer, bytes)
    return status_pb2.GetStatusResponse.FromString(answer)


def run(service: AttentionService, work: Any) -> bytes:
    result: bytes | None = None
    while result is None:  # the executor may be tidying up
        result = service.executor.run_now(work)
    return result


def new_cache(service: AttentionService, principal: str, name: str = "") -> cache_pb2.CacheRef:
    request = attnd.CacheSpec(**GEOMETRY, dtype="float32", name=name).to_request()
    created = run(service, service.unary["CreateCache"](request, principal))
    return cache_pb2.CreateCacheResponse.FromString(created).cache.cache


def attended(service: AttentionService, session: Any, cache: cache_pb2.CacheRef, step_id: int = 1) -> None:
    """A step of three tokens and both of its layers."""
    session.request(frames.step_request(PREFILL.to_message(step_id, cache)))
    for layer in range(2):
        run(service, session.request(requests.attend_call(step_id, layer, Q, K, V, requests.DEFAULT_OPTIONS)))


def test_a_principal_sees_itself_alone(service: AttentionService) -> None:
    hers, his = new_cache(service, "alice", "hers"), new_cache(service, "bob", "his")
    sessions = {name: service.open_session(name) for name in ("alice", "bob")}
    attended(service, sessions["alice"], hers)
    attended(service, sessions["bob"], his)
    told = status(service, "alice")
    assert not told.shows_everybody
    (row,) = told.principals
    assert (row.principal, row.num_caches, row.num_pages, row.num_pages_written) == ("alice", 1, 6, 1)
    assert (row.served.steps, row.served.tokens, row.served.calls) == (1, 3, 2)
    assert [(each.principal, each.plane, each.served.calls) for each in told.sessions] == [
        ("alice", plane_pb2.PLANE_INLINE, 2)
    ]
    assert told.num_process_bytes == 0
    assert not told.refusals
    assert b"bob" not in told.SerializeToString()
    assert hers.id not in told.SerializeToString()


def test_what_another_has_changes_nothing_but_what_errors_and_capabilities_tell(service: AttentionService) -> None:
    before = status(service, "alice")
    session = service.open_session("bob")
    attended(service, session, new_cache(service, "bob"))
    service.told(attnd.InvalidRequest("his"), "bob")
    service.told(attnd.Unauthenticated("nobody's"))
    after = status(service, "alice")
    assert after.devices[0].num_bytes_used > before.devices[0].num_bytes_used
    for each in (before, after):
        each.ClearField("uptime_s")
        each.ClearField("devices")
    assert after == before


def test_an_operator_sees_everybody(service: AttentionService) -> None:
    cache, session = new_cache(service, "bob"), service.open_session("bob")
    attended(service, session, cache)
    service.told(attnd.InvalidRequest("his"), "bob")
    service.told(attnd.Unauthenticated("nobody's"))
    new_cache(service, "alice")
    told = status(service, "olga")
    assert told.shows_everybody
    assert [row.principal for row in told.principals] == ["olga", "alice", "bob"]
    assert [(each.principal, each.served.tokens) for each in told.sessions] == [("bob", 3)]
    assert told.num_process_bytes > 1 << 20
    invalid, unauthenticated = error_pb2.ERROR_REASON_INVALID_REQUEST, error_pb2.ERROR_REASON_UNAUTHENTICATED
    assert {each.reason: each.count for each in told.refusals} == {invalid: 1, unauthenticated: 1}
    assert {each.reason: each.count for each in told.principals[2].refusals} == {invalid: 1}


def test_operators_alone_learn_what_is_compiled_for_whom(
    service: AttentionService, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not status(service, "olga").HasField("kernels")
    failed = [(f"kernel {index}", "x" * 10_000) for index in range(100)]
    states = KernelStates(7, 6, [("a kernel", 2.5)], failed, num_compiled=8, num_found=9)
    kernels = SimpleNamespace(states=lambda: states, close=lambda: None)
    monkeypatch.setattr(service.executor, "kernels", kernels)
    told = status(service, "olga").kernels
    numbers = told.num_loaded, told.num_waiting, told.num_compiling, told.num_failed, told.num_compiled, told.num_found
    assert numbers == (7, 6, 1, 100, 8, 9)
    assert [(each.name, each.seconds) for each in told.compiling] == [("a kernel", 2.5)]
    assert (len(told.failed), told.failed[0].name, told.failed[0].reason) == (64, "kernel 0", "x" * 500)
    assert not status(service, "alice").HasField("kernels")


def test_where_nobody_is_asked_everybody_is_shown() -> None:
    service = build_service(ServerConfig(device="cpu", kv_bytes=1 << 20))
    session = service.open_session("anybody")
    attended(service, session, new_cache(service, "anybody"))
    told = status(service, "anybody")
    assert told.shows_everybody
    assert [row.principal for row in told.principals] == ["anybody"]
    assert [each.served.calls for each in told.sessions] == [2]
    service.close()


def test_sessions_leave_with_what_they_were_served(service: AttentionService) -> None:
    cache = new_cache(service, "alice")
    session = service.open_session("alice")
    attended(service, session, cache)
    first = status(service, "alice").sessions[0].id
    del session
    gc.collect()
    told = status(service, "alice")
    assert not told.sessions
    assert told.principals[0].served.calls == 2
    again = service.open_session("alice")
    attended(service, again, cache)
    told = status(service, "alice")
    assert told.principals[0].served.tokens == 6
    assert told.sessions[0].id != first


def test_unary_requests_are_steps_of_the_principal(service: AttentionService) -> None:
    cache = new_cache(service, "alice")
    for layer in range(2):
        request = requests.unary_call("prefill", PREFILL, cache, layer, Q, K, V, requests.DEFAULT_OPTIONS)
        run(service, service.unary["Prefill"](request, "alice"))
    served = status(service, "alice").principals[0].served
    assert (served.steps, served.tokens, served.calls) == (2, 6, 2)
    assert sum(served.times.kernel) == 1  # the first of each 16


def test_it_answers_while_the_server_drains_and_after_the_device_failed(service: AttentionService) -> None:
    assert not status(service, "alice").draining
    service.drain()
    assert status(service, "alice").draining
    service.executor.faults.fail("a test says so")
    assert status(service, "alice").device_failure == "a test says so"
    with pytest.raises(attnd.AttndError):
        service.unary["GetCapabilities"](b"", "alice")


def test_calls_that_wait_are_their_principals(service: AttentionService) -> None:
    cache, session = new_cache(service, "bob"), service.open_session("bob")
    session.request(frames.step_request(PREFILL.to_message(1, cache)))
    with held(service.executor):
        for layer in range(2):
            work = session.request(requests.attend_call(1, layer, Q, K, V, requests.DEFAULT_OPTIONS))
            assert isinstance(work, Call)
            service.executor.submit(work, lambda result, error: None)
        told = status(service, "alice")
        assert (told.queue_depth, told.principals[0].queue_depth) == (2, 0)
        rows = {row.principal: row for row in status(service, "olga").principals}
        assert (rows["bob"].queue_depth, rows["olga"].queue_depth) == (2, 0)


def test_rows_are_few_and_the_last_used_come_first(service: AttentionService) -> None:
    cache = new_cache(service, "alice")
    sessions = [service.open_session("alice") for _ in range(MAX_ROWS + 5)]
    attended(service, sessions[3], cache)
    told = status(service, "alice")
    assert (len(told.sessions), told.num_sessions_left_out) == (MAX_ROWS, 5)
    assert told.sessions[0].served.calls == 2
    others = [service.open_session(f"tenant-{number}") for number in range(MAX_ROWS + 7)]
    told = status(service, "olga")
    assert (len(told.principals), told.num_principals_left_out) == (MAX_ROWS, 9)
    assert told.principals[0].principal == "olga"
    assert len(told.SerializeToString()) < 64 << 10
    assert len(others) > MAX_ROWS


def test_pages_are_looked_at_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted:
        looks = 0

        def __init__(self, num_pages: int) -> None:
            self.shape = type("Shape", (), {"num_pages": num_pages})

        @property
        def num_pages_written(self) -> int:
            Counted.looks += 1
            return 7

    monkeypatch.setattr(status_module, "MAX_PAGES_LOOKED_AT", 100)
    caches: Any = [Counted(60), Counted(40), Counted(1)]
    written = WrittenPages()
    written.begin()
    assert [written.count(cache) for cache in caches] == [7, 7, 0]
    assert Counted.looks == 2
    written.begin()
    assert [written.count(cache) for cache in reversed(caches)] == [7, 7, 7]
    large: Any = Counted(1_000)
    written.begin()
    assert written.count(large) == 7


def test_times_are_those_of_the_first_of_each_16_calls() -> None:
    counts = SessionCounts(1, "alice", "inline")
    call: Any = SimpleNamespace(step=SimpleNamespace(counts=counts.served, trace=None))
    for number in range(TIMED_EVERY + 1):
        result: Any = SimpleNamespace(copies=Copies(1, 2))
        runner._note(call, result, 0, 1_000 + number)
    times = {
        phase: {n: count for n, count in enumerate(each.counts) if count} for phase, each in counts.served.times.items()
    }
    assert times == {"queue": {0: 2}, "copy_in": {1: 2}, "kernel": {10: 2}, "copy_out": {2: 2}}
    assert counts.served.calls == TIMED_EVERY + 1


def test_a_step_that_comes_as_one_message_waits_once() -> None:
    counts = SessionCounts(1, "alice", "cuda")
    counts.step_opened(5)
    counts.step_served(4, queue_us=9, step_us=4_000)
    served = counts.served
    assert (served.steps, served.tokens, served.calls) == (1, 5, 4)
    assert (served.times["queue"].counts[4], served.times["queue"].counts[0]) == (1, 3)
    assert served.times["kernel"].counts[10] == 4


def test_principals_that_left_are_forgotten_one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers_module, "MAX_PRINCIPALS", 3)
    callers = Callers()
    stays = callers.open("stays", "shm")
    for number in range(10):
        callers.close(callers.open(f"guest-{number}", "inline"))
    assert callers.principals() == ["stays", "guest-8", "guest-9"]
    assert stays.plane == "shm"


def test_refusals_are_counted_by_what_the_caller_can_do(service: AttentionService) -> None:
    for error in (attnd.Exhausted("full"), attnd.Exhausted("full"), attnd.CacheLost("gone")):
        service.told(error, "alice")
    (row,) = status(service, "alice").principals
    expected = {error_pb2.ERROR_REASON_CACHE_NOT_FOUND: 1, error_pb2.ERROR_REASON_EXHAUSTED: 2}
    assert {each.reason: each.count for each in row.refusals} == expected

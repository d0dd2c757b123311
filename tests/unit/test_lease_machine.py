"""Leases, steps, retries and restarts in any order, as a plain model of them says: a state machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import attnd
from attnd.protocol import frames, requests
from attnd.protocol.cache_spec import CacheSpec
from attnd.v1 import cache_pb2
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.execution.executor import Executor
from attnd_server.inproc import InprocTransport
from attnd_server.kv import cache
from attnd_server.kv import caches as cache_table
from attnd_server.service.service import AttendSession

PRINCIPALS = st.sampled_from(["one", "two"])
# Which cache is used, mostly one that is there, and whether by its owner, as nearly always.
WHICH = st.integers(0, 9)
BY_OWNER = st.sampled_from([True] * 7 + [False])
SELDOM = st.sampled_from([False, False, False, True])
LAYERS, HEADS, DIM, PAGES, PAGE_SIZE = 2, 2, 8, 2, 4
SLOTS = PAGES * PAGE_SIZE
MAX_CACHES = 4
GEOMETRY: dict[str, Any] = {
    "num_layers": LAYERS,
    "num_kv_heads": HEADS,
    "head_dim": DIM,
    "num_pages": PAGES,
    "page_size": PAGE_SIZE,
    "head_dim_v": 0,
    "dtype": "float32",
    "layout": "unified",
    "backend": "naive",
    "precision": "auto",
    "kv_dtype": None,
    "k_scales": None,
    "v_scales": None,
    "kv_split": None,
    "name": "",
}


class Clock:
    """Stands in for the module `time` where leases are kept: monotonic time that tests move, wall time that jumps."""

    def __init__(self) -> None:
        self.now = 1e6

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        raise AssertionError("leases look at the wall clock")


@dataclass(eq=False)
class ModelCache:
    """A cache as the model knows it; it may have gone."""

    principal: str
    ref: cache_pb2.CacheRef
    ttl_s: float
    expires_at: float
    is_there: bool = True
    k: Any = field(default_factory=lambda: np.zeros((LAYERS, SLOTS, HEADS, DIM), np.float32))
    v: Any = field(default_factory=lambda: np.zeros((LAYERS, SLOTS, HEADS, DIM), np.float32))


class LeaseMachine(RuleBasedStateMachine):
    """A server and its model; each rule does the same to both and compares what comes of it."""

    @initialize()
    def start(self) -> None:
        self.clock = Clock()
        self.patches = [
            mock.patch.object(cache, "time", self.clock),
            mock.patch.object(cache_table, "time", self.clock),
            mock.patch.object(Executor, "EXPIRY_PERIOD_S", 1e6),  # leases end when the machine says so
        ]
        for patch in self.patches:
            patch.start()
        self.model: list[ModelCache] = []
        self.numbers = np.random.default_rng(1)
        self.transport: InprocTransport | None = None
        self.start_server()

    def start_server(self) -> None:
        config = ServerConfig(device="cpu", kv_bytes=1 << 20, max_caches=MAX_CACHES, threads=1)
        self.service = build_service(config)
        self.transport = InprocTransport(self.service)
        self.sessions: dict[str, AttendSession] = {}
        self.step_ids: dict[str, int] = {}

    def teardown(self) -> None:
        if getattr(self, "transport", None) is not None:
            self.transport.close()
            for patch in self.patches:
                patch.stop()

    def call(self, method: str, message: Any, principal: str) -> Any:
        data = message if isinstance(message, bytes) else message.SerializeToString()
        return self.transport._finish(self.service.unary[method](data, principal), 10)

    def attempt(self, held: ModelCache, principal: str, use: Callable[[], Any]) -> Any:
        """What `use` of a cache gives, which starts its lease again; None if the model says that it cannot be used."""
        if held.ref.epoch != self.service.caches.epoch:
            with pytest.raises(attnd.EpochMismatch):
                use()
        elif not held.is_there or held.principal != principal:
            with pytest.raises(attnd.CacheLost, match="no such cache exists: deleted, expired or never created"):
                use()
        else:
            result = use()
            held.expires_at = self.clock.now + held.ttl_s
            return result
        return None

    def chosen(self, which: int, by_owner: bool) -> tuple[ModelCache, str]:
        there = [held for held in self.model if held.is_there]
        caches = there if there and which < 8 else self.model
        held = caches[which % len(caches)]
        return held, held.principal if by_owner else {"one": "two", "two": "one"}[held.principal]

    # --- leases --------------------------------------------------------------------------------------------------

    @rule(principal=PRINCIPALS, ttl_s=st.sampled_from([1.0, 5.0, 60.0]))
    def create(self, principal: str, ttl_s: float) -> None:
        there = [held for held in self.model if held.is_there]
        request = CacheSpec(**GEOMETRY, ttl_s=ttl_s).to_request()
        if len(there) == MAX_CACHES:
            with pytest.raises(attnd.Exhausted, match=f"{MAX_CACHES} caches exist"):
                self.call("CreateCache", request, principal)
            return
        info = cache_pb2.CreateCacheResponse.FromString(self.call("CreateCache", request, principal)).cache
        self.model.append(ModelCache(principal, info.cache, ttl_s, self.clock.now + ttl_s))

    @precondition(lambda self: self.model)
    @rule(which=WHICH, by_owner=BY_OWNER)
    def renew(self, which: int, by_owner: bool) -> None:
        held, principal = self.chosen(which, by_owner)
        request = cache_pb2.RenewCacheRequest(cache=held.ref)
        answer = self.attempt(held, principal, lambda: self.call("RenewCache", request, principal))
        if answer is not None:
            info = cache_pb2.RenewCacheResponse.FromString(answer).cache
            assert info.expires_in_s == pytest.approx(held.ttl_s)

    @precondition(lambda self: self.model)
    @rule(which=WHICH, by_owner=BY_OWNER, really=SELDOM)
    def delete(self, which: int, by_owner: bool, really: bool) -> None:
        if not really:
            return
        held, principal = self.chosen(which, by_owner)
        request = cache_pb2.DeleteCacheRequest(cache=held.ref)
        if self.attempt(held, principal, lambda: self.call("DeleteCache", request, principal)) is not None:
            held.is_there = False

    @rule(seconds=st.sampled_from([0.25, 0.25, 0.5, 2.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def end_leases(self) -> None:
        def expire() -> bytes:
            self.service.caches.expire()
            return b""

        self.transport._finish(expire, 10)
        for held in self.model:
            held.is_there = held.is_there and held.expires_at > self.clock.now

    @rule(really=SELDOM)
    def restart(self, really: bool) -> None:
        if not really:
            return
        self.transport.close()
        for held in self.model:
            held.is_there = False
        self.start_server()

    # --- steps ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model)
    @rule(which=WHICH, by_owner=BY_OWNER, context_len=st.integers(0, SLOTS - 1), times=st.integers(1, 3))
    def decode(self, which: int, by_owner: bool, context_len: int, times: int) -> None:
        """A unary call, sent once or more often: as often as it likes, it does what it does once."""
        held, principal = self.chosen(which, by_owner)
        q, k, v = self.numbers.standard_normal((3, 1, HEADS, DIM), np.float32)
        metadata = attnd.StepMetadata([1], [context_len], [[0, 1]], [context_len], kind="decode")
        request = requests.unary_call("decode", metadata, held.ref, 1, q, k, v, requests.DEFAULT_OPTIONS)
        expected = self.expected(held, 1, context_len, q, k, v)
        for _ in range(times):
            answer = self.attempt(held, principal, lambda: self.call("Decode", request, principal))
            if answer is not None:
                output = requests.unary_reply("decode", answer, requests.Wanted(q))
                np.testing.assert_allclose(output, expected, atol=2e-5)
                held.k[1, context_len], held.v[1, context_len] = k[0], v[0]

    @precondition(lambda self: self.model)
    @rule(which=WHICH, by_owner=BY_OWNER, context_len=st.integers(0, SLOTS - 1), is_cut=SELDOM)
    def stream(self, which: int, by_owner: bool, context_len: int, is_cut: bool) -> None:
        """A step and a call of each layer on a stream, between which the lease may end."""
        held, principal = self.chosen(which, by_owner)
        session = self.sessions.setdefault(principal, self.service.open_session(principal))
        step_id = self.step_ids[principal] = self.step_ids.get(principal, 0) + 1
        metadata = attnd.StepMetadata([1], [context_len], [[0, 1]], [context_len], kind="decode")
        message = metadata.to_message(step_id, held.ref)
        if self.attempt(held, principal, lambda: session.request(frames.step_request(message))) is None:
            return
        for layer in range(LAYERS):
            q, k, v = self.numbers.standard_normal((3, 1, HEADS, DIM), np.float32)
            work = session.request(requests.attend_call(step_id, layer, q, k, v, requests.DEFAULT_OPTIONS))
            held.expires_at = self.clock.now + held.ttl_s
            if is_cut and layer:
                self.clock.now += held.ttl_s
                self.end_leases()
                with pytest.raises(attnd.CacheLost, match=r"or its lease of .* has ended"):
                    self.transport._finish(work, 10)
                return
            expected = self.expected(held, layer, context_len, q, k, v)
            reply = requests.attend_reply(self.transport._finish(work, 10))
            assert reply.kind == "call"
            output = requests.reply(reply.message, reply.tensors, requests.Wanted(q)).output
            np.testing.assert_allclose(output, expected, atol=2e-5)
            held.k[layer, context_len], held.v[layer, context_len] = k[0], v[0]

    def expected(self, held: ModelCache, layer: int, context_len: int, q: Any, k: Any, v: Any) -> Any:
        keys = np.concatenate([held.k[layer, :context_len], k]).astype(np.float64)
        values = np.concatenate([held.v[layer, :context_len], v]).astype(np.float64)
        scores = np.einsum("thd,jhd->htj", q, keys) * DIM**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("htj,jhd->thd", weights / weights.sum(-1, keepdims=True), values)

    def stored(self, data: bytes, principal: str) -> bytes:
        return self.transport._finish(self.service.kv.store_kv(data, principal), 10)

    @precondition(lambda self: self.model)
    @rule(which=WHICH, by_owner=BY_OWNER, slots=st.lists(st.integers(0, SLOTS - 1), unique=True, max_size=4))
    def store(self, which: int, by_owner: bool, slots: list[int]) -> None:
        held, principal = self.chosen(which, by_owner)
        k, v = self.numbers.standard_normal((2, len(slots), HEADS, DIM), np.float32)
        for request in requests.store_kv(held.ref, 0, slots, k, v):
            self.attempt(held, principal, lambda data=request: self.stored(data, principal))
            if held.is_there and held.principal == principal:
                held.k[0, slots], held.v[0, slots] = k, v

    @precondition(lambda self: self.model)
    @rule(which=WHICH, by_owner=BY_OWNER, source=st.integers(0, PAGES - 1))
    def copy(self, which: int, by_owner: bool, source: int) -> None:
        held, principal = self.chosen(which, by_owner)
        target = PAGES - 1 - source
        request = requests.copy_pages(held.ref, [source], [target])
        if self.attempt(held, principal, lambda: self.call("CopyPages", request, principal)) is not None:
            for tensor in (held.k, held.v):
                pages = tensor.reshape(LAYERS, PAGES, PAGE_SIZE, HEADS, DIM)
                pages[:, target] = pages[:, source]

    @precondition(lambda self: self.model)
    @rule(which=WHICH, by_owner=BY_OWNER, layer=st.integers(0, LAYERS - 1))
    def read(self, which: int, by_owner: bool, layer: int) -> None:
        held, principal = self.chosen(which, by_owner)
        request = requests.read_kv(held.ref, layer, list(range(SLOTS)))
        works = self.attempt(held, principal, lambda: list(self.service.kv.read_kv(request, principal)))
        if works is not None:
            chunks = [frames.READ_KV_RESPONSE.decode(self.transport._finish(work, 10)) for work in works]
            k, v = requests.joined(chunks, np.zeros(1, np.float32))
            assert np.array_equal(k, held.k[layer])
            assert np.array_equal(v, held.v[layer])

    # --- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def everybody_has_their_own_caches_and_what_is_stored_there(self) -> None:
        if not hasattr(self, "service"):
            return
        there = [held for held in self.model if held.is_there]
        for principal in ("one", "two"):
            answer = self.service.list_caches(b"", principal)
            listed = cache_pb2.ListCachesResponse.FromString(answer).caches
            assert len(listed) == sum(held.principal == principal for held in there)
            assert all(not info.cache.id for info in listed)
        for held in there:
            cache = self.service.caches._caches[held.ref.id]
            for pages, expected in ((cache.groups[0].k_pages, held.k), (cache.groups[0].v_pages, held.v)):
                assert np.array_equal(pages.numpy().reshape(expected.shape), expected)
        num_bytes = 4 * LAYERS * SLOTS * HEADS * 2 * DIM
        assert self.service.caches.num_bytes == num_bytes * len(there)


def test_leases_steps_retries_and_restarts_are_as_the_model_says() -> None:
    run_state_machine_as_test(
        LeaseMachine, settings=settings(deadline=None, derandomize=True, max_examples=40, stateful_step_count=30)
    )


@pytest.mark.parametrize("jump", [-2e9, 4e9], ids=["back", "forth"])
def test_a_wall_clock_that_jumps_by_decades_ends_no_lease(monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    jumped = time.time()
    monkeypatch.setattr(time, "time", lambda: jumped)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumped * 1e9))
    with attnd.connect("inproc://", timeout_s=10) as client:
        with client.create_cache(**{**GEOMETRY, "head_dim_v": DIM, "ttl_s": 1.5}) as cache, cache.session() as session:
            ones = np.ones((1, HEADS, DIM), np.float32)
            step = session.step(attnd.StepMetadata([1], [0], [[0]], [0]))
            step.attend(0, ones, ones, ones)
            jumped += jump
            time.sleep(1.1)  # in which the server looks for leases that have ended
            assert (step.attend(0, ones, ones, ones) == 1).all()
            assert 0 < cache.info().expires_in_s <= 1.5

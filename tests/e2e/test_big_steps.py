"""Steps and messages that take long to check: on another thread, in the order of their stream, and bounded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import attnd
from attnd.protocol import frames
from attnd.protocol.packing import int32_tensor
from attnd.v1 import attention_pb2, cache_pb2, step_pb2
from attnd_server.config import ServerConfig
from attnd_server.rpc import rpcs
from attnd_server.service import kept_steps, service, validation
from attnd_server.service.session import BigStep
from tests.e2e.test_overload import Busy, serving
from tests.servers import wait_for

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 64, "page_size": 4, "dtype": "float32"}
PAGES = list(range(64))
Q, K, V = torch.ones(1, 2, 16), torch.ones(1, 2, 16), torch.ones(1, 2, 16)


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Busy]:
    with serving(tmp_path) as server:
        yield server


class Seen:
    """Threads on which steps were checked, and what holds them there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[str] = []
        self.hold = threading.Event()
        self.hold.set()
        check = validation.steps

        def checked(message: step_pb2.Step, *arguments: object) -> object:
            self.threads.append(threading.current_thread().name.partition("_")[0])
            if self.threads[-1] == "checks":
                assert self.hold.wait(30)
            return check(message, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(service.validation, "steps", checked)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def decode(context_len: int) -> attnd.StepMetadata:
    return attnd.StepMetadata([1], [context_len], [PAGES], [context_len], kind="decode")


def test_a_stream_waits_for_its_big_step_and_others_do_not(
    busy: Busy, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    with attnd.connect(busy.server.address, plane="inline") as client, ThreadPoolExecutor(1) as threads:
        with client.create_cache(**GEOMETRY) as cache, client.create_cache(**GEOMETRY) as other:
            with cache.session() as session, other.session() as others:
                monkeypatch.setattr(kept_steps, "BIG_STEP_ELEMENTS", 63)
                seen.hold.clear()
                # A call right behind its step: it finds the step open.
                waiting = threads.submit(lambda: session.step(decode(0)).attend(0, Q, K, V))
                wait_for(lambda: bool(seen.threads), "the step was never checked")
                assert seen.threads == ["checks"]
                small = attnd.StepMetadata([1], [0], [[5]], [20], kind="decode")
                assert torch.equal(others.step(small).attend(0, Q, K, V), V)
                assert not waiting.done()
                seen.hold.set()
                assert torch.equal(waiting.result(30), V)
                # A delta of a few bytes that makes a table as large.
                assert torch.equal(session.step(decode(1)).attend(0, Q, K, V), V)
                assert seen.threads.count("checks") == 2
                with pytest.raises(attnd.InvalidRequest, match="page_tables"):
                    session.step(attnd.StepMetadata([1], [0], [[64] * 64], [0], kind="decode")).attend(0, Q, K, V)
                assert torch.equal(session.step(decode(2)).attend(0, Q, K, V), V)


def test_small_steps_are_checked_at_once(busy: Busy, seen: Seen) -> None:
    with attnd.connect(busy.server.address, plane="inline") as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            for context_len in range(3):
                assert torch.equal(session.step(decode(context_len)).attend(0, Q, K, V), V)
    assert len(seen.threads) == 3
    assert "checks" not in seen.threads


def test_big_messages_of_every_kind_are_checked_beside_the_event_loop(
    busy: Busy, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpcs, "BIG_MESSAGE_BYTES", 0)
    with attnd.connect(busy.server.address, plane="inline") as client, client.create_cache(**GEOMETRY) as cache:
        assert cache.store_kv(0, [3, 1], torch.cat([K, 2 * K]), torch.cat([V, 2 * V])) == 2
        assert torch.equal(cache.read_kv(0, [1], like=K)[0], 2 * K)
        assert torch.equal(client.decode(cache, decode(0), 1, Q, K, V), V)
        assert seen.threads == ["checks"]
        with pytest.raises(attnd.InvalidRequest, match="slot_mapping"):
            cache.store_kv(0, [999], K, V)
        with pytest.raises(attnd.InvalidRequest, match="slot_mapping"):
            cache.read_kv(0, [999], like=K)


def test_what_asks_for_a_large_table_is_told_from_its_header() -> None:
    """Of a table as sent and of a delta of 70 bytes; without a look at any element."""
    limit = kept_steps.BIG_STEP_ELEMENTS
    one = int32_tensor([0, 1], "cu_seqlens_q")
    for elements, is_big in ((limit, False), (limit + 1, True)):
        table = int32_tensor(np.zeros((1, elements), np.int32), "page_tables")
        assert kept_steps.is_big(step_pb2.Step(cu_seqlens_q=one, page_tables=table)) is is_big
    for pages, is_big in ((limit // 8, False), (limit, True), (2**32 - 1, True)):
        delta = step_pb2.PageTableDelta(base_step_id=1, max_pages=pages)
        assert kept_steps.is_big(step_pb2.Step(cu_seqlens_q=one, page_table_delta=delta)) is is_big
    assert not kept_steps.is_big(step_pb2.Step())


def test_a_session_asks_its_caller_to_check_big_steps_elsewhere(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    with attnd.connect(busy.server.address) as client, client.create_cache(**GEOMETRY) as cache:
        session = busy.service.open_session("anybody")
        monkeypatch.setattr(kept_steps, "BIG_STEP_ELEMENTS", 63)
        data = frames.step_request(decode(0).to_message(1, cache.ref))
        big = session.request_in_parts(data)
        assert isinstance(big, BigStep)
        assert attention_pb2.AttendResponse.FromString(big.answer()).step.step_id == 1
        again = frames.step_request(decode(0).to_message(2, cache.ref))
        answer = session.request(again)  # for planes, each of which has a thread
        assert isinstance(answer, bytes)
        assert attention_pb2.AttendResponse.FromString(answer).step.step_id == 2


def test_headers_beyond_the_largest_step_are_refused_before_they_are_parsed(
    busy: Busy, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = busy.server.config.max_header_bytes
    assert 16 << 20 < limit < 20 << 20
    padding = step_pb2.Step(page_tables=int32_tensor(np.zeros((1, limit // 4), np.int32), "page_tables"))
    data = attention_pb2.AttendRequest(step=padding).SerializeToString()
    session = busy.service.open_session("anybody")
    with pytest.raises(attnd.InvalidRequest, match=f"AttendRequest has {len(data)} bytes beside the tensors of a call"):
        session.request(data)
    assert ServerConfig(max_page_table_elements=1 << 23).max_header_bytes > len(data)


def test_more_slots_or_pages_than_the_cache_has_are_refused_before_they_are_looked_at() -> None:
    config = validation.cache_config(
        cache_pb2.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, page_size=4, num_pages=2, dtype=1)
    )
    slots = int32_tensor([0] * 9, "slot_mapping")
    told = "slot_mapping has 9 elements, but must have at most 8: the cache has 8 slots"
    with pytest.raises(attnd.InvalidRequest, match=told):
        validation.store_kv(attention_pb2.StoreKvRequest(slot_mapping=slots), {}, config)
    with pytest.raises(attnd.InvalidRequest, match=told):
        validation.read_kv(attention_pb2.ReadKvRequest(slot_mapping=slots), config)
    pages = int32_tensor([0] * 3, "pages")
    copies = cache_pb2.CopyPagesRequest(source_pages=pages, target_pages=pages)
    with pytest.raises(attnd.InvalidRequest, match="source_pages has 3 elements, but must have at most 2: the cache"):
        validation.copy_pages(copies, config)

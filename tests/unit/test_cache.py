"""Leases on KV memory, and the executor that guards them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from attnd.errors import CacheLost, DeadlineExceeded, Disconnected, EpochMismatch, Exhausted
from attnd_server.cache import CacheTable
from attnd_server.config import AttentionConfig, Layout, ServerConfig
from attnd_server.executor import Executor

CPU = torch.device("cpu")
CONFIG = AttentionConfig(num_layers=2, num_kv_heads=2, head_dim=16, num_pages=4, page_size=4, dtype=torch.float32)


@pytest.fixture
def table() -> CacheTable:
    return CacheTable(ServerConfig(max_caches=2), CPU, kv_bytes=3 * CONFIG.num_bytes)


def test_num_bytes_counts_what_is_allocated(table: CacheTable) -> None:
    for layout in Layout:
        config = AttentionConfig(**{**vars(CONFIG), "layout": layout, "head_dim_v": 8})
        cache = table.create(config, principal="a", ttl_s=9, name="")
        assert cache.k_pages.nbytes + cache.v_pages.nbytes == config.num_bytes


def test_pages_start_as_zeros(table: CacheTable) -> None:
    cache = table.create(CONFIG, principal="a", ttl_s=9, name="")
    assert not cache.k_pages.any()
    assert not cache.v_pages.any()


def test_limits_name_what_is_free(table: CacheTable) -> None:
    small = table.create(CONFIG, principal="a", ttl_s=9, name="")
    big = AttentionConfig(**{**vars(CONFIG), "num_pages": 12})
    free = table.kv_bytes - small.config.num_bytes
    with pytest.raises(Exhausted, match=f"takes {big.num_bytes} bytes.* {free} are free"):
        table.create(big, principal="a", ttl_s=9, name="")
    table.create(CONFIG, principal="b", ttl_s=9, name="")
    with pytest.raises(Exhausted, match="2 caches exist, but the server's limit is 2; 0 are free"):
        table.create(CONFIG, principal="a", ttl_s=9, name="")


def test_another_principal_sees_an_unknown_cache(table: CacheTable) -> None:
    cache = table.create(CONFIG, principal="a", ttl_s=9, name="")
    assert table.get(cache.info().cache, "a") is cache
    with pytest.raises(CacheLost, match="no such cache exists"):
        table.get(cache.info().cache, "b")
    assert table.owned("b") == []


def test_another_epoch_comes_first(table: CacheTable) -> None:
    ref = table.create(CONFIG, principal="a", ttl_s=9, name="").info().cache
    ref.epoch = 7
    with pytest.raises(EpochMismatch, match=f"cache.epoch is 7, but the server's epoch is {table.epoch}"):
        table.get(ref, "a")


def test_lease_ends_unless_it_is_used(table: CacheTable) -> None:
    silent = table.create(CONFIG, principal="a", ttl_s=0.2, name="")
    used = table.create(CONFIG, principal="a", ttl_s=0.2, name="")
    time.sleep(0.15)
    table.get(used.info().cache, "a")
    time.sleep(0.1)
    assert table.expire() == [silent]
    assert silent.k_pages.numel() == 0
    with pytest.raises(CacheLost, match=r"lease of 0\.2 s has ended"):
        silent.refuse_if_closed()


def test_deleting_frees(table: CacheTable) -> None:
    cache = table.create(CONFIG, principal="a", ttl_s=9, name="")
    table.delete(cache.info().cache, "a")
    assert table.num_bytes == 0
    with pytest.raises(CacheLost):
        table.delete(cache.info().cache, "a")


def test_written_pages_are_counted_once(table: CacheTable) -> None:
    cache = table.create(CONFIG, principal="a", ttl_s=9, name="")
    cache.mark_written(torch.tensor([0, 1, 5, -1, 3]))
    assert cache.info().num_pages_written == 2


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


def test_closed_executor_refuses(table: CacheTable) -> None:
    executor = Executor(CPU, table, ServerConfig())
    executor.close()
    with pytest.raises(Disconnected, match="shutting down"):
        executor.submit(lambda: b"", lambda *_: None)
    assert executor.run_now(lambda: b"") is None

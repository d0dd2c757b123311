"""Leases on KV memory, and the executor that guards them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import attnd_server.kv.cache
import attnd_server.kv.caches
from attnd.errors import CacheLost, EpochMismatch, Exhausted, InvalidRequest
from attnd.v1 import cache_pb2, tensor_pb2
from attnd_server.attention.config import FP8, AttentionConfig, Layout
from attnd_server.attention.kernels.pages import is_latent, stored_tokens
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.config import ServerConfig
from attnd_server.execution.step import Step
from attnd_server.kv.cache import Cache
from attnd_server.kv.caches import CacheTable
from attnd_server.kv.restored import Restored
from attnd_server.service import validation

CPU = torch.device("cpu")
# Seconds: longer than anything here should take.
PATIENCE_S = 20.0
CONFIG = AttentionConfig(num_layers=2, num_kv_heads=2, head_dim=16, num_pages=4, page_size=4, dtype=torch.float32)


@pytest.fixture
def table() -> CacheTable:
    return CacheTable(ServerConfig(max_caches=2), CPU, kv_bytes=3 * CONFIG.num_bytes)


def test_num_bytes_counts_what_is_allocated(table: CacheTable) -> None:
    for layout, kv_dtype, v_dtype in ((Layout.UNIFIED, None, FP8), (Layout.DISTINCT, FP8, None)):
        config = replace(CONFIG, layout=layout, head_dim_v=8, kv_dtype=kv_dtype, v_dtype=v_dtype)
        cache = table.create(config, principal="a", ttl_s=9, name="")
        assert cache.groups[0].k_pages.nbytes + cache.groups[0].v_pages.nbytes == config.num_bytes


@pytest.mark.parametrize("kv_dtype", [None, FP8])
def test_a_latent_cache_has_v_in_the_memory_of_k(table: CacheTable, kv_dtype: torch.dtype | None) -> None:
    config = replace(CONFIG, num_kv_heads=1, head_dim=24, head_dim_v=16, kv_dtype=kv_dtype, v_dtype=None, latent=True)
    cache = table.create(config, principal="a", ttl_s=9, name="")
    (group,) = cache.groups
    assert table.num_bytes == config.num_bytes == group.k_pages.nbytes
    assert group.v_pages.shape == (2, *config.v_shape)
    assert all(is_latent(pages) for pages in group.layers)
    k, slots = torch.randn(3, 1, 24), torch.tensor([9, 2, 7])
    group.store(1, k, k[..., :16], stored_tokens(slots, CPU))
    read_k, read_v = group.read(1, slots)
    torch.testing.assert_close(read_k, k, rtol=0 if kv_dtype is None else 2**-4, atol=0 if kv_dtype is None else 2**-10)
    assert torch.equal(read_v, read_k[..., :16])
    group.copy_pages(torch.tensor([2]), torch.tensor([3]))
    assert torch.equal(group.read(1, slots[:1] + 4)[0], read_k[:1])
    assert not group.read(0, slots)[0].any()
    cache.close()
    other = table.create(config, principal="a", ttl_s=9, name="")
    assert not other.groups[0].k_pages.view(torch.uint8).any()


def test_pages_start_as_zeros(table: CacheTable) -> None:
    cache = table.create(CONFIG, principal="a", ttl_s=9, name="")
    assert not cache.groups[0].k_pages.any()
    assert not cache.groups[0].v_pages.any()


@pytest.mark.parametrize("layout", Layout)
def test_fp8_pages_hold_what_their_scales_make_of_it(table: CacheTable, layout: Layout) -> None:
    config = replace(CONFIG, layout=layout, kv_dtype=FP8, v_dtype=None, k_scales=(0.5,), v_scales=(0.1, 3.0))
    cache = table.create(config, principal="a", ttl_s=9, name="")
    assert cache.groups[0].k_pages.dtype is cache.groups[0].v_pages.dtype is FP8
    k, v = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    k[0, 0, :2] = torch.tensor([1e5, math.nan])
    slots = torch.tensor([9, 2, 7])
    (group,) = cache.groups
    group.store(1, k, v, stored_tokens(slots, CPU))
    read_k, read_v = group.read(1, slots)
    assert read_k.dtype is read_v.dtype is torch.float32
    k[0, 0, 0] = 0.5 * 448
    # Half a unit in the last of 4 binary places; near zero half of the smallest number, 2^-9 of a scale.
    torch.testing.assert_close(read_k, k, rtol=2**-4, atol=0.5 * 2**-10, equal_nan=True)
    torch.testing.assert_close(read_v, v, rtol=2**-4, atol=3.0 * 2**-10)
    group.copy_pages(torch.tensor([2]), torch.tensor([3]))
    assert torch.equal(group.read(1, slots[:1] + 4)[1], read_v[:1])
    assert not group.read(0, slots)[0].any()


def test_info_gives_back_what_was_created(table: CacheTable) -> None:
    plain = table.create(CONFIG, principal="a", ttl_s=9, name="").info().config
    assert plain.kv_dtype == plain.dtype == tensor_pb2.DTYPE_FLOAT32
    assert not plain.HasField("k_scales")
    assert plain.kv_split == cache_pb2.KvSplit(max_splits=128)
    config = replace(CONFIG, kv_dtype=FP8, v_dtype=None, v_scales=(0.125, 3.0), layout=Layout.DISTINCT)
    info = table.create(config, principal="a", ttl_s=9, name="").info()
    assert info.num_bytes == CONFIG.num_bytes // 4
    assert not info.config.v_dtype
    assert validation.cache_config(info.config) == config


@pytest.mark.parametrize("is_k", [True, False])
def test_info_says_vs_type_where_it_is_another(table: CacheTable, is_k: bool) -> None:
    kinds = {"kv_dtype": FP8, "k_scales": (0.5, 2.0)} if is_k else {"v_dtype": FP8, "v_scales": (0.5, 2.0)}
    config = replace(CONFIG, **kinds)
    info = table.create(config, principal="a", ttl_s=9, name="").info()
    fp8, plain = tensor_pb2.DTYPE_FLOAT8_E4M3FN, tensor_pb2.DTYPE_FLOAT32
    assert (info.config.kv_dtype, info.config.v_dtype) == ((fp8, plain) if is_k else (plain, fp8))
    assert (info.config.HasField("k_scales"), info.config.HasField("v_scales")) == (is_k, not is_k)
    assert info.num_bytes == CONFIG.num_bytes * 5 // 8
    assert validation.cache_config(info.config) == config


@pytest.mark.parametrize("batch_invariant", [None, False, True])
def test_info_gives_back_how_kv_is_cut(table: CacheTable, batch_invariant: bool | None) -> None:
    config = replace(CONFIG, kv_split=KVSplitConfig(256, 7, batch_invariant))
    info = table.create(config, principal="a", ttl_s=9, name="").info()
    assert info.config.kv_split.HasField("batch_invariant") == (batch_invariant is not None)
    assert validation.cache_config(info.config) == config


def test_limits_name_what_is_free(table: CacheTable) -> None:
    small = table.create(CONFIG, principal="a", ttl_s=9, name="")
    big = AttentionConfig(**{**vars(CONFIG), "num_pages": 12})
    free = table.kv_bytes - small.shape.num_bytes
    with pytest.raises(Exhausted, match=f"takes {big.num_bytes} bytes.* {free} are free"):
        table.create(big, principal="a", ttl_s=9, name="")
    table.create(CONFIG, principal="b", ttl_s=9, name="")
    with pytest.raises(Exhausted, match="2 caches exist, but the server's limit is 2; 0 are free"):
        table.create(CONFIG, principal="a", ttl_s=9, name="")


@pytest.fixture
def shared() -> CacheTable:
    """Of a server that asks who calls, with room for 6 caches of which one principal may have 3."""
    return CacheTable(ServerConfig(max_caches=6, tokens="file"), CPU, kv_bytes=6 * CONFIG.num_bytes)


def test_one_principal_leaves_caches_to_another(shared: CacheTable) -> None:
    small = replace(CONFIG, num_pages=1)
    caches = [shared.create(small, principal="a", ttl_s=9, name="") for _ in range(3)]
    told = "3 caches of this principal exist, but a principal's limit is 3; 0 are free"
    with pytest.raises(Exhausted, match=told):
        shared.create(small, principal="a", ttl_s=9, name="")
    assert shared.create(small, principal="b", ttl_s=9, name="") in shared.owned("b")
    shared.delete(caches[0].info().cache, "a")
    shared.create(small, principal="a", ttl_s=9, name="")


def test_one_principal_leaves_memory_to_another(shared: CacheTable) -> None:
    size = CONFIG.num_bytes
    cache = shared.create(replace(CONFIG, num_pages=8), principal="a", ttl_s=9, name="")
    told = (
        f"takes {2 * size} bytes, but of a principal's {3 * size} bytes of KV memory {2 * size} are in use and {size} "
    )
    with pytest.raises(Exhausted, match=told) as refused:
        shared.create(replace(CONFIG, num_pages=8), principal="a", ttl_s=9, name="")
    assert refused.value.field == "num_pages"
    with pytest.raises(Exhausted, match=f"graphs takes {size + 1} bytes, but of a principal's"):
        shared.reserve(cache, size + 1, "graphs")
    shared.reserve(cache, size, "graphs")
    shared.create(replace(CONFIG, num_pages=12), principal="b", ttl_s=9, name="")
    with pytest.raises(Exhausted, match=f"of the server's {6 * size} bytes of KV memory {6 * size} are in use and 0"):
        shared.create(replace(CONFIG, num_pages=1), principal="c", ttl_s=9, name="")


def test_a_key_makes_one_cache_for_as_long_as_it_lives(shared: CacheTable) -> None:
    def create(principal: str = "a", key: bytes = b"key", name: str = "") -> Cache:
        return shared.create(CONFIG, principal=principal, ttl_s=9, name=name, key=key)

    cache = create()
    cache.expires_at = 0.0
    assert create() is cache
    assert cache.expires_at > time.monotonic()
    assert create(key=b"another") is not cache
    assert create(principal="b") is not cache
    with pytest.raises(InvalidRequest, match="key is 6b6579, but must be of one request alone, sent twice") as refused:
        create(name="different")
    assert refused.value.field == "key"
    shared.delete(cache.info().cache, "a")
    again = create()
    assert again is not cache
    again.expires_at = 0.0
    assert shared.expire() == [again]
    assert create() is not again
    assert len(shared.all()) == len(shared._keyed) == 3


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


def test_lease_ends_unless_it_is_used(table: CacheTable, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    for module in (attnd_server.kv.cache, attnd_server.kv.caches):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    silent = table.create(CONFIG, principal="a", ttl_s=20.5, name="")
    used = table.create(CONFIG, principal="a", ttl_s=20.5, name="")
    now += 20.4
    table.get(used.info().cache, "a")
    assert table.expire() == []
    now += 0.2
    assert table.expire() == [silent]
    assert silent.groups[0].k_pages.numel() == 0
    with pytest.raises(CacheLost, match=r"lease of 20\.5 s has ended"):
        silent.refuse_if_closed()


def test_deleting_frees(table: CacheTable) -> None:
    cache = table.create(CONFIG, principal="a", ttl_s=9, name="")
    table.delete(cache.info().cache, "a")
    assert table.num_bytes == 0
    with pytest.raises(CacheLost):
        table.delete(cache.info().cache, "a")


def test_pages_that_somebody_holds_outlive_the_cache(table: CacheTable) -> None:
    cache = table.create(CONFIG, principal="a", ttl_s=9, name="")
    pages = cache.groups[0].pages
    assert pages is not None
    with cache.held(), cache.held():
        pages.k.fill_(1)
        table.delete(cache.info().cache, "a")
        assert (pages.k == 1).all()
        other = table.create(CONFIG, principal="a", ttl_s=9, name="")
        other.groups[0].k_pages.fill_(2)
        assert (pages.k == 1).all()
        with pytest.raises(CacheLost), cache.held():
            pass
    again = table.create(CONFIG, principal="a", ttl_s=9, name="")
    assert again.groups[0].pages is not None
    assert again.groups[0].pages.first == pages.first
    assert not again.groups[0].k_pages.any()
    assert (other.groups[0].k_pages == 2).all()


def test_written_pages_are_counted_once(table: CacheTable) -> None:
    cache = table.create(CONFIG, principal="a", ttl_s=9, name="")
    cache.groups[0].mark_written(torch.tensor([0, 1, 5, -1, 3]))
    assert cache.info().num_pages_written == 2


class Device:
    """Stores into pages of its own, as resident steps do; each page is told once."""

    def __init__(self) -> None:
        self.num_ways_made = 0
        self.pages: list[int] = []
        self.may_tell: Callable[[], None] = lambda: None

    def make_way(self) -> None:
        self.num_ways_made += 1

    def written_pages(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        pages, self.pages = self.pages, []
        self.may_tell()
        return np.array(pages, np.int64)


def test_pages_into_which_the_device_stored_of_its_own_are_counted(table: CacheTable) -> None:
    cache, device = table.create(CONFIG, principal="a", ttl_s=9, name=""), Device()
    (group,) = cache.groups
    group.watch(device)
    group.mark_written(torch.tensor([5]))
    device.pages = [3, 1]
    assert cache.num_pages_written == 2
    device.pages = [3]
    assert cache.info().num_pages_written == 2
    device.pages = [0]
    assert group.written_pages.tolist() == [0, 1, 3]
    assert group.num_pages_written == 3
    device.pages = [2]
    group.watch_no_more(device)  # the last that it did counts
    assert group.num_pages_written == 4
    device.pages = [1]
    assert cache.num_pages_written == 4
    assert device.pages == [1]  # nobody asks it any more


def test_what_stores_of_its_own_makes_way_for_whatever_else_does(table: CacheTable) -> None:
    cache, devices = table.create(CONFIG, principal="a", ttl_s=9, name=""), (Device(), Device())
    (group,) = cache.groups
    for device in devices:
        group.watch(device)
    group.mark_written(torch.tensor([5, -1]))
    assert [device.num_ways_made for device in devices] == [1, 1]
    group.mark_written(torch.tensor([-1]))
    group.mark_pages_written(torch.tensor([2]))
    group.copy_pages(torch.tensor([1]), torch.tensor([3]))
    assert [device.num_ways_made for device in devices] == [4, 4]
    cache.info()
    group.read(0, torch.tensor([5]))
    assert [device.num_ways_made for device in devices] == [4, 4]
    group.watch_no_more(devices[0])
    group.about_to_write()
    assert [device.num_ways_made for device in devices] == [4, 5]


def test_every_call_of_a_step_that_stores_makes_what_stores_of_its_own_make_way(table: CacheTable) -> None:
    """Its pages are noted once, but between two calls of a step others come back."""
    cache, device = table.create(CONFIG, principal="a", ttl_s=9, name=""), Device()
    (group,) = cache.groups
    group.watch(device)
    stores = Step(1, cache, group, SimpleNamespace(slot_mapping=torch.tensor([5])))  # type: ignore[arg-type]
    reads = Step(2, cache, group, SimpleNamespace(slot_mapping=None))  # type: ignore[arg-type]
    for number in range(1, 4):
        stores.mark_written()
        reads.mark_written()
        assert device.num_ways_made == number
    assert group.num_pages_written == 1


def test_an_adoption_is_refused_once_the_device_itself_changed_a_page(table: CacheTable) -> None:
    old = table.create(CONFIG, principal="a", ttl_s=9, name="")
    device, restored = Device(), Restored(old.id, (old.epoch - 1,))
    cache = Cache(old.shape, epoch=old.epoch, principal="a", ttl_s=9, name="", device=CPU, restored=restored)
    (group,) = cache.groups
    group.mark_pages_written(torch.tensor([1]))
    cache.filled()
    group.watch(device)
    device.pages = [2]  # of which the snapshot had nothing
    assert cache.adoptable_epochs
    device.pages = [1]
    assert cache.adoptable_epochs == ()


def test_pages_are_noted_before_anybody_else_is_told_that_there_are_no_more(table: CacheTable) -> None:
    """Somebody counts pages while another writes a snapshot, for which a page is asked of the device but once."""
    cache, device = table.create(CONFIG, principal="a", ttl_s=9, name=""), Device()
    (group,) = cache.groups
    group.watch(device)
    is_asked, may_tell, written = threading.Event(), threading.Event(), []

    def tell() -> None:
        is_asked.set()
        assert may_tell.wait(PATIENCE_S)

    device.pages, device.may_tell = [2], tell
    with ThreadPoolExecutor(2) as pool:
        counted = pool.submit(lambda: cache.num_pages_written)
        assert is_asked.wait(PATIENCE_S)
        device.may_tell = lambda: None
        snapshot = pool.submit(lambda: written.append(group.written_pages.tolist()))
        with suppress(TimeoutError):
            snapshot.result(0.05)
        may_tell.set()
        assert counted.result(PATIENCE_S) == 1
        snapshot.result(PATIENCE_S)
    assert written == [[2]]


def test_who_listens_for_the_end_of_a_cache_may_stop_to(table: CacheTable) -> None:
    cache, told = table.create(CONFIG, principal="a", ttl_s=9, name=""), []

    def first() -> None:
        told.append("first")
        cache.when_closed_no_more(first)  # while all are told

    def second() -> None:
        told.append("second")

    def third() -> None:
        told.append("third")

    for listener in (first, second, third):
        cache.when_closed(listener)
    cache.when_closed_no_more(second)
    cache.close()
    assert told == ["first", "third"]
    cache.when_closed_no_more(third)  # too late, and no error

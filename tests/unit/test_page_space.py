"""Where caches' pages lie: side by side, zeros, and given back."""

from __future__ import annotations

import random
import resource
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnd.errors import Exhausted
from attnd.protocol.cuda import driver as cuda_driver
from attnd_server.attention.config import FP8, AttentionConfig, Layout
from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.config import ServerConfig
from attnd_server.device import gpu_addresses
from attnd_server.device.indexed import with_index
from attnd_server.device.quiet import QuietGpu
from attnd_server.kv import addresses
from attnd_server.kv.cache import Cache
from attnd_server.kv.cache_shape import CacheShape
from attnd_server.kv.caches import CacheTable
from attnd_server.kv.page_space import MOST_UNIT_BYTES, SharedSpace
from attnd_server.kv.page_spaces import CachePages, PageSpaces
from tests.unit.fake_driver import UNIT, FakeDriver

CPU = torch.device("cpu")
CONFIG = AttentionConfig(num_layers=3, num_kv_heads=2, head_dim=16, num_pages=5, page_size=4, dtype=torch.float32)
ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="caches share addresses on Linux alone")


def spaces(num_bytes: int = 1 << 20) -> PageSpaces:
    return PageSpaces(CPU, num_bytes)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("kv_dtype", [None, FP8])
@pytest.mark.parametrize("v_dtype", [None, FP8])
def test_pages_are_views_of_the_space_from_their_first_on(
    layout: Layout, kv_dtype: torch.dtype | None, v_dtype: torch.dtype | None
) -> None:
    config = replace(CONFIG, layout=layout, kv_dtype=kv_dtype, v_dtype=v_dtype, head_dim_v=24)
    held = spaces()
    for pages in (held.take(config), held.take(replace(config, num_pages=2, num_layers=1))):
        num_layers = len(pages.k)
        for layer in range(num_layers):
            for tensor, space in ((pages.k, pages.space.k), (pages.v, pages.space.v)):
                page = pages.first + layer * tensor.shape[1]
                assert tensor[layer].data_ptr() == space[page].data_ptr()
                assert tensor[layer].is_contiguous()
                assert not tensor[layer].view(torch.uint8).any()
        assert (pages.k.dtype, pages.k.shape[2:]) == (config.kv_dtype, config.k_shape[1:])
        assert (pages.v.dtype, pages.v.shape[2:]) == (config.v_dtype, config.v_shape[1:])


def test_a_latent_space_has_no_memory_for_v() -> None:
    config = replace(CONFIG, num_kv_heads=1, head_dim_v=8, latent=True)
    held = spaces()
    first, second = held.take(config), held.take(config)
    for pages in (first, second):
        assert pages.space.v.data_ptr() == pages.space.k.data_ptr()
        assert pages.v.shape == (3, *config.v_shape)
        for layer in range(3):
            assert pages.v[layer].data_ptr() == pages.k[layer].data_ptr()
        pages.k.fill_(7.0)
        assert (pages.v == 7).all()
    held.give_back(first, config)
    assert (second.k == 7).all()
    assert not held.take(config).k.any()


@pytest.mark.parametrize("fails_at", [0, 1])
def test_what_memory_came_before_one_that_fails_is_given_back(monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    held = spaces()
    space = held.take(CONFIG).space
    if not isinstance(space, SharedSpace):
        pytest.skip("caches lie alone here")
    given_back: list[int] = []
    for index, part in enumerate(space._parts):
        monkeypatch.setattr(part, "give_back", lambda start, end, index=index: given_back.append(index))

    def fail(start: int, end: int) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(space._parts[fails_at], "commit", fail)
    free = list(space._free)
    with pytest.raises(torch.OutOfMemoryError):
        held.take(CONFIG)
    assert given_back == list(range(fails_at))
    assert space._free == free


@ONLY_LINUX
def test_caches_of_one_geometry_share_a_space_and_others_do_not() -> None:
    held = spaces()
    first = held.take(CONFIG).space
    assert held.take(replace(CONFIG, num_layers=1, num_pages=9)).space is first
    others = [
        replace(CONFIG, head_dim=24),
        replace(CONFIG, page_size=8),
        replace(CONFIG, dtype=torch.float16, kv_dtype=None, v_dtype=None),
        replace(CONFIG, layout=Layout.DISTINCT),
        replace(CONFIG, v_dtype=FP8),
        replace(CONFIG, num_kv_heads=1, latent=True),
    ]
    assert len({held.take(config).space.id for config in others} | {first.id}) == 7


def overlap(one: CachePages, other: CachePages) -> bool:
    ranges = [(pages.first, pages.first + pages.k.shape[0] * pages.k.shape[1]) for pages in (one, other)]
    return one.space is other.space and ranges[0][0] < ranges[1][1] and ranges[1][0] < ranges[0][1]


def test_nobody_sees_anothers_pages_whoever_comes_and_goes() -> None:
    held, random_ = spaces(), random.Random(0)
    leased: list[tuple[AttentionConfig, CachePages, int]] = []
    for value in range(1, 120):
        if leased and random_.random() < 0.45:
            config, pages, mark = leased.pop(random_.randrange(len(leased)))
            assert (pages.k == mark).all()
            assert (pages.v == mark).all()
            del_k, del_v = pages.k, pages.v
            held.give_back(pages, config)
            del pages, del_k, del_v
            continue
        config = replace(CONFIG, num_layers=random_.randint(1, 3), num_pages=random_.randint(1, 9))
        pages = held.take(config)
        assert not pages.k.any()
        assert not pages.v.any()
        assert not any(overlap(pages, other) for _, other, _ in leased)
        pages.k.fill_(value)
        pages.v.fill_(value)
        leased.append((config, pages, value))
    for config, pages, _ in leased:
        held.give_back(pages, config)
    assert held._spaces == {}


@ONLY_LINUX
def test_memory_comes_with_what_is_written_and_goes_with_the_cache() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    held = spaces(1 << 34)
    config = replace(CONFIG, num_layers=1, num_pages=1 << 18)  # 64 MiB of K, and of V
    kept = held.take(replace(CONFIG, num_pages=1))
    before = resident()
    pages = held.take(config)
    assert resident() - before < 16 << 20
    pages.k.fill_(1)
    assert resident() - before > 48 << 20
    held.give_back(pages, config)
    assert resident() - before < 16 << 20
    assert not pages.k[:8].any()
    assert kept.space is pages.space


def test_where_addresses_count_as_memory_a_cache_lies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device, num_bytes: int) -> None:
        raise OSError("cannot allocate memory")

    monkeypatch.setattr("attnd_server.kv.page_space.addresses_on", refuse)
    held = spaces()
    one, other = held.take(CONFIG), held.take(CONFIG)
    assert one.space is not other.space
    assert one.k.numel() == one.space.k.numel()
    assert not one.k.any()
    held.give_back(one, CONFIG)
    held.give_back(other, CONFIG)
    assert held._spaces == {}


def test_a_cache_bigger_than_a_space_lies_alone() -> None:
    held = spaces(CONFIG.num_bytes)
    shared = held.take(CONFIG).space
    big = replace(CONFIG, num_pages=len(shared.k))
    assert held.take(big).space.k.shape[0] == 3 * len(shared.k)


@pytest.fixture
def fake_driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Addresses "on a GPU" in which nothing can be stored, with room for 20 units."""
    driver = FakeDriver(20 * UNIT)
    for module in (cuda_driver, gpu_addresses):
        monkeypatch.setattr(module, "driver", lambda: driver)
    stream = SimpleNamespace(query=lambda: True, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch, "as_tensor", lambda held, device: torch.empty(*held.shape, dtype=torch.uint8))
    monkeypatch.setattr(
        "attnd_server.device.gpu_addresses._Bytes", lambda address, size: SimpleNamespace(shape=(size,))
    )
    monkeypatch.setattr(addresses, "HostAddresses", lambda num_bytes: gpu_addresses.GpuAddresses(CPU, num_bytes))
    return driver


def test_on_a_gpu_memory_is_mapped_for_each_cache_and_unmapped_with_it(fake_driver: FakeDriver) -> None:
    page_bytes = 4 * 2 * 16 * 4
    config = replace(CONFIG, num_layers=2, num_pages=UNIT // page_bytes)  # two units of K, and of V
    held = spaces(1 << 22)
    caches = [held.take(config) for _ in range(3)]
    assert sorted(fake_driver.mapped.values()) == [UNIT] * 2 + [2 * UNIT] * 6
    assert fake_driver.accessible == set(fake_driver.mapped)
    assert fake_driver.handles == {}
    for pages in caches:
        for tensor, space in ((pages.k, pages.space.k), (pages.v, pages.space.v)):
            offset = tensor.data_ptr() - space.data_ptr()
            assert any(start - base == offset for start in fake_driver.mapped for base in fake_driver.reserved)
    held.give_back(caches[1], config)
    assert len(fake_driver.mapped) == 6
    again = held.take(config)
    assert again.first == caches[1].first
    for pages in (again, caches[0], caches[2]):
        held.give_back(pages, config)
    assert (fake_driver.mapped, fake_driver.reserved, fake_driver.free) == ({}, {}, 20 * UNIT)


def test_a_full_gpu_says_so_and_keeps_nothing(fake_driver: FakeDriver) -> None:
    page_bytes = 4 * 2 * 16 * 4
    config = replace(CONFIG, num_layers=1, num_pages=12 * UNIT // page_bytes)  # 12 units of K fit, then not of V
    held = spaces(1 << 23)
    with pytest.raises(torch.OutOfMemoryError, match="left: cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY"):
        held.take(config)
    assert (fake_driver.mapped, fake_driver.reserved, fake_driver.free) == ({}, {}, 20 * UNIT)
    small = replace(config, num_pages=UNIT // page_bytes)
    kept = held.take(small)
    with pytest.raises(torch.OutOfMemoryError):
        held.take(config)
    held.give_back(kept, small)
    assert (fake_driver.mapped, fake_driver.reserved, fake_driver.free) == ({}, {}, 20 * UNIT)


def test_what_torch_keeps_is_not_asked_for_while_a_step_waits(
    fake_driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet, asked = QuietGpu(), []
    monkeypatch.setattr("attnd_server.device.gpu_addresses.quiet_gpu", lambda device: quiet)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append(quiet.are_over(0)))
    config = replace(CONFIG, num_layers=1, num_pages=12 * UNIT // (4 * 2 * 16 * 4))
    with quiet.waits(), pytest.raises(torch.OutOfMemoryError, match="cannot be freed while a cuda plane's step waits"):
        spaces(1 << 23).take(config)
    assert asked == []
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA_ERROR_OUT_OF_MEMORY$"):
        spaces(1 << 23).take(config)
    assert asked == [True]


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    named = {name: str(with_index(name)) for name in ("cuda", "cuda:1", "cpu")}
    assert named == {"cuda": "cuda:3", "cuda:1": "cuda:1", "cpu": "cpu"}
    monkeypatch.setattr("attnd_server.attention.ops._LOADERS", {})
    monkeypatch.setattr("attnd_server.attention.ops._capability", lambda device: (9, 0))
    assert TritonAttentionOps("cuda").device == torch.device("cuda", 3)
    seen: list[torch.device] = []

    class Stop(Exception):
        pass

    def note(config: AttentionConfig, scales: tuple[float, ...], device: torch.device) -> None:
        seen.append(device)
        raise Stop

    monkeypatch.setattr("attnd_server.kv.layer_group._scales", note)
    config = replace(CONFIG, kv_dtype=FP8)
    with pytest.raises(Stop):
        Cache(CacheShape.of(config), epoch=1, principal="", ttl_s=1, name="", device=torch.device("cuda"))
    assert seen == [torch.device("cuda", 3)]


@pytest.mark.parametrize(
    ("changes", "unused"),
    [
        # Pages of 512 bytes of K and of V: 4096 fill a unit of each, and the first units are nobody's.
        ({"num_pages": 1}, 2 * 4095 * 512 + 2 * MOST_UNIT_BYTES),
        ({"num_pages": 4096}, 2 * MOST_UNIT_BYTES),
        ({"num_pages": 4097, "num_layers": 2}, 2 * (4096 - 2) * 512 + 2 * MOST_UNIT_BYTES),
        # Of 768, of which no fewer end with a unit.
        ({"num_pages": 1, "num_kv_heads": 3}, 2 * 8191 * 768 + 2 * MOST_UNIT_BYTES),
        ({"num_pages": 1, "num_kv_heads": 1, "latent": True}, 8191 * 256 + MOST_UNIT_BYTES),
    ],
)
def test_what_units_of_a_gpu_leave_unused_is_known(changes: dict[str, Any], unused: int) -> None:
    config = replace(AttentionConfig(1, 2, 16, 1, page_size=4, dtype=torch.float32), **changes)
    on_gpu = PageSpaces(torch.device("cuda", 0), 1 << 30)
    assert on_gpu.unused_bytes([config]) == 0
    most = replace(config, num_pages=1, num_kv_heads=1 if config.latent else 511)
    assert on_gpu.unused_bytes([config, most]) == on_gpu.unused_bytes([most, config]) == unused
    assert PageSpaces(CPU, 1 << 30).unused_bytes([config, most]) == 0


def test_what_units_leave_unused_counts_for_each_layer_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageSpaces, "unused_bytes", lambda self, groups: 1_000_000 * (len(groups) - 1))
    one = replace(AttentionConfig(1, 2, 16, 1, page_size=4, dtype=torch.float32), num_layers=1)
    table = CacheTable(ServerConfig(), CPU, 9_000_000)
    lease: dict[str, Any] = {"principal": "a", "ttl_s": 60, "name": ""}
    eight = table.create(CacheShape((one,) * 8, tuple((layer,) for layer in range(8))), **lease)
    assert eight.num_bytes == eight.shape.num_bytes == 8 * one.num_bytes
    rule = r"takes 2003072 bytes, but of the server's 9000000 bytes of KV memory 7008192 are in use"
    three = CacheShape((one,) * 3, ((0,), (1,), (2,)))
    with pytest.raises(Exhausted, match=rule):
        table.create(three, **lease)
    table.create(one, **lease)  # as ever
    table.delete(eight.info().cache, "a")
    table.create(three, **lease)

"""The Triton read of slots against the one in torch, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from attnd_server.attention.config import FP8, AttentionConfig, Layout
from attnd_server.attention.kernels import pages
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.kv import layer_group
from attnd_server.kv.cache import Cache
from attnd_server.kv.cache_shape import CacheShape
from tests import interpreter
from tests.kernels.slots import GEOMETRIES, LAYOUTS, QUANTISED, config_of, only, types
from tests.steps import DTYPES

pytestmark = pytest.mark.skipif(interpreter.reason_against() is not None, reason=str(interpreter.reason_against()))


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[str]:
    with interpreter.interpreter() as device:
        yield device


def without_nan(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where it is not a number, and the bytes of the rest."""
    is_nan = tensor.isnan()
    return is_nan, tensor.masked_fill(is_nan, 0).view(torch.uint8)


def compare(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: list[int],
    layout: Layout,
    dtype: torch.dtype,
    *scales: torch.Tensor | None,
) -> None:
    """Reads slots both ways, into memory full of NaN, and compares."""
    from attnd_server.attention.kernels.gather import read_kv

    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        fresh = new_empty(*args, **kwargs)
        return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

    stored = LayerPages(k_pages, v_pages, *scales)
    where = torch.tensor(slots, dtype=torch.int64, device=k_pages.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        read = read_kv(stored, where, layout, dtype)
    expected = pages.read_kv(stored, where, layout, dtype)
    for actual, wanted in zip(read, expected, strict=True):
        assert (actual.shape, actual.dtype) == (wanted.shape, dtype)
        assert actual.is_contiguous()
        for one, other in zip(without_nan(actual), without_nan(wanted), strict=True):
            assert torch.equal(one, other)


def some_slots(config: AttentionConfig) -> list[int]:
    """In no order, the first and the last of the cache among them, and one twice."""
    last = config.num_slots - 1
    return [last, *torch.randperm(config.num_slots)[:17].tolist(), 0, last]


def fp8_pages(shape: tuple[int, ...], first: int, last: int) -> torch.Tensor:
    """Random FP8 numbers of either sign whose bits without the sign are `first` to `last`."""
    numbers = torch.randint(first, last + 1, shape, dtype=torch.uint8)
    return (numbers | torch.randint(2, shape, dtype=torch.uint8) << 7).view(FP8)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@GEOMETRIES
def test_same_tokens_as_torch(
    device: str, layout: Layout, dtype: torch.dtype, num_kv_heads: int, head_dim: int, head_dim_v: int
) -> None:
    config = config_of(layout, dtype, num_kv_heads, head_dim, head_dim_v)
    k_pages, v_pages = (torch.randn(shape).to(device, dtype) for shape in (config.k_shape, config.v_shape))
    compare(k_pages, v_pages, some_slots(config), layout, dtype)


@LAYOUTS
@pytest.mark.parametrize("num_slots", [0, 1, 2])
def test_few_slots(device: str, layout: Layout, num_slots: int) -> None:
    config = config_of(layout, torch.float32, 2, 16, 8)
    k_pages, v_pages = (torch.randn(shape, device=device) for shape in (config.k_shape, config.v_shape))
    compare(k_pages, v_pages, some_slots(config)[:num_slots], layout, torch.float32)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@QUANTISED
@GEOMETRIES
def test_fp8_numbers_are_multiplied_by_their_scale(
    device: str,
    layout: Layout,
    dtype: torch.dtype,
    quantised: tuple[bool, bool],
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int,
) -> None:
    """Normal numbers, as Triton's interpreter gets the others wrong."""
    config = replace(config_of(layout, dtype, num_kv_heads, head_dim, head_dim_v), **types(dtype, quantised))
    scales = torch.rand(2, num_kv_heads, device=device) + 0.1
    k_pages, v_pages = (
        fp8_pages(shape, 0x08, 0x7E).to(device) if is_fp8 else torch.randn(shape).to(device, dtype)
        for shape, is_fp8 in zip((config.k_shape, config.v_shape), quantised, strict=True)
    )
    compare(k_pages, v_pages, some_slots(config), layout, dtype, *only(quantised, scales))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@QUANTISED
@GEOMETRIES
def test_any_fp8_number_is_read_as_in_torch(
    device: str,
    layout: Layout,
    dtype: torch.dtype,
    quantised: tuple[bool, bool],
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int,
) -> None:
    if device == "cpu":
        pytest.skip("Triton's interpreter has neither FP8's NaN nor its subnormal numbers, nor rounds to bfloat16")
    config = replace(config_of(layout, dtype, num_kv_heads, head_dim, head_dim_v), **types(dtype, quantised))
    scales = torch.rand(2, num_kv_heads, device=device) + 0.1
    k_pages, v_pages = (
        fp8_pages(shape, 0x00, 0x7F).to(device) if is_fp8 else torch.randn(shape).to(device, dtype)
        for shape, is_fp8 in zip((config.k_shape, config.v_shape), quantised, strict=True)
    )
    compare(k_pages, v_pages, some_slots(config), layout, dtype, *only(quantised, scales))


@LAYOUTS
def test_offsets_beyond_two_to_the_31(device: str, layout: Layout) -> None:
    # More than 2^31 elements of K and of V; bytes are enough, and memory that is never touched costs nothing.
    config = AttentionConfig(1, 8, 512, 2**31 // (16 * 8 * 512) + 1, layout=layout)
    k_pages, v_pages = (
        torch.empty(shape, dtype=torch.uint8, device=device) for shape in (config.k_shape, config.v_shape)
    )
    for each in (k_pages, v_pages):
        each[-1] = torch.randint(256, each.shape[1:], dtype=torch.uint8)
    compare(k_pages, v_pages, [config.num_slots - 1, config.num_slots - 16], layout, torch.uint8)


@LAYOUTS
def test_a_cache_reads_with_it_what_it_stored(device: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnd_server.attention.kernels import gather, store

    launches = []

    def read_kv(*args):
        launches.append(args)
        return gather.read_kv(*args)

    kernels = layer_group._TritonKernels(store.store_kv, read_kv)
    monkeypatch.setattr(layer_group, "_triton_kernels", lambda config, device: kernels)
    config = replace(config_of(layout, torch.float32, 3, 40, 24), num_layers=2)
    lease = {"epoch": 1, "principal": "a", "ttl_s": 9.0, "name": ""}
    (group,) = Cache(CacheShape.of(config), **lease, device=torch.device(device)).groups
    slots = torch.tensor([7, 29, 0])
    k, v = torch.randn(3, 3, 40, device=device), torch.randn(3, 3, 24, device=device)
    group.store(1, k, v, pages.stored_tokens(slots, device))
    read_k, read_v = group.read(1, slots.to(device))
    assert torch.equal(read_k, k)
    assert torch.equal(read_v, v)
    assert not group.read(0, slots.to(device))[0].any()
    assert len(launches) == 2


def test_caches_take_the_kernels_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnd_server.attention.kernels import gather, store

    plain = config_of(Layout.UNIFIED, torch.bfloat16, 2, 16, 16)
    fp8, gpu, none = replace(plain, kv_dtype=FP8, v_dtype=None), torch.device("cuda", 0), (None, None)
    both = (store.store_kv, gather.read_kv)
    monkeypatch.setattr(layer_group, "availability", lambda device: None)
    for capability, expected in (((8, 6), (both, none)), ((8, 9), (both, both)), ((10, 0), (both, both))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert (layer_group._triton_kernels(plain, gpu), layer_group._triton_kernels(fp8, gpu)) == expected
        mixed = replace(plain, v_dtype=FP8)
        assert layer_group._triton_kernels(mixed, gpu) == expected[1]
    assert layer_group._triton_kernels(replace(plain, num_kv_heads=1, latent=True), gpu) == none
    assert layer_group._triton_kernels(plain, torch.device("cpu")) == none
    monkeypatch.setattr(layer_group, "availability", lambda device: "triton is too old")
    assert layer_group._triton_kernels(plain, gpu) == none

"""The Triton store against the one in torch, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from attnd_server.attention.config import FP8, AttentionConfig, Layout
from attnd_server.attention.kernels import pages
from attnd_server.attention.layer_pages import LayerPages
from tests import interpreter
from tests.kernels.slots import GEOMETRIES, LAYOUTS, QUANTISED, config_of, only, types
from tests.steps import DTYPES

pytestmark = pytest.mark.skipif(interpreter.reason_against() is not None, reason=str(interpreter.reason_against()))


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[str]:
    with interpreter.interpreter() as device:
        yield device


def compare(
    config: AttentionConfig, k: torch.Tensor, v: torch.Tensor, scales: Sequence[torch.Tensor | None] = (None, None)
) -> None:
    """Stores some of the tokens both ways, in pages full of NaN, and compares the pages' bytes."""
    from attnd_server.attention.kernels.store import store_kv

    slots = torch.randperm(config.num_slots)[: len(k)]
    slots[[0, 5]] = -1
    kinds = (config.k_shape, config.kv_dtype), (config.v_shape, config.v_dtype)
    filled, expected = ([torch.full(shape, math.nan).to(k.device, dtype) for shape, dtype in kinds] for _ in range(2))
    store_kv(LayerPages(*filled, *scales), k, v, slots.to(k.device), config.layout)
    stored = pages.stored_tokens(slots, k.device)
    pages.store_kv(LayerPages(*expected, *scales), k, v, stored, config.layout)
    for actual, wanted in zip(filled, expected, strict=True):
        assert torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@GEOMETRIES
def test_same_pages_as_torch(
    device: str, layout: Layout, dtype: torch.dtype, num_kv_heads: int, head_dim: int, head_dim_v: int
) -> None:
    config = config_of(layout, dtype, num_kv_heads, head_dim, head_dim_v)
    k = torch.randn(13, num_kv_heads, head_dim, device=device).to(dtype)
    v = torch.randn(13, num_kv_heads, head_dim_v, device=device).to(dtype)
    compare(config, k, v)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@QUANTISED
@GEOMETRIES
def test_fp8_numbers_find_their_place_and_scale(
    device: str,
    layout: Layout,
    dtype: torch.dtype,
    quantised: tuple[bool, bool],
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int,
) -> None:
    """Numbers that need no rounding, which Triton's interpreter gets wrong: normal ones, some of them clamped."""
    scales = 2.0 ** torch.randint(-2, 3, (2, num_kv_heads, 1))

    def exact(size: int, scale: torch.Tensor) -> torch.Tensor:
        shape = (13, num_kv_heads, size)
        numbers = torch.randint(8, 127, shape, dtype=torch.uint8) | torch.randint(2, shape, dtype=torch.uint8) << 7
        return (numbers.view(FP8).float() * scale * 32.0 ** (torch.rand(shape) < 0.1)).to(device, dtype)

    config = replace(config_of(layout, dtype, num_kv_heads, head_dim, head_dim_v), **types(dtype, quantised))
    k, v = exact(head_dim, scales[0]), exact(head_dim_v, scales[1])
    compare(config, k, v, only(quantised, scales[:, :, 0].contiguous().to(device)))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@QUANTISED
@GEOMETRIES
def test_any_number_is_rounded_to_fp8_as_in_torch(
    device: str,
    layout: Layout,
    dtype: torch.dtype,
    quantised: tuple[bool, bool],
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int,
) -> None:
    if device == "cpu":
        pytest.skip("Triton's interpreter rounds FP8 down, and has neither its NaN nor its subnormal numbers")
    k = (torch.randn(13, num_kv_heads, head_dim) * 2.0 ** torch.randint(-12, 13, (13, num_kv_heads, 1))).to(dtype)
    v = torch.randn(13, num_kv_heads, head_dim_v).to(dtype)
    v[1, :, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    scales = torch.rand(2, num_kv_heads, device=device) + 0.1
    config = replace(config_of(layout, dtype, num_kv_heads, head_dim, head_dim_v), **types(dtype, quantised))
    compare(config, k.to(device), v.to(device), only(quantised, scales))


def test_no_tokens(device: str) -> None:
    from attnd_server.attention.kernels.store import store_kv

    nothing, slots = torch.empty(0, 2, 8, device=device), torch.empty(0, dtype=torch.int64, device=device)
    k_pages = torch.zeros(3, 4, 2, 8, device=device)
    store_kv(LayerPages(k_pages, k_pages.clone()), nothing, nothing, slots, Layout.UNIFIED)
    assert not k_pages.any()

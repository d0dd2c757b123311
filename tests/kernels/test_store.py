"""The Triton store against the one in torch, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from attnd_server.config import AttentionConfig, Layout
from attnd_server.kernels import pages
from tests import interpreter
from tests.steps import DTYPES

pytestmark = pytest.mark.skipif(interpreter.reason_against() is not None, reason=str(interpreter.reason_against()))


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[str]:
    with interpreter.interpreter() as device:
        yield device


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kv_heads", "head_dim", "head_dim_v"), [(1, 8, 8), (3, 40, 24), (7, 192, 128)])
def test_same_pages_as_torch(
    device: str, layout: Layout, dtype: torch.dtype, num_kv_heads: int, head_dim: int, head_dim_v: int
) -> None:
    from attnd_server.kernels.store import store_kv

    config = AttentionConfig(
        num_layers=1,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        num_pages=5,
        page_size=6,
        dtype=dtype,
        layout=layout,
    )
    k = torch.randn(13, num_kv_heads, head_dim, device=device).to(dtype)
    v = torch.randn(13, num_kv_heads, head_dim_v, device=device).to(dtype)
    slots = torch.randperm(config.num_slots)[:13]
    slots[[0, 5]] = -1
    expected, stored = (
        tuple(torch.full(shape, math.nan, dtype=dtype, device=device) for shape in (config.k_shape, config.v_shape))
        for _ in range(2)
    )
    pages.store_kv(*expected, k, v, pages.stored_tokens(slots, device), layout)
    store_kv(*stored, k, v, slots.to(device), layout)
    for actual, wanted in zip(stored, expected, strict=True):
        assert torch.equal(actual.isnan(), wanted.isnan())
        assert torch.equal(actual.nan_to_num(), wanted.nan_to_num())


def test_no_tokens(device: str) -> None:
    from attnd_server.kernels.store import store_kv

    nothing, slots = torch.empty(0, 2, 8, device=device), torch.empty(0, dtype=torch.int64, device=device)
    k_pages = torch.zeros(3, 4, 2, 8, device=device)
    store_kv(k_pages, k_pages.clone(), nothing, nothing, slots, Layout.UNIFIED)
    assert not k_pages.any()

"""Caches for the tests of kernels that write and read slots."""

from __future__ import annotations

import pytest
import torch

from attnd_server.attention.config import FP8, AttentionConfig, Layout

LAYOUTS = pytest.mark.parametrize("layout", Layout)
# Among them tokens of several pieces, the last of which is not whole.
GEOMETRIES = pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "head_dim_v"), [(1, 8, 8), (3, 40, 24), (7, 192, 128)]
)
# Whether K's pages are FP8, and V's.
QUANTISED = pytest.mark.parametrize("quantised", [(True, True), (True, False), (False, True)], ids=["kv", "k", "v"])


def types(dtype: torch.dtype, quantised: tuple[bool, bool]) -> dict[str, torch.dtype]:
    """The types of K's and V's pages, as a geometry has them."""
    return dict(zip(("kv_dtype", "v_dtype"), (FP8 if is_fp8 else dtype for is_fp8 in quantised), strict=True))


def only(quantised: tuple[bool, bool], scales: torch.Tensor) -> list[torch.Tensor | None]:
    """Scales `[2, num_kv_heads]` of what has some."""
    return [each if is_fp8 else None for each, is_fp8 in zip(scales, quantised, strict=True)]


def config_of(layout: Layout, dtype: torch.dtype, num_kv_heads: int, head_dim: int, head_dim_v: int) -> AttentionConfig:
    return AttentionConfig(
        1, num_kv_heads, head_dim, num_pages=5, page_size=6, head_dim_v=head_dim_v, dtype=dtype, layout=layout
    )

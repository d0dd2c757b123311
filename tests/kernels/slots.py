"""Caches for the tests of kernels that write and read slots."""

from __future__ import annotations

import pytest
import torch

from attnd_server.attention.config import AttentionConfig, Layout

LAYOUTS = pytest.mark.parametrize("layout", Layout)
# Among them tokens of several pieces, the last of which is not whole.
GEOMETRIES = pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "head_dim_v"), [(1, 8, 8), (3, 40, 24), (7, 192, 128)]
)


def config_of(layout: Layout, dtype: torch.dtype, num_kv_heads: int, head_dim: int, head_dim_v: int) -> AttentionConfig:
    return AttentionConfig(
        1, num_kv_heads, head_dim, num_pages=5, page_size=6, head_dim_v=head_dim_v, dtype=dtype, layout=layout
    )

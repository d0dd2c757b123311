"""The caches of the world: small ones of every kind, some of them with layers that differ."""

from __future__ import annotations

from dataclasses import replace

import torch

from attnd_server.attention.config import FP8, AttentionConfig, Layout
from attnd_server.kv.cache_shape import CacheShape

_TINY = AttentionConfig(num_layers=2, num_kv_heads=2, head_dim=8, num_pages=6, page_size=4, dtype=torch.float32)
_PLAIN = replace(_TINY, head_dim_v=16)
_HALF = replace(_TINY, dtype=torch.float16, kv_dtype=None, v_dtype=None, layout=Layout.DISTINCT)
_FP8 = replace(_TINY, kv_dtype=FP8, v_dtype=FP8)
_FP8_V = replace(_TINY, v_dtype=FP8, layout=Layout.DISTINCT)


def _shape(*groups: tuple[AttentionConfig, tuple[int, ...]]) -> CacheShape[AttentionConfig]:
    """Groups with layers that have these numbers."""
    configs = tuple(replace(config, num_layers=len(layers)) for config, layers in groups)
    return CacheShape(configs, tuple(layers for _, layers in groups))


_WINDOWED = replace(_TINY, num_kv_heads=1, head_dim=24, head_dim_v=8, num_pages=5, window=5, kv_dtype=FP8, v_dtype=FP8)
_LATENT = replace(_TINY, num_kv_heads=1, head_dim=24, head_dim_v=16, num_pages=9, page_size=2, latent=True)
_V_APART = replace(_TINY, num_pages=7, v_dtype=FP8)
# The first of these lies in the space of the caches of `_PLAIN`, the second in that of `_HALF`.
_HYBRID = _shape((_PLAIN, (0, 2)), (_WINDOWED, (1,)), (_LATENT, (3,)), (_V_APART, (4,)))
_HALVES = _shape((replace(_HALF, num_pages=20, page_size=1, window=3), (0,)), (_HALF, (1, 2)))
# Groups that may have each other's page tables, but not all of each other's pages.
_ALIKE = _shape((_TINY, (0,)), (replace(_TINY, num_pages=4, window=4), (2,)), (_TINY, (1,)))


def shapes() -> tuple[CacheShape[AttentionConfig], ...]:
    """Of each kind of cache the layer groups."""
    flat = (_PLAIN, _HALF, _FP8, _FP8_V)
    return (*map(CacheShape.of, flat), _HYBRID, _HALVES, _ALIKE)

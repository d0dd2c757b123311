"""Geometry and choices of a cache, with torch's types. Frozen: a value that exists is a valid one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from attnd_server.attention.geometry import (
    DISTINCT_LANES,
    ITEM_SIZES,
    AttentionBackend,
    Geometry,
    Layout,
    PrecisionMode,
)
from attnd_server.attention.kv_split import KVSplitConfig

__all__ = ["DISTINCT_LANES", "FP8", "AttentionBackend", "AttentionConfig", "Layout", "PrecisionMode"]

FP8 = torch.float8_e4m3fn
"""The type of quantised pages: a sign, 4 bits of exponent, 3 of mantissa, no infinities."""

_DTYPES = {name: getattr(torch, name) for name in ITEM_SIZES}


@dataclass(frozen=True)
class AttentionConfig(Geometry):
    """Geometry and choices of a cache.

    Attributes:
        num_layers: layers that share each page.
        num_kv_heads: KV heads per layer.
        head_dim: elements per head of q and k.
        num_pages: pages of the cache.
        page_size: token slots per page.
        head_dim_v: elements per head of v and of the output; 0 means `head_dim`.
        dtype: type of a call's tensors.
        layout: how K and V lie in the pages.
        backend: backend of calls that name none.
        precision: type in which backends multiply.
        kv_split: how decode splits KV.
        kv_dtype: type of the pages, or of K's alone: `dtype`, or FP8; None means `dtype`.
        k_scales: of FP8 pages, one for all KV heads or one for each: K is stored as k / scale and read as the stored
            value times scale. 1.0 alone without FP8.
        v_scales: likewise for V.
        v_dtype: type of V's pages: `dtype`, or FP8; None means `kv_dtype`.
        window: tokens of the sliding window that all layers have; 0 is none.
        latent: a token's row of K has V as its first `head_dim_v` elements, and V no memory of its own. There is one KV
            head then, and the layout is unified.
    """

    dtype: torch.dtype = torch.bfloat16
    kv_split: KVSplitConfig = field(default_factory=KVSplitConfig)
    kv_dtype: torch.dtype | None = None
    v_dtype: torch.dtype | None = None

    @classmethod
    def of_names(
        cls, *, dtype: str, kv_dtype: str, kv_split: dict[str, Any], v_dtype: str = "", **more: Any
    ) -> AttentionConfig:
        """One whose types are given by name, and the cut of its KV by its fields; raises as the constructor does."""
        types = {"dtype": _DTYPES[dtype], "kv_dtype": _DTYPES[kv_dtype], "v_dtype": _DTYPES[v_dtype or kv_dtype]}
        return cls(**types, kv_split=KVSplitConfig(**kv_split), **more)

    @property
    def k_is_quantised(self) -> bool:
        """Whether K's pages hold FP8 and have scales."""
        return self.kv_dtype is FP8

    @property
    def v_is_quantised(self) -> bool:
        """Whether V's pages hold FP8 and have scales."""
        return self.v_dtype is FP8

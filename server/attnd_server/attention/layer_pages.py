"""The pages of one layer, and what FP8 pages are multiplied by."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LayerPages(NamedTuple):
    """K and V of one layer in pages, all on one device.

    Attributes:
        k: contiguous, of shape `AttentionConfig.k_shape`.
        v: contiguous, of shape `AttentionConfig.v_shape`; of a latent cache the view `k[..., :head_dim_v]`.
        k_scales: float32 `[num_kv_heads]`: what K's pages hold is multiplied by it. None: K's pages are not scaled.
        v_scales: likewise for V.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None

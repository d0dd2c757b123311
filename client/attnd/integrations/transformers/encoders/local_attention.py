"""Attention that stays in the worker: of encoders, and of the vision and audio parts of a model."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def stays_here(module: torch.nn.Module, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether a layer whose keys come from no cache is one of an encoder, and not of a model without its cache.

    Some causal layers are not marked as such. Their masks are: bool `[batch_size, num_columns]`.
    """
    if mask is not None and mask.dim() == 2 and mask.dtype == torch.bool:
        return False
    return kwargs.get("is_causal") is False or not getattr(module, "is_causal", True)


def attend_here(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Transformers' own attention by torch's `scaled_dot_product_attention`; arguments as of `attention`.

    The mask is ours: `[batch_size, num_keys]`, or with a dimension for queries; not 0, and 1 of int8, is seen.
    """
    if mask is not None and not mask.is_floating_point():
        seen = mask == 1 if mask.dtype == torch.int8 else mask.bool()
        mask = seen[:, None, None, :] if seen.dim() == 2 else seen
        mask = mask[..., : key.shape[2]]  # guidance hands a longer one to the encoder, as eager attention lets it
    given = {name: each for name, each in kwargs.items() if name != "is_causal"}
    sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    output, _ = sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False, **given)
    return output, None

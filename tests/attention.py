"""Attention of one whole sequence, for tests that look at the service and not at masks."""

from __future__ import annotations

import torch


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True) -> torch.Tensor:
    """q `[n, num_heads, d]` are the last n of the tokens of k and v `[s, num_kv_heads, d]`; `[n, num_heads, d]`."""
    n, s, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    scores = torch.einsum("nhd,shd->hns", q.double(), k.double().repeat_interleave(group, 1)) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(n, s).tril(s - n).bool().to(q.device), -torch.inf)
    return torch.einsum("hns,shd->nhd", scores.softmax(2), v.double().repeat_interleave(group, 1)).to(q.dtype)

"""Attention as it is written down: the specification of what every backend computes."""

from __future__ import annotations

import torch


def reference_torch_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    q_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request over keys in token order.

    Args:
        q: `[num_rows, num_heads, head_dim]`.
        keys: `[num_keys, num_kv_heads, head_dim]`. What no row sees may be NaN.
        values: `[num_keys, num_kv_heads, head_dim_v]`, likewise.
        seen: bool `[num_rows, num_keys]`.
        q_positions: int64 `[num_rows]`.
        key_positions: int64 `[num_keys]`.
        scale: factor of q.k; any finite number.
        softcap: 0 is off.
        alibi_slopes: `[num_heads]` or None.
        sinks: `[num_heads]` or None.
        dtype: in which everything is computed.

    Returns:
        Output `[num_rows, num_heads, head_dim_v]` and lse `[num_rows, num_heads]` in `dtype`. A row that sees nothing
        has zeros, and the sink for its lse: -inf without one.
    """
    group = q.shape[1] // keys.shape[1]
    values = values.masked_fill(~seen.any(0)[:, None, None], 0)  # 0 * NaN is NaN
    keys, values = (tensor.to(dtype).repeat_interleave(group, dim=1) for tensor in (keys, values))
    scores = scale * torch.einsum("nhd,shd->hns", q.to(dtype), keys)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(dtype)[:, None, None] * (key_positions - q_positions[:, None])
    # Past the greatest number a score is that number: inf - inf would be NaN.
    most = torch.finfo(dtype).max
    scores = scores.clamp_(-most, most).masked_fill(~seen, -torch.inf)
    # A sink is one more key without a value.
    sink = scores.new_full(q.shape[1:2], -torch.inf) if sinks is None else sinks.to(dtype)
    scores = torch.cat([scores, sink[:, None, None].expand(-1, len(q), 1)], dim=2)
    blind = ~seen.any(1)
    weights = torch.softmax(scores, dim=2)[:, :, :-1].masked_fill(blind[:, None], 0)
    output = torch.einsum("hns,shd->nhd", weights, values)
    return output, torch.logsumexp(scores, dim=2).T

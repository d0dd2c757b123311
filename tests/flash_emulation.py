"""The functions of the FlashAttention packages in plain torch, with their signatures, rules and layouts.

Written from their documentation: causal masks and windows count from the bottom right corner, lse is natural and
`[num_heads, num_tokens]`, lengths and page tables are int32. What the packages demand is asserted.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from attnd_server.attention.backends.flash_libraries import (
    FlashAttention2,
    FlashAttention3,
    FlashAttention4,
    FlashLibrary,
)


def libraries() -> dict[str, FlashLibrary]:
    """Each package, emulated."""
    return {
        "flash_attn_2": FlashAttention2(varlen_2),
        "flash_attn_3": FlashAttention3(varlen_3, with_kvcache_3),
        "flash_attn_4": FlashAttention4(varlen_4, 256),
    }


def varlen_2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    block_table: torch.Tensor | None = None,
) -> Any:
    if block_table is not None:
        assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    assert cu_seqlens_k.dtype == torch.int32
    key_lens = cu_seqlens_k.diff()
    assert max_seqlen_k == int(key_lens.max())
    # A row that sees nothing has an lse of +inf in this package.
    output, lse = _attend(
        q,
        k,
        v,
        cu_seqlens_q,
        max_seqlen_q,
        key_lens,
        block_table,
        softmax_scale,
        causal,
        window_size,
        softcap,
        math.inf,
    )
    return (output, lse, None) if return_attn_probs else output


def varlen_3(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    return_attn_probs: bool = False,
) -> Any:
    assert cu_seqlens_k.dtype == torch.int32
    key_lens = cu_seqlens_k.diff()
    assert max_seqlen_k == int(key_lens.max())
    output, lse = _attend(
        q, k, v, cu_seqlens_q, max_seqlen_q, key_lens, None, softmax_scale, causal, window_size, softcap
    )
    return (output, lse) if return_attn_probs else output


def with_kvcache_3(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    assert k is None, "would be written to the pages"
    assert v is None
    assert page_table is not None
    assert cache_seqlens is not None
    assert cache_seqlens.dtype == torch.int32
    output, lse = _attend(
        q, k_cache, v_cache, cu_seqlens_q, max_seqlen_q, cache_seqlens, page_table, softmax_scale, causal, window_size,
        softcap,
    )  # fmt: skip
    return (output, lse, None, None) if return_softmax_lse else output


def varlen_4(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qv: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    num_splits: int = 1,
    return_lse: bool = False,
) -> Any:
    assert page_table is None or cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
    assert all(side is None or side >= 0 for side in window_size)
    key_lens = seqused_k if cu_seqlens_k is None else cu_seqlens_k.diff()
    assert key_lens is not None
    assert key_lens.dtype == torch.int32
    assert max_seqlen_k == int(key_lens.max())
    left, right = (-1 if side is None else side for side in window_size)
    output, lse = _attend(
        q, k, v, cu_seqlens_q, max_seqlen_q, key_lens, page_table, softmax_scale, causal, (left, right), softcap
    )
    return output, lse if return_lse else None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    key_lens: torch.Tensor,
    page_table: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    lse_of_nothing: float = -math.inf,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert cu_seqlens_q is not None
    assert cu_seqlens_q.dtype == torch.int32
    assert scale is not None
    assert scale > 0, "the packages take the greatest product for the greatest score, and scale the -inf of a mask"
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
    assert len(key_lens) == len(cu_seqlens_q) - 1 > 0
    query_lens = cu_seqlens_q.diff().tolist()
    assert min(query_lens) > 0, "flash-attn 2 reshapes steps of one token each by the number of requests"
    assert max_seqlen_q == max(query_lens)
    assert sum(query_lens) == len(q)
    outputs, lses = [], []
    first_key = 0
    for request, (rows, num_keys) in enumerate(zip(q.split(query_lens), key_lens.tolist(), strict=True)):
        if page_table is None:
            keys, values = k[first_key : first_key + num_keys], v[first_key : first_key + num_keys]
            first_key += num_keys
        else:
            assert page_table.dtype == torch.int32
            assert page_table.is_contiguous()
            assert page_table.shape[1] * k.shape[1] >= num_keys
            pages = page_table[request].long()
            keys, values = k[pages].flatten(0, 1)[:num_keys], v[pages].flatten(0, 1)[:num_keys]
        output, lse = _one_request(rows.float(), keys.float(), values.float(), scale, causal, window, softcap)
        outputs.append(output)
        lses.append(lse.masked_fill(lse == -math.inf, lse_of_nothing))
    assert page_table is not None or first_key == len(k)
    return torch.cat(outputs).to(q.dtype), torch.cat(lses, dim=1)


def _one_request(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = scale * torch.einsum("nhd,shd->hns", q, keys)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    # Where row i stands among the keys, and which it sees.
    positions = len(keys) - len(q) + torch.arange(len(q))[:, None]
    distances = torch.arange(len(keys)) - positions
    left, right = window
    seen = torch.ones_like(distances, dtype=torch.bool)
    if causal or right >= 0:
        seen &= distances <= (0 if causal else right)
    if left >= 0:
        seen &= distances >= -left
    scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(2)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return torch.einsum("hns,shd->nhd", weights, values), lse

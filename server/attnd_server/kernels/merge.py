"""Puts together what programs computed over different keys of the same rows, by log-sum-exp.

With partial outputs `o_s` and `l_s`, each the attention over its own keys alone: `lse = log(sum_s exp(l_s))` and
`output = sum_s exp(l_s - lse) o_s` (arXiv 2311.01282). float32. The order of the sum depends on the request's number
of splits alone, so its bits do not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnd_server.kernels.softmax import finish, rebase

# Columns of `merges`: first row of q, new tokens, first row of the partial results, splits.
MERGE_FIELDS = 4
# Splits that a program loads at once.
_SPLITS = 16
_MERGE_FIELDS = tl.constexpr(MERGE_FIELDS)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _merge_kernel(
    output, lse,
    partial_output, partial_lse, merges, sinks,
    NUM_HEADS: tl.constexpr, HEAD_DIM_V: tl.constexpr, DIMS_V: tl.constexpr, SPLITS: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Grid: (merges * NUM_HEADS, most new tokens of a merge)."""
    head = tl.program_id(0) % NUM_HEADS
    token = tl.program_id(1)
    fields = merges + tl.program_id(0) // NUM_HEADS * _MERGE_FIELDS
    first_row = tl.load(fields)
    num_new = tl.load(fields + 1)
    first_partial = tl.load(fields + 2)
    num_splits = tl.load(fields + 3)
    if token >= num_new:
        return

    dims_v = tl.arange(0, DIMS_V)
    in_v = dims_v < HEAD_DIM_V
    accumulator = tl.zeros([1, DIMS_V], dtype=tl.float32)
    row_max = tl.full([1], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([1], dtype=tl.float32)
    for start in tl.range(0, num_splits, SPLITS):
        splits = start + tl.arange(0, SPLITS)
        exists = splits < num_splits
        rows = (first_partial + splits * num_new + token).to(tl.int64) * NUM_HEADS + head
        partial = tl.load(partial_lse + rows, mask=exists, other=float("-inf"))
        values = tl.load(
            partial_output + (rows * HEAD_DIM_V)[:, None] + dims_v[None, :],
            mask=exists[:, None] & in_v[None, :],
            other=0.0,
        )
        row_max, base, decay = rebase(row_max, tl.max(partial, 0))
        weights = tl.exp2(partial - base)
        row_sum = row_sum * decay + tl.sum(weights, 0)
        accumulator = accumulator * decay[:, None] + tl.sum(weights[:, None] * values, 0)[None, :]

    sink = tl.load(sinks + head) if SINKS else 0.0
    result, row_lse = finish(accumulator, row_max, row_sum, sink, SINKS)
    row = (first_row + token).to(tl.int64) * NUM_HEADS + head
    tl.store(output + row * HEAD_DIM_V + dims_v[None, :], result, mask=in_v[None, :])
    if LSE:
        tl.store(lse + row + tl.arange(0, 1), row_lse * _LN2)


def merge(
    output: torch.Tensor,
    lse: torch.Tensor | None,
    partial_output: torch.Tensor,
    partial_lse: torch.Tensor,
    merges: torch.Tensor,
    max_tokens: int,
    sinks: torch.Tensor | None,
) -> None:
    """Merges the partial results of the requests in `merges`.

    Args:
        output: `[num_tokens, num_heads, head_dim_v]`, written at the requests' rows.
        lse: float32 `[num_tokens, num_heads]`, likewise, natural logarithm; or None.
        partial_output: float32 `[num_partial_rows, num_heads, head_dim_v]`.
        partial_lse: float32 `[num_partial_rows, num_heads]`, in units of log2; -inf for a row that saw nothing.
        merges: int32 `[num_merges, MERGE_FIELDS]`. Split s of new token t lies at row `first + s * new tokens + t`.
        max_tokens: most new tokens of a merge.
        sinks: float32 `[num_heads]` in units of log2, or None.
    """
    num_heads, head_dim_v = output.shape[1:]
    _merge_kernel[(len(merges) * num_heads, max_tokens)](
        output,
        lse,
        partial_output,
        partial_lse,
        merges,
        sinks,
        NUM_HEADS=num_heads,
        HEAD_DIM_V=head_dim_v,
        DIMS_V=triton.next_power_of_2(head_dim_v),
        SPLITS=_SPLITS,
        SINKS=sinks is not None,
        LSE=lse is not None,
        num_warps=4,
    )

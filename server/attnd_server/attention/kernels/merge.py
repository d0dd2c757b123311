"""Puts together what was computed over different keys of the same rows, by log-sum-exp.

With partial outputs `o_c` and `l_c`, each the attention over the keys of chunk c alone: `lse = log(sum_c exp(l_c))` and
`output = sum_c exp(l_c - lse) o_c` (arXiv 2311.01282). float32. The order of the sum depends on the request's number
of chunks alone, so its bits do not depend on the batch, nor on who does it: the program that finishes the last chunk,
or a launch of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnd_server.attention.kernels.items import MERGE_FIELDS
from attnd_server.attention.kernels.softmax import finish
from attnd_server.device.kernels.launch import launch_kernel

# Chunks whose lse a program loads at once, and whose output.
CHUNKS, TOGETHER = 32, 8
# Rows that it merges at once.
ROWS = 4
_CHUNKS = tl.constexpr(CHUNKS)
_TOGETHER = tl.constexpr(TOGETHER)
_ROWS = tl.constexpr(ROWS)
_MERGE_FIELDS = tl.constexpr(MERGE_FIELDS)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def merge_rows(
    output, lse, partial_output, partial_lse, sinks,
    q_row, num_new, num_valid, partial_row, num_chunks, first_row, first_head,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM_V: tl.constexpr, DIMS_V: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Merges `_ROWS` rows of a request, from `first_row` on, and stores them."""
    rows = first_row + tl.arange(0, _ROWS)
    tokens = rows // HEADS
    heads = first_head + rows % HEADS
    exists = tokens < num_new
    dims = tl.arange(0, DIMS_V)
    in_v = dims < HEAD_DIM_V
    # Past the first cache, which does not know what other multiprocessors have written.
    row_max = tl.full([_ROWS], float("-inf"), dtype=tl.float32)
    for start in tl.range(0, num_chunks, _CHUNKS):
        chunks = start + tl.arange(0, _CHUNKS)
        there = (chunks < num_chunks)[:, None] & exists[None, :]
        places = ((partial_row + chunks * num_new)[:, None] + tokens[None, :]).to(tl.int64) * NUM_HEADS + heads[None, :]
        partial = tl.load(partial_lse + places, mask=there, other=float("-inf"), cache_modifier=".cg")
        row_max = tl.maximum(row_max, tl.max(partial, 0))
    base = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.zeros([_ROWS], dtype=tl.float32)
    accumulator = tl.zeros([_ROWS, DIMS_V], dtype=tl.float32)
    for start in tl.range(0, num_chunks, _TOGETHER):
        # One after the other, in the order of the chunks; unrolled, so that their loads are under way together.
        for offset in tl.static_range(_TOGETHER):
            chunk = start + offset
            there = exists & (chunk < num_chunks)
            places = (partial_row + chunk * num_new + tokens).to(tl.int64) * NUM_HEADS + heads
            partial = tl.load(partial_lse + places, mask=there, other=float("-inf"), cache_modifier=".cg")
            values = tl.load(
                partial_output + ((places * HEAD_DIM_V)[:, None] + dims[None, :]),
                mask=there[:, None] & in_v[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            weights = tl.exp2(partial - base)
            row_sum += weights
            accumulator += weights[:, None] * values

    sink = tl.load(sinks + heads, mask=tokens < num_valid, other=float("-inf")) if SINKS else 0.0
    result, row_lse = finish(accumulator, row_max, row_sum, sink, SINKS)
    places = (q_row + tokens).to(tl.int64) * NUM_HEADS + heads
    tl.store(output + ((places * HEAD_DIM_V)[:, None] + dims[None, :]), result, mask=exists[:, None] & in_v[None, :])
    if LSE:
        tl.store(lse + places, row_lse * _LN2, mask=exists)


@triton.jit
def _merge_kernel(
    output, lse,
    partial_output, partial_lse, merges, sinks,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM_V: tl.constexpr, DIMS_V: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Grid: (merges * NUM_HEADS / HEADS, most rows of a merge / _ROWS)."""
    fields = merges + tl.program_id(0) // (NUM_HEADS // HEADS) * _MERGE_FIELDS
    first_head = tl.program_id(0) % (NUM_HEADS // HEADS) * HEADS
    q_row = tl.load(fields)
    num_new = tl.load(fields + 1)
    partial_row = tl.load(fields + 2)
    num_chunks = tl.load(fields + 3)
    num_valid = tl.load(fields + 4)
    first_row = tl.program_id(1) * _ROWS
    # A request of one chunk has nothing to merge.
    if (first_row < num_new * HEADS) & (num_chunks > 1):
        merge_rows(
            output, lse, partial_output, partial_lse, sinks,
            q_row, num_new, num_valid, partial_row, num_chunks, first_row, first_head,
            NUM_HEADS, HEADS, HEAD_DIM_V, DIMS_V, SINKS, LSE,
        )  # fmt: skip


def merge(
    output: torch.Tensor,
    lse: torch.Tensor | None,
    partial_output: torch.Tensor,
    partial_lse: torch.Tensor,
    merges: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    heads: int,
    max_tokens: int,
) -> None:
    """Merges the partial results of the requests in `merges`.

    Args:
        output: `[num_tokens, num_heads, head_dim_v]`, written at the requests' rows.
        lse: float32 `[num_tokens, num_heads]`, likewise, natural logarithm; or None.
        partial_output: float32 `[num_partial_rows, num_heads, head_dim_v]`.
        partial_lse: float32 `[num_partial_rows, num_heads]`, in units of log2; -inf for a row that saw nothing.
        merges: int32 `[num_merges, MERGE_FIELDS]`. Chunk c of new token t lies at row `first + c * new tokens + t`.
        sinks: float32 `[num_heads]` in units of log2, or None.
        heads: query heads that share a program.
        max_tokens: most new tokens of a merge.
    """
    num_heads, head_dim_v = output.shape[1:]
    launch_kernel(
        _merge_kernel,
        (len(merges) * (num_heads // heads), triton.cdiv(max_tokens * heads, ROWS)),
        output,
        lse,
        partial_output,
        partial_lse,
        merges,
        sinks,
        NUM_HEADS=num_heads,
        HEADS=heads,
        HEAD_DIM_V=head_dim_v,
        DIMS_V=triton.next_power_of_2(head_dim_v),
        SINKS=sinks is not None,
        LSE=lse is not None,
        num_warps=4,
    )

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
from triton.language import int64

from attnd_server.attention.kernels.division import divide, inverse
from attnd_server.attention.kernels.given import LSE, NARROW, RUN_TIME_NUMBERS, SINKS, bits_of, some
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


def _merge_rows(
    output, lse, partial_output, partial_lse, sinks,
    q_row, num_new, num_valid, partial_row, num_chunks, first_row, first_head,
    num_heads, heads, heads_inverse, given, HEAD_DIM_V: tl.constexpr, DIMS_V: tl.constexpr,
):  # fmt: skip
    """Merges `_ROWS` rows of a request, from `first_row` on, and stores them."""
    rows = first_row + tl.arange(0, _ROWS)
    tokens = divide(rows, heads_inverse)
    head = first_head + (rows - tokens * heads)
    exists = tokens < num_new
    dims = tl.arange(0, DIMS_V)
    in_v = dims < HEAD_DIM_V
    first_place = (partial_row + tokens).to(tl.int64) * num_heads + head
    chunk_places = num_new.to(tl.int64) * num_heads
    # Past the first cache, which does not know what other multiprocessors have written.
    row_max = tl.full([_ROWS], float("-inf"), dtype=tl.float32)
    for start in tl.range(0, num_chunks, _CHUNKS):
        chunks = start + tl.arange(0, _CHUNKS)
        there = (chunks < num_chunks)[:, None] & exists[None, :]
        places = first_place[None, :] + (chunks * chunk_places)[:, None]
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
            places = first_place + chunk * chunk_places
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

    has_sinks = (tokens < num_valid) & ((given & SINKS) != 0)
    sink = tl.load(sinks + head, mask=has_sinks, other=float("-inf"))
    result, row_lse = finish(accumulator, row_max, row_sum, sink, True)
    places = (q_row + tokens).to(tl.int64) * num_heads + head
    tl.store(output + ((places * HEAD_DIM_V)[:, None] + dims[None, :]), result, mask=exists[:, None] & in_v[None, :])
    tl.store(lse + places, row_lse * _LN2, mask=exists & ((given & LSE) != 0))


_merge_rows_here = triton.jit(_merge_rows)
# For a kernel that ends with it. Triton's own passes, some of which look at all of a function for each access of
# memory, take less time for two functions, which LLVM joins: docs/benchmarks.md has how much. What Triton knows of
# addresses is lost, though, so that a kernel which does nothing else is slower by 0.2 to 0.9 us.
merge_rows = triton.jit(_merge_rows, noinline=True)


@triton.jit(do_not_specialize=RUN_TIME_NUMBERS, do_not_specialize_on_alignment=NARROW)
def _merge_kernel(
    output, lse,
    partial_output, partial_lse, merges, sinks,
    num_heads, heads, heads_inverse: int64, groups, groups_inverse: int64, given,
    HEAD_DIM_V: tl.constexpr, DIMS_V: tl.constexpr,
):  # fmt: skip
    """Grid: (merges * groups, most rows of a merge / _ROWS)."""
    index = divide(tl.program_id(0), groups_inverse)
    fields = merges + index * _MERGE_FIELDS
    first_head = (tl.program_id(0) - index * groups) * heads
    q_row = tl.load(fields)
    num_new = tl.load(fields + 1)
    partial_row = tl.load(fields + 2)
    num_chunks = tl.load(fields + 3)
    num_valid = tl.load(fields + 4)
    first_row = tl.program_id(1) * _ROWS
    # A request of one chunk has nothing to merge.
    if (first_row < num_new * heads) & (num_chunks > 1):
        _merge_rows_here(
            output, lse, partial_output, partial_lse, sinks,
            q_row, num_new, num_valid, partial_row, num_chunks, first_row, first_head,
            num_heads, heads, heads_inverse, given, HEAD_DIM_V, DIMS_V,
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
    groups = num_heads // heads
    launch_kernel(
        _merge_kernel,
        (len(merges) * groups, triton.cdiv(max_tokens * heads, ROWS)),
        output,
        some(lse, partial_lse),
        partial_output,
        partial_lse,
        merges,
        some(sinks, partial_lse),
        num_heads,
        heads,
        inverse(heads),
        groups,
        inverse(groups),
        bits_of(lse=lse, sinks=sinks),
        HEAD_DIM_V=head_dim_v,
        DIMS_V=triton.next_power_of_2(head_dim_v),
        num_warps=4,
    )

"""What becomes of the rows of an item in Hopper's decode kernels: masks, the running softmax, and where results go.

Scores are `[KEYS, ROWS]`, in units of log2; see `softmax.py` for the mathematics.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attnd_server.attention.kernels.given import LSE, SINKS
from attnd_server.attention.kernels.hopper.items import divide, finish_rows

_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def cap_scores(scores, softcap, OPTIONS: gl.constexpr):
    """Softcap of scores: tanh(x) = 1 - 2 / (exp(2 x) + 1), which saturates where exp overflows or vanishes.

    OPTIONS: there may be a softcap, ALiBi or a window.
    """
    if OPTIONS and softcap != 0.0:
        # The scale of the products makes 2 x log2(e) of them.
        scores = softcap * (1.0 - 2.0 / (gl.exp2(scores) + 1.0))
    return scores


@gluon.jit
def mask_scores(
    scores, keys, is_edge, positions, limits, slopes, context_len, cached_keys, hole_start, hole_end, end_new, softcap,
    window, NEW_TOKENS: gl.constexpr, OPTIONS: gl.constexpr,
):  # fmt: skip
    """Scores `[KEYS, ROWS]` of scaled products, in units of log2; -inf where a row does not see a key of an edge."""
    scores = cap_scores(scores, softcap, OPTIONS)
    key_positions = gl.where(keys < cached_keys, keys, keys - cached_keys + context_len)
    if OPTIONS:
        scores += slopes[None, :] * (key_positions[:, None] - positions[None, :]).to(gl.float32)
    if is_edge:
        in_context = (keys < context_len) & ((keys < hole_start) | (keys >= hole_end)) & (end_new > 0)
        visible = in_context[:, None]
        if NEW_TOKENS:
            is_new = keys >= cached_keys
            visible = visible | (is_new[:, None] & (key_positions[:, None] < limits[None, :]))
        if OPTIONS:
            visible = visible & (positions[None, :] - key_positions[:, None] < window)
        else:
            visible = visible & (positions >= 0)[None, :]
        scores = gl.where(visible, scores, float("-inf"))
    return scores


@gluon.jit
def rebase(row_max, tile_max):
    """The new maximum of each row, what to subtract from scores, and the factor for what was summed up so far."""
    new_max = gl.maximum(row_max, tile_max)
    # A row that has seen nothing has -inf, and -inf - -inf is NaN: subtract 0 instead, and exp2(-inf) is 0.
    base = gl.where(new_max == float("-inf"), 0.0, new_max)
    return new_max, base, gl.exp2(row_max - base)


@gluon.jit
def store_item(
    output, lse, partial_output, partial_lse, accumulators, factor, row_max, row_sum, rows, heads, sinks,
    q_row, num_new, num_valid, partial_row, is_split, group, num_heads, group_inverse, given,
    DIM_V: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Stores the output and lse of an item's rows, or its part of them.

    `accumulators` are N sums of products `[DIM_V / N, ROWS]`, still to be multiplied with `factor`; the first has the
    dims 0, N, 2 N, ..., the next 1, N + 1, ...
    """
    # Those past the request's valid tokens see nothing.
    is_live = rows < num_valid * group
    has_sinks = (given & SINKS) != 0
    row_factor, row_lse = finish_rows(row_max, row_sum, is_live, is_split, 1.0, sinks, heads, has_sinks, True)
    row_factor = row_factor[None, :]
    results = ()
    for index in gl.static_range(len(accumulators)):
        # A row that saw nothing may share a tile with NaN, and 0 * NaN is NaN.
        result = gl.where(row_factor != 0.0, accumulators[index] * (row_factor * factor), 0.0)
        results = results + (result,)  # type: ignore[assignment]  # noqa: RUF005 - kernels know no unpacking
    exists = rows < num_new * group
    places = (divide(rows, group_inverse) * num_heads + heads).to(gl.int64)
    if is_split:
        places += partial_row.to(gl.int64) * num_heads
        _store(partial_output, partial_lse, results, row_lse, places, exists, exists, DIM_V, LAYOUT)
    else:
        places += q_row * num_heads
        has_lse = exists & ((given & LSE) != 0)
        _store(output, lse, results, row_lse * _LN2, places, exists, has_lse, DIM_V, LAYOUT)


@gluon.jit
def _store(output, lse, results, row_lse, places, exists, has_lse, DIM_V: gl.constexpr, LAYOUT: gl.constexpr):
    """Stores the output and lse of rows at their places."""
    STEP: gl.constexpr = len(results)
    for first in gl.static_range(STEP):
        dims = first + STEP * gl.arange(0, DIM_V // STEP, layout=gl.SliceLayout(1, LAYOUT))
        pointers = output + ((places * DIM_V)[None, :] + dims[:, None])
        gl.store(pointers, results[first].to(output.dtype.element_ty), mask=exists[None, :])
    gl.store(lse + places, row_lse, mask=has_lse)

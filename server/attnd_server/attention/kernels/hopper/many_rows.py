"""What becomes of the rows of an item in Hopper's kernel for many rows, whichever warps take them; see `attention.py`.

FIRST and ROWS: of an item, the first row that a consumer takes, and how many it takes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from attnd_server.attention.kernels.hopper.items import finish_rows, item_at, limit, sync
from attnd_server.attention.kernels.items import (
    BLOCK_SIZE,
    CONTEXT_LEN,
    FIRST_ROW,
    HOLE_END,
    HOLE_START,
    NUM_CHUNKS,
    NUM_NEW,
    NUM_VALID,
    PADDED_PREFIX_LEN,
    PARTIAL_ROW,
    PREFIX_LEN,
    Q_ROW,
)

_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _adjust(
    scores, key, positions, slopes, context_len, cached_keys, scale, softcap,
    KEYS: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Options that change scores. Plain scores stay without their scale: it joins the exponent's product."""
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1) saturates where exp overflows or vanishes; `scale` makes 2 x log2(e).
        scores = softcap * (1.0 - 2.0 / (gl.exp2(scores * scale) + 1.0))
    elif ALIBI:
        scores = scores * scale
    if ALIBI:
        keys = key + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
        places = gl.where(keys < cached_keys, keys, keys - cached_keys + context_len)
        scores += slopes[:, None] * (places[None, :] - positions[:, None]).to(gl.float32)
    return scores


@gluon.jit
def _mask(
    scores, key, row_starts, row_ends, context_len, cached_keys, hole_start, hole_end,
    KEYS: gl.constexpr, WINDOW: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """-inf for keys that a row does not see: outside `[row_starts, row_ends)`, in a hole, or none.

    By the least of each score and a cap, inf or -inf: that also takes NaN away, and thousands of predicates would not
    fit the registers.
    """
    columns = gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
    places = columns.to(gl.float32)[None, :] + 0.5
    scores = gl.minimum(scores, ((row_ends - key).to(gl.float32)[:, None] - places) * float("inf"))
    if WINDOW:
        scores = gl.minimum(scores, (places - (row_starts - key).to(gl.float32)[:, None]) * float("inf"))
    has_gap = (context_len < cached_keys) & (key < cached_keys) & (key + KEYS > context_len)
    if has_gap | (hole_end > hole_start):
        keys = key + columns
        seen = (keys < context_len) & ((keys < hole_start) | (keys >= hole_end)) | (keys >= cached_keys)
        scores = gl.minimum(scores, gl.where(seen, float("inf"), float("-inf"))[None, :])
    return scores


@gluon.jit
def weights_of(
    scores, key, is_masked, row_max, row_sum, positions, row_starts, row_ends, slopes, context_len, cached_keys,
    hole_start, hole_end, scale, softcap,
    KEYS: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Weights of a tile, the new state of its rows, and the factor of what was summed up so far."""
    scores = _adjust(
        scores, key, positions, slopes, context_len, cached_keys, scale, softcap, KEYS, SOFTCAP, ALIBI, LAYOUT
    )
    if is_masked:
        scores = _mask(
            scores, key, row_starts, row_ends, context_len, cached_keys, hole_start, hole_end, KEYS, WINDOW, LAYOUT
        )
    if SOFTCAP or ALIBI:
        scale = 1.0  # the scores carry it already
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    # A row that has seen nothing has -inf, and -inf - -inf is NaN: subtract 0 instead, and exp2(-inf) is 0.
    base = gl.where(new_max == float("-inf"), 0.0, new_max * scale)
    decay = gl.exp2(row_max * scale - base)
    weights = gl.exp2(scores * scale - base[:, None])
    return weights, new_max, row_sum * decay + gl.sum(weights, 1), decay


@gluon.jit
def seen_by(
    item, kv_head, window, end_new, alibi_slopes,
    FIRST: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, PIECE: gl.constexpr, NEW_TOKENS: gl.constexpr,
    WINDOW: gl.constexpr, ALIBI: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """What a consumer's rows see of an item.

    Returns:
        the item's context length, cached keys, start and end of its hole; of each row its position, first key, end of
        its keys, and ALiBi slope.
    """
    context_len = gl.load(item + CONTEXT_LEN)
    hole_start = gl.load(item + HOLE_START)
    hole_end = gl.load(item + HOLE_END)
    first_row = gl.load(item + FIRST_ROW)
    cached_keys = (context_len + PIECE - 1) // PIECE * PIECE

    rows = first_row + FIRST + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    positions = context_len + rows // GROUP
    row_ends = gl.full([ROWS], 0, gl.int32, gl.SliceLayout(1, LAYOUT)) + context_len
    if NEW_TOKENS:
        limits = limit(
            positions, gl.load(item + BLOCK_SIZE), gl.load(item + PREFIX_LEN), gl.load(item + PADDED_PREFIX_LEN)
        )
        limits = gl.minimum(limits, context_len + gl.load(item + NUM_VALID))
        row_ends = gl.where(limits > context_len, limits + cached_keys - context_len, row_ends)
    # An end of 0 marks an item of which nobody sees anything.
    row_ends = gl.where(end_new > 0, row_ends, 0)
    row_starts = positions - window + 1
    if WINDOW:
        row_starts = gl.where(row_starts < context_len, row_starts, row_starts + cached_keys - context_len)
    slopes = gl.load(alibi_slopes + kv_head * GROUP + rows % GROUP) if ALIBI else 0.0
    return context_len, cached_keys, hole_start, hole_end, positions, row_starts, row_ends, slopes


@gluon.jit
def _places(
    q_row, first_row, kv_head, num_tokens,
    FIRST: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Rows of q and of the output, `token * HEADS + head`, of a group's rows, and which are of the first tokens."""
    rows = first_row + FIRST + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    places = (q_row + rows // GROUP).to(gl.int64) * HEADS + kv_head * GROUP + rows % GROUP
    return places, rows < num_tokens * GROUP


@gluon.jit
def copy_queries(
    tile, q, items, index, exists,
    FIRST: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Starts to copy a group's queries of an item, if it exists; zeros for tokens that do not count."""
    item = item_at(items, index, KV_HEADS)
    q_row = gl.load(item + Q_ROW, mask=exists, other=0)
    first_row = gl.load(item + FIRST_ROW, mask=exists, other=0)
    num_valid = gl.load(item + NUM_VALID, mask=exists, other=0)
    places, seen = _places(q_row, first_row, index % KV_HEADS, num_valid, FIRST, ROWS, GROUP, KV_HEADS * GROUP, LAYOUT)
    columns = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
    async_copy.async_copy_global_to_shared(tile, q + ((places * DIM)[:, None] + columns[None, :]), mask=seen[:, None])
    async_copy.commit_group()


@gluon.jit
def await_queries():
    """Waits until the copies of all threads of the group have come, and shows them to the tensor cores."""
    async_copy.wait_group(0)
    fence_async_shared()
    sync()


@gluon.jit
def _store_rows(
    output, tile, result, q_row, first_row, kv_head, num_new,
    FIRST: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM_V: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Stores a group's output through shared memory, so that each row is written in one piece."""
    tile = tile._reinterpret(tile.dtype, [ROWS, DIM_V], gl.NVMMASharedLayout(128, 16, 2))
    tile.store(result.to(tile.dtype))
    sync()
    places, exists = _places(q_row, first_row, kv_head, num_new, FIRST, ROWS, GROUP, HEADS, LAYOUT)
    columns = gl.arange(0, DIM_V, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(output + ((places * DIM_V)[:, None] + columns[None, :]), tile.load(LAYOUT), mask=exists[:, None])


@gluon.jit
def _store_partial(partial_output, result, places, exists, DIM_V: gl.constexpr, LAYOUT: gl.constexpr):
    """Stores a group's partial output, float32."""
    columns = gl.arange(0, DIM_V, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(partial_output + ((places * DIM_V)[:, None] + columns[None, :]), result, mask=exists[:, None])


@gluon.jit
def store_results(
    output, lse, partial_output, partial_lse, tile, accumulator, row_max, row_sum, item, kv_head, sinks, exponent,
    FIRST: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DIM_V: gl.constexpr,
    SINKS: gl.constexpr, LSE: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, IO_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Stores what came of a consumer's rows of an item, through the tile that had their queries."""
    HEADS: gl.constexpr = KV_HEADS * GROUP
    # Read late: during the loops registers are short.
    q_row = gl.load(item + Q_ROW).to(gl.int64)
    num_new = gl.load(item + NUM_NEW)
    num_valid = gl.load(item + NUM_VALID)
    first_row = gl.load(item + FIRST_ROW)
    partial_row = gl.load(item + PARTIAL_ROW)
    is_split = gl.load(item + NUM_CHUNKS) > 1
    rows = first_row + FIRST + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    heads = kv_head * GROUP + rows % GROUP
    # Those past the request's valid tokens see nothing.
    is_live = rows < num_valid * GROUP
    factor, row_lse = finish_rows(row_max, row_sum, is_live, is_split, exponent, sinks, heads, True, SINKS)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, O_LAYOUT))[:, None]
    # A row that saw nothing may share a tile with NaN, and 0 * NaN is NaN.
    result = gl.where(factor != 0.0, accumulator * factor, 0.0)
    is_new = rows < num_new * GROUP
    places = (rows // GROUP * HEADS + heads).to(gl.int64)
    if partial_output is None:
        if LSE:
            gl.store(lse + q_row * HEADS + places, row_lse * _LN2, mask=is_new)
        _store_rows(
            output, tile, result, q_row, first_row, kv_head, num_new, FIRST, ROWS, GROUP, HEADS, DIM_V, IO_LAYOUT
        )
    elif is_split:
        places += partial_row.to(gl.int64) * HEADS
        gl.store(partial_lse + places, row_lse, mask=is_new)
        _store_partial(
            partial_output, result, gl.convert_layout(places, gl.SliceLayout(1, O_LAYOUT)),
            gl.convert_layout(is_new, gl.SliceLayout(1, O_LAYOUT)), DIM_V, O_LAYOUT,
        )  # fmt: skip
    else:
        if LSE:
            gl.store(lse + q_row * HEADS + places, row_lse * _LN2, mask=is_new)
        _store_rows(
            output, tile, result, q_row, first_row, kv_head, num_new, FIRST, ROWS, GROUP, HEADS, DIM_V, IO_LAYOUT
        )

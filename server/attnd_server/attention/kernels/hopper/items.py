"""What an item is to Hopper's kernels, and what their roles share.

Keys of a request are counted in one row: first the cached ones, rounded up to whole pieces, then the new ones. A tile
is KEYS of these, a piece the PIECE keys that one copy brings.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from attnd_server.attention.kernels.division import SHIFT
from attnd_server.attention.kernels.items import (
    BLOCK_SIZE,
    CONTEXT_LEN,
    END_KEY,
    FIRST_KEY,
    FIRST_ROW,
    FIRST_TOKEN,
    HOLE_END,
    HOLE_START,
    ITEM_FIELDS,
    LAST_TOKEN,
    NUM_ITEMS,
    NUM_VALID,
    PADDED_PREFIX_LEN,
    PREFIX_LEN,
)
from attnd_server.attention.kernels.launch_shapes import MAX_STAGES

# Columns of a copy: 128 bytes, the widest swizzle.
COLUMNS = 64

_ITEM_FIELDS = gl.constexpr(ITEM_FIELDS)
_SHIFT = gl.constexpr(SHIFT)
_MAX_STAGES = gl.constexpr(MAX_STAGES)
_FIRST_BARRIER = gl.constexpr(16 - 2 * MAX_STAGES)
# Synchronises the warps of a role; renamed between triton 3.6 and 3.7.
sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def divide(numbers, inverse):
    """See `division.divide`."""
    return (numbers.to(gl.int64) * inverse >> _SHIFT).to(gl.int32)


@gluon.jit
def limit(position, block_size, prefix_len, padded_prefix_len):
    """First position that a token does not see among the new ones; see `masks.new_token_limits`."""
    if block_size == 1:  # causal: no division
        block_end = position + 1
    else:
        block_end = (position // block_size + 1) * block_size
    block_end = gl.where(position < padded_prefix_len, padded_prefix_len, block_end)
    return gl.where(position < prefix_len, prefix_len, block_end)


@gluon.jit
def prefetch(pointer):
    """Brings what is read next close. The address need not exist."""
    gl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [pointer], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def release(stage, IS_V: gl.constexpr, CONSUMERS: gl.constexpr):
    """Says that this warp has read a stage of the ring of K or V.

    By a named barrier, on which only the producer waits. An mbarrier is for one thread to arrive at, when all warps of
    its group are known to be done, so that they would wait for each other, twice a tile.
    """
    gl.inline_asm_elementwise(
        "bar.arrive $1, $2; mov.u32 $0, 0;", "=r,r,r", [_barrier(stage, IS_V), _threads(CONSUMERS)], gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def await_release(stage, IS_V: gl.constexpr, CONSUMERS: gl.constexpr):
    """Waits, in the producer's warp, until all consumers have released a stage: once more than it was filled."""
    gl.inline_asm_elementwise(
        "bar.sync $1, $2; mov.u32 $0, 0;", "=r,r,r", [_barrier(stage, IS_V), _threads(CONSUMERS)], gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def release_all(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Releases all stages of both rings, which are free at the start."""
    for stage in gl.static_range(STAGES):
        release(stage, False, CONSUMERS)
        release(stage, True, CONSUMERS)


@gluon.jit
def _barrier(stage, IS_V: gl.constexpr):
    """Named barrier of a stage. The compiler takes the first few for the groups of warps."""
    return gl.to_tensor(stage + _FIRST_BARRIER + (_MAX_STAGES if IS_V else 0))


@gluon.jit
def _threads(CONSUMERS: gl.constexpr):
    """Threads that meet at a stage's barrier: groups of four warps, and the producer's warp."""
    return gl.to_tensor(CONSUMERS * 128 + 32)


@gluon.jit
def item_at(items, index, KV_HEADS: gl.constexpr):
    """Where the item of the program's work `index` lies."""
    return items + index // KV_HEADS * _ITEM_FIELDS


@gluon.jit
def num_work(items, KV_HEADS: gl.constexpr):
    """Items times KV heads of the launch. Read beside the program's own first item, so that nobody waits for it."""
    return gl.load(item_at(items, gl.program_id(0), KV_HEADS) + NUM_ITEMS) * KV_HEADS


@gluon.jit
def work(
    item, window, new_mask,
    KEYS: gl.constexpr, PIECE: gl.constexpr, WINDOW: gl.constexpr, NEW_TOKENS: gl.constexpr,
    ROWS: gl.constexpr = 0, GROUP: gl.constexpr = 0,
):  # fmt: skip
    """What an item is: every role asks, and must get the same answer. `item` is a pointer to it.

    Returns:
        tiles: how many, how many of them are seen whole, the first, the first seen whole, the end of these; keys that
        may be read: first position, end of new ones.

    WINDOW: whether there may be a window; without one it is greater than any position. NEW_TOKENS: whether new tokens
    may be keys; `new_mask` says whether they are: -1, or 0. ROWS and GROUP: of an item, and query heads of a KV head,
    where the kernel is compiled for them; if not, the item says which tokens it is of.
    """
    first_tile = gl.load(item + FIRST_KEY) // KEYS
    end_tile = gl.load(item + END_KEY) // KEYS
    num_valid = gl.load(item + NUM_VALID)
    context_len = gl.load(item + CONTEXT_LEN)
    block_size = gl.load(item + BLOCK_SIZE)
    prefix_len = gl.load(item + PREFIX_LEN)
    padded_prefix_len = gl.load(item + PADDED_PREFIX_LEN)
    has_hole = gl.load(item + HOLE_END) > gl.load(item + HOLE_START)

    if GROUP:
        first_row = gl.load(item + FIRST_ROW)
        first_token = first_row // GROUP
        last_token = (first_row + ROWS - 1) // GROUP
    else:
        first_token = gl.load(item + FIRST_TOKEN)
        last_token = gl.load(item + LAST_TOKEN)
    last_token = gl.minimum(last_token, num_valid - 1)
    cached_keys = (context_len + PIECE - 1) // PIECE * PIECE
    shift = cached_keys - context_len
    first_position = 0
    full_start = 0
    if WINDOW:
        first_position = gl.maximum(context_len + first_token - window + 1, 0)
        full_start = gl.maximum(context_len + last_token - window + 1, 0)
    end_new = context_len
    full_end = context_len
    if NEW_TOKENS:
        # No branch for steps that see none, behind which loads would wait for those before it, and no choice either,
        # which would take all of this from the units for scalars, and its numbers into registers that are short.
        end_position = context_len + (num_valid & new_mask)
        last_limit = limit(context_len + last_token, block_size, prefix_len, padded_prefix_len)
        end_new = gl.minimum(end_position, last_limit)
        if shift == 0:
            first_limit = limit(context_len + first_token, block_size, prefix_len, padded_prefix_len)
            full_end = gl.minimum(end_position, first_limit)
    if has_hole:
        full_end = 0
    first_key = gl.where(first_position < context_len, first_position, first_position + shift)
    full_start = gl.where(full_start < context_len, full_start, full_start + shift)
    end_key = gl.where(end_new > context_len, end_new + shift, context_len)

    first_tile = gl.maximum(first_tile, first_key // KEYS)
    end_tile = gl.minimum(end_tile, (end_key + KEYS - 1) // KEYS)
    if (end_tile <= first_tile) | (first_token > last_token):
        # One tile that nobody sees: the roles need not know of the case.
        end_tile = first_tile + 1
        full_end = 0
        end_new = 0
    full_tile = gl.minimum((full_start + KEYS - 1) // KEYS, end_tile)
    full_tile = gl.maximum(full_tile, first_tile)
    full_end_tile = gl.maximum(gl.minimum(full_end // KEYS, end_tile), full_tile)
    num_tiles = end_tile - first_tile
    num_full = full_end_tile - full_tile
    return num_tiles, num_full, first_tile, full_tile, full_end_tile, first_position, end_new


@gluon.jit
def tile_at(order, first_tile, full_tile, full_end_tile):
    """The tile that comes at `order`: those that are seen whole, then those before them, then those after them."""
    after = order - (full_end_tile - full_tile)
    before = full_tile - first_tile
    edge = gl.where(after < before, first_tile + after, full_end_tile + after - before)
    return gl.where(after < 0, full_tile + order, edge)


@gluon.jit
def tile_of(ring, stage, KEYS: gl.constexpr, DIM: gl.constexpr):
    """A stage of the ring as `[KEYS, DIM]`: its pieces lie one below the other, in stripes of 64 columns."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    STAGES: gl.constexpr = ring.numel // (KEYS * DIM)
    return ring._reinterpret(ring.dtype, [STAGES, KEYS, DIM], LAYOUT).index(stage)


@gluon.jit
def finish_rows(row_max, row_sum, is_live, is_split, exponent, sinks, heads, has_sinks, SINKS: gl.constexpr):
    """The factor of each row's sum of products and its lse, in units of log2.

    For a row that saw nothing these are 0 and its sink, or -inf without one. Sinks join where a request's parts are
    merged, if it has several. See `finish` in `softmax.py`.

    SINKS: whether there may be sinks; `has_sinks` says whether there are.
    """
    row_sum = gl.where(is_live, row_sum, 0.0)
    saw = row_sum != 0.0  # true for NaN as well: who sends NaN gets NaN
    row_max = gl.where(row_max == float("-inf"), 0.0, row_max * exponent)
    factor = gl.where(saw, 1.0, 0.0)
    counts = saw
    if SINKS:
        # Without them no bit changes: factors are 1, and what is added is 0. A branch would take registers from all.
        joins = has_sinks & (is_split == 0)
        sink = gl.load(sinks + heads, mask=is_live & joins, other=float("-inf"))
        has_sink = sink != float("-inf")
        counts = saw | has_sink
        base = gl.where(saw, gl.maximum(row_max, sink), gl.where(has_sink, sink, 0.0))
        factor = gl.where(saw, gl.exp2(row_max - base), 0.0)
        row_sum = row_sum * factor + gl.exp2(sink - base)
        row_max = base
    denominator = gl.where(counts, row_sum, 1.0)
    return factor / denominator, gl.where(counts, row_max + gl.log2(denominator), float("-inf"))

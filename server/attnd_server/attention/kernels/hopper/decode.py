"""Decode on Hopper's own units: attention of a few rows over a paged context, at the speed of the memory.

As `attention.py`, with the products turned round: keys and the dims of V are the long side of each product, the
few rows the short one, of which the tensor cores take as little as 16 ("swap AB"). So a tile of keys costs four warps
less time than its bytes cost the memory, which two more warps keep busy across items.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma
from triton.language import int64

from attnd_server.attention.kernels.given import NARROW, RUN_TIME_NUMBERS, SLOPES
from attnd_server.attention.kernels.hopper.items import (
    COLUMNS,
    divide,
    item_at,
    limit,
    num_work,
    prefetch,
    release,
    release_all,
    sync,
    tile_at,
    tile_of,
    work,
)
from attnd_server.attention.kernels.hopper.producer import make_ring, producer
from attnd_server.attention.kernels.hopper.rows import mask_scores, rebase, store_item
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

_COLUMNS = gl.constexpr(COLUMNS)


@gluon.jit
def _consumer(
    k_ring, v_ring, q_tile, weights_tile, k_ready, v_ready,
    output, lse, partial_output, partial_lse, q, items, alibi_slopes, sinks,
    group, group_inverse, scale, softcap, window, new_mask, given,
    ROWS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, DIM_V: gl.constexpr, KEYS: gl.constexpr,
    PIECE: gl.constexpr, STAGES: gl.constexpr, OPTIONS: gl.constexpr,
):  # fmt: skip
    """Four warps: all rows of each item. Scores and weights are `[KEYS, ROWS]`, the sum of products `[DIM_V, ROWS]`."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    COLUMN: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    num_heads = KV_HEADS * group
    release_all(STAGES, 1)
    end = num_work(items, KV_HEADS)
    count = 0
    for index in range(gl.program_id(0), end, gl.num_programs(0)):
        kv_head = index % KV_HEADS
        item = item_at(items, index, KV_HEADS)
        num_tiles, num_full, first_tile, full_tile, full_end_tile, _, end_new = work(
            item, window, new_mask, KEYS, PIECE, OPTIONS, True
        )
        prefetch(item_at(items, gl.minimum(index + gl.num_programs(0), end - 1), KV_HEADS))
        q_row = gl.load(item + Q_ROW).to(gl.int64)
        num_new = gl.load(item + NUM_NEW)
        num_valid = gl.load(item + NUM_VALID)
        context_len = gl.load(item + CONTEXT_LEN)
        hole_start = gl.load(item + HOLE_START)
        hole_end = gl.load(item + HOLE_END)
        first_row = gl.load(item + FIRST_ROW)
        partial_row = gl.load(item + PARTIAL_ROW)
        is_split = gl.load(item + NUM_CHUNKS) > 1
        cached_keys = (context_len + PIECE - 1) // PIECE * PIECE

        q_rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, Q_LAYOUT))
        q_tokens = divide(q_rows, group_inverse)
        places = (q_row + q_tokens) * num_heads + kv_head * group + (q_rows - q_tokens * group)
        dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, Q_LAYOUT))
        pointers = q + ((places * DIM)[:, None] + dims[None, :])
        q_tile.store(gl.load(pointers, mask=(q_rows < num_valid * group)[:, None], other=0.0))
        fence_async_shared()

        rows = first_row + gl.arange(0, ROWS, layout=ROW)
        tokens = divide(rows, group_inverse)
        heads = kv_head * group + (rows - tokens * group)
        positions = context_len + tokens
        limits = limit(
            positions, gl.load(item + BLOCK_SIZE), gl.load(item + PREFIX_LEN), gl.load(item + PADDED_PREFIX_LEN)
        )
        limits = gl.minimum(limits, end_new)
        slopes = 0.0
        if OPTIONS:
            slopes = gl.load(alibi_slopes + heads, mask=(heads >= 0) & ((given & SLOPES) != 0), other=0.0)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        zeros = gl.full([KEYS, ROWS], 0.0, gl.float32, LAYOUT)
        sums = gl.full([KEYS, ROWS], 0.0, gl.float32, LAYOUT)
        accumulator = gl.full([DIM_V, ROWS], 0.0, gl.float32, LAYOUT)
        for order in range(num_tiles):
            stage = count % STAGES
            phase = count // STAGES & 1
            key = tile_at(order, first_tile, full_tile, full_end_tile) * KEYS
            mbarrier.wait(k_ready.index(stage), phase)
            scores = warpgroup_mma(tile_of(k_ring, stage, KEYS, DIM), q_tile.permute([1, 0]), zeros, use_acc=False)
            release(stage, False, 1)
            keys = key + gl.arange(0, KEYS, layout=COLUMN)
            scores = mask_scores(
                scores * scale, keys, order >= num_full, positions, limits, slopes, context_len, cached_keys,
                hole_start, hole_end, end_new, softcap, window, True, OPTIONS,
            )  # fmt: skip
            row_max, base, decay = rebase(row_max, gl.max(scores, 0))
            weights = gl.exp2(scores - base[None, :])
            sums = sums * decay[None, :] + weights
            weights_tile.store(weights.to(q.dtype.element_ty))
            fence_async_shared()
            sync()
            mbarrier.wait(v_ready.index(stage), phase)
            v_tile = tile_of(v_ring, stage, KEYS, DIM_V).permute([1, 0])
            accumulator = warpgroup_mma(v_tile, weights_tile, accumulator * decay[None, :])
            release(stage, True, 1)
            count += 1

        store_item(
            output, lse, partial_output, partial_lse, (accumulator,), 1.0, row_max, gl.sum(sums, 0), rows, heads, sinks,
            q_row, num_new, num_valid, partial_row, is_split, group, num_heads, group_inverse, given, DIM_V,
            LAYOUT,
        )  # fmt: skip


@gluon.jit(do_not_specialize=RUN_TIME_NUMBERS, do_not_specialize_on_alignment=NARROW)
def hopper_decode_kernel(
    output, lse, partial_output, partial_lse, q, k, v, k_pages, v_pages,
    k_descriptor, v_descriptor, k_pages_descriptor, v_pages_descriptor,
    page_tables, items, alibi_slopes, sinks,
    group, group_inverse: int64, scale, softcap, window, new_mask, given,
    ROWS: gl.constexpr, KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr, DIM: gl.constexpr, DIM_V: gl.constexpr,
    KEYS: gl.constexpr, PIECE: gl.constexpr, STAGES: gl.constexpr, OPTIONS: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as there are multiprocessors, or fewer. ROWS: of an item, a power of two from 16."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = q.dtype.element_ty
    WEIGHTS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], dtype)
    k_ring, k_ready = make_ring(dtype, STAGES, KEYS, PIECE, DIM)
    v_ring, v_ready = make_ring(dtype, STAGES, KEYS, PIECE, DIM_V)
    q_tile = gl.allocate_shared_memory(dtype, [ROWS, DIM], LAYOUT)
    weights_tile = gl.allocate_shared_memory(dtype, [KEYS, ROWS], WEIGHTS_LAYOUT)
    fence_async_shared()
    # The last numbers: warps and registers of the roles after the first.
    gl.warp_specialize(
        [
            (_consumer, (
                k_ring, v_ring, q_tile, weights_tile, k_ready, v_ready,
                output, lse, partial_output, partial_lse, q, items, alibi_slopes, sinks,
                group, group_inverse, scale, softcap, window, new_mask, given,
                ROWS, KV_HEADS, DIM, DIM_V, KEYS, PIECE, STAGES, OPTIONS,
            )),
            (producer, (
                k_ring, k_ready, k, k_pages, k_descriptor, k_pages_descriptor, page_tables, items,
                window, new_mask,
                KV_HEADS, PAGE_SIZE, DIM, KEYS, PIECE, STAGES, OPTIONS, True, 0, 0, False, 1,
            )),
            (producer, (
                v_ring, v_ready, v, v_pages, v_descriptor, v_pages_descriptor, page_tables, items,
                window, new_mask,
                KV_HEADS, PAGE_SIZE, DIM_V, KEYS, PIECE, STAGES, OPTIONS, True, 0, 0, True, 1,
            )),
        ],
        [1, 1],
        [56, 56],
    )  # fmt: skip

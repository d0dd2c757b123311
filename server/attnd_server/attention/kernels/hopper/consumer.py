"""The warps of Hopper's kernel for many rows that multiply: each group of four takes 64 rows of an item.

See `attention.py`. While the tensor cores work on one tile's products, the group's other units take the softmax
of the next.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from attnd_server.attention.kernels.hopper.items import (
    item_at,
    num_work,
    prefetch,
    release,
    release_all,
    sync,
    tile_at,
    tile_of,
    work,
)
from attnd_server.attention.kernels.hopper.many_rows import (
    await_queries,
    copy_queries,
    seen_by,
    store_results,
    weights_of,
)

# Groups of four warps that multiply: 64 rows are the least that the tensor cores take.
CONSUMERS = 2
_CONSUMERS = gl.constexpr(CONSUMERS)


@gluon.jit
def consumer(
    k_ring, v_ring, q_tiles, k_ready, v_ready, gate,
    output, lse, partial_output, partial_lse, q,
    items, alibi_slopes, sinks, scale, softcap, window,
    FIRST: gl.constexpr, ROWS: gl.constexpr, ITEM_ROWS: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr,
    DIM: gl.constexpr, DIM_V: gl.constexpr, KEYS: gl.constexpr, PIECE: gl.constexpr, STAGES: gl.constexpr,
    NEW_TOKENS: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, SINKS: gl.constexpr,
    LSE: gl.constexpr,
):  # fmt: skip
    """Four warps: 64 rows of each item, the first half or the second."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM_V, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    IO_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    # With options the scores carry their scale already.
    exponent = 1.0 if SOFTCAP or ALIBI else scale
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    Q_TILES: gl.constexpr = q_tiles.shape[0] // _CONSUMERS
    first = gl.program_id(0)
    tile = q_tiles.index(FIRST // ROWS)._reinterpret(q.dtype.element_ty, [ROWS, DIM], Q_LAYOUT)
    copy_queries(tile, q, items, first, True, FIRST, ROWS, GROUP, KV_HEADS, DIM, IO_LAYOUT)
    release_all(STAGES, _CONSUMERS)
    end = num_work(items, KV_HEADS)
    count = 0
    turn = 0  # which of the group's tiles has the item's queries
    await_queries()
    for index in range(first, end, gl.num_programs(0)):
        prefetch(item_at(items, gl.minimum(index + gl.num_programs(0), end - 1), KV_HEADS))
        item = item_at(items, index, KV_HEADS)
        num_tiles, num_full, first_tile, full_tile, full_end_tile, _, end_new = work(
            item, window, -1, KEYS, PIECE, WINDOW, NEW_TOKENS, ITEM_ROWS, GROUP
        )
        kv_head = index % KV_HEADS
        context_len, cached_keys, hole_start, hole_end, positions, row_starts, row_ends, slopes = seen_by(
            item, kv_head, window, end_new, alibi_slopes,
            FIRST, ROWS, GROUP, PIECE, NEW_TOKENS, WINDOW, ALIBI, S_LAYOUT,
        )  # fmt: skip
        row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        row_sum = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        zeros = gl.full([ROWS, KEYS], 0.0, gl.float32, S_LAYOUT)
        accumulator = gl.full([ROWS, DIM_V], 0.0, gl.float32, O_LAYOUT)

        # The first tile's weights; then each turn multiplies the last tile's weights while it makes the next one's.
        stage = count % STAGES
        mbarrier.wait(k_ready.index(stage), count // STAGES & 1)
        io_tile = q_tiles.index(turn * _CONSUMERS + FIRST // ROWS)
        q_tile = io_tile._reinterpret(q.dtype.element_ty, [ROWS, DIM], Q_LAYOUT)
        k_tile = tile_of(k_ring, stage, KEYS, DIM).permute([1, 0])
        scores = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
        following = index + gl.num_programs(0)
        turn = (turn + 1) % Q_TILES
        next_tile = q_tiles.index(turn * _CONSUMERS + FIRST // ROWS)
        next_tile = next_tile._reinterpret(q.dtype.element_ty, [ROWS, DIM], Q_LAYOUT)
        if Q_TILES > 1:  # the next item's queries, on their way while this one is served
            copy_queries(next_tile, q, items, following, following < end, FIRST, ROWS, GROUP, KV_HEADS, DIM, IO_LAYOUT)
        scores = warpgroup_mma_wait(0, [scores])
        release(stage, False, _CONSUMERS)
        weights, row_max, row_sum, _ = weights_of(
            scores, tile_at(0, first_tile, full_tile, full_end_tile) * KEYS, num_full < 1, row_max, row_sum, positions,
            row_starts, row_ends, slopes, context_len, cached_keys, hole_start, hole_end, scale, softcap,
            KEYS, WINDOW, SOFTCAP, ALIBI, S_LAYOUT,
        )  # fmt: skip
        weights = gl.convert_layout(weights.to(q.dtype.element_ty), P_LAYOUT)
        for order in range(1, num_tiles):
            next_stage = (count + 1) % STAGES
            mbarrier.wait(k_ready.index(next_stage), (count + 1) // STAGES & 1)
            k_tile = tile_of(k_ring, next_stage, KEYS, DIM).permute([1, 0])
            scores = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
            stage = count % STAGES
            mbarrier.wait(v_ready.index(stage), count // STAGES & 1)
            accumulator = warpgroup_mma(weights, tile_of(v_ring, stage, KEYS, DIM_V), accumulator, is_async=True)
            scores = warpgroup_mma_wait(1, [scores])
            release(next_stage, False, _CONSUMERS)
            next_weights, row_max, row_sum, decay = weights_of(
                scores, tile_at(order, first_tile, full_tile, full_end_tile) * KEYS, order >= num_full, row_max,
                row_sum, positions, row_starts, row_ends, slopes, context_len, cached_keys, hole_start, hole_end,
                scale, softcap, KEYS, WINDOW, SOFTCAP, ALIBI, S_LAYOUT,
            )  # fmt: skip
            next_weights = gl.convert_layout(next_weights.to(q.dtype.element_ty), P_LAYOUT)
            # Waits for nothing: its branch keeps the assembler from moving the softmax behind the next wait, where it
            # would not run beside the multiplication.
            mbarrier.wait(gate, 1)
            accumulator, weights = warpgroup_mma_wait(0, [accumulator, weights])
            release(stage, True, _CONSUMERS)
            accumulator = accumulator * gl.convert_layout(decay, gl.SliceLayout(1, O_LAYOUT))[:, None]
            weights = next_weights
            count += 1
        stage = count % STAGES
        mbarrier.wait(v_ready.index(stage), count // STAGES & 1)
        accumulator = warpgroup_mma(weights, tile_of(v_ring, stage, KEYS, DIM_V), accumulator, is_async=True)
        accumulator, weights = warpgroup_mma_wait(0, [accumulator, weights])
        release(stage, True, _CONSUMERS)
        count += 1

        store_results(
            output, lse, partial_output, partial_lse, io_tile, accumulator, row_max, row_sum, item, kv_head, sinks,
            exponent, FIRST, ROWS, GROUP, KV_HEADS, DIM_V, SINKS, LSE, S_LAYOUT, O_LAYOUT, IO_LAYOUT,
        )  # fmt: skip
        if Q_TILES == 1:
            sync()  # the output has left the tile
            copy_queries(next_tile, q, items, following, following < end, FIRST, ROWS, GROUP, KV_HEADS, DIM, IO_LAYOUT)
        await_queries()

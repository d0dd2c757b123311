"""One group of eight warps that takes all rows of an item, one product after the other; see `attention.py`.

It gives the bits of `consumer.py`, where two groups do so at once and each takes softmaxes beside products. That is a
fifth faster, and takes twice as long to compile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from attnd_server.attention.kernels.hopper.consumer import CONSUMERS
from attnd_server.attention.kernels.hopper.items import (
    item_at,
    num_work,
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

# Stages are released warp by warp, and these are as many warps.
_CONSUMERS = gl.constexpr(CONSUMERS)


@gluon.jit
def lone_consumer(
    k_ring, v_ring, q_tiles, k_ready, v_ready,
    output, lse, partial_output, partial_lse, q,
    items, alibi_slopes, sinks, scale, softcap, window,
    ROWS: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, DIM_V: gl.constexpr,
    KEYS: gl.constexpr, PIECE: gl.constexpr, STAGES: gl.constexpr, NEW_TOKENS: gl.constexpr, WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, SINKS: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """Eight warps: all rows of each item."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, DIM_V, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    IO_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    exponent = 1.0 if SOFTCAP or ALIBI else scale
    io_tile = q_tiles.index(0)
    q_tile = io_tile._reinterpret(q.dtype.element_ty, [ROWS, DIM], gl.NVMMASharedLayout(128, 16, 2))
    release_all(STAGES, _CONSUMERS)
    end = num_work(items, KV_HEADS)
    count = 0
    for index in range(gl.program_id(0), end, gl.num_programs(0)):
        copy_queries(q_tile, q, items, index, True, 0, ROWS, GROUP, KV_HEADS, DIM, IO_LAYOUT)
        item = item_at(items, index, KV_HEADS)
        num_tiles, num_full, first_tile, full_tile, full_end_tile, _, end_new = work(
            item, window, -1, KEYS, PIECE, WINDOW, NEW_TOKENS, ROWS, GROUP
        )
        kv_head = index % KV_HEADS
        context_len, cached_keys, hole_start, hole_end, positions, row_starts, row_ends, slopes = seen_by(
            item, kv_head, window, end_new, alibi_slopes,
            0, ROWS, GROUP, PIECE, NEW_TOKENS, WINDOW, ALIBI, S_LAYOUT,
        )  # fmt: skip
        row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        row_sum = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        zeros = gl.full([ROWS, KEYS], 0.0, gl.float32, S_LAYOUT)
        accumulator = gl.full([ROWS, DIM_V], 0.0, gl.float32, O_LAYOUT)
        await_queries()
        for order in range(num_tiles):
            stage = count % STAGES
            mbarrier.wait(k_ready.index(stage), count // STAGES & 1)
            k_tile = tile_of(k_ring, stage, KEYS, DIM).permute([1, 0])
            scores = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, [scores])
            release(stage, False, _CONSUMERS)
            weights, row_max, row_sum, decay = weights_of(
                scores, tile_at(order, first_tile, full_tile, full_end_tile) * KEYS, order >= num_full, row_max,
                row_sum, positions, row_starts, row_ends, slopes, context_len, cached_keys, hole_start, hole_end,
                scale, softcap, KEYS, WINDOW, SOFTCAP, ALIBI, S_LAYOUT,
            )  # fmt: skip
            weights = gl.convert_layout(weights.to(q.dtype.element_ty), P_LAYOUT)
            accumulator = accumulator * gl.convert_layout(decay, gl.SliceLayout(1, O_LAYOUT))[:, None]
            mbarrier.wait(v_ready.index(stage), count // STAGES & 1)
            accumulator = warpgroup_mma(weights, tile_of(v_ring, stage, KEYS, DIM_V), accumulator, is_async=True)
            accumulator, weights = warpgroup_mma_wait(0, [accumulator, weights])
            release(stage, True, _CONSUMERS)
            count += 1
        store_results(
            output, lse, partial_output, partial_lse, io_tile, accumulator, row_max, row_sum, item, kv_head, sinks,
            exponent, 0, ROWS, GROUP, KV_HEADS, DIM_V, SINKS, LSE, S_LAYOUT, O_LAYOUT, IO_LAYOUT,
        )  # fmt: skip
        sync()  # the output has left the tile

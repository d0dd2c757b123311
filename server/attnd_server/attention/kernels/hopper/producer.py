"""The warps of Hopper's kernels that bring K and V from pages and new tokens, piece by piece; see `items.py`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from attnd_server.attention.kernels.hopper.items import (
    COLUMNS,
    await_release,
    item_at,
    num_work,
    prefetch,
    sync,
    tile_at,
    work,
)
from attnd_server.attention.kernels.items import CONTEXT_LEN, FIRST_KEY, HOLE_END, HOLE_START, Q_ROW, TABLE

_COLUMNS = gl.constexpr(COLUMNS)


@gluon.jit
def make_ring(
    dtype: gl.constexpr, STAGES: gl.constexpr, KEYS: gl.constexpr, PIECE: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    """Room in shared memory for tiles of K or V, in pieces, and when each stage is ready."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PIECES: gl.constexpr = KEYS // PIECE
    ring = gl.allocate_shared_memory(dtype, [STAGES * (DIM // _COLUMNS) * PIECES, PIECE, _COLUMNS], LAYOUT)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=PIECES)
    return ring, ready


@gluon.jit
def _copy_piece(ring, slot, ready, descriptor, row, kv_head, DIM: gl.constexpr, PIECES: gl.constexpr):
    """Starts the copies of a piece, from `row` on, to the ring's piece `slot`."""
    for column in gl.static_range(DIM // _COLUMNS):
        target = ring.index(slot + column * PIECES)
        tma.async_copy_global_to_shared(descriptor, [row, kv_head * DIM + column * _COLUMNS], ready, target)


@gluon.jit
def _expect_tile(ready, descriptor, DIM: gl.constexpr, PIECES: gl.constexpr):
    """Arrives at `ready` for all pieces of a tile, which the copy engine will bring."""
    mbarrier.expect(ready, descriptor.block_type.nbytes * (DIM // _COLUMNS) * PIECES)
    mbarrier.arrive(ready, count=PIECES - 1)


@gluon.jit
def _bring_piece(
    ring, slot, ready, source, descriptor, row, kv_head, low, high, hole_low, hole_high,
    KV_HEADS: gl.constexpr, DIM: gl.constexpr, PIECE: gl.constexpr, PIECES: gl.constexpr, IS_V: gl.constexpr,
):  # fmt: skip
    """Brings a piece of which the rows `[low, high)` but for those of a hole may be seen.

    Hidden K does no harm: its scores are replaced. Hidden V would, if it were NaN: its weights are 0, and 0 * NaN is
    NaN. So a piece of V with some hidden rows is read by hand, with zeros for these.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    has_hole = (hole_low < high) & (hole_high > low) & (hole_high > hole_low)
    is_whole = (low == 0) & (high == PIECE) & (has_hole == 0)
    is_empty = (low >= high) | (has_hole & (hole_low <= low) & (hole_high >= high))
    if (is_whole | is_empty) if IS_V else True:
        # Rows before the first are zeros to the copy engine.
        mbarrier.expect(ready, descriptor.block_type.nbytes * (DIM // _COLUMNS))
        _copy_piece(ring, slot, ready, descriptor, gl.where(is_empty, -PIECE, row), kv_head, DIM, PIECES)
    else:
        rows = gl.arange(0, PIECE, layout=gl.SliceLayout(1, LAYOUT))
        columns = gl.arange(0, _COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
        # int64: pages may hold more than 2^31 elements.
        offsets = ((row.to(gl.int64) + rows) * KV_HEADS + kv_head) * DIM
        seen = (rows >= low) & (rows < high) & ((rows < hole_low) | (rows >= hole_high))
        for column in gl.static_range(DIM // _COLUMNS):
            pointers = source + (offsets[:, None] + (column * _COLUMNS + columns)[None, :])
            ring.index(slot + column * PIECES).store(gl.load(pointers, mask=seen[:, None], other=0.0))
        fence_async_shared()
        sync()
        mbarrier.arrive(ready, count=1)


@gluon.jit
def _bring_tile(
    ring, stage, ready, tokens, pages, descriptor, pages_descriptor, table, key, kv_head, q_row,
    context_len, cached_keys, first_position, end_new, hole_start, hole_end, is_full,
    KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr, DIM: gl.constexpr, KEYS: gl.constexpr,
    PIECE: gl.constexpr, NEW_TOKENS: gl.constexpr, IS_V: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Brings K or V of the tile that begins at `key`."""
    PIECES: gl.constexpr = KEYS // PIECE
    first_slot = stage * (DIM // _COLUMNS * PIECES)
    if is_full & (key + KEYS <= cached_keys):
        # The loads of all page ids at once and before the wait, so that nobody waits for them.
        rows = ()
        for piece in gl.static_range(PIECES):
            start = key + piece * PIECE
            row = gl.load(table + start // PAGE_SIZE) * PAGE_SIZE + start % PAGE_SIZE
            rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005 - kernels know no unpacking
        # Up to PREFETCHED past the last table; a bound to keep would cost registers that these warps do not have.
        prefetch(table + (key + 2 * KEYS) // PAGE_SIZE)
        await_release(stage, IS_V, CONSUMERS)
        _expect_tile(ready, pages_descriptor, DIM, PIECES)
        for piece in gl.static_range(PIECES):
            _copy_piece(ring, first_slot + piece, ready, pages_descriptor, rows[piece], kv_head, DIM, PIECES)
    elif NEW_TOKENS and is_full & (key >= cached_keys):
        row = q_row + key - cached_keys
        await_release(stage, IS_V, CONSUMERS)
        _expect_tile(ready, descriptor, DIM, PIECES)
        for piece in gl.static_range(PIECES):
            _copy_piece(ring, first_slot + piece, ready, descriptor, row + piece * PIECE, kv_head, DIM, PIECES)
    else:
        await_release(stage, IS_V, CONSUMERS)
        for piece in range(PIECES):
            start = key + piece * PIECE
            if start < cached_keys:
                # The last piece of a tile may lie past the context, and has no page then.
                page = gl.load(table + start // PAGE_SIZE, mask=start < context_len, other=-1)
                low = gl.maximum(first_position - start, 0)
                high = gl.where(page >= 0, gl.minimum(context_len - start, PIECE), 0)
                row = page * PAGE_SIZE + start % PAGE_SIZE
                _bring_piece(
                    ring, first_slot + piece, ready, pages, pages_descriptor, row, kv_head,
                    low, high, hole_start - start, hole_end - start, KV_HEADS, DIM, PIECE, PIECES, IS_V,
                )  # fmt: skip
            else:
                token = start - cached_keys
                low = gl.maximum(first_position - context_len - token, 0)
                high = gl.minimum(end_new - context_len - token, PIECE)
                if NEW_TOKENS:
                    _bring_piece(
                        ring, first_slot + piece, ready, tokens, descriptor, q_row + token, kv_head,
                        low, high, 0, 0, KV_HEADS, DIM, PIECE, PIECES, IS_V,
                    )  # fmt: skip
                else:
                    mbarrier.expect(ready, descriptor.block_type.nbytes * (DIM // _COLUMNS))
                    _copy_piece(ring, first_slot + piece, ready, pages_descriptor, -PIECE, kv_head, DIM, PIECES)


@gluon.jit
def producer(
    ring, ready, tokens, pages, descriptor, pages_descriptor, page_tables, items,
    window, new_mask,
    KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr, DIM: gl.constexpr, KEYS: gl.constexpr,
    PIECE: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr, NEW_TOKENS: gl.constexpr, ROWS: gl.constexpr,
    GROUP: gl.constexpr, IS_V: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """One warp: brings K or V of each tile of each item, in the order in which the consumers take them.

    NEW_TOKENS: those of `tokens` may be keys too, if `new_mask` says so. ROWS and GROUP: see `work`.
    """
    end = num_work(items, KV_HEADS)
    count = 0
    for index in range(gl.program_id(0), end, gl.num_programs(0)):
        prefetch(item_at(items, gl.minimum(index + 2 * gl.num_programs(0), end - 1), KV_HEADS))
        kv_head = index % KV_HEADS
        item = item_at(items, index, KV_HEADS)
        num_tiles, num_full, first_tile, full_tile, full_end_tile, first_position, end_new = work(
            item, window, new_mask, KEYS, PIECE, WINDOW, NEW_TOKENS, ROWS, GROUP
        )
        q_row = gl.load(item + Q_ROW)
        context_len = gl.load(item + CONTEXT_LEN)
        hole_start = gl.load(item + HOLE_START)
        hole_end = gl.load(item + HOLE_END)
        cached_keys = (context_len + PIECE - 1) // PIECE * PIECE
        table = page_tables + gl.load(item + TABLE)
        for order in range(num_tiles):
            stage = count % STAGES
            key = tile_at(order, first_tile, full_tile, full_end_tile) * KEYS
            _bring_tile(
                ring, stage, ready.index(stage), tokens, pages,
                descriptor, pages_descriptor, table, key, kv_head, q_row, context_len, cached_keys,
                first_position, end_new, hole_start, hole_end, order < num_full,
                KV_HEADS, PAGE_SIZE, DIM, KEYS, PIECE, NEW_TOKENS, IS_V, CONSUMERS,
            )  # fmt: skip
            count += 1
            if order == 0:
                # The next item's first page ids, now that this one's first copies are under way.
                next_item = item_at(items, gl.minimum(index + gl.num_programs(0), end - 1), KV_HEADS)
                next_table = page_tables + gl.load(next_item + TABLE)
                prefetch(next_table + gl.load(next_item + FIRST_KEY) // PAGE_SIZE)

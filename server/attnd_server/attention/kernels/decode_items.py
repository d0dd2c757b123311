"""Lays out the items of a decode step for Hopper's kernels on the device, as `hopper_schedule` does on the host.

The host says a few numbers of each request, and a launch of fixed size makes the rest of them, in buffers that never
change. So the launches of a step can be captured in a CUDA graph, and the host hardly works.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnd_server.attention.kernels.cuts import (
    EVERYTHING,
    KEYS_PER_NEW_TOKEN,
    MAX_LEAST_CHUNK,
    MIN_OWN_TILES,
    MOST_WAVES,
    OWN_PARTS,
    PART_COST,
)
from attnd_server.attention.kernels.items import (
    BLOCK_SIZE,
    CONTEXT_LEN,
    END_KEY,
    FIRST_CHUNK,
    FIRST_KEY,
    FIRST_ROW,
    FIRST_TOKEN,
    HAS_ABSENT_PAGES,
    HOLE_END,
    HOLE_START,
    ITEM_FIELDS,
    LAST_TOKEN,
    MERGE_FIELDS,
    NUM_CHUNKS,
    NUM_ITEMS,
    NUM_NEW,
    NUM_VALID,
    PADDED_PREFIX_LEN,
    PARTIAL_ROW,
    PREFIX_LEN,
    Q_ROW,
    TABLE,
)
from attnd_server.attention.kernels.launch_shapes import HOPPER_KEYS
from attnd_server.attention.kv_split import CHUNKED_LENGTHS, CHUNKS, KVSplitConfig
from attnd_server.device.kernels.launch import launch_kernel

# A step for the device, int32: how many requests, pages of a row of the page tables, nothing; then REQUEST_COLUMNS of
# the requests, each as long as the requests are many. A block size of 0 is bidirectional.
STEP_HEADER = 4
# Most requests of a step: a program looks at all of them.
MAX_REQUESTS = 1024

_EVERYTHING = tl.constexpr(EVERYTHING)
_PART_COST = tl.constexpr(PART_COST)
_MOST_WAVES = tl.constexpr(MOST_WAVES)
_OWN_PARTS = tl.constexpr(OWN_PARTS)
_MIN_OWN_TILES = tl.constexpr(MIN_OWN_TILES)
_HEADER = tl.constexpr(STEP_HEADER)
_KEYS = tl.constexpr(HOPPER_KEYS)
_ITEM_FIELDS = tl.constexpr(ITEM_FIELDS)
_MERGE_FIELDS = tl.constexpr(MERGE_FIELDS)
_MOST_COST = tl.constexpr(1 << 62)
# Items that a program writes at once; ways of cutting and requests that it compares at once.
_ITEMS = tl.constexpr(32)
_CANDIDATES = tl.constexpr(64)
_COMPARED = tl.constexpr(64)
# Items that one program marks at once, where there are fewer than are looked at.
_LOOKED_AT = tl.constexpr(256)
# Requests that a program looks at: the least of these that is enough. The kernel is compiled for each.
SLOTS = (16, 128, MAX_REQUESTS)


@triton.jit
def _power_of_two(values):
    """The least power of two that is not less than each value, up to 2^30; see `kv_split.power_of_two`."""
    values = tl.maximum(values - 1, 0)
    values |= values >> 1
    values |= values >> 2
    values |= values >> 4
    values |= values >> 8
    values |= values >> 16
    return values + 1


@triton.jit
def _first_keys(context_lens, window):
    """First cached position that a window leaves to each request; 0 is no window."""
    first = tl.minimum(tl.maximum(context_lens - window + 1, 0), context_lens)
    return tl.where(window > 0, first, 0)


@triton.jit
def _key_tiles(context_lens, window):
    """Tiles of the cached keys of each request that a window leaves to it, at least one."""
    return tl.maximum(tl.cdiv(context_lens, _KEYS) - _first_keys(context_lens, window) // _KEYS, 1)


@triton.jit
def _own_tiles(
    context_lens, key_tiles, chunk_size, least_chunk, max_splits, window, is_chunked,
    LENGTHS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Tiles of a part of each request by its own length; see `part_tiles_of` and `KVSplitConfig.chunk_keys`."""
    num_keys = context_lens - _first_keys(context_lens, window)
    chunks = tl.full(num_keys.shape, CHUNKS[0], tl.int32)
    for index in tl.static_range(len(LENGTHS)):
        chunks = tl.where(num_keys > LENGTHS[index], CHUNKS[index + 1], chunks)
    chunks = tl.where(chunk_size > 0, chunk_size, chunks)
    chunks = tl.maximum(chunks, _power_of_two(tl.cdiv(num_keys, max_splits)))
    own = tl.where(
        is_chunked != 0,
        tl.maximum(tl.maximum(chunks, least_chunk) // _KEYS, 1),
        tl.maximum(tl.cdiv(key_tiles, _OWN_PARTS), _MIN_OWN_TILES),
    )
    return tl.maximum(own, tl.cdiv(key_tiles, max_splits))


@triton.jit
def _even_tiles(context_lens, num_reqs, longest, num_tiles, num_groups, num_multiprocessors, max_splits, window):
    """Tiles of every part, so that the last program ends soon; see `hopper_parts._even_parts`."""
    most_parts = tl.minimum(max_splits, longest)
    # int64: what no part costs more than does not fit 32 bits.
    best, best_cost = longest.to(tl.int64), longest.to(tl.int64) * 0 + _MOST_COST
    most_programs = num_reqs.to(tl.int64) * num_tiles * num_groups + _MOST_WAVES * num_multiprocessors
    # Parts become shorter from one candidate to the next. Of the cheapest the shortest is taken: the last.
    for first in tl.range(1, most_parts + 1, _CANDIDATES):
        splits = first + tl.arange(0, _CANDIDATES)
        tiles = tl.cdiv(longest, splits)
        num_parts = tl.zeros([_CANDIDATES], tl.int64)
        for start in tl.range(0, num_reqs, _COMPARED):
            requests = start + tl.arange(0, _COMPARED)
            exists = requests < num_reqs
            key_tiles = _key_tiles(tl.load(context_lens + requests, mask=exists, other=0), window)
            parts = tl.where(exists[None, :], tl.cdiv(key_tiles[None, :], tiles[:, None]), 0)
            num_parts += tl.sum(parts, 1)
        programs = num_parts * num_tiles * num_groups
        waves = tl.cdiv(programs, num_multiprocessors)
        cost = waves * (tiles + tl.where(tiles < longest, _PART_COST, 0))
        cost = tl.where((splits <= most_parts) & (programs <= most_programs), cost, _MOST_COST)
        least = tl.min(cost, 0)
        cheapest = tl.min(tl.where(cost == least, tiles, longest), 0)
        is_better = least <= best_cost
        best = tl.where(is_better, cheapest.to(tl.int64), best)
        best_cost = tl.where(is_better, least, best_cost)
    return best.to(tl.int32)


@triton.jit
def _write_items(
    items,
    num_items,
    step,
    slot,
    num_reqs,
    first_tile,
    part_tiles,
    num_parts,
    partial_row,
    query_len,
    num_tiles,
    rows,
    group,
):
    """Writes the items of a request, the parts of a tile of rows one after the other, from `items` on."""
    columns = step + _HEADER + slot
    table = slot * tl.load(step + 1)
    num_valid = tl.load(columns)
    context_len = tl.load(columns + num_reqs)
    block_size = tl.load(columns + 2 * num_reqs)
    block_size = tl.where(block_size == 0, _EVERYTHING, block_size)
    prefix_len = tl.load(columns + 3 * num_reqs)
    padded_prefix_len = tl.load(columns + 4 * num_reqs)
    hole_start = tl.load(columns + 5 * num_reqs)
    hole_end = tl.load(columns + 6 * num_reqs)
    for start in tl.range(0, num_tiles * num_parts, _ITEMS):
        index = start + tl.arange(0, _ITEMS)
        exists = index < num_tiles * num_parts
        tile, part = index // num_parts, index % num_parts
        end_key = tl.where(part == num_parts - 1, _EVERYTHING, (first_tile + (part + 1) * part_tiles) * _KEYS)
        item = items + index * _ITEM_FIELDS
        tl.store(item + TABLE, table, mask=exists)
        tl.store(item + Q_ROW, slot * query_len, mask=exists)
        tl.store(item + NUM_NEW, query_len, mask=exists)
        tl.store(item + NUM_VALID, num_valid, mask=exists)
        tl.store(item + CONTEXT_LEN, context_len, mask=exists)
        tl.store(item + BLOCK_SIZE, block_size, mask=exists)
        tl.store(item + PREFIX_LEN, prefix_len, mask=exists)
        tl.store(item + PADDED_PREFIX_LEN, padded_prefix_len, mask=exists)
        tl.store(item + HOLE_START, hole_start, mask=exists)
        tl.store(item + HOLE_END, hole_end, mask=exists)
        tl.store(item + HAS_ABSENT_PAGES, 0, mask=exists)
        tl.store(item + FIRST_ROW, tile * rows, mask=exists)
        tl.store(item + FIRST_KEY, (first_tile + part * part_tiles) * _KEYS, mask=exists)
        tl.store(item + END_KEY, end_key, mask=exists)
        tl.store(item + FIRST_TOKEN, tile * rows // group, mask=exists)
        tl.store(item + FIRST_CHUNK, part, mask=exists)
        tl.store(item + NUM_CHUNKS, num_parts, mask=exists)
        tl.store(item + PARTIAL_ROW, partial_row + part * query_len, mask=exists)
        tl.store(item + LAST_TOKEN, ((tile + 1) * rows - 1) // group, mask=exists)
        tl.store(item + NUM_ITEMS, num_items, mask=exists)


@triton.jit
def _at(values, slots, slot):
    """The number of one request."""
    return tl.sum(tl.where(slots == slot, values, 0), 0)


@triton.jit(
    do_not_specialize=[
        "query_len", "num_tiles", "rows", "group", "num_groups", "num_multiprocessors", "num_looked_at", "chunk_size",
        "least_chunk", "max_splits", "window", "is_chunked",
    ],
    do_not_specialize_on_alignment=["items", "merges", "step"],
)  # fmt: skip
def _decode_items_kernel(
    items, merges, step,
    query_len, num_tiles, rows, group, num_groups, num_multiprocessors, num_looked_at,
    chunk_size, least_chunk, max_splits, window, is_chunked,
    SLOTS: tl.constexpr, EVEN: tl.constexpr, LENGTHS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Grid: a program for each request that a step may have. It cuts all requests, and writes what is of its own."""
    slot = tl.program_id(0)
    num_reqs = tl.load(step)
    slots = tl.arange(0, SLOTS)
    exists = slots < num_reqs
    all_lens = step + _HEADER + num_reqs
    context_lens = tl.load(all_lens + slots, mask=exists, other=0)
    key_tiles = _key_tiles(context_lens, window)
    if EVEN:
        longest = tl.max(tl.where(exists, key_tiles, 1), 0)
        part_tiles = tl.zeros([SLOTS], tl.int32) + _even_tiles(
            all_lens, num_reqs, longest, num_tiles, num_groups, num_multiprocessors, max_splits, window
        )
    else:
        part_tiles = _own_tiles(
            context_lens, key_tiles, chunk_size, least_chunk, max_splits, window, is_chunked, LENGTHS, CHUNKS
        )
    num_parts = tl.where(exists, tl.cdiv(key_tiles, part_tiles), 0)
    num_items = tl.sum(num_parts, 0) * num_tiles
    if slot == 0:
        # Programs of the attention kernel look at the first rows even if there are fewer items.
        for start in tl.range(0, num_looked_at, _LOOKED_AT):
            others = start + tl.arange(0, _LOOKED_AT)
            unused = (others >= num_items) & (others < num_looked_at)
            tl.store(items + others * _ITEM_FIELDS + NUM_ITEMS, num_items, mask=unused)

    # Long ones first, so that the last to end are short.
    length = tl.minimum(part_tiles, key_tiles)
    my_length, my_parts = _at(length, slots, slot), _at(num_parts, slots, slot)
    before = (length > my_length) | ((length == my_length) & (slots < slot))
    first_item = tl.sum(tl.where(before, num_parts, 0), 0) * num_tiles
    partial_row = tl.sum(tl.where(before & (num_parts > 1), num_parts, 0), 0) * query_len
    if slot < num_reqs:
        first_tile = _first_keys(tl.load(all_lens + slot), window) // _KEYS
        _write_items(
            items + first_item * _ITEM_FIELDS, num_items, step, slot, num_reqs, first_tile,
            _at(part_tiles, slots, slot), my_parts, partial_row, query_len, num_tiles, rows, group,
        )  # fmt: skip
    # No new tokens: nothing to merge.
    tl.store(merges + slot * _MERGE_FIELDS, slot * query_len)
    tl.store(merges + slot * _MERGE_FIELDS + 1, tl.where(my_parts > 1, query_len, 0))
    tl.store(merges + slot * _MERGE_FIELDS + 2, partial_row)
    tl.store(merges + slot * _MERGE_FIELDS + 3, my_parts)
    tl.store(merges + slot * _MERGE_FIELDS + 4, tl.load(step + _HEADER + slot, mask=slot < num_reqs, other=0))


def decode_items(
    items: torch.Tensor,
    merges: torch.Tensor,
    step: torch.Tensor,
    *,
    query_len: int,
    group: int,
    num_groups: int,
    rows: int,
    num_multiprocessors: int,
    num_looked_at: int,
    kv_split: KVSplitConfig,
    is_chunked: bool,
    is_even: bool,
    window: int,
) -> None:
    """Lays out a step; all tensors lie on one device.

    Args:
        items: int32 `[capacity, ITEM_FIELDS]`, written from the first on; see `items.py`.
        merges: int32 `[slots, MERGE_FIELDS]`, a row for each request that a step may have, up to MAX_REQUESTS. One
            that is not there, or not cut, has no new tokens in it.
        step: int32, STEP_HEADER numbers and REQUEST_COLUMNS.
        query_len: new tokens of each request.
        group: query heads that share a program.
        num_groups: programs for the heads of one tile of rows.
        rows: of a program.
        num_multiprocessors: of the GPU.
        num_looked_at: first rows of `items` that get NUM_ITEMS in any case.
        kv_split: of the cache.
        is_chunked: a request's own length cuts it as `kv_split` says, and else into a few parts.
        is_even: all requests are cut alike, for the chip to be full.
        window: 0 is off.
    """
    num_slots = len(merges)
    least_chunk = query_len * (1 if kv_split.chunk_size else KEYS_PER_NEW_TOKEN)
    slots = next(slots for slots in SLOTS if slots >= num_slots)
    with torch.cuda.device_of(items):
        launch_kernel(
            _decode_items_kernel,
            (num_slots,),
            items,
            merges,
            step,
            query_len,
            triton.cdiv(query_len * group, rows),
            rows,
            group,
            num_groups,
            num_multiprocessors,
            num_looked_at,
            kv_split.chunk_size,
            triton.next_power_of_2(min(least_chunk, MAX_LEAST_CHUNK)),
            kv_split.max_splits,
            min(window, EVERYTHING),
            int(is_chunked),
            SLOTS=slots,
            EVEN=is_even,
            LENGTHS=CHUNKED_LENGTHS,
            CHUNKS=CHUNKS,
            num_warps=8 if slots > 256 or is_even else 4,
        )

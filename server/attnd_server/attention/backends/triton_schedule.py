"""What the Triton kernels do in a step, laid out on the host as work lists.

How the keys of a request are cut into chunks depends on the request alone, so that its bits do not depend on the batch;
how many chunks one program takes depends on the batch, so that the chip is full. Vectorised with numpy; what decode
steps in a row share is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from attnd_server.attention.config import KVSplitConfig, power_of_two
from attnd_server.attention.kernels import items as columns
from attnd_server.attention.kernels.cuts import (
    EVERYTHING,
    KEYS_PER_NEW_TOKEN,
    MAX_LEAST_CHUNK,
    MIN_OWN_TILES,
    MOST_WAVES,
    OWN_PARTS,
    PART_COST,
)
from attnd_server.attention.kernels.items import ITEM_FIELDS
from attnd_server.attention.kernels.launch_shapes import HOPPER_KEYS, HOPPER_ROWS, MAX_SPLIT_TOKENS
from attnd_server.attention.metadata import AttentionMetadata

Ints = npt.NDArray[np.int32]

# Programs of a decode launch for each multiprocessor, if there is that much to do: enough for the last ones to be
# short, few enough for their start not to count.
_PROGRAMS_PER_MULTIPROCESSOR = 8


@dataclass(frozen=True, eq=False)
class Rows:
    """How new tokens become rows of a launch.

    Attributes:
        group: query heads that share a program.
        num_groups: programs for the heads of one tile of rows.
        rows: of a program.
        keys: that a program takes at once.
        num_multiprocessors: of the device.
    """

    group: int
    num_groups: int
    rows: int
    keys: int
    num_multiprocessors: int


@dataclass(frozen=True, eq=False)
class Work:
    """The items of one launch.

    Attributes:
        items: int32 `[num_items, ITEM_FIELDS]`.
        num_partial_rows: rows of partial results; 0 if every request has one chunk.
        num_counters: counters of unfinished chunks, for each group of heads.
        merges: int32 `[num_merges, 4]`: what `merge` takes, if partial results are merged by a launch of their own.
    """

    items: Ints
    num_partial_rows: int
    num_counters: int
    merges: Ints


def request_table(metadata: AttentionMetadata, page_tables: npt.NDArray[np.integer[Any]], page_size: int) -> Ints:
    """The columns of an item that belong to its request: int32 `[num_reqs, ITEM_FIELDS]`."""
    table = np.zeros((metadata.num_reqs, ITEM_FIELDS), dtype=np.int32)
    starts = metadata.cu_seqlens_q.numpy()
    table[:, columns.TABLE.value] = np.arange(metadata.num_reqs) * page_tables.shape[1]
    table[:, columns.Q_ROW.value] = starts[:-1]
    table[:, columns.NUM_NEW.value] = starts[1:] - starts[:-1]
    # In the order of the columns of an item, so that one assignment fills them all.
    table[:, columns.NUM_VALID.value : columns.HAS_ABSENT_PAGES.value] = metadata.columns.T
    block_sizes = table[:, columns.BLOCK_SIZE.value]
    block_sizes[block_sizes == 0] = EVERYTHING
    if page_tables.size and page_tables.min() < 0:
        num_pages = -(-table[:, columns.CONTEXT_LEN.value, None] // page_size)
        absent = (page_tables < 0) & (np.arange(page_tables.shape[1]) < num_pages)
        table[:, columns.HAS_ABSENT_PAGES.value] = absent.any(axis=1)
    return table


def split_schedule(table: Ints, kv_split: KVSplitConfig, window: int, rows: Rows) -> Work:
    """Items whose programs count the chunks that they finish: decode, and everything on other GPUs than Hopper."""
    context_lens = table[:, columns.CONTEXT_LEN.value]
    first_keys = _first_keys(context_lens, window)
    # Whose new tokens all do not count sees nothing.
    num_keys = np.where(table[:, columns.NUM_VALID.value] > 0, context_lens - first_keys, 0)
    # No chunk is shorter than a tile, and long prefills, which fill a chip anyway, have but one.
    num_new = table[:, columns.NUM_NEW.value]
    chunk_keys = np.maximum(_chunk_keys(num_keys, num_new, kv_split), rows.keys)
    chunk_keys = np.where(num_new > MAX_SPLIT_TOKENS, EVERYTHING, chunk_keys)
    num_chunks = np.maximum(1, -(-num_keys // chunk_keys))
    num_tiles = -(-table[:, columns.NUM_NEW.value] * rows.group // rows.rows)
    most_keys = (
        int((num_keys.astype(np.int64) * num_tiles).sum())
        * rows.num_groups
        // (rows.num_multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR)
    )
    num_parts = -(-num_chunks // np.maximum(1, most_keys // chunk_keys))
    chunks_per_part = -(-num_chunks // num_parts)
    num_parts = -(-num_chunks // chunks_per_part)
    request, tile, part = _spread(num_tiles, num_parts)
    items = table[request]
    chunk = part * chunks_per_part[request]
    first_key = first_keys[request] + chunk * chunk_keys[request]
    # int64: with EVERYTHING for a chunk the sum does not fit int32.
    end_key = first_key + (chunks_per_part * chunk_keys)[request].astype(np.int64)
    end_key = np.minimum(end_key, context_lens[request])
    partial_rows, num_partial_rows = _partial_rows(table[:, columns.NUM_NEW.value], num_chunks)
    counters = np.cumsum(num_tiles) - num_tiles
    items[:, columns.FIRST_ROW.value] = tile * rows.rows
    items[:, columns.FIRST_KEY.value] = first_key
    items[:, columns.END_KEY.value] = np.where(num_keys[request] > 0, end_key, first_key)
    items[:, columns.CHUNK_KEYS.value] = chunk_keys[request]
    items[:, columns.FIRST_CHUNK.value] = chunk
    items[:, columns.NUM_CHUNKS.value] = num_chunks[request]
    items[:, columns.PARTIAL_ROW.value] = partial_rows[request]
    items[:, columns.COUNTER.value] = counters[request] + tile
    items[:, columns.NUM_ITEMS.value] = len(items)
    length = end_key - first_key
    if len(length) and length.min() != length.max():
        items = items[np.argsort(-length, kind="stable")]
    return Work(items, num_partial_rows, int(num_tiles.sum()) if num_partial_rows else 0, np.zeros((0, 4), np.int32))


def hopper_schedule(table: Ints, kv_split: KVSplitConfig, window: int, rows: Rows) -> Work:
    """Items of Hopper's kernels, whose keys are tiles of the cached and the new ones; merged by a launch of its own."""
    num_new = table[:, columns.NUM_NEW.value]
    context_lens = table[:, columns.CONTEXT_LEN.value]
    num_tiles = -(-num_new * rows.group // rows.rows)
    # Tiles are counted from the start of the context, which a window may hide. New tokens go with the last part.
    first_keys = _first_keys(context_lens, window)
    first_tile = first_keys // HOPPER_KEYS
    key_tiles = _key_tiles(context_lens, first_keys)
    if num_new.max() > MAX_SPLIT_TOKENS:
        part_tiles = np.where(num_new > MAX_SPLIT_TOKENS, key_tiles, 0)
        few = part_tiles == 0
        if few.any():
            part_tiles[few] = _part_tiles(
                key_tiles[few], (context_lens - first_keys)[few], num_new[few], num_tiles[few], kv_split, rows
            )
        order = context_lens
    else:
        part_tiles = _part_tiles(key_tiles, context_lens - first_keys, num_new, num_tiles, kv_split, rows)
        order = np.zeros_like(context_lens)  # of little use, and would make each step another one
    num_parts = -(-key_tiles // part_tiles)
    numbers = np.array([first_tile, part_tiles, num_parts, num_tiles, num_new, order], dtype=np.int32)
    layout = _lay_out(numbers.tobytes(), rows.rows, rows.group, rows.num_multiprocessors / rows.num_groups)
    items = table.take(layout.request, axis=0)
    items[:, columns.FIRST_ROW.value :] = layout.columns
    merges = layout.merges.copy()
    merges[:, 0] = table[layout.merge_request, columns.Q_ROW.value]
    return Work(items, layout.num_partial_rows, 0, merges)


@dataclass(frozen=True, eq=False)
class _Layout:
    """The items of a step but for the columns of their requests, which change with every step.

    Attributes:
        request: of each item.
        columns: int32, of each item from FIRST_ROW on.
        num_partial_rows: rows of partial results.
        merge_request: of each merge.
        merges: int32 `[num_merges, 4]`, without the first column.
    """

    request: Any
    columns: Ints
    num_partial_rows: int
    merge_request: Any
    merges: Ints


@lru_cache(maxsize=64)
def _lay_out(numbers: bytes, rows: int, group: int, items_at_once: float) -> _Layout:
    """Lays out the parts of each request. Kept: decode steps in a row differ only in what `table` holds.

    Args:
        numbers: int32 `[6, num_reqs]`: first tile of keys, tiles of a part, parts, tiles of rows, new tokens, context.
        rows: of a program.
        group: query heads that share a program.
        items_at_once: that the programs of a GPU take.
    """
    first_tile, part_tiles, num_parts, num_tiles, num_new, context = np.frombuffer(numbers, np.int32).reshape(6, -1)
    request, tile, part = _spread(num_tiles, num_parts)
    partial_rows, num_partial_rows = _partial_rows(num_new, num_parts)
    result = np.zeros((len(request), ITEM_FIELDS), dtype=np.int32)
    result[:, columns.FIRST_ROW.value] = tile * rows
    result[:, columns.FIRST_KEY.value] = (first_tile[request] + part * part_tiles[request]) * HOPPER_KEYS
    end_key = (first_tile[request] + (part + 1) * part_tiles[request]) * HOPPER_KEYS
    result[:, columns.END_KEY.value] = np.where(part == num_parts[request] - 1, EVERYTHING, end_key)
    result[:, columns.FIRST_CHUNK.value] = part
    result[:, columns.NUM_CHUNKS.value] = num_parts[request]
    result[:, columns.PARTIAL_ROW.value] = partial_rows[request] + part * num_new[request]
    result[:, columns.NUM_ITEMS.value] = len(request)
    # Long ones first, so that the last to end are short.
    last_token = np.minimum((tile + 1) * rows // group, num_new[request])
    length = np.where(num_parts[request] > 1, part_tiles[request] * HOPPER_KEYS, context[request] + last_token)
    order = _to_and_fro(np.argsort(-length, kind="stable"), items_at_once)
    merged = np.flatnonzero(num_parts > 1)
    merges = np.stack([merged * 0, num_new[merged], partial_rows[merged], num_parts[merged]], axis=1).astype(np.int32)
    return _Layout(request[order], result[order, columns.FIRST_ROW.value :], num_partial_rows, merged, merges)


def _to_and_fro(order: npt.NDArray[np.signedinteger], at_once: float) -> Any:
    """Turns every second round round: programs take an item of each, and none shall get the longest of all."""
    position = np.arange(len(order))
    turn = position // at_once
    first = np.ceil(turn * at_once)
    end = np.minimum(np.ceil((turn + 1) * at_once), len(order))
    return order[np.where(turn % 2 == 1, first + end - 1 - position, position).astype(np.int64)]


def _first_keys(context_lens: Ints, window: int) -> Ints:
    """First cached position that a window leaves to each request."""
    if not window:
        return np.zeros_like(context_lens)
    return np.minimum(np.maximum(context_lens - window + 1, 0), context_lens)


def _key_tiles(context_lens: Ints, first_keys: Ints) -> Ints:
    """Tiles of the cached keys of each request from `first_keys` on, at least one."""
    key_tiles: Ints = np.maximum(1, -(-context_lens // HOPPER_KEYS) - first_keys // HOPPER_KEYS)
    return key_tiles


def _spread(num_tiles: Ints, num_parts: Ints) -> tuple[Any, Any, Any]:
    """Request, tile of rows and part of the keys of each item, the parts of a tile one after the other."""
    counts = num_tiles * num_parts
    request = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
    parts = num_parts[request]
    return request, index // parts, index % parts


def _partial_rows(num_new: Ints, num_chunks: Ints) -> tuple[Ints, int]:
    """First row of each request's partial results, and their number."""
    counts = np.where(num_chunks > 1, num_chunks * num_new, 0)
    return np.cumsum(counts) - counts, int(counts.sum())


def _chunk_keys(num_keys: Ints, num_new: Ints, kv_split: KVSplitConfig) -> Ints:
    """Keys of a chunk of each request, a power of two; depends on nothing else of the batch."""
    chunk_keys = kv_split.chunk_keys(num_keys)
    least = num_new * (1 if kv_split.chunk_size else KEYS_PER_NEW_TOKEN)
    if (chunk_keys < least).any():
        return np.maximum(chunk_keys, power_of_two(np.minimum(least, MAX_LEAST_CHUNK)))
    return chunk_keys


def _part_tiles(
    key_tiles: Ints, num_keys: Ints, num_new: Ints, num_tiles: Ints, kv_split: KVSplitConfig, rows: Rows
) -> Ints:
    """Tiles of keys of a part of each request: what its own length says, or what makes the longest program short."""
    if is_chunked(kv_split, rows):
        own = np.maximum(1, _chunk_keys(num_keys, num_new, kv_split) // HOPPER_KEYS)
    else:
        own = np.maximum(MIN_OWN_TILES, -(-key_tiles // OWN_PARTS))
    own = np.maximum(own, -(-key_tiles // kv_split.max_splits))
    if kv_split.chunk_size or kv_split.batch_invariant:
        return own
    by_own_length = (num_new == 1) & (kv_split.batch_invariant is None)
    if by_own_length.all():
        return own
    return np.where(by_own_length, own, _even_parts(key_tiles, num_tiles, kv_split, rows))


def _even_parts(key_tiles: Ints, num_tiles: Ints, kv_split: KVSplitConfig, rows: Rows) -> int:
    """Tiles of keys of every part, so that the last program ends soon. See MOST_WAVES."""
    longest = int(key_tiles.max())
    candidates = np.unique(-(-longest // np.arange(1, min(kv_split.max_splits, longest) + 1)))
    num_programs = (num_tiles * -(-key_tiles // candidates[:, None])).sum(axis=1) * rows.num_groups
    most_programs = num_tiles.sum() * rows.num_groups + MOST_WAVES * rows.num_multiprocessors
    waves = -(-num_programs // rows.num_multiprocessors)
    cost = waves * (candidates + PART_COST * (candidates < longest))
    return int(candidates[np.where(num_programs <= most_programs, cost, np.inf).argmin()])


def is_chunked(kv_split: KVSplitConfig, rows: Rows) -> bool:
    """Whether a request's own length cuts it for Hopper's kernels as `kv_split` says, and not just into a few parts."""
    return kv_split.chunk_size > 0 or rows.rows < HOPPER_ROWS


def is_even(kv_split: KVSplitConfig, query_len: int) -> bool:
    """Whether requests of `query_len` new tokens are cut alike for the chip to be full, by Hopper's schedule."""
    by_own_length = query_len == 1 and kv_split.batch_invariant is None
    return not (kv_split.chunk_size or kv_split.batch_invariant or by_own_length)


def most_parts(
    num_reqs: int, query_len: int, max_context_len: int, kv_split: KVSplitConfig, window: int, rows: Rows
) -> int:
    """Most parts that `hopper_schedule` makes of a step in which all requests have as many new tokens.

    Args:
        num_reqs: most requests of the step.
        query_len: new tokens of each, up to MAX_SPLIT_TOKENS.
        max_context_len: most cached tokens of a request.
        kv_split: of the cache.
        window: 0 is off.
        rows: of the launch.
    """
    # A request has most parts where its tiles are just begun; what a window leaves looks the same again a tile later.
    longest = min(max_context_len, window + 2 * HOPPER_KEYS) if window else max_context_len
    last = np.arange(max(0, longest - 2 * HOPPER_KEYS), longest + 1, dtype=np.int32)
    context_lens = np.concatenate([np.arange(1, longest + 1, HOPPER_KEYS, dtype=np.int32), last])
    first_keys = _first_keys(context_lens, window)
    key_tiles = _key_tiles(context_lens, first_keys)
    num_tiles = -(-query_len * rows.group // rows.rows)
    if is_even(kv_split, query_len):
        added = MOST_WAVES * rows.num_multiprocessors // (rows.num_groups * num_tiles)
        return min(num_reqs * min(kv_split.max_splits, int(key_tiles.max())), num_reqs + added)
    num_new, all_tiles = np.full_like(context_lens, query_len), np.full_like(context_lens, num_tiles)
    part_tiles = _part_tiles(key_tiles, context_lens - first_keys, num_new, all_tiles, kv_split, rows)
    return num_reqs * int((-(-key_tiles // part_tiles)).max())

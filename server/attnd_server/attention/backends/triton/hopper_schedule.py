"""The items of Hopper's kernels. What decode steps in a row share is kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from attnd_server.attention.backends.triton.hopper_parts import key_tiles_of, part_tiles_of
from attnd_server.attention.backends.triton.work import Ints, Rows, Work, first_keys_of, partial_rows_of, spread
from attnd_server.attention.kernels import items as columns
from attnd_server.attention.kernels.cuts import EVERYTHING
from attnd_server.attention.kernels.items import ITEM_FIELDS
from attnd_server.attention.kernels.launch_shapes import HOPPER_KEYS, MAX_SPLIT_TOKENS
from attnd_server.attention.kv_split import KVSplitConfig


def hopper_schedule(table: Ints, kv_split: KVSplitConfig, window: int, rows: Rows) -> Work:
    """Items of Hopper's kernels, whose keys are tiles of the cached and the new ones; merged by a launch of its own."""
    num_new = table[:, columns.NUM_NEW.value]
    context_lens = table[:, columns.CONTEXT_LEN.value]
    num_tiles = -(-num_new * rows.group // rows.rows)
    # Tiles are counted from the start of the context, which a window may hide. New tokens go with the last part.
    first_keys = first_keys_of(context_lens, window)
    first_tile = first_keys // HOPPER_KEYS
    key_tiles = key_tiles_of(context_lens, first_keys)
    if num_new.max() > MAX_SPLIT_TOKENS:
        part_tiles = np.where(num_new > MAX_SPLIT_TOKENS, key_tiles, 0)
        few = part_tiles == 0
        if few.any():
            part_tiles[few] = part_tiles_of(
                key_tiles[few], (context_lens - first_keys)[few], num_new[few], num_tiles[few], kv_split, rows
            )
        order = context_lens
    else:
        part_tiles = part_tiles_of(key_tiles, context_lens - first_keys, num_new, num_tiles, kv_split, rows)
        order = np.zeros_like(context_lens)  # of little use, and would make each step another one
    num_parts = -(-key_tiles // part_tiles)
    numbers = np.array([first_tile, part_tiles, num_parts, num_tiles, num_new, order], dtype=np.int32)
    layout = _lay_out(numbers.tobytes(), rows.rows, rows.group, rows.num_multiprocessors / rows.num_groups)
    items = table.take(layout.request, axis=0)
    items[:, columns.FIRST_ROW.value :] = layout.columns
    merges = layout.merges.copy()
    merges[:, 0] = table[layout.merge_request, columns.Q_ROW.value]
    merges[:, 4] = table[layout.merge_request, columns.NUM_VALID.value]
    return Work(items, layout.num_partial_rows, 0, merges)


@dataclass(frozen=True, eq=False)
class _Layout:
    """The items of a step but for the columns of their requests, which change with every step.

    Attributes:
        request: of each item.
        columns: int32, of each item from FIRST_ROW on.
        num_partial_rows: rows of partial results.
        merge_request: of each merge.
        merges: int32 `[num_merges, MERGE_FIELDS]`, without the first column and the last.
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
    request, tile, part = spread(num_tiles, num_parts)
    partial_rows, num_partial_rows = partial_rows_of(num_new, num_parts)
    result = np.zeros((len(request), ITEM_FIELDS), dtype=np.int32)
    result[:, columns.FIRST_ROW.value] = tile * rows
    result[:, columns.FIRST_KEY.value] = (first_tile[request] + part * part_tiles[request]) * HOPPER_KEYS
    end_key = (first_tile[request] + (part + 1) * part_tiles[request]) * HOPPER_KEYS
    result[:, columns.END_KEY.value] = np.where(part == num_parts[request] - 1, EVERYTHING, end_key)
    result[:, columns.FIRST_TOKEN.value] = tile * rows // group
    result[:, columns.LAST_TOKEN.value] = ((tile + 1) * rows - 1) // group
    result[:, columns.FIRST_CHUNK.value] = part
    result[:, columns.NUM_CHUNKS.value] = num_parts[request]
    result[:, columns.PARTIAL_ROW.value] = partial_rows[request] + part * num_new[request]
    result[:, columns.NUM_ITEMS.value] = len(request)
    # Long ones first, so that the last to end are short.
    last_token = np.minimum((tile + 1) * rows // group, num_new[request])
    length = np.where(num_parts[request] > 1, part_tiles[request] * HOPPER_KEYS, context[request] + last_token)
    order = _to_and_fro(np.argsort(-length, kind="stable"), items_at_once)
    merged = np.flatnonzero(num_parts > 1)
    known = num_new[merged], partial_rows[merged], num_parts[merged]
    merges = np.stack([merged * 0, *known, merged * 0], axis=1).astype(np.int32)
    return _Layout(request[order], result[order, columns.FIRST_ROW.value :], num_partial_rows, merged, merges)


def _to_and_fro(order: npt.NDArray[np.signedinteger], at_once: float) -> Any:
    """Reverses every second round: a program takes an item of each, and none shall always get the longest."""
    position = np.arange(len(order))
    turn = position // at_once
    first = np.ceil(turn * at_once)
    end = np.minimum(np.ceil((turn + 1) * at_once), len(order))
    return order[np.where(turn % 2 == 1, first + end - 1 - position, position).astype(np.int64)]

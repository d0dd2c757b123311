"""The items of kernels whose programs count the chunks that they finish: decode, and everything but on Hopper.

How many chunks one program takes depends on the batch, so that the GPU is full.
"""

from __future__ import annotations

import numpy as np

from attnd_server.attention.backends.triton.work import (
    Ints,
    Rows,
    Work,
    chunk_keys_of,
    first_keys_of,
    partial_rows_of,
    spread,
)
from attnd_server.attention.kernels import items as columns
from attnd_server.attention.kernels.cuts import EVERYTHING
from attnd_server.attention.kernels.items import MERGE_FIELDS
from attnd_server.attention.kernels.launch_shapes import MAX_SPLIT_TOKENS
from attnd_server.attention.kv_split import KVSplitConfig

# Programs of a decode launch for each multiprocessor, if there is that much to do: enough for the last ones to be
# short, few enough for their start not to count.
_PROGRAMS_PER_MULTIPROCESSOR = 8


def split_schedule(table: Ints, kv_split: KVSplitConfig, window: int, rows: Rows) -> Work:
    """Items whose programs count the chunks that they finish: decode, and everything on other GPUs than Hopper."""
    context_lens = table[:, columns.CONTEXT_LEN.value]
    first_keys = first_keys_of(context_lens, window)
    # Whose new tokens all do not count sees nothing.
    num_keys = np.where(table[:, columns.NUM_VALID.value] > 0, context_lens - first_keys, 0)
    # No chunk is shorter than a tile, and long prefills, which fill a chip anyway, have but one.
    num_new = table[:, columns.NUM_NEW.value]
    chunk_keys = np.maximum(chunk_keys_of(num_keys, num_new, kv_split), rows.keys)
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
    request, tile, part = spread(num_tiles, num_parts)
    items = table[request]
    chunk = part * chunks_per_part[request]
    first_key = first_keys[request] + chunk * chunk_keys[request]
    # int64: with EVERYTHING for a chunk the sum does not fit int32.
    end_key = first_key + (chunks_per_part * chunk_keys)[request].astype(np.int64)
    end_key = np.minimum(end_key, context_lens[request])
    partial_rows, num_partial_rows = partial_rows_of(table[:, columns.NUM_NEW.value], num_chunks)
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
    return Work(
        items, num_partial_rows, int(num_tiles.sum()) if num_partial_rows else 0, np.zeros((0, MERGE_FIELDS), np.int32)
    )

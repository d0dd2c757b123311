"""What the programs of a launch do, as a table of items, and what all schedules share.

How the keys of a request are cut into chunks depends on the request alone, so that its bits do not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from attnd_server.attention.kernels import items as columns
from attnd_server.attention.kernels.cuts import EVERYTHING, KEYS_PER_NEW_TOKEN, MAX_LEAST_CHUNK
from attnd_server.attention.kernels.items import ITEM_FIELDS
from attnd_server.attention.kv_split import KVSplitConfig, power_of_two
from attnd_server.attention.metadata import AttentionMetadata

Ints = npt.NDArray[np.int32]


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
        merges: int32 `[num_merges, MERGE_FIELDS]`: what `merge` takes, if partial results are merged by a launch of
            their own.
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


def first_keys_of(context_lens: Ints, window: int) -> Ints:
    """First cached position that a window leaves to each request."""
    if not window:
        return np.zeros_like(context_lens)
    return np.minimum(np.maximum(context_lens - window + 1, 0), context_lens)


def spread(num_tiles: Ints, num_parts: Ints) -> tuple[Any, Any, Any]:
    """Request, tile of rows and part of the keys of each item, the parts of a tile one after the other."""
    counts = num_tiles * num_parts
    request = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
    parts = num_parts[request]
    return request, index // parts, index % parts


def partial_rows_of(num_new: Ints, num_chunks: Ints) -> tuple[Ints, int]:
    """First row of each request's partial results, and their number."""
    counts = np.where(num_chunks > 1, num_chunks * num_new, 0)
    return np.cumsum(counts) - counts, int(counts.sum())


def chunk_keys_of(num_keys: Ints, num_new: Ints, kv_split: KVSplitConfig) -> Ints:
    """Keys of a chunk of each request, a power of two; depends on nothing else of the batch."""
    chunk_keys = kv_split.chunk_keys(num_keys)
    least = num_new * (1 if kv_split.chunk_size else KEYS_PER_NEW_TOKEN)
    if (chunk_keys < least).any():
        return np.maximum(chunk_keys, power_of_two(np.minimum(least, MAX_LEAST_CHUNK)))
    return chunk_keys

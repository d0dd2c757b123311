"""Into how many parts Hopper's schedule cuts the keys of a request, in tiles of HOPPER_KEYS."""

from __future__ import annotations

import numpy as np

from attnd_server.attention.backends.triton.work import Ints, Rows, chunk_keys_of, first_keys_of
from attnd_server.attention.kernels.cuts import MIN_OWN_TILES, MOST_WAVES, OWN_PARTS, PART_COST
from attnd_server.attention.kernels.launch_shapes import HOPPER_KEYS, HOPPER_ROWS
from attnd_server.attention.kv_split import KVSplitConfig


def key_tiles_of(context_lens: Ints, first_keys: Ints) -> Ints:
    """Tiles of the cached keys of each request from `first_keys` on, at least one."""
    key_tiles: Ints = np.maximum(1, -(-context_lens // HOPPER_KEYS) - first_keys // HOPPER_KEYS)
    return key_tiles


def part_tiles_of(
    key_tiles: Ints, num_keys: Ints, num_new: Ints, num_tiles: Ints, kv_split: KVSplitConfig, rows: Rows
) -> Ints:
    """Tiles of keys of a part of each request: what its own length says, or what makes the longest program short."""
    if is_chunked(kv_split, rows):
        own = np.maximum(1, chunk_keys_of(num_keys, num_new, kv_split) // HOPPER_KEYS)
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
    first_keys = first_keys_of(context_lens, window)
    key_tiles = key_tiles_of(context_lens, first_keys)
    num_tiles = -(-query_len * rows.group // rows.rows)
    if is_even(kv_split, query_len):
        added = MOST_WAVES * rows.num_multiprocessors // (rows.num_groups * num_tiles)
        return min(num_reqs * min(kv_split.max_splits, int(key_tiles.max())), num_reqs + added)
    num_new, all_tiles = np.full_like(context_lens, query_len), np.full_like(context_lens, num_tiles)
    part_tiles = part_tiles_of(key_tiles, context_lens - first_keys, num_new, all_tiles, kv_split, rows)
    return num_reqs * int((-(-key_tiles // part_tiles)).max())

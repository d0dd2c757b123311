"""Launch shapes of the attention kernel in Triton: one table.

They fit the shared memory of sm_80 to sm_100 and spill few registers there: `tests/kernels/test_compile.py` compiles
them. They are not timed: on Hopper other kernels do what matters most.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """A launch shape.

    Attributes:
        rows: (new token, query head) pairs of a program, a power of two from 16.
        keys: keys that it takes at once, a power of two from 16.
        num_warps: warps of it.
        num_stages: tiles of keys under way.
        most_tokens: new tokens of the requests that it is for: FEW_NEW_TOKENS, MAX_SPLIT_TOKENS, or None for any.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    most_tokens: int | None = None


# Requests with at most so many new tokens are decode; those with more than the other number are never cut into chunks.
FEW_NEW_TOKENS, MAX_SPLIT_TOKENS = 16, 256
# Hopper's kernels: most rows of a decode program, rows of one of the other kernel, and keys in which parts are counted.
# More rows than these leave a multiprocessor no registers for two programs, and the other kernel is faster then.
HOPPER_DECODE_ROWS, HOPPER_ROWS, HOPPER_KEYS = 32, 128, 128
# Most rows of a decode program over FP8 pages, times its head dim.
_FP8_ELEMENTS = 64 * 128
# Shared memory of a multiprocessor for tiles of K and V under way in decode, in bytes: more would fit beside queries
# and weights, and measured worse.
_RING_BYTES = 131_072
# Most stages of a ring: each takes a named barrier, of which a program has sixteen.
MAX_STAGES = 4
# By (bytes of an element, head dim padded to a power of two from 64): for decode, where reading KV is the work; for
# more tokens, whose chunks' partial results need room as well; and for tokens that are not cut. float32 has no tensor
# cores.
TILES: dict[tuple[int, int], tuple[Tile, Tile, Tile]] = {
    (1, 64): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
    (1, 128): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
    (1, 256): (Tile(32, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    (1, 512): (Tile(16, 16, 4, 1), Tile(32, 16, 8, 1), Tile(32, 32, 8, 1)),
    (2, 64): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)),
    (2, 128): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
    (2, 256): (Tile(32, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    (2, 512): (Tile(16, 16, 4, 1), Tile(32, 16, 8, 1), Tile(32, 32, 8, 1)),
    (4, 64): (Tile(16, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    (4, 128): (Tile(16, 16, 4, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (4, 256): (Tile(16, 16, 4, 1), Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
    (4, 512): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}


class HopperLaunch(NamedTuple):
    """A launch shape of Hopper's kernels.

    Attributes:
        keys: that a program takes at once.
        num_stages: tiles of keys under way.
        num_programs: of a multiprocessor.
        max_registers: of a thread at the start; None: as many as one program can have.
    """

    keys: int
    num_stages: int
    num_programs: int
    max_registers: int | None


def hopper_launch(rows: int, head_dim: int, head_dim_v: int) -> HopperLaunch:
    """The launch shape for items of so many rows.

    Two decode programs share a multiprocessor: while one begins or ends an item, the other multiplies.
    """
    if rows == HOPPER_ROWS:
        return HopperLaunch(64 if max(head_dim, head_dim_v) > 128 else 128, 2, 1, None)
    tile_bytes = 2 * 64 * (head_dim + head_dim_v)
    return HopperLaunch(64, min(MAX_STAGES, _RING_BYTES // 2 // tile_bytes), 2, 128)


def fits_hopper_fp8(rows: int, head_dim: int) -> bool:
    """Whether Hopper's kernel for FP8 has registers for items of so many rows."""
    return rows * head_dim <= _FP8_ELEMENTS


def hopper_fp8_launch(rows: int, head_dim: int) -> HopperLaunch:
    """The launch shape for items of so many rows over pages of FP8, with `fits_hopper_fp8`.

    Where their registers allow it, two programs share a multiprocessor: one's conversions and softmax take longer than
    the memory takes for the bytes.
    """
    keys = 128 if (rows, head_dim) == (16, 128) else 64
    num_programs, max_registers = (2, 128) if rows * head_dim <= 32 * 128 else (1, None)
    num_stages = min(MAX_STAGES, _RING_BYTES // num_programs // (2 * keys * head_dim))
    return HopperLaunch(keys, num_stages, num_programs, max_registers)


def launch_shape(num_new: int, heads: int, dims: int, item_size: int) -> Tile:
    """The launch shape of a request; that of a few tokens with no more rows than it has.

    Args:
        num_new: its new tokens.
        heads: query heads that share a program.
        dims: head dim of K or V, whichever is greater, padded to a power of two.
        item_size: bytes of an element of the pages if K and V are quantised, else of the products.
    """
    size = (num_new > FEW_NEW_TOKENS) + (num_new > MAX_SPLIT_TOKENS)
    tile = TILES[item_size, max(64, dims)][size]
    rows = min(tile.rows, max(16, 1 << (num_new * heads - 1).bit_length())) if size == 0 else tile.rows
    return tile._replace(rows=rows, most_tokens=(FEW_NEW_TOKENS, MAX_SPLIT_TOKENS, None)[size])

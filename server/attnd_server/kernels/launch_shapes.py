"""Launch shapes of the attention kernel: one table."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """A launch shape.

    Attributes:
        rows: most (new token, query head) pairs of a program, a power of two from 16.
        keys: keys that it takes at once, a power of two from 16.
        num_warps: warps of it.
        num_stages: tiles of keys under way.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# Requests are launched apart by their number of new tokens, up to and with: a request's launch shape must depend on
# nothing but itself, so that its bits do not either.
CLASSES: tuple[float, ...] = (1, 256, float("inf"))
# Launch shapes of each class by (bytes of an element, head dim padded to a power of two from 64). They fit the shared
# memory of sm_80 to sm_100 and spill few registers there (compiled, not timed yet). float32 has no tensor cores.
TILES: dict[tuple[int, int], tuple[Tile, Tile, Tile]] = {
    (2, 64): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
    (2, 128): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 8, 2)),
    (2, 256): (Tile(16, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    (2, 512): (Tile(16, 16, 4, 2), Tile(32, 16, 8, 1), Tile(32, 32, 8, 1)),
    (4, 64): (Tile(16, 32, 4, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2)),
    (4, 128): (Tile(16, 16, 4, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (4, 256): (Tile(16, 16, 4, 1), Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
    (4, 512): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}


def class_of(num_new: int) -> int:
    """Index in CLASSES of a request with `num_new` new tokens."""
    return next(index for index, up_to in enumerate(CLASSES) if num_new <= up_to)


def launch_shape(index: int, heads: int, dims: int, item_size: int) -> Tile:
    """The launch shape of a class, with no more rows than its requests have.

    Args:
        index: in CLASSES.
        heads: query heads that share a program.
        dims: head dim of K or V, whichever is greater, padded to a power of two.
        item_size: bytes of an element of the products or of the pages, whichever is greater.
    """
    tile = TILES[item_size, max(64, dims)][index]
    rows = max(16, (1 << (heads - 1).bit_length()) * CLASSES[index])
    return tile._replace(rows=int(min(tile.rows, rows)))

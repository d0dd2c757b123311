"""Cuts the attention of a request into tiles, so that a call takes at most `SCRATCH_BYTES` beside its results.

A page may be named again and again, so a message of some kilobytes may ask for keys that fill any memory. How a request
is cut depends on itself alone, never on what shares its batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

SCRATCH_BYTES = 128 << 20
"""Most bytes of gathered K and V, masks and scores that exist at one time, as they are counted before a call starts."""
EXP_PRODUCTS = 64
"""Products that take a processor as long as what a score takes whatever the dims are, most of it its exponential."""
KEY_TILE = 2048
"""Keys of a tile, or fewer, so that it ends with a page."""


class Heads(NamedTuple):
    """Query heads that are computed together, and their KV heads: whole groups, or a part of one group."""

    query: slice
    kv: slice


def head_blocks(num_heads: int, num_kv_heads: int, most: int) -> Iterator[Heads]:
    """All heads in blocks of at most `most` query heads, and at least one."""
    group, most = num_heads // num_kv_heads, max(1, most)
    if most >= group:
        step = most // group
        for first in range(0, num_kv_heads, step):
            end = min(first + step, num_kv_heads)
            yield Heads(slice(first * group, end * group), slice(first, end))
        return
    for kv_head in range(num_kv_heads):
        end = (kv_head + 1) * group
        for first in range(kv_head * group, end, most):
            yield Heads(slice(first, min(first + most, end)), slice(kv_head, kv_head + 1))


def key_tiles(num_keys: int, page_size: int) -> Iterator[slice]:
    """Keys `[0, num_keys)` in tiles of whole pages; the first key is the first of a page."""
    step = max(1, KEY_TILE // page_size) * page_size
    for first in range(0, num_keys, step):
        yield slice(first, min(first + step, num_keys))


class Merged:
    """Attention over several tiles of keys, from that over each (arXiv 2311.01282).

    Attributes:
        output: `[num_rows, num_heads, head_dim_v]`.
        lse: `[num_rows, num_heads]`.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        """Over no keys: an output of `shape` with zeros."""
        self.output = torch.zeros(shape, dtype=dtype, device=device)
        self.lse = torch.full(shape[:2], -torch.inf, dtype=dtype, device=device)

    def add(self, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Adds the keys of one more tile."""
        total = torch.logaddexp(self.lse, lse)
        self.output = self.output * _weight(self.lse, total) + output * _weight(lse, total)
        self.lse = total

    def add_sinks(self, sinks: torch.Tensor | None) -> None:
        """Adds a key without a value for each head; see `reference_torch_attention`."""
        if sinks is None:
            return
        total = torch.logaddexp(self.lse, sinks.to(self.lse.dtype))
        self.output *= _weight(self.lse, total)
        self.lse = total


def _weight(lse: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """What the keys of `lse` have of all keys; 0 where nothing is seen."""
    return (lse - total.masked_fill(total == -torch.inf, 0)).exp()[:, :, None]

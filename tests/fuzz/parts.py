"""The layer groups of a cache as its info tells them: what a valid request must know of each."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from attnd.v1 import cache_pb2


class Part(NamedTuple):
    """A layer group of a cache, or all of a cache that has none.

    Attributes:
        index: of the group.
        layers: their numbers in the cache.
        num_kv_heads: as in its message, like those below.
        head_dim: likewise.
        head_dim_v: likewise.
        page_size: likewise.
        num_pages: likewise.
        window: likewise.
        latent: likewise.
    """

    index: int
    layers: list[int]
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    page_size: int
    num_pages: int
    window: int = 0
    latent: bool = False

    @property
    def num_slots(self) -> int:
        """Slots of each layer."""
        return self.num_pages * self.page_size


def parts_of(config: cache_pb2.CacheConfig) -> list[Part]:
    """The groups of a cache, of which a cache without them has one."""
    if not config.groups:
        return [Part(0, list(range(config.num_layers)), *_geometry(config))]
    return [
        Part(index, list(array("i", group.layers.data)), *_geometry(group), group.window, group.latent)
        for index, group in enumerate(config.groups)
    ]


def part_of(config: cache_pb2.CacheConfig, layer: int) -> Part:
    """The group of a layer."""
    return next(part for part in parts_of(config) if layer in part.layers)


def _geometry(message: cache_pb2.CacheConfig | cache_pb2.LayerGroup) -> tuple[int, int, int, int, int]:
    return message.num_kv_heads, message.head_dim, message.head_dim_v, message.page_size, message.num_pages

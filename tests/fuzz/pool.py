"""A model of what every byte of the pages of a cache must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from attnd_server.attention.config import Layout
from attnd_server.kv.cache import Cache
from attnd_server.kv.layer_group import LayerGroup


class GroupPages:
    """The pages of one layer group, and what they must hold, as bytes. A layer is told by its index in the group."""

    def __init__(self, group: LayerGroup) -> None:
        """Expects what is there now."""
        self.config = group.config
        pages = [group.k_pages] if self.config.latent else [group.k_pages, group.v_pages]
        self._actual = [each.view(torch.uint8).numpy() for each in pages]
        self._expected = [each.copy() for each in self._actual]

    @property
    def num_parts(self) -> int:
        """K and V; K alone of a latent group, whose V is a part of it."""
        return len(self._actual)

    def is_exact(self, part: int) -> bool:
        """Whether K (part 0) or V (part 1) is stored as it comes."""
        return not (self.config.k_is_quantised, self.config.v_is_quantised)[part]

    def is_as_expected(self) -> bool:
        """Whether every byte is what it must be."""
        return all(map(np.array_equal, self._actual, self._expected))

    def stored(self, layer: int, slots: Sequence[int], *tensors: bytes) -> None:
        """From now on these tokens, K and V of each, lie in these slots, -1 excepted."""
        for part, data in enumerate(tensors[: self.num_parts]):
            size = len(data) // max(1, len(slots))
            for index, slot in enumerate(slots):
                if slot >= 0:
                    row = np.frombuffer(data, np.uint8)[index * size : (index + 1) * size]
                    self._set_row(part, layer, slot, row)

    def copied(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """From now on these pages are copies of those."""
        for expected in self._expected:
            for source, target in zip(sources, targets, strict=True):
                expected[:, target] = expected[:, source]

    def row(self, part: int, layer: int, slot: int) -> bytes:
        """What K (part 0) or V (part 1) of a slot must be."""
        return self._row_of(self._expected[part], part, layer, slot).tobytes()

    def _set_row(self, part: int, layer: int, slot: int, row: npt.NDArray[np.uint8]) -> None:
        target = self._row_of(self._expected[part], part, layer, slot)
        if self.is_exact(part):
            target[...] = row.reshape(target.shape)
        else:  # it may change, to whatever its kernels' own tests say
            target[...] = self._row_of(self._actual[part], part, layer, slot)

    def _row_of(self, pages: npt.NDArray[Any], part: int, layer: int, slot: int) -> npt.NDArray[Any]:
        page, offset = divmod(slot, self.config.page_size)
        if self.config.layout is Layout.UNIFIED:
            return pages[layer, page, offset]
        if part == 0:
            return pages[layer, page, :, :, offset]
        size = (self.config.v_dtype or self.config.dtype).itemsize
        return pages[layer, page, :, :, offset * size : (offset + 1) * size]


class Pool:
    """The pages of one cache, and what they must hold.

    Attributes:
        cache: the cache.
        info: as its owner sees it.
        groups: the pages of each layer group.
    """

    def __init__(self, cache: Cache) -> None:
        """Expects what is there now."""
        self.cache = cache
        self.info = cache.info()
        self.groups = [GroupPages(group) for group in cache.groups]

    def is_as_expected(self) -> bool:
        """Whether every byte is what it must be."""
        return all(group.is_as_expected() for group in self.groups)

    def place(self, layer: int) -> tuple[GroupPages, int]:
        """The group of a layer of the cache, and the layer's index there."""
        group, index = self.cache.shape.places[layer]
        return self.groups[group], index

    def stored(self, layer: int, slots: Sequence[int], k: bytes, v: bytes) -> None:
        """From now on these tokens lie in these slots of a layer, -1 excepted."""
        group, index = self.place(layer)
        group.stored(index, slots, k, v)

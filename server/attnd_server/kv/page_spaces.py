"""The page spaces of a device, and the pages that a cache has in one of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace

import torch

from attnd.errors import Unsupported
from attnd_server.attention.config import AttentionConfig
from attnd_server.device.faults import is_device_fault
from attnd_server.kv.page_space import (
    MAX_SLOTS,
    MOST_UNIT_BYTES,
    PageSpace,
    SharedSpace,
    page_sizes,
    pages_per_unit,
    tensors_of,
)

log = logging.getLogger(__name__)

# Addresses of a space, as a multiple of the memory that all caches may take: holes between caches cost nothing.
_ADDRESSES = 4

# Spaces that have more addresses than memory: all together must fit those that a process has.
MAX_SHARED_SPACES = 256


class CachePages:
    """The pages of one cache.

    Attributes:
        space: where they lie.
        first: page of the space that is page 0 of layer 0.
        k: `[num_layers, *config.k_shape]`, zeros at first.
        v: `[num_layers, *config.v_shape]`, likewise; a view of k where the config is latent.
    """

    def __init__(self, space: PageSpace, first: int, config: AttentionConfig) -> None:
        """Made by `PageSpaces.take`."""
        num_pages = config.num_layers * config.num_pages
        self.space = space
        self.first = first
        self.k = space.k[first : first + num_pages].view(config.num_layers, *config.k_shape)
        self.v = space.v[first : first + num_pages].unflatten(0, (config.num_layers, config.num_pages))


class PageSpaces:
    """The spaces of one device, by geometry. Any thread may call it."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        """None yet.

        Args:
            device: of the pages.
            num_bytes: that all caches may take.
        """
        self._device = device
        self._num_bytes = num_bytes
        self._spaces: dict[AttentionConfig, list[PageSpace]] = {}
        self._lock = threading.Lock()

    def unused_bytes(self, groups: Sequence[AttentionConfig]) -> int:
        """Bytes of the device that the pages of a cache's layer groups take beside their own, at the most.

        Memory of a GPU comes in units of megabytes, and the first unit of a space is nobody's. A processor's takes none
        where nobody touches it. Those of one group do not count, so that a cache of all the memory there is can be
        leased; those of hundreds are gigabytes.
        """
        if self._device.type != "cuda":
            return 0
        return sum(sorted(map(_unused_bytes, groups))[:-1])

    def take(self, config: AttentionConfig) -> CachePages:
        """Pages for a cache. Raises RuntimeError, MemoryError or torch.OutOfMemoryError if the device has none left."""
        num_pages = config.num_layers * config.num_pages
        alike = _alike(config)
        with self._lock:
            for space in self._spaces.get(alike, ()):
                first = space.take(num_pages)
                if first is not None:
                    return CachePages(space, first, config)
            space, first = self._new_space(config, num_pages)
            self._spaces.setdefault(alike, []).append(space)
            return CachePages(space, first, config)

    def give_back(self, pages: CachePages, config: AttentionConfig) -> None:
        """Takes the pages of a cache back. Whoever still holds its tensors may see another's data in them later."""
        alike = _alike(config)
        with self._lock:
            pages.space.give_back(pages.first, config.num_layers * config.num_pages)
            if pages.space.is_empty:
                self._spaces[alike].remove(pages.space)
                pages.space.close()
                if not self._spaces[alike]:
                    del self._spaces[alike]

    def _new_space(self, config: AttentionConfig, num_pages: int) -> tuple[PageSpace, int]:
        if sum(isinstance(each, SharedSpace) for alike in self._spaces.values() for each in alike) >= MAX_SHARED_SPACES:
            return self._lone(config, num_pages)
        most = min(_ADDRESSES * self._num_bytes // (config.num_bytes // num_pages), MAX_SLOTS // config.page_size)
        try:
            space = SharedSpace(config, most, self._device)
        except (Unsupported, OSError, OverflowError, RuntimeError) as error:
            if is_device_fault(error):
                raise
            log.info("caches lie alone, and their calls share no launches: %s", error)
        else:
            try:
                first = space.take(num_pages)
            except BaseException:
                space.close()
                raise
            if first is not None:
                return space, first
            space.close()
        return self._lone(config, num_pages)

    def _lone(self, config: AttentionConfig, num_pages: int) -> tuple[PageSpace, int]:
        whole = replace(config, num_layers=1, num_pages=num_pages)
        tensors = [torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in tensors_of(whole)]
        return PageSpace(config, *tensors), 0


def _alike(config: AttentionConfig) -> AttentionConfig:
    """Equal for caches, and layer groups, whose pages lie in one space: what windows hide is not their concern."""
    return replace(config, num_layers=1, num_pages=1, window=0)


def _unused_bytes(config: AttentionConfig) -> int:
    sizes = page_sizes(config)
    unit = max(pages_per_unit(size) for size in sizes)
    return sum(sizes) * (-(config.num_layers * config.num_pages) % unit) + MOST_UNIT_BYTES * len(sizes)

"""Memory of pages: caches of one geometry lie in one address space, so that their calls can share a launch.

Kernels take the tensors of one layer and the ids of pages in them. In a space, the pages of all layers of all its
caches are numbered through: page p of layer l of a cache is page `first + l * num_pages + p` of the space. So calls of
several caches and layers become one call on the space by adding one number to each request's page ids.

A space has far more addresses than there is memory. The system gives memory to what is written to, and takes it back
from what a cache leaves, which is zeros from then on. That is so on a processor; on a GPU each cache has a space of its
own as yet, because torch has no addresses without memory.
"""

from __future__ import annotations

import itertools
import mmap
import sys
import threading
from dataclasses import replace

import torch

from attnd_server.config import AttentionConfig

# Addresses of a space, as a multiple of the memory that all caches may take: holes between caches cost nothing.
_ADDRESSES = 4
# Slots of a space: kernels count them in int32.
_MAX_SLOTS = 2**31 - 1

_ids = itertools.count()


class PageSpace:
    """The pages of caches of one geometry.

    Attributes:
        id: no other space of the process has it.
        config: of the space as if it were a cache of one layer.
        k: `config.k_shape`, contiguous.
        v: `config.v_shape`, contiguous.
    """

    def __init__(self, config: AttentionConfig, num_pages: int, device: torch.device, is_shared: bool) -> None:
        """Takes the addresses, or where they are not shared the memory.

        Args:
            config: of any cache that is to lie in it.
            num_pages: of all layers of all caches.
            device: of the pages.
            is_shared: whether there may be several caches; else one takes all pages, and all goes with it.

        Raises:
            RuntimeError: the device has not enough of it.
            OSError: likewise.
        """
        self.id = next(_ids)
        self.config = replace(config, num_layers=1, num_pages=num_pages)
        shapes = self.config.k_shape, self.config.v_shape
        dtype = self.config.kv_dtype or self.config.dtype
        self._memory: list[mmap.mmap] = []
        if is_shared:
            sizes = [dtype.itemsize * torch.Size(shape).numel() for shape in shapes]
            self._memory = [_addresses(size) for size in sizes]
            self.k, self.v = (
                torch.frombuffer(memory, dtype=torch.uint8, count=size).view(dtype).view(shape)
                for memory, size, shape in zip(self._memory, sizes, shapes, strict=True)
            )
            # Pages that fill whole pages of the system's, in K and V, so that memory can be given back.
            self._unit = max(_pages_per_unit(tensor[:1].nbytes) for tensor in (self.k, self.v))
            self._free = [(0, num_pages)]  # ranges [first, end), rising, none touching another
        else:
            self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
            self._unit, self._free = 1, []

    @property
    def is_empty(self) -> bool:
        """Whether no cache lies in it."""
        return self._free == [(0, self.config.num_pages)]

    def take(self, num_pages: int) -> int | None:
        """The first of so many pages in a row, all zeros; None if there is no such row."""
        num_pages = self._rounded(num_pages)
        for index, (first, end) in enumerate(self._free):
            if end - first >= num_pages:
                self._free[index : index + 1] = [(first + num_pages, end)] if end - first > num_pages else []
                return first
        return None

    def give_back(self, first: int, num_pages: int) -> None:
        """Takes pages of `take` back, and their memory."""
        end = first + self._rounded(num_pages)
        for memory, tensor in zip(self._memory, (self.k, self.v), strict=False):
            page_bytes = tensor[:1].nbytes
            memory.madvise(mmap.MADV_DONTNEED, first * page_bytes, (end - first) * page_bytes)
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self._free, (first, end)]):
            if merged and merged[-1][1] == start:
                start = merged.pop()[0]
            merged.append((start, stop))
        self._free = merged

    def _rounded(self, num_pages: int) -> int:
        return -(-num_pages // self._unit) * self._unit


def _addresses(num_bytes: int) -> mmap.mmap:
    """So many addresses, which take memory as they are written to."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return mmap.mmap(-1, num_bytes, flags=flags)


def _pages_per_unit(page_bytes: int) -> int:
    """The fewest pages that fill whole pages of the system's. A power of two, as the size of those is."""
    unit = 1
    while unit * page_bytes % mmap.PAGESIZE:
        unit *= 2
    return unit


class CachePages:
    """The pages of one cache.

    Attributes:
        space: where they lie.
        first: page of the space that is page 0 of layer 0.
        k: `[num_layers, *config.k_shape]`, zeros at first.
        v: `[num_layers, *config.v_shape]`, likewise.
    """

    def __init__(self, space: PageSpace, first: int, config: AttentionConfig) -> None:
        """Made by `PageSpaces.take`."""
        num_pages = config.num_layers * config.num_pages
        self.space = space
        self.first = first
        self.k = space.k[first : first + num_pages].view(config.num_layers, *config.k_shape)
        self.v = space.v[first : first + num_pages].view(config.num_layers, *config.v_shape)


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
        self._is_shared = device.type == "cpu" and sys.platform == "linux"
        self._spaces: dict[AttentionConfig, list[PageSpace]] = {}
        self._lock = threading.Lock()

    def take(self, config: AttentionConfig) -> CachePages:
        """Pages for a cache. Raises RuntimeError, MemoryError or torch.OutOfMemoryError if the device has none left."""
        num_pages = config.num_layers * config.num_pages
        alike = replace(config, num_layers=1, num_pages=1)
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
        alike = replace(config, num_layers=1, num_pages=1)
        with self._lock:
            pages.space.give_back(pages.first, config.num_layers * config.num_pages)
            if pages.space.is_empty:
                self._spaces[alike].remove(pages.space)
                if not self._spaces[alike]:
                    del self._spaces[alike]

    def _new_space(self, config: AttentionConfig, num_pages: int) -> tuple[PageSpace, int]:
        bytes_per_page = config.num_bytes // num_pages
        most = min(_ADDRESSES * self._num_bytes // bytes_per_page, _MAX_SLOTS // config.page_size)
        if self._is_shared and num_pages <= most:
            try:
                space = PageSpace(config, most, self._device, is_shared=True)
                first = space.take(num_pages)
            except (OSError, OverflowError):
                first = None  # the system counts addresses as memory, or has too few of them
            if first is not None:
                return space, first
        return PageSpace(config, num_pages, self._device, is_shared=False), 0

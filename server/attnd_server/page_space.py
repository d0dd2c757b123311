"""Memory of pages: caches of one geometry lie in one address space, so that their calls can share a launch.

Kernels take the tensors of one layer and the ids of pages in them. In a space, the pages of all layers of all its
caches are numbered through: page p of layer l of a cache is page `first + l * num_pages + p` of the space. So calls of
several caches and layers become one call on the space by adding one number to each request's page ids.

A space has far more addresses than there is memory, which comes with a cache and goes with it.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import sys
import threading
from dataclasses import replace
from typing import Protocol

import torch

from attnd.errors import Unsupported
from attnd_server.config import AttentionConfig
from attnd_server.device_faults import is_device_fault

# Addresses of a space, as a multiple of the memory that all caches may take: holes between caches cost nothing.
_ADDRESSES = 4
# Slots of a space: kernels count them in int32.
_MAX_SLOTS = 2**31 - 1

# Bytes in which memory comes, at the most: those of a GPU.
_MOST_UNIT_BYTES = 2 << 20

log = logging.getLogger(__name__)
_ids = itertools.count()


def with_index(device: torch.device | str) -> torch.device:
    """The device with its number: "cuda" alone is this thread's current GPU, which may be another one later."""
    device = torch.device(device)
    is_current = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if is_current else device


class Addresses(Protocol):
    """Bytes in a row that have memory only where somebody asked for it.

    Attributes:
        unit_bytes: memory comes and goes in multiples of so many bytes.
        tensor: uint8 of all bytes.
    """

    unit_bytes: int
    tensor: torch.Tensor

    def commit(self, start: int, end: int) -> None:
        """Gives the bytes `[start, end)` memory, all zeros. The first unit is nobody's."""

    def give_back(self, start: int, end: int) -> None:
        """Takes back the memory of bytes that were committed together."""

    def close(self) -> None:
        """Gives back the rest."""


class HostAddresses:
    """Implements `Addresses` on a processor: the system gives zeros to whoever touches what was never touched."""

    unit_bytes = mmap.PAGESIZE

    def __init__(self, num_bytes: int) -> None:
        """Takes the addresses. Raises OSError where they count as memory that is not there."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self._memory = mmap.mmap(-1, num_bytes, flags=flags)
        self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8)

    def commit(self, start: int, end: int) -> None:
        """Nothing to do."""

    def give_back(self, start: int, end: int) -> None:
        """Takes back the memory."""
        self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Nothing to do: it ends with the last tensor."""


class PageSpace:
    """The pages of caches of one geometry.

    Attributes:
        id: no other space of the process has it.
        config: of the space as if it were a cache of one layer.
        k: `config.k_shape`, contiguous.
        v: `config.v_shape`, contiguous.
    """

    def __init__(self, config: AttentionConfig, k: torch.Tensor, v: torch.Tensor) -> None:
        """Over pages that exist, of which nobody else takes any; see `SharedSpace` for others.

        Args:
            config: of any cache that is to lie in it.
            k: `[num_pages, ...]` as in `config.k_shape`.
            v: likewise.
        """
        self.id = next(_ids)
        self.config = replace(config, num_layers=1, num_pages=len(k))
        self.k, self.v = k, v

    @property
    def is_empty(self) -> bool:
        """Whether no cache lies in it, once `give_back` was called."""
        return True

    def take(self, num_pages: int) -> int | None:
        """The first of so many pages in a row, all zeros; None if there is no such row."""
        return None

    def give_back(self, first: int, num_pages: int) -> None:
        """Takes pages of `take` back, and their memory."""

    def close(self) -> None:
        """Ends it, when it is empty."""


class SharedSpace(PageSpace):
    """The pages of as many caches as come."""

    def __init__(self, config: AttentionConfig, num_pages: int, device: torch.device) -> None:
        """Takes the addresses.

        Args:
            config: of any cache that is to lie in it.
            num_pages: of all layers of all caches, roughly.
            device: of the pages.

        Raises:
            Unsupported: there is no such thing on this device.
            OSError: likewise, or the system has too few of them.
            RuntimeError: likewise.
        """
        dtype = config.kv_dtype or config.dtype
        self._page_bytes = [
            dtype.itemsize * torch.Size(shape[1:]).numel() for shape in (config.k_shape, config.v_shape)
        ]
        margin = 2 * max(_pages_per_unit(page_bytes, _MOST_UNIT_BYTES) for page_bytes in self._page_bytes)
        num_pages = min(num_pages + margin, _MAX_SLOTS // config.page_size)
        space = replace(config, num_layers=1, num_pages=num_pages)
        shapes = space.k_shape, space.v_shape
        self._parts: list[Addresses] = []
        try:
            for page_bytes in self._page_bytes:
                self._parts.append(_addresses(device, num_pages * page_bytes))
        except BaseException:
            self.close()
            raise
        k, v = (
            part.tensor[: num_pages * page_bytes].view(dtype).view(shape)
            for part, page_bytes, shape in zip(self._parts, self._page_bytes, shapes, strict=True)
        )
        super().__init__(config, k, v)
        # Pages that fill whole units of memory, in K and V. The first unit is nobody's.
        sizes = zip(self._page_bytes, self._parts, strict=True)
        self._unit = max(_pages_per_unit(page_bytes, part.unit_bytes) for page_bytes, part in sizes)
        self._all = [(self._unit, num_pages // self._unit * self._unit)]
        self._free = list(self._all)  # ranges [first, end), rising, none empty, none touching another

    @property
    def is_empty(self) -> bool:
        """Whether no cache lies in it."""
        return self._free == self._all

    def take(self, num_pages: int) -> int | None:
        """The first of so many pages in a row, all zeros; None if there is no such row.

        Raises:
            torch.OutOfMemoryError: there is one, but no memory for it.
        """
        num_pages = self._rounded(num_pages)
        for index, (first, end) in enumerate(self._free):
            if end - first >= num_pages:
                self._commit(first, num_pages)
                self._free[index : index + 1] = [(first + num_pages, end)] if end - first > num_pages else []
                return first
        return None

    def give_back(self, first: int, num_pages: int) -> None:
        """Takes pages of `take` back, and their memory."""
        end = first + self._rounded(num_pages)
        for page_bytes, part in zip(self._page_bytes, self._parts, strict=True):
            part.give_back(first * page_bytes, end * page_bytes)
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self._free, (first, end)]):
            if merged and merged[-1][1] == start:
                start = merged.pop()[0]
            merged.append((start, stop))
        self._free = merged

    def close(self) -> None:
        """Gives back the addresses."""
        for part in self._parts:
            part.close()

    def _commit(self, first: int, num_pages: int) -> None:
        (k_bytes, v_bytes), (k, v) = self._page_bytes, self._parts
        k.commit(first * k_bytes, (first + num_pages) * k_bytes)
        try:
            v.commit(first * v_bytes, (first + num_pages) * v_bytes)
        except BaseException:
            k.give_back(first * k_bytes, (first + num_pages) * k_bytes)
            raise

    def _rounded(self, num_pages: int) -> int:
        return -(-num_pages // self._unit) * self._unit


def _addresses(device: torch.device, num_bytes: int) -> Addresses:
    """So many addresses on a device."""
    if device.type == "cuda":
        from attnd_server.gpu_addresses import GpuAddresses

        return GpuAddresses(device, num_bytes)
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} does not give back memory of its own accord")
    return HostAddresses(num_bytes)


def _pages_per_unit(page_bytes: int, unit_bytes: int) -> int:
    """The fewest pages that fill whole units of memory. A power of two, as the size of those is."""
    unit = 1
    while unit * page_bytes % unit_bytes:
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
                pages.space.close()
                if not self._spaces[alike]:
                    del self._spaces[alike]

    def _new_space(self, config: AttentionConfig, num_pages: int) -> tuple[PageSpace, int]:
        most = min(_ADDRESSES * self._num_bytes // (config.num_bytes // num_pages), _MAX_SLOTS // config.page_size)
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
        whole = replace(config, num_layers=1, num_pages=num_pages)
        shapes = whole.k_shape, whole.v_shape
        k, v = (torch.zeros(shape, dtype=config.kv_dtype, device=self._device) for shape in shapes)
        return PageSpace(config, k, v), 0

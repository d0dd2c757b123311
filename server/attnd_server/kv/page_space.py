"""Memory of pages: caches of one geometry lie in one address space, so that their calls can share a launch.

Kernels take the tensors of one layer and the ids of pages in them. In a space, the pages of all layers of all its
caches are numbered through: page p of layer l of a cache is page `first + l * num_pages + p` of the space. So calls of
several caches and layers become one call on the space by adding one number to each request's page ids.

A space has far more addresses than there is memory, which comes with a cache and goes with it.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import replace

import torch

from attnd_server.attention.config import AttentionConfig
from attnd_server.kv.addresses import Addresses, addresses_on

# Slots of a space: kernels count them in int32.
MAX_SLOTS = 2**31 - 1
# Bytes in which memory comes, at the most: those of a GPU.
MOST_UNIT_BYTES = 2 << 20

_ids = itertools.count()


class PageSpace:
    """The pages of caches of one geometry.

    Attributes:
        id: no other space of the process has it.
        config: of the space as if it were a cache of one layer.
        k: `config.k_shape`, contiguous.
        v: `config.v_shape`, contiguous; a view of k where the config is latent.
    """

    def __init__(self, config: AttentionConfig, k: torch.Tensor, v: torch.Tensor | None = None) -> None:
        """Over pages that exist, of which nobody else takes any; see `SharedSpace` for others.

        Args:
            config: of any cache that is to lie in it.
            k: `[num_pages, ...]` as in `config.k_shape`.
            v: likewise; None where the config is latent.
        """
        self.id = next(_ids)
        self.config = replace(config, num_layers=1, num_pages=len(k), window=0)
        self.k, self.v = k, k[..., : config.head_dim_v] if v is None else v

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
        self._page_bytes = page_sizes(config)
        margin = 2 * max(pages_per_unit(page_bytes, MOST_UNIT_BYTES) for page_bytes in self._page_bytes)
        num_pages = min(num_pages + margin, MAX_SLOTS // config.page_size)
        space = replace(config, num_layers=1, num_pages=num_pages)
        self._parts: list[Addresses] = []
        try:
            for page_bytes in self._page_bytes:
                self._parts.append(addresses_on(device, num_pages * page_bytes))
        except BaseException:
            self.close()
            raise
        super().__init__(
            config,
            *(
                part.tensor[: num_pages * page_bytes].view(dtype).view(shape)
                for part, page_bytes, (shape, dtype) in zip(
                    self._parts, self._page_bytes, tensors_of(space), strict=True
                )
            ),
        )
        # Pages that fill whole units of memory, in K and V. The first unit is nobody's.
        sizes = zip(self._page_bytes, self._parts, strict=True)
        self._unit = max(pages_per_unit(page_bytes, part.unit_bytes) for page_bytes, part in sizes)
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
        with ExitStack() as committed:
            for page_bytes, part in zip(self._page_bytes, self._parts, strict=True):
                start, end = first * page_bytes, (first + num_pages) * page_bytes
                part.commit(start, end)
                committed.callback(part.give_back, start, end)
            committed.pop_all()  # nothing is given back unless one of them fails

    def _rounded(self, num_pages: int) -> int:
        return -(-num_pages // self._unit) * self._unit


def tensors_of(config: AttentionConfig) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of a layer's tensors of pages: of K, and of V unless it is a part of K's rows."""
    k, v = (config.k_shape, config.kv_dtype or config.dtype), (config.v_shape, config.v_dtype or config.dtype)
    return [k] if config.latent else [k, v]


def page_sizes(config: AttentionConfig) -> list[int]:
    """Bytes of a page in each tensor of `tensors_of`."""
    return [dtype.itemsize * torch.Size(shape[1:]).numel() for shape, dtype in tensors_of(config)]


def pages_per_unit(page_bytes: int, unit_bytes: int = MOST_UNIT_BYTES) -> int:
    """The fewest pages that fill whole units of memory. A power of two, as the size of those is."""
    unit = 1
    while unit * page_bytes % unit_bytes:
        unit *= 2
    return unit

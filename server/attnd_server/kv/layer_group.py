"""The KV memory of one layer group of a cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from attnd_server.attention.backends.triton.attention import availability
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.kernels.pages import StoredTokens, page_copies, read_kv, store_kv, stored_tokens
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.kv.page_spaces import CachePages, PageSpaces

# Oldest GPU for which Triton converts to and from FP8.
MIN_FP8_CAPABILITY = (8, 9)


class Writer(Protocol):
    """What stores into pages on the device, without the executor."""

    def make_way(self) -> None:
        """Stores nothing more until the cache's work that has the device now is done. Does not wait."""

    def written_pages(self) -> npt.NDArray[np.int64]:
        """Pages into which it has stored since it was asked last. On any thread."""


class LayerGroup:
    """The pages of layers that have geometry and page tables in common. Their ids are the group's own.

    Attributes:
        index: of the group among those of its cache.
        config: geometry; `num_layers` are those of the group.
        layer_numbers: of its layers in the cache. Elsewhere here a layer is told by its index among these.
        k_pages: `[num_layers, *config.k_shape]`.
        v_pages: `[num_layers, *config.v_shape]`; a view of k_pages where the config is latent.
        layers: the pages of each layer: to find them by an index takes torch a microsecond.
        pages: where they lie among other groups'; None once the cache was closed.
        num_pages_written: pages into which something was stored. Any thread may ask.
        writers: what stores on the device of its own, see `watch`.
    """

    def __init__(
        self,
        index: int,
        config: AttentionConfig,
        layer_numbers: Sequence[int],
        device: torch.device,
        changed: Callable[[int, npt.NDArray[np.int64]], None] | None,
    ) -> None:
        """Has no pages yet: `take` gets them.

        Args:
            index: of the group.
            config: geometry.
            layer_numbers: of its layers.
            device: of the pages.
            changed: told the index and pages, before something is stored there; None: nobody is.
        """
        self.index = index
        self.config = config
        self.layer_numbers = layer_numbers
        self.device = device
        self._changed = changed
        # Held here too: a step of a cuda plane that is running reads them after `close`.
        self._scales = (
            _scales(config, config.k_scales, device) if config.k_is_quantised else None,
            _scales(config, config.v_scales, device) if config.v_is_quantised else None,
        )
        self._triton_store, self._triton_read = _triton_kernels(config, device)
        self.num_pages_written = 0  # counted while they are: to count millions of them takes long
        self.page_was_written = np.zeros(config.num_pages, dtype=np.bool_)
        self.writers: list[Writer] = []
        self._marking, self._settling = threading.Lock(), threading.Lock()
        self.pages: CachePages | None = None
        self.layers: list[LayerPages] = []
        self._forget()

    def take(self, spaces: PageSpaces) -> None:
        """Takes the pages, all of them zeros, so that nobody sees what a former owner stored."""
        self.pages = spaces.take(self.config)
        self.k_pages, self.v_pages = self.pages.k, self.pages.v
        of_layers = zip(self.k_pages.unbind(), self.v_pages.unbind(), strict=True)
        self.layers = [LayerPages(k, v, *self._scales) for k, v in of_layers]

    def let_go(self) -> CachePages | None:
        """Has no pages any more; returns them, for whoever gives them back when nobody holds them."""
        pages, self.pages = self.pages, None
        self._forget()
        return pages

    def _forget(self) -> None:
        self.k_pages = self.v_pages = torch.empty(0)
        self.layers = []

    @property
    def written_pages(self) -> torch.Tensor:
        """Int64, the ids of the pages into which something was stored, rising. Any thread may ask."""
        self.settle_written()
        return torch.from_numpy(np.flatnonzero(self.page_was_written))

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor, stored: StoredTokens) -> None:
        """Stores what is to be stored of k and v `[num_tokens, num_kv_heads, head_dim]`. All on the cache's device."""
        self.store_in(self.layers[layer], k, v, stored)

    def store_in(self, pages: LayerPages, k: torch.Tensor, v: torch.Tensor, stored: StoredTokens) -> None:
        """As `store`, into any pages like the group's: those of its space, with slots there."""
        layout = self.config.layout
        if self._triton_store is None:
            store_kv(pages, k, v, stored, layout)
        else:
            self._triton_store(pages, k, v, stored.slots, layout)

    def store_at(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """As `store`, at int64 slots `[num_tokens]` that are looked at when it runs: to be captured. -1 is skipped."""
        skips = self._triton_store is not None
        self.store(layer, k, v, StoredTokens(slots) if skips else stored_tokens(slots, self.device))

    def read(self, layer: int, slot_mapping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V at the slots in `config.dtype`, `[num_tokens, num_kv_heads, head_dim]`. All on the cache's device."""
        read = self._triton_read or read_kv
        return read(self.layers[layer], slot_mapping, self.config.layout, self.config.dtype)

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies whole pages in every layer; no page is in both."""
        for _ in self.copy_pages_in_pieces(sources, targets):
            pass

    def copy_pages_in_pieces(self, sources: torch.Tensor, targets: torch.Tensor) -> Iterator[None]:
        """As `copy_pages`, but only as far as it is asked to go on. Not once the cache was closed."""
        self.mark_pages_written(targets)
        v_pages = None if self.config.latent else self.v_pages
        return page_copies(self.k_pages, v_pages, sources.to(self.device), targets.to(self.device))

    def mark_written(self, slot_mapping: torch.Tensor) -> None:
        """Notes the pages of these slots, for `num_pages_written`. On the host; -1 is skipped."""
        slots = slot_mapping.numpy()
        self._mark(slots[slots >= 0] // self.config.page_size)

    def mark_pages_written(self, pages: torch.Tensor) -> None:
        """Notes pages, for `written_pages`. On the host."""
        self._mark(pages.numpy())

    def watch(self, writer: Writer) -> None:
        """From now on the device itself stores, too. On the executor's thread, as all that stores."""
        with self._marking:
            self.writers.append(writer)

    def watch_no_more(self, writer: Writer) -> None:
        """It does not any more; what it did is noted. From any thread."""
        self.settle_written()
        with self._marking:
            self.writers.remove(writer)

    def about_to_write(self) -> None:
        """Says that work which has the device is going to store something."""
        for writer in self.writers:
            writer.make_way()

    def settle_written(self) -> None:
        """Notes the pages into which the device has stored of its own. From any thread; waits for a copy."""
        with self._settling:  # or another would be told that there are no more, before they are noted
            for writer in list(self.writers):
                self._note(writer.written_pages())

    def _mark(self, pages: npt.NDArray[np.int64]) -> None:
        """With the device."""
        self.about_to_write()
        self._note(pages)

    def _note(self, pages: npt.NDArray[np.int64]) -> None:
        if self._changed is not None:
            self._changed(self.index, pages)
        with self._marking:
            fresh = pages[~self.page_was_written[pages]]
            if fresh.size:  # rarely: a page takes several tokens
                self.page_was_written[fresh] = True
                self.num_pages_written += len(np.unique(fresh))


class _TritonKernels(NamedTuple):
    """What replaces `store_kv` and `read_kv` on a GPU; None: nothing does."""

    store: Callable[..., None] | None = None
    read: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None


def _triton_kernels(config: AttentionConfig, device: torch.device) -> _TritonKernels:
    """Store and read in Triton, if they run on `device`."""
    if device.type != "cuda" or availability(device) is not None or config.latent:
        return _TritonKernels()
    if config.is_quantised and torch.cuda.get_device_capability(device) < MIN_FP8_CAPABILITY:
        return _TritonKernels()
    from attnd_server.attention.kernels import gather, store

    return _TritonKernels(store.store_kv, gather.read_kv)


def _scales(config: AttentionConfig, scales: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(scales, dtype=torch.float32).expand(config.num_kv_heads).to(device).contiguous()

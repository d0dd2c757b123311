"""The KV memory of one cache, and its lease."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from attnd.errors import CacheLost
from attnd.protocol.packing import float32_tensor
from attnd.protocol.tensors import KV_DTYPES
from attnd.v1 import backend_pb2, cache_pb2, tensor_pb2
from attnd_server.attention.backends.triton.attention import availability
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.geometry import dtype_name
from attnd_server.attention.kernels.pages import StoredTokens, page_copies, read_kv, store_kv, stored_tokens
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.device.indexed import with_index
from attnd_server.kv.page_spaces import CachePages, PageSpaces
from attnd_server.kv.restored import Restored

# Oldest GPU for which Triton converts to and from FP8.
MIN_FP8_CAPABILITY = (8, 9)
# Of a cache that was restored again and again and never used, how many epochs are kept.
MAX_EPOCHS = 16


class Cache:
    """A lease on KV memory with one geometry.

    Attributes:
        id: 16 random bytes.
        principal: who it belongs to.
        config: its geometry.
        k_pages: `[num_layers, *config.k_shape]`.
        v_pages: `[num_layers, *config.v_shape]`; a view of k_pages where the config is latent.
        layers: the pages of each layer: to find them by an index takes torch a microsecond.
        pages: where they lie among other caches'.
        restored: what it was before the server was restarted; None: it is of this life.
        num_pages_written: pages into which something was stored. Any thread may ask.
        is_used: whether anybody may have changed it in this life of the server.
        num_graph_bytes: bytes of the device's memory that buffers of its CUDA graphs take, or are about to.
    """

    def __init__(
        self,
        config: AttentionConfig,
        *,
        epoch: int,
        principal: str,
        ttl_s: float,
        name: str,
        device: torch.device,
        spaces: PageSpaces | None = None,
        restored: Restored | None = None,
        key: bytes = b"",
    ) -> None:
        """Takes the pages, all of them zeros, so that nobody sees what a former owner stored.

        Args:
            config: geometry.
            epoch: the server's.
            principal: who it belongs to.
            ttl_s: its lease, in seconds.
            name: for people.
            device: of the pages.
            spaces: of the device; None: the cache lies alone.
            restored: what it was before; None: it is new.
            key: of the request that created it; empty: it had none.
        """
        device = with_index(device)
        self.id = secrets.token_bytes(16) if restored is None else restored.id
        self.epoch = epoch
        self.restored = restored
        self.is_used = restored is None
        self.principal = principal
        self.config = config
        self.name = name
        self.key = key
        self.ttl_s = ttl_s
        # Held here too: a step of a cuda plane that is running reads them after `close`.
        self._scales = (
            _scales(config, config.k_scales, device) if config.k_is_quantised else None,
            _scales(config, config.v_scales, device) if config.v_is_quantised else None,
        )
        self._triton_store, self._triton_read = _triton_kernels(config, device)
        self.is_closed = False
        self._holding = threading.Lock()
        self._num_holders = 1  # the cache itself, until it is closed
        self.num_pages_written = 0  # counted while they are: to count millions of them takes long
        self._page_was_written = np.zeros(config.num_pages, dtype=np.bool_)
        # The last that can fail: nobody would give the pages of half a cache back.
        self._spaces = spaces or PageSpaces(device, config.num_bytes)
        self.pages: CachePages | None = self._spaces.take(config)
        self.k_pages, self.v_pages = self.pages.k, self.pages.v
        of_layers = zip(self.k_pages.unbind(), self.v_pages.unbind(), strict=True)
        self.layers = [LayerPages(k, v, *self._scales) for k, v in of_layers]
        self._when_closed: list[Callable[[], None]] = []
        self.num_graph_bytes = 0
        self.renew()

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self.k_pages.device

    @property
    def num_bytes(self) -> int:
        """Bytes of the device's memory, those of graphs' buffers included."""
        return self.config.num_bytes + self.num_graph_bytes

    @property
    def written_pages(self) -> torch.Tensor:
        """Int64, the ids of the pages into which something was stored, rising. Any thread may ask."""
        return torch.from_numpy(np.flatnonzero(self._page_was_written))

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs under which the cache was as it is now, this life's last."""
        earlier = () if self.is_used or self.restored is None else self.restored.epochs[1 - MAX_EPOCHS :]
        return (*earlier, self.epoch)

    @property
    def adoptable_epochs(self) -> tuple[int, ...]:
        """The epochs of earlier lives under which it may be adopted: none once a page that it had then was changed."""
        return () if self.restored is None else self.restored.adoptable_epochs

    def filled(self) -> None:
        """All that a snapshot has of it lies in its pages now."""
        if self.restored is not None:
            self.restored.filled(self._page_was_written)

    def renew(self) -> None:
        """Starts the lease again."""
        self.expires_at = time.monotonic() + self.ttl_s

    def close(self) -> None:
        """Frees its pages, once nobody holds them. On the executor's thread, so that no call is running."""
        with self._holding:
            self.is_closed = True
        for listener in self._when_closed:
            listener()
        self._when_closed.clear()
        self.k_pages = self.v_pages = torch.empty(0)
        self.layers = []
        pages, self.pages = self.pages, None
        if pages is not None:
            self._let_go(pages)

    def when_closed(self, listener: Callable[[], None]) -> None:
        """Lets `close` call a listener, for what was made with the addresses of its pages. On the executor's thread."""
        self._when_closed.append(listener)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the memory of the pages, for whoever has the device use them while the cache may be closed.

        Calls need not: they run on the thread that closes caches. Raises CacheLost.
        """
        with self._holding:
            self.refuse_if_closed()
            pages = self.pages
            self._num_holders += 1
        try:
            yield
        finally:
            if pages is not None:
                self._let_go(pages)

    def _let_go(self, pages: CachePages) -> None:
        """One holder fewer; `close` is the last but those of `held`."""
        with self._holding:
            self._num_holders -= 1
            is_last = not self._num_holders
        if is_last:
            self._spaces.give_back(pages, self.config)

    def refuse_if_closed(self) -> None:
        """Raises CacheLost once the cache was deleted or its lease has ended."""
        if self.is_closed:
            raise CacheLost(
                f"cache {self.id.hex()} was deleted, or its lease of {self.ttl_s:g} s has ended", field="cache.id"
            )

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor, stored: StoredTokens) -> None:
        """Stores what is to be stored of k and v `[num_tokens, num_kv_heads, head_dim]`. All on the cache's device."""
        self.store_in(self.layers[layer], k, v, stored)

    def store_in(self, pages: LayerPages, k: torch.Tensor, v: torch.Tensor, stored: StoredTokens) -> None:
        """As `store`, into any pages like the cache's: those of its space, with slots there."""
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
        """As `copy_pages`, but only as far as it is asked to go on. Raises CacheLost: the cache was closed between."""
        self.refuse_if_closed()
        self.mark_pages_written(targets)
        v_pages = None if self.config.latent else self.v_pages
        for _ in page_copies(self.k_pages, v_pages, sources.to(self.device), targets.to(self.device)):
            yield
            self.refuse_if_closed()

    def mark_written(self, slot_mapping: torch.Tensor) -> None:
        """Notes the pages of these slots, for `num_pages_written`. On the host; -1 is skipped."""
        slots = slot_mapping.numpy()
        self._mark(slots[slots >= 0] // self.config.page_size)

    def mark_pages_written(self, pages: torch.Tensor) -> None:
        """Notes pages, for `written_pages`. On the host."""
        self._mark(pages.numpy())

    def _mark(self, pages: npt.NDArray[np.int64]) -> None:
        """With the device."""
        if self.restored is not None:
            self.restored.changed(pages)
        fresh = pages[~self._page_was_written[pages]]
        if fresh.size:  # rarely: a page takes several tokens
            self._page_was_written[fresh] = True
            self.num_pages_written += len(np.unique(fresh))

    def info(self, *, with_id: bool = True) -> cache_pb2.CacheInfo:
        """The cache as its owner sees it."""
        config = self.config
        return cache_pb2.CacheInfo(
            cache=cache_pb2.CacheRef(id=self.id if with_id else b"", epoch=self.epoch),
            config=cache_pb2.CacheConfig(
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                head_dim_v=config.head_dim_v,
                page_size=config.page_size,
                num_pages=config.num_pages,
                dtype=KV_DTYPES[dtype_name(config.dtype)],
                layout=cache_pb2.Layout.Value(f"LAYOUT_{config.layout.name}"),
                backend=backend_pb2.Backend.Value(f"BACKEND_{config.backend.name}"),
                precision=cache_pb2.Precision.Value(f"PRECISION_{config.precision.name}"),
                kv_dtype=KV_DTYPES[dtype_name(config.kv_dtype)],
                k_scales=float32_tensor(config.k_scales, "k_scales") if config.k_is_quantised else None,
                v_scales=float32_tensor(config.v_scales, "v_scales") if config.v_is_quantised else None,
                # Absent where it says nothing new: earlier clients need not know it.
                v_dtype=tensor_pb2.DTYPE_UNSPECIFIED
                if config.v_dtype is config.kv_dtype
                else KV_DTYPES[dtype_name(config.v_dtype)],
                kv_split=cache_pb2.KvSplit(**asdict(config.kv_split)),
            ),
            ttl_s=self.ttl_s,
            expires_in_s=max(0.0, self.expires_at - time.monotonic()),
            num_bytes=config.num_bytes,
            num_pages_written=self.num_pages_written,
            name=self.name,
            awaits_adoption=not self.is_used,
        )


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

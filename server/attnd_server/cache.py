"""The KV memory and its leases."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from attnd.errors import CacheLost, EpochMismatch, Exhausted, InvalidRequest
from attnd.packing import float32_tensor
from attnd.tensors import KV_DTYPES
from attnd.v1 import backend_pb2, cache_pb2
from attnd_server.backends.triton import availability
from attnd_server.config import AttentionConfig, ServerConfig
from attnd_server.kernels.pages import StoredTokens, copy_pages, read_kv, store_kv, stored_tokens
from attnd_server.page_space import CachePages, PageSpaces

if TYPE_CHECKING:
    from attnd_server.decode_graphs import DecodeGraphs

# Oldest GPU for which Triton converts to and from FP8.
MIN_FP8_CAPABILITY = (8, 9)
# Of a cache that was restored again and again and never used, how many epochs are kept.
MAX_EPOCHS = 16

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What a restored cache was in earlier lives of the server.

    Attributes:
        id: its id.
        epochs: those under which it was as it is; the last is that of the life that wrote the snapshot.
    """

    id: bytes
    epochs: tuple[int, ...]


class Cache:
    """A lease on KV memory with one geometry.

    Attributes:
        id: 16 random bytes.
        principal: who it belongs to.
        config: its geometry.
        k_pages: `[num_layers, *config.k_shape]`.
        v_pages: `[num_layers, *config.v_shape]`.
        k_scales: float32 `[num_kv_heads]` on the pages' device if they hold FP8, else None.
        v_scales: likewise.
        pages: where they lie among other caches'.
        restored: what it was before the server was restarted; None: it is of this life.
        is_used: whether anybody may have changed it in this life of the server.
        graphs: what warm-ups captured, by what `find_graphs` looks for.
        num_graph_bytes: bytes of the device's memory that the graphs' buffers take, or are about to.
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
        self.id = secrets.token_bytes(16) if restored is None else restored.id
        self.epoch = epoch
        self.restored = restored
        self.is_used = restored is None
        self.principal = principal
        self.config = config
        self.name = name
        self.key = key
        self.ttl_s = ttl_s
        self.k_scales = _scales(config, config.k_scales, device)
        self.v_scales = _scales(config, config.v_scales, device)
        self._triton_store, self._triton_read = _triton_kernels(config, device)
        self.is_closed = False
        self._holding = threading.Lock()
        self._num_holders = 1  # the cache itself, until it is closed
        self._page_was_written = torch.zeros(config.num_pages, dtype=torch.bool)
        # The last that can fail: nobody would give the pages of half a cache back.
        self._spaces = spaces or PageSpaces(device, config.num_bytes)
        self.pages: CachePages | None = self._spaces.take(config)
        self.k_pages, self.v_pages = self.pages.k, self.pages.v
        self.graphs: dict[tuple[object, ...], list[DecodeGraphs]] = {}
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
    def num_pages_written(self) -> int:
        """Pages into which something was stored. Any thread may ask: numpy counts without torch's threads."""
        return int(np.count_nonzero(self._page_was_written.numpy()))

    @property
    def written_pages(self) -> torch.Tensor:
        """Int64, the ids of these pages, rising. Any thread may ask."""
        return torch.from_numpy(np.flatnonzero(self._page_was_written.numpy()))

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs under which the cache was as it is now, this life's last."""
        earlier = () if self.is_used or self.restored is None else self.restored.epochs[1 - MAX_EPOCHS :]
        return (*earlier, self.epoch)

    def renew(self) -> None:
        """Starts the lease again."""
        self.expires_at = time.monotonic() + self.ttl_s

    def close(self) -> None:
        """Frees graphs and, once nobody holds them, pages. On the executor's thread, so that no call is running."""
        with self._holding:
            self.is_closed = True
        for captured in self.graphs.values():
            for graphs in captured:
                graphs.close()
        self.graphs.clear()
        self.k_pages = self.v_pages = torch.empty(0)
        pages, self.pages = self.pages, None
        if pages is not None:
            self._let_go(pages)

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
        self.store_in(self.k_pages[layer], self.v_pages[layer], k, v, stored)

    def store_in(
        self, k_pages: torch.Tensor, v_pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stored: StoredTokens
    ) -> None:
        """As `store`, into any pages like the cache's: those of its space, with slots there."""
        layout = self.config.layout
        if self._triton_store is None:
            store_kv(k_pages, v_pages, k, v, stored, layout, self.k_scales, self.v_scales)
        else:
            self._triton_store(k_pages, v_pages, k, v, stored.slots, layout, self.k_scales, self.v_scales)

    def store_at(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """As `store`, at int64 slots `[num_tokens]` that are looked at when it runs: to be captured. -1 is skipped."""
        skips = self._triton_store is not None
        self.store(layer, k, v, StoredTokens(slots) if skips else stored_tokens(slots, self.device))

    def read(self, layer: int, slot_mapping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V at the slots in `config.dtype`, `[num_tokens, num_kv_heads, head_dim]`. All on the cache's device."""
        read, layout, scales = self._triton_read or read_kv, self.config.layout, (self.k_scales, self.v_scales)
        return read(self.k_pages[layer], self.v_pages[layer], slot_mapping, layout, self.config.dtype, *scales)

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies whole pages in every layer; no page is in both."""
        copy_pages(self.k_pages, self.v_pages, sources.to(self.device), targets.to(self.device))
        self.mark_pages_written(targets)

    def mark_written(self, slot_mapping: torch.Tensor) -> None:
        """Notes the pages of these slots, for `num_pages_written`. On the host; -1 is skipped."""
        self._page_was_written[slot_mapping[slot_mapping >= 0] // self.config.page_size] = True

    def mark_pages_written(self, pages: torch.Tensor) -> None:
        """Notes pages, for `written_pages`. On the host."""
        self._page_was_written[pages] = True

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
                dtype=KV_DTYPES[str(config.dtype).removeprefix("torch.")],
                layout=cache_pb2.Layout.Value(f"LAYOUT_{config.layout.name}"),
                backend=backend_pb2.Backend.Value(f"BACKEND_{config.backend.name}"),
                precision=cache_pb2.Precision.Value(f"PRECISION_{config.precision.name}"),
                kv_dtype=KV_DTYPES[str(config.kv_dtype).removeprefix("torch.")],
                k_scales=float32_tensor(config.k_scales, "k_scales") if config.is_quantised else None,
                v_scales=float32_tensor(config.v_scales, "v_scales") if config.is_quantised else None,
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
    if device.type != "cuda" or availability(device) is not None:
        return _TritonKernels()
    if config.is_quantised and torch.cuda.get_device_capability(device) < MIN_FP8_CAPABILITY:
        return _TritonKernels()
    from attnd_server.kernels import gather, store

    return _TritonKernels(store.store_kv, gather.read_kv)


def _scales(config: AttentionConfig, scales: tuple[float, ...], device: torch.device) -> torch.Tensor | None:
    if not config.is_quantised:
        return None
    return torch.tensor(scales, dtype=torch.float32).expand(config.num_kv_heads).to(device).contiguous()


def _no_such_cache(cache_id: bytes) -> CacheLost:
    return CacheLost(
        f"cache.id is {cache_id.hex() or 'empty'}, but no such cache exists: deleted, expired or never created",
        field="cache.id",
    )


class _Reservation(NamedTuple):
    """Memory of a cache that is being allocated, and whose it will be."""

    principal: str
    num_bytes: int


class CacheTable:
    """All caches of one server. Any thread may call it.

    Attributes:
        epoch: a random number that names this life of the server.
        kv_bytes: bytes that all caches may take.
        share: what one principal may take.
    """

    def __init__(self, config: ServerConfig, device: torch.device, kv_bytes: int) -> None:
        """Starts empty, under a new epoch.

        Args:
            config: the limits.
            device: where pages live.
            kv_bytes: bytes that all caches may take.
        """
        self.epoch = secrets.randbits(63) | 1
        self.kv_bytes = kv_bytes
        self.share = config.principal_limits(kv_bytes)
        self._config = config
        self._device = device
        self._spaces = PageSpaces(device, kv_bytes)
        self._caches: dict[bytes, Cache] = {}
        self._keyed: dict[tuple[str, bytes], Cache] = {}  # by principal and key, those that have one
        self._reserved: dict[object, _Reservation] = {}  # of caches that are being allocated
        self._keeps_all = False
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes that caches take now."""
        return sum(cache.num_bytes for cache in self.all())

    def create(
        self,
        config: AttentionConfig,
        *,
        principal: str,
        ttl_s: float,
        name: str,
        key: bytes = b"",
        restored: Restored | None = None,
    ) -> Cache:
        """Leases a new cache, the one that was made with the same key, or one that was `restored` and is to be filled.

        On the executor's thread.

        Raises:
            InvalidRequest: that one is different.
            Exhausted: too many caches, or not enough memory, of the server or of the principal's share.
        """
        if key and (made := self._keyed.get((principal, key))) is not None:
            if (made.config, made.ttl_s, made.name) != (config, ttl_s, name):
                rule = "must be of one request alone, sent twice: another cache was created with it"
                raise InvalidRequest(f"key is {key.hex()}, but {rule}", field="key")
            made.renew()
            return made
        reservation = object()
        with self._lock:
            self._refuse_if_too_many(principal)
            asked = f"num_pages is {config.num_pages}, which takes"
            used = self._refuse_if_full(principal, config.num_bytes, asked, field="num_pages")
            self._reserved[reservation] = _Reservation(principal, config.num_bytes)
        try:
            cache = Cache(
                config,
                epoch=self.epoch,
                principal=principal,
                ttl_s=ttl_s,
                name=name,
                device=self._device,
                spaces=self._spaces,
                restored=restored,
                key=key,
            )
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            raise Exhausted(
                f"num_pages is {config.num_pages}, which takes {config.num_bytes} bytes: of the server's "
                f"{self.kv_bytes} bytes of KV memory {used} are in use and {self.kv_bytes - used} are free, but "
                f"{self._device} cannot allocate them: {error}",
                field="num_pages",
            ) from None
        finally:
            with self._lock:
                self._reserved.pop(reservation)
        with self._lock:
            self._caches[cache.id] = cache
            if key:
                self._keyed[principal, key] = cache
        return cache

    def reserve(self, cache: Cache, num_bytes: int, purpose: str) -> None:
        """Counts bytes that the graphs of a cache are about to take.

        Raises:
            Exhausted: they are not free; `purpose` says what takes them.
        """
        with self._lock:
            self._refuse_if_full(cache.principal, num_bytes, f"{purpose} takes")
            cache.num_graph_bytes += num_bytes

    def _refuse_if_too_many(self, principal: str) -> None:
        """Refuses one more cache. With the lock."""
        count = len(self._caches) + len(self._reserved)
        own = len(self.owned(principal)) + sum(each.principal == principal for each in self._reserved.values())
        if count >= self._config.max_caches:
            raise Exhausted(f"{count} caches exist, but the server's limit is {self._config.max_caches}; 0 are free")
        if own >= self.share.caches:
            raise Exhausted(
                f"{own} caches of this principal exist, but a principal's limit is {self.share.caches}; 0 are free"
            )

    def _refuse_if_full(self, principal: str, num_bytes: int, asked: str, field: str = "") -> int:
        """Refuses bytes that are not free; `asked` is what takes them. Returns those in use. With the lock."""
        used = self.num_bytes + sum(each.num_bytes for each in self._reserved.values())
        own = sum(cache.num_bytes for cache in self.owned(principal))
        own += sum(each.num_bytes for each in self._reserved.values() if each.principal == principal)
        for whose, limit, taken in (("the server's", self.kv_bytes, used), ("a principal's", self.share.kv_bytes, own)):
            if taken + num_bytes > limit:
                raise Exhausted(
                    f"{asked} {num_bytes} bytes, but of {whose} {limit} bytes of KV memory {taken} are in use and "
                    f"{limit - taken} are free",
                    field=field,
                )
        return used

    def release(self, cache: Cache, num_bytes: int) -> None:
        """Gives back bytes of `reserve`."""
        with self._lock:
            cache.num_graph_bytes -= num_bytes

    def get(self, ref: cache_pb2.CacheRef, principal: str) -> Cache:
        """The cache that `ref` names; its lease starts again.

        Raises:
            EpochMismatch: of an earlier life of the server.
            CacheLost: unknown, deleted, expired or another principal's.
        """
        cache = self._owned(ref.id, principal)
        if ref.epoch != self.epoch:
            fate = "and the KV is gone"
            if cache is not None and cache.restored is not None and ref.epoch in cache.restored.epochs:
                fate = "and has restored this cache: adopt it to go on (cache.adopt() in the clients, AdoptCache)"
            raise EpochMismatch(
                f"cache.epoch is {ref.epoch}, but the server's epoch is {self.epoch}: it was restarted since, {fate}",
                field="cache.epoch",
            )
        if cache is None:
            raise _no_such_cache(ref.id)
        cache.is_used = True
        cache.renew()
        return cache

    def adopt(self, ref: cache_pb2.CacheRef, principal: str) -> Cache:
        """The cache that was restored from what `ref` names, or that it names as it is; its lease starts again.

        Raises:
            EpochMismatch: it was restored from a snapshot of another epoch.
            CacheLost: it was not restored, was deleted since, has expired or is another principal's.
        """
        cache = self._owned(ref.id, principal)
        if cache is None:
            raise _no_such_cache(ref.id)
        restored = cache.restored.epochs if cache.restored is not None else ()
        if ref.epoch not in (*restored, self.epoch):
            snapshot = restored[-1] if restored else self.epoch
            raise EpochMismatch(
                f"cache.epoch is {ref.epoch}, but the cache was restored from a snapshot of epoch {snapshot}, which "
                "may be without what was stored since: create another cache and store again",
                field="cache.epoch",
            )
        cache.renew()
        return cache

    def _owned(self, cache_id: bytes, principal: str) -> Cache | None:
        cache = self._caches.get(cache_id)
        return cache if cache is not None and cache.principal == principal else None

    def delete(self, ref: cache_pb2.CacheRef, principal: str) -> Cache:
        """Frees the cache that `ref` names. On the executor's thread. Raises as `get` does."""
        with self._lock:
            cache = self.get(ref, principal)
            self._forget(cache)
        cache.close()
        return cache

    def all(self) -> list[Cache]:
        """Everybody's caches, oldest first."""
        return list(self._caches.values())

    def owned(self, principal: str) -> list[Cache]:
        """The principal's caches, oldest first."""
        return [cache for cache in self.all() if cache.principal == principal]

    def keep_all(self) -> None:
        """No lease ends any more: nobody can renew one while the server drains, and a snapshot is to have them all."""
        self._keeps_all = True

    def _forget(self, cache: Cache) -> None:
        """With the lock."""
        del self._caches[cache.id]
        self._keyed.pop((cache.principal, cache.key), None)

    def expire(self) -> list[Cache]:
        """Frees the caches whose lease has ended, and returns them. On the executor's thread."""
        if self._keeps_all:
            return []
        now = time.monotonic()
        with self._lock:
            ended = [cache for cache in self._caches.values() if cache.expires_at <= now]
            for cache in ended:
                self._forget(cache)
        for cache in ended:
            log.info(
                "lease ended", extra={"cache": cache.id.hex(), "label": cache.name, "num_bytes": cache.config.num_bytes}
            )
            cache.close()
        return ended

"""All caches of a server: what they may take, whose they are, and when their leases end."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable

import torch

from attnd.errors import CacheLost, EpochMismatch, Exhausted, InvalidRequest
from attnd.v1 import cache_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.config import ServerConfig
from attnd_server.kv.cache import Cache
from attnd_server.kv.cache_shape import CacheShape
from attnd_server.kv.limits import CacheLimits, Holding
from attnd_server.kv.page_spaces import PageSpaces
from attnd_server.kv.restored import Restored

log = logging.getLogger(__name__)


def _no_such_cache(cache_id: bytes) -> CacheLost:
    return CacheLost(
        f"cache.id is {cache_id.hex() or 'empty'}, but no such cache exists: deleted, expired or never created",
        field="cache.id",
    )


def _refuse_if_different(made: Cache, shape: CacheShape[AttentionConfig], ttl_s: float, name: str) -> None:
    """Refuses a request that has the key of another one."""
    if (made.shape, made.ttl_s, made.name) != (shape, ttl_s, name):
        rule = "must be of one request alone, sent twice: another cache was created with it"
        raise InvalidRequest(f"key is {made.key.hex()}, but {rule}", field="key")


class CacheTable:
    """All caches of one server. Any thread may call it.

    Attributes:
        epoch: a random number that names this life of the server.
        kv_bytes: bytes that all caches may take.
        share: what one principal may take.
        created: told of each layer group of a cache that was made, on the executor's thread.
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
        self._limits = CacheLimits(config.max_caches, kv_bytes, self.share)
        self._device = device
        self._spaces = PageSpaces(device, kv_bytes)
        self._caches: dict[bytes, Cache] = {}
        self._keyed: dict[tuple[str, bytes], Cache] = {}  # by principal and key, those that have one
        self._reserved: dict[object, Holding] = {}  # of caches that are being allocated
        self._keeps_all = False
        self.created: Callable[[AttentionConfig], None] = lambda config: None
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes that caches take now."""
        return sum(cache.num_bytes for cache in self.all())

    def create(
        self,
        asked_for: AttentionConfig | CacheShape[AttentionConfig],
        *,
        principal: str,
        ttl_s: float,
        name: str,
        key: bytes = b"",
        restored: Restored | None = None,
    ) -> Cache:
        """Leases a new cache, the one that was made with the same key, or one that was `restored` and is to be filled.

        On the executor's thread. Without layer groups a geometry says all.

        Raises:
            InvalidRequest: that one is different.
            Exhausted: too many caches, or not enough memory, of the server or of the principal's share.
        """
        shape = asked_for if isinstance(asked_for, CacheShape) else CacheShape.of(asked_for)
        if key and (made := self._keyed.get((principal, key))) is not None:
            _refuse_if_different(made, shape, ttl_s, name)
            made.renew()
            return made
        asked, reservation = f"{shape}, which takes", object()
        num_unused_bytes = self._spaces.unused_bytes(shape.groups)
        num_bytes = shape.num_bytes + num_unused_bytes
        with self._lock:
            holdings = self._holdings()
            self._limits.refuse_if_too_many(holdings, principal, len(shape.groups))
            used = self._limits.refuse_if_full(holdings, principal, num_bytes, asked, field="num_pages")
            self._reserved[reservation] = Holding(principal, num_bytes, len(shape.groups))
        try:
            cache = Cache(
                shape,
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
                f"{asked} {num_bytes} bytes: of the server's {self.kv_bytes} bytes of KV memory {used} are in "
                f"use and {self.kv_bytes - used} are free, but {self._device} cannot allocate them: {error}",
                field="num_pages",
            ) from None
        finally:
            with self._lock:
                self._reserved.pop(reservation)
        cache.num_unused_bytes = num_unused_bytes
        with self._lock:
            self._caches[cache.id] = cache
            if key:
                self._keyed[principal, key] = cache
        for config in shape.groups:
            self.created(config)
        return cache

    def reserve(self, cache: Cache, num_bytes: int, purpose: str) -> None:
        """Counts bytes that the graphs of a cache are about to take.

        Raises:
            Exhausted: they are not free; `purpose` says what takes them.
        """
        with self._lock:
            self._limits.refuse_if_full(self._holdings(), cache.principal, num_bytes, f"{purpose} takes")
            cache.num_graph_bytes += num_bytes

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
            if cache is not None and ref.epoch in cache.adoptable_epochs:
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
            EpochMismatch: it was restored from a snapshot of another epoch, or somebody else has adopted it and stored
                into pages that it had then: what is known of these under the earlier epoch is not there any more.
            CacheLost: it was not restored, was deleted since, has expired or is another principal's.
        """
        cache = self._owned(ref.id, principal)
        if cache is None:
            raise _no_such_cache(ref.id)
        restored = cache.restored.epochs if cache.restored is not None else ()
        if ref.epoch not in (*cache.adoptable_epochs, self.epoch):
            if ref.epoch in restored:
                raise EpochMismatch(
                    f"cache.epoch is {ref.epoch}, but since it was restored from that epoch somebody has adopted it "
                    "and stored into pages that it had: create another cache and store again",
                    field="cache.epoch",
                )
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

    def _holdings(self) -> list[Holding]:
        """Who takes what, caches that are being allocated included. With the lock."""
        made = (
            Holding(each.principal, each.num_bytes + each.num_unused_bytes, len(each.groups)) for each in self.all()
        )
        return [*made, *self._reserved.values()]

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
                "lease ended", extra={"cache": cache.id.hex(), "label": cache.name, "num_bytes": cache.shape.num_bytes}
            )
            cache.close()
        return ended

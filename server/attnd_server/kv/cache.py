"""A cache: a lease on the KV memory of its layer groups."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property

import torch

from attnd.errors import CacheLost
from attnd.v1 import cache_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.device.indexed import with_index
from attnd_server.kv.cache_messages import config_message
from attnd_server.kv.cache_shape import CacheShape
from attnd_server.kv.layer_group import LayerGroup
from attnd_server.kv.page_spaces import CachePages, PageSpaces
from attnd_server.kv.restored import Restored

# Of a cache that was restored again and again and never used, how many epochs are kept.
MAX_EPOCHS = 16


class Cache:
    """A lease on KV memory.

    Attributes:
        id: 16 random bytes.
        principal: who it belongs to.
        shape: its layer groups.
        groups: their memory.
        device: of the pages.
        restored: what it was before the server was restarted; None: it is of this life.
        is_used: whether anybody may have changed it in this life of the server.
        is_closed: whether it was deleted or its lease has ended.
        num_graph_bytes: bytes of the device's memory that buffers of its CUDA graphs take, or are about to.
        num_unused_bytes: bytes that its pages take beside their own, and that count against the limits, too.
    """

    def __init__(
        self,
        shape: CacheShape[AttentionConfig],
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
            shape: its layer groups.
            epoch: the server's.
            principal: who it belongs to.
            ttl_s: its lease, in seconds.
            name: for people.
            device: of the pages.
            spaces: of the device; None: the cache lies alone.
            restored: what it was before; None: it is new.
            key: of the request that created it; empty: it had none.
        """
        self.device = device = with_index(device)
        self.id = secrets.token_bytes(16) if restored is None else restored.id
        self.epoch = epoch
        self.restored = restored
        self.is_used = restored is None
        self.principal = principal
        self.shape = shape
        self.name = name
        self.key = key
        self.ttl_s = ttl_s
        self.is_closed = False
        self._holding = threading.Lock()
        self._num_holders = 1  # the cache itself, until it is closed
        changed = None if restored is None else restored.changed
        self.groups = tuple(
            LayerGroup(index, config, layers, device, changed)
            for index, (config, layers) in enumerate(zip(shape.groups, shape.layers, strict=True))
        )
        # The last that can fail: nobody would give the pages of half a cache back.
        self._spaces = spaces or PageSpaces(device, shape.num_bytes)
        self._take()
        self._when_closed: list[Callable[[], None]] = []
        self.num_graph_bytes = self.num_unused_bytes = 0
        self.renew()

    def _take(self) -> None:
        """Takes the pages of all groups, or none."""
        try:
            for group in self.groups:
                group.take(self._spaces)
        except BaseException:
            self._give_back([group.let_go() for group in self.groups])
            raise

    @cached_property
    def _config(self) -> cache_pb2.CacheConfig:
        """That of its info: of hundreds of layer groups it takes milliseconds to say."""
        return config_message(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the device's memory, those of graphs' buffers included."""
        return self.shape.num_bytes + self.num_graph_bytes

    @property
    def num_pages_written(self) -> int:
        """Pages into which something was stored, of all groups. Any thread may ask."""
        self._settle_written()
        return sum(group.num_pages_written for group in self.groups)

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs under which the cache was as it is now, this life's last."""
        earlier = () if self.is_used or self.restored is None else self.restored.epochs[1 - MAX_EPOCHS :]
        return (*earlier, self.epoch)

    @property
    def adoptable_epochs(self) -> tuple[int, ...]:
        """The epochs of earlier lives under which it may be adopted: none once a page that it had then was changed."""
        if self.restored is None:
            return ()
        self._settle_written()
        return self.restored.adoptable_epochs

    def _settle_written(self) -> None:
        for group in self.groups:
            group.settle_written()

    def filled(self) -> None:
        """All that a snapshot has of it lies in its pages now."""
        if self.restored is not None:
            self.restored.filled([group.page_was_written for group in self.groups])

    def renew(self) -> None:
        """Starts the lease again."""
        self.expires_at = time.monotonic() + self.ttl_s

    def close(self) -> None:
        """Frees its pages, once nobody holds them. On the executor's thread, so that no call is running."""
        with self._holding:
            self.is_closed = True
        for listener in list(self._when_closed):
            listener()
        self._when_closed.clear()
        self._let_go([group.let_go() for group in self.groups])

    def when_closed(self, listener: Callable[[], None]) -> None:
        """Lets `close` call a listener, for what was made with the addresses of its pages. On the executor's thread."""
        self._when_closed.append(listener)

    def when_closed_no_more(self, listener: Callable[[], None]) -> None:
        """Takes a listener back, if the cache is not closed yet. From any thread."""
        with suppress(ValueError):
            self._when_closed.remove(listener)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the memory of the pages, for whoever has the device use them while the cache may be closed.

        Calls need not: they run on the thread that closes caches. Raises CacheLost.
        """
        with self._holding:
            self.refuse_if_closed()
            pages = [group.pages for group in self.groups]
            self._num_holders += 1
        try:
            yield
        finally:
            self._let_go(pages)

    def _let_go(self, pages: Sequence[CachePages | None]) -> None:
        """One holder fewer; `close` is the last but those of `held`."""
        if None in pages:  # it was closed before
            return
        with self._holding:
            self._num_holders -= 1
            is_last = not self._num_holders
        if is_last:
            self._give_back(pages)

    def _give_back(self, pages: Sequence[CachePages | None]) -> None:
        for group, each in zip(self.groups, pages, strict=True):
            if each is not None:
                self._spaces.give_back(each, group.config)

    def refuse_if_closed(self) -> None:
        """Raises CacheLost once the cache was deleted or its lease has ended."""
        if self.is_closed:
            raise CacheLost(
                f"cache {self.id.hex()} was deleted, or its lease of {self.ttl_s:g} s has ended", field="cache.id"
            )

    def info(self, *, with_id: bool = True) -> cache_pb2.CacheInfo:
        """The cache as its owner sees it."""
        return cache_pb2.CacheInfo(
            cache=cache_pb2.CacheRef(id=self.id if with_id else b"", epoch=self.epoch),
            config=self._config,
            ttl_s=self.ttl_s,
            expires_in_s=max(0.0, self.expires_at - time.monotonic()),
            num_bytes=self.shape.num_bytes,
            num_pages_written=self.num_pages_written,
            name=self.name,
            awaits_adoption=not self.is_used,
        )

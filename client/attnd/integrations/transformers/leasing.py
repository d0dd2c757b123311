"""What a RemoteCache and its forks have in common: the server's memory, and the pages of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from attnd.errors import AttndError, CacheLost, InvalidRequest
from attnd.pages import PagePool

if TYPE_CHECKING:
    from attnd.cache import Cache


def pages_for(max_tokens: int, page_size: int, field: str = "max_tokens") -> int:
    """Pages that hold so many tokens. Raises InvalidRequest if that is none."""
    for name, value in ((field, max_tokens), ("page_size", page_size)):
        if value < 1:
            raise InvalidRequest(f"{name} is {value}, but must be at least 1", field=name)
    return -(-max_tokens // page_size)


class Leasing:
    """A lease that is freed when the last of those that share it has gone.

    Attributes:
        cache: the server's. Another one after it was lost and leased again.
        pool: its pages.
        generation: how often it was leased again: what a sharer stored before that is lost.
        lock: of the pool.
    """

    def __init__(self, create: Callable[[], Cache], num_pages: int, page_size: int) -> None:
        """Leases, for one sharer."""
        self._create = create
        self.cache = create()
        self.pool = PagePool(num_pages, page_size)
        self.generation = 0
        self.lock = threading.RLock()
        self._num_sharers = 1

    @property
    def is_shared(self) -> bool:
        """Whether several have it."""
        return self._num_sharers > 1

    def renew_pool(self) -> PagePool:
        """All pages are free, whatever happened before. For the only one that has it."""
        self.pool = PagePool(self.pool.num_pages, self.pool.page_size)
        return self.pool

    def share(self) -> None:
        """Another one has it from now on."""
        with self.lock:
            self._num_sharers += 1

    def release(self) -> None:
        """One fewer has it. The last one frees the server's memory; a server that is away, or has lost it, is fine."""
        with self.lock:
            self._num_sharers -= 1
            is_last = self._num_sharers == 0
        if is_last:
            try:
                self.cache.delete()
            except (CacheLost, ConnectionError, TimeoutError):
                pass

    def release_quietly(self) -> None:
        """As `release`, for a thread that nobody asks what went wrong; the server frees what is not renewed."""
        try:
            self.release()
        except AttndError:
            pass

    def lease_again(self) -> None:
        """Another lease in the place of one that was lost. Raises as `create_cache`."""
        self.cache = self._create()
        self.generation += 1

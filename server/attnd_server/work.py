"""What an executor is given to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

Work = Callable[[], bytes]
Done = Callable[[bytes | None, BaseException | None], None]


class CacheWork(ABC):
    """Work on one cache: what came before it for the same cache runs before it, others' caches have turns between."""

    @abstractmethod
    def cache_id(self) -> bytes:
        """The cache's id."""

    @abstractmethod
    def __call__(self) -> bytes:
        """The work."""


@dataclass(frozen=True, eq=False)
class OnCache(CacheWork):
    """Any work on one cache.

    Attributes:
        id: of the cache.
        work: the work.
    """

    id: bytes
    work: Work

    def cache_id(self) -> bytes:
        """The cache's id."""
        return self.id

    def __call__(self) -> bytes:
        """Does it."""
        return self.work()


class LongWork(ABC):
    """Work that takes seconds, for which others need not wait: it runs on a thread beside the executor's.

    One at a time. What needs the device to itself, it does by `Executor.take_turn`, in short pieces.
    """

    @abstractmethod
    def __call__(self) -> bytes:
        """The work."""


class Cancelled(Exception):
    """Nobody waits for the work any more, so it was not started."""

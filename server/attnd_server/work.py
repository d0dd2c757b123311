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


class SharedWork(CacheWork):
    """Work that can be done together with others like it, of other caches, if they wait at the same time."""

    @abstractmethod
    def joiner(self) -> Callable[[Work], bool] | None:
        """What says of other work if it can be done with this one and with all that it said yes to; None: none can.

        On the executor's thread, as the rest.
        """

    @abstractmethod
    def with_others(self, works: list[SharedWork], queue_us: list[int]) -> list[bytes | Exception]:
        """Does several works at once that `joiner` said yes to, or some of them.

        Args:
            works: of different caches.
            queue_us: microseconds that each waited.

        Returns:
            What each gives, or the error that it ends with.
        """


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

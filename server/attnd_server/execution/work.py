"""What an executor is given to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Work = Callable[[], bytes]
Done = Callable[[bytes | None, BaseException | None], None]


class CacheWork(ABC):
    """Work on one cache: what came before it for the same cache runs before it, others' caches have turns between."""

    @abstractmethod
    def cache_id(self) -> bytes:
        """The cache's id."""

    @abstractmethod
    def principal(self) -> str:
        """Whose cache it is."""

    @abstractmethod
    def __call__(self) -> bytes:
        """The work."""


class Group(Protocol):
    """Works that can be done together."""

    def takes(self, work: Work) -> bool:
        """Adds another if it can be done with all that are there."""

    @property
    def is_worth_it(self) -> bool:
        """Whether that takes less time than each alone."""


class SharedWork(CacheWork):
    """Work that can be done together with others like it, of other caches, if they wait at the same time."""

    @abstractmethod
    def group(self) -> Group | None:
        """A group with this work alone; None: it is done alone. With the device, as the rest."""

    @abstractmethod
    def with_others(self, works: list[SharedWork], queue_us: list[int]) -> list[bytes | Exception]:
        """Does several works of a group at once, all or some.

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
        owner: whose cache it is.
    """

    id: bytes
    work: Work
    owner: str = ""

    def cache_id(self) -> bytes:
        """The cache's id."""
        return self.id

    def principal(self) -> str:
        """Whose cache it is."""
        return self.owner

    def __call__(self) -> bytes:
        """Does it."""
        return self.work()


@dataclass(frozen=True, eq=False)
class NewCache(CacheWork):
    """The work of making a cache, which has no id yet: those of one principal wait behind each other.

    Attributes:
        owner: whose it will be.
        work: the work.
    """

    owner: str
    work: Work

    def cache_id(self) -> bytes:
        """What no cache has for an id."""
        return b"new cache of " + self.owner.encode()

    def principal(self) -> str:
        """Whose it will be."""
        return self.owner

    def __call__(self) -> bytes:
        """Does it."""
        return self.work()


class LongWork(ABC):
    """Work that takes seconds, for which others need not wait: it runs on a thread beside the executor's.

    One at a time. What needs the device to itself, it does by `Executor.take_turn`, in short pieces.
    """

    @abstractmethod
    def principal(self) -> str:
        """Whose it is."""

    @abstractmethod
    def __call__(self) -> bytes:
        """The work."""


class Cancelled(Exception):
    """Nobody waits for the work any more, so it was not started."""

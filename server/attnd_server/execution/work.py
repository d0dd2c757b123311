"""What an executor is given to do, beside calls."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from attnd_server.execution.step import Call
from attnd_server.kv.cache import Cache

# Stands for the cache of what belongs to none: the turns of warm-ups.
NO_CACHE = b""

Done = Callable[[bytes | None, BaseException | None], None]
"""Gets the result of some work, or its error."""


@dataclass(frozen=True, eq=False)
class CacheWork:
    """Work on one cache: what came before it for the same cache runs before it, others' caches have turns between.

    Attributes:
        cache_id: of the cache.
        principal: whose cache it is.
        work: the work.
    """

    cache_id: bytes
    principal: str
    work: Callable[[], bytes]

    def __call__(self) -> bytes:
        """Does it."""
        return self.work()


Pieces = Generator[None, None, bytes]
"""Work that stops between its pieces, and gives its result in the end."""


@dataclass(frozen=True, eq=False)
class WorkInPieces:
    """As CacheWork, but others have turns between its pieces. Once it was begun it goes on to its end.

    Attributes:
        cache_id: of the cache.
        principal: whose cache it is.
        work: begins the work, each piece of which takes some tenths of a second at most.
    """

    cache_id: bytes
    principal: str
    work: Callable[[], Pieces]

    def __call__(self) -> bytes:
        """Does all of it at once."""
        return run_all(self.work())


def run_all(pieces: Pieces) -> bytes:
    """Does what is left of some work."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: bytes = end.value
            return result


@dataclass(frozen=True, eq=False)
class SideWork:
    """Work that takes seconds, for which others need not wait: it runs on a thread beside the executor's.

    One at a time. What needs the device to itself, it does by `Executor.take_turn`, in short pieces.

    Attributes:
        principal: whose it is.
        work: the work.
    """

    principal: str
    work: Callable[[], bytes]

    def __call__(self) -> bytes:
        """Does it."""
        return self.work()


Work = Call | CacheWork | WorkInPieces | SideWork | Callable[[], bytes]
"""The executor attends a call; the rest it calls."""


@dataclass(eq=False)
class Job:
    """A piece of work that waits.

    Attributes:
        work: what to do.
        done: gets its result or its error.
        deadline: `time.monotonic()` after which it is not started.
        submitted_at: `time.perf_counter()`.
        is_wanted: asked before it starts, and between its pieces: whether anybody still waits for it; raises
            AttndError: it may not go on. None: somebody does, and it may.
        rest: what is left of it, if it runs in pieces and was begun.
        ran_s: seconds for which it has had the device, if it runs in pieces.
        is_cancelled: whether it is to end before its next piece.
        cache_id: the cache in whose queue it waits.
        principal: whose it is; "" of what is nobody's.
    """

    work: Work
    done: Done
    deadline: float
    submitted_at: float
    is_wanted: Callable[[], bool] | None = None
    rest: Pieces | None = None
    ran_s: float = 0.0
    is_cancelled: bool = False
    cache_id: bytes = field(default=NO_CACHE, init=False)
    principal: str = field(default="", init=False)

    def __post_init__(self) -> None:
        """Asks its work, once."""
        if isinstance(self.work, (Call, CacheWork, WorkInPieces)):
            self.cache_id, self.principal = self.work.cache_id, self.work.principal


def on_cache(cache: Cache, work: Callable[[], bytes]) -> CacheWork:
    """Work on a cache that exists."""
    return CacheWork(cache.id, cache.principal, work)


def new_cache(principal: str, work: Callable[[], bytes]) -> CacheWork:
    """The work of making a cache, which has no id yet: those of one principal wait behind each other."""
    return CacheWork(b"new cache of " + principal.encode(), principal, work)


class Cancelled(Exception):
    """Nobody waits for the work any more, so it was not started."""

"""What a session on a cuda plane computes on: shared memory, a stream, and hand-overs between the two sides."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from attnd.protocol.cuda.layout import Place


class Flags(Protocol):
    """One side of the hand-overs: `HostFlags` or `GateFlags`."""

    is_stopped: bool

    def close(self) -> None:
        """Frees what this side has of its own."""

    def wait(self, stream: int, layer: int, is_last: bool) -> None:
        """Lets `stream` wait until the worker has handed over a layer."""

    def signal(self, stream: int, layer: int, is_last: bool) -> None:
        """Tells the worker that what `stream` did so far is done."""

    def stop(self) -> None:
        """Lets everything that waits go on. To be called again until the stream is idle."""


class Channel(Protocol):
    """What a session computes on.

    Attributes:
        num_bytes: of the region.
        flags: of this side.
        handle: the stream, for the flags.
        capture: runs launches on the stream in a way that only records them, and returns what launches them all at
            once; None: there is no such thing.
    """

    num_bytes: int
    flags: Flags
    handle: int
    capture: Callable[[Callable[[], None]], Callable[[], None]] | None

    def tensor(self, place: Place) -> torch.Tensor:
        """A tensor that the worker has, too."""

    def current(self) -> AbstractContextManager[object]:
        """Makes the stream the calling thread's current one, after all that was enqueued on the one before."""

    def mark(self) -> Callable[[], None]:
        """What waits until all that was enqueued up to now is done."""

    def drain(self) -> None:
        """Lets go of what waits for the worker, until the stream is idle."""

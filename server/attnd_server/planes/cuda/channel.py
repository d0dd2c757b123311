"""What a session on a cuda plane computes on: shared memory, a stream, and hand-overs between the two sides."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt
import torch

from attnd.protocol.cuda.layout import Place
from attnd_server.planes.cuda.resident.books import Books


class Gates(Protocol):
    """The gates of a session's resident steps; see `gates.ResidentGates`."""

    def begin(self, stream: int) -> None:
        """Waits for a step, or until the launch is revoked."""

    def wait(self, stream: int) -> None:
        """Waits until the worker has handed over the next layer."""

    def signal(self, stream: int) -> None:
        """Tells the worker that the layer is done."""

    def end(self, stream: int) -> None:
        """Tells the worker that the last layer is done, and how the step went."""

    def resume(self, stream: int) -> None:
        """No step was refused any more."""


class Resident(NamedTuple):
    """What a channel has for resident steps.

    Attributes:
        gates: of the session.
        books: of the session.
        wake: reads the low 32 bits of the number of the last step that the worker has counted.
    """

    gates: Gates
    books: Books
    wake: Callable[[], int]


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
            once, on the current stream; None: there is no such thing.
        capture_for: likewise, but they are launched on the stream, whatever is current.
    """

    num_bytes: int
    flags: Flags
    handle: int
    capture: Callable[[Callable[[], None]], Callable[[], None]] | None
    capture_for: Callable[[Callable[[], None]], Callable[[], None]] | None

    def tensor(self, place: Place) -> torch.Tensor:
        """A tensor that the worker has, too."""

    def alone(self) -> AbstractContextManager[object]:
        """Makes the stream the calling thread's current one, whatever was enqueued elsewhere."""

    def host_copy(self, tensor: torch.Tensor) -> npt.NDArray[Any]:
        """A copy of a tensor of the server's on the host, of what lies there now. On any thread."""

    def resident(self, state: torch.Tensor, word: int) -> Resident:
        """What resident steps need of it, for their private words and the offset of the region where they are counted.

        Raises:
            Unsupported: it has no such thing; the message says why.
        """

    def current(self) -> AbstractContextManager[object]:
        """Makes the stream the calling thread's current one, after all that was enqueued on the one before."""

    def mark(self) -> Callable[[], None]:
        """What waits until all that was enqueued up to now is done."""

    def drain(self) -> None:
        """Lets go of what waits for the worker, until the stream is idle."""

"""The threads among which torch divides a large operation on the processor: each thread that calls it has its own."""

from __future__ import annotations

import torch

# More than torch leaves to one thread.
_DIVIDED_ELEMENTS = 1 << 16


def open_team() -> None:
    """Starts the calling thread's others now, as many as `torch.set_num_threads` has told.

    OpenMP would start them at the first large operation, and it ends the process if the system refuses a thread. The
    first may be the making of a cache for which there is no memory, and that is to be refused alone.
    """
    torch.zeros(_DIVIDED_ELEMENTS, dtype=torch.bool)

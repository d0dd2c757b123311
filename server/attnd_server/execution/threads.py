"""What torch is told on the threads that run calls."""

from __future__ import annotations

import threading

import torch

from attnd_server.device.machine import num_cores
from attnd_server.device.team import open_team


class ThreadSettings:
    """Torch's settings of the server's threads, as opposed to those of callers of `inproc://`."""

    def __init__(self, num_threads: int) -> None:
        """Calls compute with so many threads each."""
        self._num_threads = num_threads
        self._here = threading.local()

    @property
    def are_here(self) -> bool:
        """Whether the calling thread has them."""
        return getattr(self._here, "are_set", False)

    def prepare(self, opens_team: bool = False) -> None:
        """Sets them for the calling thread; with `opens_team`, one that runs large operations, see `open_team`."""
        self._here.are_set = True
        torch.set_grad_enabled(False)
        torch.set_num_threads(self._num_threads)
        if opens_team:
            open_team()


def default_threads(device: torch.device) -> int:
    """Of a call on the processor. With a GPU it only fills buffers, and to wake threads for that takes longer."""
    return 1 if device.type == "cuda" else max(1, num_cores() // 2)

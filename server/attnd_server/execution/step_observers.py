"""Who sees what became of one step: counts of whoever sent it, and its trace."""

from __future__ import annotations

from typing import Protocol

from attnd_server.device.copy_timer import Copies


class StepCounts(Protocol):
    """Counts the calls of a step for whoever asks whose they were.

    Attributes:
        calls: that were served. To add one is all that most calls pay.
    """

    calls: int

    def time(self, queue_us: int, copies: Copies, kernel_us: int) -> None:
        """Takes the times of a call."""


class StepTrace(Protocol):
    """Notes how long the parts of a step take, whose client has asked for a trace."""

    def planned(self, began_ns: int) -> None:
        """A plan was made since then, `time.time_ns`."""

    def call_served(self, layer: int, queue_us: int, kernel_us: int, copies: Copies, backend: str) -> None:
        """A call was served."""

    def step_served(self, queue_us: int, step_us: int, backend: str) -> None:
        """The whole step was served, which came as one message."""

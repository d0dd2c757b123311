"""What a session is told of its resident steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepsDone:
    """What the books tell of steps that ended since the last look.

    Attributes:
        count: of them.
        num_reqs: requests of the last one; 0: it was refused.
        step_us: microseconds of the last one, from the moment in which it came.
    """

    count: int
    num_reqs: int
    step_us: int


@dataclass(frozen=True)
class Told:
    """What a session is told.

    Attributes:
        done: of steps that are done; on the launches' thread.
        refused: the number of the first step that was refused; likewise.
        failed: why there will be no more launches; on any thread.
    """

    done: Callable[[StepsDone], None]
    refused: Callable[[int], None]
    failed: Callable[[Exception], None]

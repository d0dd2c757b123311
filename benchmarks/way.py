"""One way of computing a step, to be timed beside others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Call = Callable[[int], Any]
"""Computes a layer and returns its output, or the echo of one."""


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        name: for people.
        open: starts a step; what it returns makes the calls of its layers.
        floor: names of the ways that it cannot be faster than, together.
        cache: where it stores, with `store_kv` and `read_kv`; None for an echo.
        session: where the server's own times are; None if nowhere.
        finish: waits for the calls of a step; None: each call ends when it has its output.
        num_steps: steps that follow each other before `finish`, and of which the times are an average.
        limit: name of the way that does the same with nothing but the transport around it; "": none does.
        beside: name of the backend's way that its step is compared with; "": the one that waits for the device once.
    """

    name: str
    open: Callable[[], Call]
    floor: tuple[str, ...] = ()
    cache: Any = None
    session: Any = None
    finish: Callable[[], None] | None = None
    num_steps: int = 1
    limit: str = ""
    beside: str = ""


@dataclass
class Ways:
    """All ways of computing one step.

    Attributes:
        ways: that can be timed.
        reasons: by the name of each plane that cannot be had, why.
    """

    ways: list[Way] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

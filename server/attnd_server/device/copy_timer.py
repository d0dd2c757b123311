"""How long the copies of a call took on a GPU, without waiting for it once more than the call does."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch


class Copies(NamedTuple):
    """What the copies of a call took.

    Attributes:
        in_us: microseconds to bring its tensors to the device.
        out_us: microseconds to bring its results back.
    """

    in_us: int
    out_us: int


# Where the device computes in place.
NO_COPIES = Copies(0, 0)


# Launches that take a GPU longer than the host takes to make two copies and the marks around them.
_LAUNCHES_BEFORE = 8


def timed_behind(
    launch: Callable[[], None], fetch: Callable[[], None], send: Callable[[], None], device: torch.device
) -> Copies:
    """What the copies of a captured launch take by themselves. Waits for the GPU.

    Args:
        launch: made before: what the GPU finds in its queue takes its own time, and not the host's between two of them.
        fetch: starts the copies to the device.
        send: starts those back.
        device: the GPU.
    """
    stream = torch.cuda.current_stream(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    for _ in range(_LAUNCHES_BEFORE):
        launch()
    for event, copies in zip(events, (fetch, send, None), strict=True):
        event.record(stream)
        if copies is not None:
            copies()
    events[-1].synchronize()
    in_us, out_us = (round(_us(first, last)) for first, last in pairwise(events))
    return Copies(in_us, out_us)


class CopyTimer:
    """Times one call on a GPU, from the moment when it is made.

    The call marks where one part ends and the next begins: the device notes when it comes to a mark, the host when it
    sets it. What the device noted is read once the call has waited for its results, which it does anyway.
    """

    def __init__(self, device: torch.device) -> None:
        """The call begins."""
        self._stream = torch.cuda.current_stream(device)
        self._events: list[torch.cuda.Event] = []
        self._marked_at: list[float] = []
        self._started = time.perf_counter()

    def mark(self) -> None:
        """A part of the call has been launched, and the next follows."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        self._events.append(event)
        self._marked_at.append(time.perf_counter())

    def staged(self) -> Copies:
        """Of a call with pinned buffers, whose marks enclose the copy to the device and that from there.

        In is the host's copy to the buffer and the device's from there; out is the device's copy to its buffer.
        """
        before_in, after_in, before_out, after_out = self._events
        host_us = (self._marked_at[0] - self._started) * 1e6
        return Copies(round(host_us + _us(before_in, after_in)), round(_us(before_out, after_out)))

    def waited(self) -> Copies:
        """Of a call that waited for its results, with marks around the copies to the device and behind its kernels.

        Out is what these leave of the host's time until now.
        """
        _, after_in, after_kernels = self._events
        total_us = (time.perf_counter() - self._started) * 1e6
        in_us = self._in_us()
        return Copies(round(in_us), max(0, round(total_us - in_us - _us(after_in, after_kernels))))

    def copied(self) -> Copies:
        """Of a call without results, with marks around the copies to the device: waits until these are done.

        Whoever hears of the call's end may write to the memory that they come from.
        """
        self._events[1].synchronize()
        return Copies(round(self._in_us()), 0)

    def _in_us(self) -> float:
        """The host's time for the copies, or the device's: from pinned memory the host only starts them."""
        before_in, after_in, *_ = self._events
        return max((self._marked_at[1] - self._started) * 1e6, _us(before_in, after_in))


def _us(first: torch.cuda.Event, last: torch.cuda.Event) -> float:
    milliseconds: float = first.elapsed_time(last)
    return milliseconds * 1e3

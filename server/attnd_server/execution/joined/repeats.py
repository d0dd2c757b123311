"""Runs repeats of several callers in one launch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.config import ServerConfig
from attnd_server.device.copy_timer import Copies
from attnd_server.device.faults import DeviceFaults
from attnd_server.execution.batch import Batch, shareable
from attnd_server.execution.joined.graphs import JoinedGraphs
from attnd_server.execution.joined.repeat import Repeat, Repeatable, Repeated
from attnd_server.execution.step import Call
from attnd_server.execution.step_observers import StepCounts

log = logging.getLogger(__name__)


class RepeatObserver(Protocol):
    """Sees repeats that ran. With the device."""

    def takes_one_of(self, num_calls: int) -> bool:
        """Whether one of the next calls, so many, is to be looked at by itself; if not, they count as not looked at."""

    def served_alike(self, repeats: Sequence[Repeat], result: Repeated) -> None:
        """They have run, none of which had waited."""


def repeatable(call: Call, backend: AttentionBackend, ops: TritonAttentionOps) -> Repeatable | None:
    """What is known of a call that `backend` has run, for its repeats; None: each is to be looked at by itself."""
    if call.at is None or call.into is None or call.is_sampled or call.step.trace is not None:
        return None
    found = shareable(call, ops)
    if found is None:
        return None
    received, sent = (
        sum(0 if each is None else each.nbytes for each in tensors) for tensors in ((call.q, call.k, call.v), call.into)
    )
    return Repeatable(call, backend, found, call.at, received, sent)


class Repeats:
    """Runs repeats of several callers together. With the device."""

    def __init__(
        self,
        graphs: JoinedGraphs,
        ops: TritonAttentionOps,
        limits: ServerConfig,
        faults: DeviceFaults,
        observer: RepeatObserver | None,
        count: Callable[[StepCounts | None, int, Copies, int], None],
    ) -> None:
        """Of a runner, whose these are."""
        self._graphs, self._ops, self._limits, self._faults, self._observer = graphs, ops, limits, faults, observer
        self._count = count

    def run(self, repeats: Sequence[Repeat]) -> Repeated | None:
        """Attends and stores all; None: none was begun, each is to be looked at by itself."""
        try:
            return self._run(repeats)
        except Exception as fault:
            # Alone each is told its own, as `Runner` does it.
            self._faults.look_at(fault)
            log.warning("%d repeated calls cannot run together", len(repeats), exc_info=fault)
            return None

    def _run(self, repeats: Sequence[Repeat]) -> Repeated | None:
        if self._faults.reason or not self._go_together(repeats):
            return None
        graph = self._graphs.find([each.of.call for each in repeats], repeats[0].of.shareable.key)
        if graph is None or any(each.of.backend is not graph.backend for each in repeats):
            return None
        if self._observer is not None and self._observer.takes_one_of(len(repeats)):
            return None
        started = time.perf_counter()
        copies = graph.attend_repeats(repeats)
        kernel_us = max(0, int((time.perf_counter() - started) * 1e6) - sum(copies))
        result = Repeated(graph.backend, copies, kernel_us)
        if self._observer is not None:
            self._observer.served_alike(repeats, result)
        for each in repeats:
            self._count(each.of.call.step.counts, 0, copies, kernel_us)
        return result

    def _go_together(self, repeats: Sequence[Repeat]) -> bool:
        """Whether one launch may have all of them. Of a cache it has one: a second may need what the first leaves."""
        first, *others = (each.of.shareable for each in repeats)
        batch = Batch(first, self._ops, self._limits)
        if not all(batch.adds(each) for each in others):
            return False
        caches = {each.of.call.step.cache.id for each in repeats}
        return len(caches) == len(repeats) and not any(each.of.call.step.cache.is_closed for each in repeats)

"""Which classes of joined launches there are, and which of them serves calls that came together."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any

from cachetools import LRUCache

from attnd_server.attention.backends.base import DecodeShape, PlansOnDevice
from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.device.faults import is_device_fault
from attnd_server.device.kernels.launch import KernelMissing
from attnd_server.device.memory import is_memory_error
from attnd_server.execution.by_options import ShareKey
from attnd_server.execution.decode_graphs import Capture
from attnd_server.execution.joined.graph import JoinedGraph
from attnd_server.execution.step import Call

log = logging.getLogger(__name__)

# Calls of a launch: many more than fill any device. A byte says of a request which one it is of.
MAX_CALLS = 64
# Of the classes, each so many times the one before: what a launch costs depends little on what it has room for.
REQS, PAGES = (16, 64, 256, 1024), (64, 256, 1024, 4096)
# Launches that a class must have been asked for before it is made: options may never come again. And how many times the
# time that one took passes before another is made: whoever asks for ever new ones costs others little.
ASKED_BEFORE, PAUSE = 3, 20
# Bytes of the device that all classes may take, and one. They are no cache's, so no quota counts them.
MOST_BYTES, MOST_CLASS_BYTES = 768 << 20, 256 << 20


class JoinedGraphs:
    """The classes of a device. With the device."""

    def __init__(self, ops: TritonAttentionOps, capture: Capture | None) -> None:
        """None yet.

        Args:
            ops: the backends of the device.
            capture: captures launches; None: there are no graphs on the device.
        """
        self._ops, self._capture = ops, capture
        self._graphs: LRUCache[tuple[object, ...], JoinedGraph] = LRUCache(MOST_BYTES, lambda graph: graph.num_bytes)
        # Why there is no such class, and what one waits for that is not there yet.
        self._refused: LRUCache[tuple[object, ...], str] = LRUCache(256)
        self._missing: LRUCache[tuple[object, ...], Future[Any]] = LRUCache(256)
        self._asked: LRUCache[tuple[object, ...], int] = LRUCache(256)
        self._next_at = 0.0  # `time.monotonic` from which on another may be made

    def find(self, calls: Sequence[Call], key: ShareKey) -> JoinedGraph | None:
        """What serves calls that share a launch, made if need be; None: there is no such class, or not yet."""
        if self._capture is None:
            return None
        num_reqs = sum(call.step.metadata.num_reqs for call in calls)
        longest = max(call.step.metadata.max_context_len for call in calls)
        page_size = calls[0].step.group.config.page_size
        num_pages = -(-longest // page_size) + margin_of(page_size)
        max_reqs = next((most for most in REQS if most >= num_reqs), 0)
        max_pages = next((most for most in PAGES if most >= num_pages), 0)
        if not (max_reqs and max_pages):
            return None
        of_class = (key.rest, max_reqs, max_pages)
        graph = self._graphs.get(of_class)
        if graph is None and self._is_due(of_class):
            started = time.monotonic()
            try:
                return self._make(of_class, calls[0], max_reqs, max_pages)
            finally:
                now = time.monotonic()
                self._next_at = now + PAUSE * (now - started)
        return graph

    def _is_due(self, of_class: tuple[object, ...]) -> bool:
        """Whether a class is to be made that is asked for once more."""
        if of_class in self._refused:
            return False
        self._asked[of_class] = asked = self._asked.get(of_class, 0) + 1
        missing = self._missing.get(of_class)
        is_there = missing is None or missing.done()
        return is_there and asked > ASKED_BEFORE and time.monotonic() >= self._next_at

    def _make(self, of_class: tuple[object, ...], call: Call, max_reqs: int, max_pages: int) -> JoinedGraph | None:
        """A new class; None: there is none, or a kernel is not there yet."""
        try:
            made = self._made(call, max_reqs, max_pages)
        except KernelMissing as missing:
            self._missing[of_class] = missing.ready
            return None
        except Exception as error:
            if is_device_fault(error) or not is_memory_error(error):
                raise
            made = str(error)
        if isinstance(made, str):
            log.info("calls share launches that are no graphs: %s", made)
            self._refused[of_class] = made
            return None
        self._graphs[of_class] = made
        return made

    def _made(self, call: Call, max_reqs: int, max_pages: int) -> JoinedGraph | str:
        """A class that serves a call, or why there is none."""
        assert self._capture is not None
        group, metadata = call.step.group, call.step.metadata
        assert group.pages is not None
        kernel, config = self._ops.choose(group.config, metadata, call.options), group.pages.space.config
        if not isinstance(kernel, PlansOnDevice):
            return "its kernels are planned on the host"
        query_len = metadata.num_tokens // metadata.num_reqs
        shape = DecodeShape(max_reqs, query_len, max_pages * config.page_size)
        num_bytes = kernel.device_plan_bytes(config, shape, call.options, group.device)
        if isinstance(num_bytes, str):
            return num_bytes
        if num_bytes > MOST_CLASS_BYTES:
            return f"its plan takes {num_bytes} bytes, but may take at most {MOST_CLASS_BYTES}"
        step = kernel.device_step(config, shape, group.device)
        plan = kernel.device_plan(config, shape, call.options, step)
        if isinstance(plan, str):
            return plan
        margin = margin_of(config.page_size)
        graph = JoinedGraph(group, call.options, kernel.backend, shape, plan, step, max_calls=MAX_CALLS, margin=margin)
        graph.make(self._capture)
        return graph

    def forget(self) -> None:
        """Keeps no class of a space in which nothing lies any more."""
        for of_class, graph in list(self._graphs.items()):
            if graph.is_over:
                del self._graphs[of_class]


@cache  # asked for with every launch
def margin_of(page_size: int) -> int:
    """Columns of a page table past a context that kernels look at, and never use."""
    from attnd_server.attention.kernels.items import PREFETCHED
    from attnd_server.attention.kernels.launch_shapes import HOPPER_KEYS

    return -(-HOPPER_KEYS // page_size) + PREFETCHED

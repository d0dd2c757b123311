"""Makes decode steps of a cache ready before the first of them comes: compiles, captures, and says how it went."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch

from attnd.errors import AttndError
from attnd.threads import start_thread
from attnd.v1 import attention_pb2, backend_pb2
from attnd_server.attention.backends.base import AttentionKernel, DecodeShape
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import decode_step
from attnd_server.attention.warming_up import this_thread_warms_up
from attnd_server.config import ServerConfig
from attnd_server.device.faults import is_device_fault
from attnd_server.device.kernels.launch import collecting
from attnd_server.device.kernels.loading import num_standing_in
from attnd_server.device.memory import is_memory_error
from attnd_server.execution.decode_graphs import Capture, DecodeGraphs, buffer_bytes
from attnd_server.execution.executor import Executor
from attnd_server.identity import refuse_if_revoked
from attnd_server.kv.cache import Cache
from attnd_server.kv.caches import CacheTable
from attnd_server.kv.layer_group import LayerGroup
from attnd_server.service.validation.warm_ups import WarmSteps

# Each size of batch is so many times the one before, from 1 on. A call copies what it brings of q and gets of output,
# but k and v of the whole size.
SIZE_STEP = 4
# Graphs of one cache: for every layer of a big model with a few kinds of steps. What the driver holds for a graph is
# not among the bytes that are counted.
MAX_GRAPHS = 8_192

log = logging.getLogger(__name__)


def batch_sizes(max_reqs: int) -> list[int]:
    """The sizes of batches that graphs are captured for; the last is `max_reqs`."""
    sizes = []
    size = 1
    while size < max_reqs:
        sizes.append(size)
        size *= SIZE_STEP
    return [*sizes, max_reqs]


def shapes_of(steps: WarmSteps, config: AttentionConfig, limits: ServerConfig) -> list[DecodeShape]:
    """A shape for each size of batch. Contexts are as long as asked, as the pages hold and as page tables may be."""
    shapes = []
    for num_reqs in batch_sizes(steps.max_reqs):
        num_pages = min(config.num_pages, limits.max_page_table_elements // num_reqs)
        longest = min(num_pages * config.page_size, limits.max_context_len)
        shapes.append(DecodeShape(num_reqs, steps.query_len, min(steps.max_context_len or longest, longest)))
    return shapes


class _Nothing(Exception):
    """There is nothing to capture, or it cannot be; the text says why."""


class WarmUp:
    """One warm-up of a layer group of a cache."""

    def __init__(
        self,
        executor: Executor,
        caches: CacheTable,
        cache: Cache,
        group: LayerGroup,
        steps: WarmSteps,
        limits: ServerConfig,
        principal: str,
    ) -> None:
        """Nothing is made yet. It ends when the token of `principal` goes."""
        self._executor = executor
        self._caches = caches
        self._cache = cache
        self._group = group
        self._principal = principal
        self._options = steps.options
        self._shapes = shapes_of(steps, group.config, limits)
        self._made: list[DecodeGraphs] = []  # captured, and their bytes counted, but not in use yet
        self._stood_in = False  # whether kernels may have been captured that are in the second context for now

    def __call__(self) -> bytes:
        """Makes what is not there yet. Answers the WarmUpResponse.

        Raises:
            Unsupported: the steps cannot be served at all.
            Exhausted: the memory is not free.
            CacheLost: the cache was closed meanwhile.
            Unauthenticated: the token has gone meanwhile.
        """
        started = time.perf_counter()
        try:
            with self._cache.held():
                reason = self._make_all()
            self._executor.take_turn(self._use)
        except BaseException:
            for graphs in self._made:
                self._discard(graphs)
            raise
        if self._stood_in:  # behind what loads those kernels
            self._executor.quiet.later(partial(start_thread, self._capture_all_again, "capture-again"))
        ready = [captured for shape in self._shapes if (captured := self._ready(shape))]
        backend = self._executor.ops.kernel_for(self._group.config, self._shapes[-1], self._options).backend
        response = attention_pb2.WarmUpResponse(
            num_graphs=sum(captured.num_graphs for captured in ready),
            num_bytes=sum(captured.num_bytes for captured in ready),
            seconds=time.perf_counter() - started,
            backend=backend_pb2.Backend.Value(f"BACKEND_{backend.name}"),
            reason=reason,
        )
        told = {"num_graphs": response.num_graphs, "num_bytes": response.num_bytes, "seconds": response.seconds}
        log.info("warmed up", extra={"cache": self._cache.id.hex(), **told, "reason": reason})
        return response.SerializeToString()

    def _make_all(self) -> str:
        """Makes graphs for each shape that has none yet, and returns "", or the reason why not for all."""
        try:
            for shape in self._shapes:
                refuse_if_revoked(self._principal)
                if not self._ready(shape):
                    self._made.append(self._make(shape))
        except _Nothing as reason:
            return str(reason)
        except AttndError:
            raise
        except Exception as error:
            if is_device_fault(error) or is_memory_error(error):
                raise
            log.warning("decode steps cannot be captured", exc_info=error)
            return f"decode steps cannot be captured: {error}"
        return ""

    def _make(self, shape: DecodeShape) -> DecodeGraphs:
        """Makes and captures the graphs of a shape, and counts their bytes."""
        cache, options, device, capture = self._cache, self._options, self._executor.device, self._executor.capture
        config = self._group.config
        kernel = self._executor.ops.kernel_for(config, shape, options)
        if capture is None:
            raise _Nothing(f"device is {device}, and only a GPU has CUDA graphs")
        self._check_count()
        most = self._shapes[-1].num_reqs
        purpose = f"max_reqs is {most}: a batch of {shape.num_reqs} requests of {shape.query_len} new tokens"
        counted = buffer_bytes(config, options, shape)
        self._caches.reserve(cache, counted, purpose)
        try:
            with this_thread_warms_up():
                plan = kernel.fixed_plan(config, shape, options, device)
                if isinstance(plan, str):
                    self._compile(kernel, shape.query_len)
                    reason = f"no fixed plan for batches of {shape.num_reqs}, and is only compiled"
                    raise _Nothing(f"{kernel.backend.value} has {reason}: {plan}")
            self._caches.reserve(cache, plan.num_bytes, purpose)
            counted += plan.num_bytes
            graphs = DecodeGraphs(self._group, options, plan, kernel.backend, shape)
            self._capture(graphs, capture)
        except BaseException:
            self._caches.release(cache, counted)
            raise
        return graphs

    def _compile(self, kernel: AttentionKernel, query_len: int) -> None:
        """Runs a step of one request that nobody wants, the way in which those without graphs run."""
        group, device, num_heads = self._group, self._executor.device, self._options.num_heads
        config = group.config

        def tokens(num_heads: int, head_dim: int) -> torch.Tensor:
            return torch.zeros(query_len, num_heads, head_dim, dtype=config.dtype, device=device)

        q = tokens(num_heads, config.head_dim)
        k, v = tokens(config.num_kv_heads, config.head_dim), tokens(config.num_kv_heads, config.head_dim_v)

        def step() -> None:
            group.store_at(0, k, v, torch.full((query_len,), -1, device=device))
            one = decode_step(1, query_len, config.page_size, config.page_size)
            kernel.run(kernel.plan(config, one, self._options, device), q, k, v, group.layers[0])

        self._launch(step)

    def _launch(self, launches: Callable[[], None]) -> None:
        """Makes some launches, after all their kernels were brought to the device at the same time."""
        kernels = self._executor.kernels
        if kernels is not None:  # else Triton compiles one after the other
            with collecting() as specs:
                launches()
            for ready in kernels.wanted(specs, is_urgent=True):
                ready.result()
        launches()

    def _check_count(self) -> None:
        in_use = self._executor.graphs.of(self._cache)
        num_graphs = sum(graphs.num_graphs for graphs in in_use + self._made)
        if num_graphs + self._group.config.num_layers > MAX_GRAPHS:
            raise _Nothing(f"the cache has {num_graphs} graphs, and the limit is {MAX_GRAPHS}")

    def _capture(self, graphs: DecodeGraphs, capture: Capture) -> None:
        """Captures a layer a turn, so that others wait for no more than that."""
        cache, group = self._cache, self._group

        def capture_next() -> None:
            refuse_if_revoked(self._principal)
            cache.refuse_if_closed()
            with this_thread_warms_up():
                graphs.capture_next(group, capture)

        def step() -> None:
            graphs.load(decode_step(graphs.shape.num_reqs, graphs.shape.query_len))
            graphs.launch(group, 0)

        with this_thread_warms_up():
            self._launch(step)
        self._stood_in = self._stood_in or num_standing_in(self._executor.device) > 0
        for _ in range(group.config.num_layers):
            self._executor.take_turn(capture_next)

    def _capture_all_again(self) -> None:
        """Captures the graphs once more that are in use, a layer a turn."""
        capture = self._executor.capture
        assert capture is not None

        def again(graphs: DecodeGraphs, layer: int) -> None:
            with this_thread_warms_up():
                graphs.capture_again(self._group, layer, capture)

        try:
            for graphs in self._made:
                for layer in range(self._group.config.num_layers):
                    self._executor.take_turn(partial(again, graphs, layer))
        except Exception as error:  # they are right as they are, only slower
            log.info("graphs keep kernels of the second context: %s", error)

    def _use(self) -> None:
        refuse_if_revoked(self._principal)
        self._cache.refuse_if_closed()
        for graphs in self._made:
            self._executor.graphs.add(self._cache, self._group, self._options, graphs)

    def _ready(self, shape: DecodeShape) -> DecodeGraphs | None:
        return self._executor.graphs.ready(self._group, self._options, shape)

    def _discard(self, graphs: DecodeGraphs) -> None:
        self._caches.release(self._cache, graphs.num_bytes)
        graphs.close()

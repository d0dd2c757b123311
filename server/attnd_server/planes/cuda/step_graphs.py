"""The graphs of a session on a cuda plane, by the shape of a decode step.

The second step of a shape is captured, while its worker waits for it, and replayed; the first is launched layer by
layer, so that shapes which come once cost nothing more.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

from attnd.errors import AttndError
from attnd.protocol.cuda.layout import StepLayout
from attnd_server.attention.backends.base import DecodeShape, FixedPlan
from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.device.faults import is_device_fault
from attnd_server.device.kernels.loading import num_standing_in
from attnd_server.kv.cache import Cache
from attnd_server.kv.caches import CacheTable
from attnd_server.kv.layer_group import LayerGroup
from attnd_server.planes.cuda.channel import Channel
from attnd_server.planes.cuda.step_graph import StepGraph

log = logging.getLogger(__name__)

# Shapes of one session: as many batch sizes as a worker has graphs for, times a few lengths of the longest context.
MAX_GRAPHS = 32
# Shapes that were seen once and are remembered.
_MAX_SEEN = 256
# The least bound of a graph's contexts; each of the next is twice the one before.
_LEAST_CONTEXT_LEN = 1024


class StepGraphs:
    """The graphs of one session."""

    def __init__(
        self, channel: Channel, caches: CacheTable, ops: TritonAttentionOps, backends: tuple[AttentionBackend, ...]
    ) -> None:
        """None yet.

        Args:
            channel: of the session.
            caches: that count the graphs' bytes.
            ops: the backends of the device.
            backends: those that may be captured.
        """
        self._channel, self._caches, self._ops, self._backends = channel, caches, ops, backends
        self._graphs: OrderedDict[tuple[object, ...], StepGraph | None] = OrderedDict()  # None: there can be none
        self._seen: OrderedDict[tuple[object, ...], int] = OrderedDict()  # `id` of the metadata of the first step

    def find(
        self,
        cache: Cache,
        group: LayerGroup,
        metadata: AttentionMetadata,
        options: list[AttentionOptions],
        layouts: tuple[StepLayout, StepLayout],
    ) -> StepGraph | None:
        """The graph of a step, captured now if the shape was seen before; None: launch it layer by layer.

        On the executor's thread, and the stream of all other work. Whoever replays it keeps it until that is over.
        """
        capture = self._channel.capture
        if capture is None or not metadata.is_decode or metadata.store_only or metadata.cache_only:
            return None
        query_len = metadata.num_tokens // metadata.num_reqs
        most = _LEAST_CONTEXT_LEN
        while most < metadata.max_context_len:
            most *= 2
        most = max(metadata.max_context_len, min(most, group.config.num_slots))
        shape = DecodeShape(metadata.num_reqs, query_len, most)
        key = cache.id, shape, layouts, *(each.key for each in options)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            found = self._graphs[key]
            return found if found is not None and found.fits(metadata) else None
        if key not in self._seen:
            self._seen[key] = id(metadata)
            if len(self._seen) > _MAX_SEEN:
                self._seen.popitem(last=False)
            return None
        # That step once more, for which a kernel was missing; or kernels that would stay in the second context.
        if self._seen[key] == id(metadata) or num_standing_in(self._ops.device):
            return None
        self._make_room()
        self._graphs[key] = graph = self._made(cache, group, metadata, options, shape, layouts)
        if graph is not None:
            try:
                graph.capture(capture, metadata)
            except BaseException as error:
                self._drop(key)
                # CUDA's: launched layer by layer, the step may do. For a kernel that is missing it comes again.
                if not isinstance(error, RuntimeError) or is_device_fault(error):
                    raise
                log.warning("a cuda plane's step cannot be captured", exc_info=error)
                self._graphs[key] = graph = None
        return graph

    def close(self) -> None:
        """Frees all, when none is running."""
        while self._graphs:
            self._drop(next(iter(self._graphs)))

    def _made(
        self,
        cache: Cache,
        group: LayerGroup,
        metadata: AttentionMetadata,
        options: list[AttentionOptions],
        shape: DecodeShape,
        layouts: tuple[StepLayout, StepLayout],
    ) -> StepGraph | None:
        plans: dict[AttentionOptions, FixedPlan] = {}
        kernel = None
        for each in dict.fromkeys(options):
            kernel = self._ops.kernel_for(group.config, shape, each)
            if kernel.backend not in self._backends:
                return None
            plan = kernel.fixed_plan(group.config, shape, each, group.device)
            if isinstance(plan, str) or plan.refusal(metadata) is not None:
                return None
            plans[each] = plan
        assert kernel is not None
        graph = StepGraph(cache, group, options, plans, kernel.backend, self._channel, layouts)
        try:
            self._caches.reserve(cache, graph.num_bytes, "the graph of a cuda plane's step")
        except AttndError:
            return None  # no memory is no reason to refuse a step
        return graph

    def _make_room(self) -> None:
        """For one more; also from those of caches that were closed."""
        for key in [key for key, graph in self._graphs.items() if graph is not None and graph.cache.is_closed]:
            self._drop(key)
        if len(self._graphs) >= MAX_GRAPHS:
            self._drop(next(iter(self._graphs)))

    def _drop(self, key: tuple[object, ...]) -> None:
        graph = self._graphs.pop(key)
        if graph is not None:
            self._caches.release(graph.cache, graph.num_bytes)

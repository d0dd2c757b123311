"""Decode steps of a cuda plane as one CUDA graph each: all layers with their waits and signals in a single launch.

A graph belongs to a session, because it has the addresses of the session's region and words. The second step of a
shape is captured, while its worker waits for it, and replayed; the first is launched layer by layer, so that shapes
which come once cost nothing more. Its bits are those of the layers launched one by one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import torch

from attnd.errors import AttndError
from attnd.protocol.cuda.layout import StepLayout
from attnd_server.attention.backends.base import DecodeShape, FixedPlan
from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.device.cuda_graph import Launches
from attnd_server.device.faults import is_device_fault
from attnd_server.device.pinned_tensor import PinnedTensor
from attnd_server.kv.cache import Cache
from attnd_server.kv.caches import CacheTable
from attnd_server.planes.cuda.channel import Channel

log = logging.getLogger(__name__)

# Shapes of one session: as many batch sizes as a worker has graphs for, times a few lengths of the longest context.
MAX_GRAPHS = 32
# Shapes that were seen once and are remembered.
_MAX_SEEN = 256
# The least bound of a graph's contexts; each of the next is twice the one before.
_LEAST_CONTEXT_LEN = 1024


class StepGraph:
    """All layers of decode steps of one shape, on one lane and one cache.

    Attributes:
        backend: what computes them.
        num_bytes: memory of the device that its plans take.
    """

    def __init__(
        self,
        cache: Cache,
        options: list[AttentionOptions],
        plans: dict[AttentionOptions, FixedPlan],
        backend: AttentionBackend,
        lane: Channel,
        layout: StepLayout,
    ) -> None:
        """Takes memory for the slots; captures nothing yet. As the rest, on the stream of all other work.

        Args:
            cache: that the steps read and write.
            options: of each layer.
            plans: by options.
            backend: of the plans.
            lane: of the session.
            layout: of the steps' tensors.
        """
        self.cache = cache
        self.backend = backend
        self.num_bytes = sum(plan.num_bytes for plan in plans.values())
        self._options, self._plans, self._lane = options, plans, lane
        self._q, self._k, self._v, self._output, self._lse = (lane.tensor(place) for place in layout)
        self._slots = torch.full((self._q.shape[0],), -1, dtype=torch.int64, device=cache.device)
        self._staged_slots = [PinnedTensor(self._slots) for _ in range(2)]
        self._replay: Launches | None = None

    def fits(self, metadata: AttentionMetadata) -> bool:
        """Whether it serves a step of its shape: page tables with gaps it does not."""
        return all(plan.refusal(metadata) is None for plan in self._plans.values())

    def capture(self, capture: Callable[[Launches], Launches], metadata: AttentionMetadata) -> None:
        """Captures a step that fits, which is still to be loaded."""
        self.load(metadata)  # loads the kernels that do it
        # A kernel that is not on the device yet cannot be captured. Nothing is stored: slots are -1. The region's own
        # output may still be read by the worker.
        self._slots.fill_(-1)
        for options in self._plans:
            self._store_and_attend(0, options, torch.empty_like(self._output), torch.empty_like(self._lse))
        self._replay = capture(self._layers)

    def replay(self) -> None:
        """Enqueues the layers of the step that was loaded, once it was captured. The lane's stream is the current."""
        assert self._replay is not None
        self._replay()

    def load(self, metadata: AttentionMetadata) -> None:
        """Makes a step that fits the one that is replayed next, in the order of the current stream.

        Unless it is two steps ahead of the device, it does not wait for it.
        """
        for plan in self._plans.values():
            plan.update(metadata)
        staged = self._staged_slots[0]
        self._staged_slots.reverse()
        staged.wait()
        if metadata.slot_mapping is None:
            staged.host.fill_(-1)
        else:
            staged.host.copy_(metadata.slot_mapping)
        staged.send(len(self._slots))

    def _layers(self) -> None:
        lane, last = self._lane, len(self._options) - 1
        for layer, options in enumerate(self._options):
            lane.flags.wait(lane.handle, layer, layer == last)
            self._store_and_attend(layer, options, self._output, self._lse)
            lane.flags.signal(lane.handle, layer, layer == last)

    def _store_and_attend(self, layer: int, options: AttentionOptions, output: torch.Tensor, lse: torch.Tensor) -> None:
        cache = self.cache
        cache.store_at(layer, self._k, self._v, self._slots)
        returned = lse if options.return_lse else None
        self._plans[options].launch(output, returned, self._q, self._k, self._v, cache.layers[layer])


class StepGraphs:
    """The graphs of one session."""

    def __init__(
        self, lane: Channel, caches: CacheTable, ops: TritonAttentionOps, backends: tuple[AttentionBackend, ...]
    ) -> None:
        """None yet.

        Args:
            lane: of the session.
            caches: that count the graphs' bytes.
            ops: the backends of the device.
            backends: those that may be captured.
        """
        self._lane, self._caches, self._ops, self._backends = lane, caches, ops, backends
        self._graphs: OrderedDict[tuple[object, ...], StepGraph | None] = OrderedDict()  # None: there can be none
        self._seen: OrderedDict[tuple[object, ...], None] = OrderedDict()

    def find(
        self, cache: Cache, metadata: AttentionMetadata, options: list[AttentionOptions], layout: StepLayout
    ) -> StepGraph | None:
        """The graph of a step, captured now if the shape was seen before; None: launch it layer by layer.

        On the executor's thread, and the stream of all other work. Whoever replays it keeps it until that is over.
        """
        capture = self._lane.capture
        if capture is None or not metadata.is_decode or metadata.store_only or metadata.cache_only:
            return None
        query_len = metadata.num_tokens // metadata.num_reqs
        most = _LEAST_CONTEXT_LEN
        while most < metadata.max_context_len:
            most *= 2
        most = max(metadata.max_context_len, min(most, cache.config.num_pages * cache.config.page_size))
        shape = DecodeShape(metadata.num_reqs, query_len, most)
        key = cache.id, shape, *(each.key for each in options)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            found = self._graphs[key]
            return found if found is not None and found.fits(metadata) else None
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > _MAX_SEEN:
                self._seen.popitem(last=False)
            return None
        self._make_room()
        self._graphs[key] = graph = self._made(cache, metadata, options, shape, layout)
        if graph is not None:
            try:
                graph.capture(capture, metadata)
            except RuntimeError as error:  # CUDA's: launched layer by layer, the step may do
                if is_device_fault(error):
                    raise
                log.warning("a cuda plane's step cannot be captured", exc_info=error)
                self._drop(key)
                self._graphs[key] = graph = None
        return graph

    def close(self) -> None:
        """Frees all, when none is running."""
        while self._graphs:
            self._drop(next(iter(self._graphs)))

    def _made(
        self,
        cache: Cache,
        metadata: AttentionMetadata,
        options: list[AttentionOptions],
        shape: DecodeShape,
        layout: StepLayout,
    ) -> StepGraph | None:
        plans: dict[AttentionOptions, FixedPlan] = {}
        kernel = None
        for each in dict.fromkeys(options):
            kernel = self._ops.kernel_for(cache.config, shape, each)
            if kernel.backend not in self._backends:
                return None
            plan = kernel.fixed_plan(cache.config, shape, each, cache.device)
            if isinstance(plan, str) or plan.refusal(metadata) is not None:
                return None
            plans[each] = plan
        assert kernel is not None
        graph = StepGraph(cache, options, plans, kernel.backend, self._lane, layout)
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

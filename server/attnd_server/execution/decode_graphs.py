"""Decode steps of a fixed shape as CUDA graphs, one for each layer: captured at warm-up, replayed by calls that fit.

A graph holds addresses, so all that differs between calls lies in buffers that it was captured with: the plan's, which
a step is written into once, and those here, through which the tensors of a call pass. These lie side by side, on the
device and again on the host, so that one copy takes all inputs over and one brings all results back. Where these are
small, the graph has both, and a call is one launch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from attnd_server.attention.backends.base import DecodeShape, FixedPlan
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.staging import Buffer, Head, call_fields, offsets_of
from attnd_server.device.copy_timer import NO_COPIES, Copies, CopyTimer, timed_behind
from attnd_server.device.cuda_graph import Launches, captured
from attnd_server.device.kernels.launch import for_graphs
from attnd_server.kv.layer_group import LayerGroup

Capture = Callable[[Launches], Launches]
"""Runs launches in a way that only records them, and returns what launches them all at once."""

# Bytes of q, k and v from which on several copies straight from pinned memory take less time than one from a buffer
# that the processor fills first. By the costs of each, not measured as such. Below, graphs have the copies in them.
DIRECT_BYTES = 256 << 10
# Steps whose copies' times are kept.
KEPT_TIMES = 4


def cuda_capture(device: torch.device) -> Capture | None:
    """Captures CUDA graphs on `device`; None where there is no such thing."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    return lambda launches: captured(launches, stream)


def buffer_bytes(config: AttentionConfig, options: AttentionOptions, shape: DecodeShape) -> int:
    """Bytes of the device's memory that the buffers of a DecodeGraphs take, beside the plan's own."""
    return sum(offsets_of(shape.num_reqs * shape.query_len, fields)[1] for fields in call_fields(config, options))


class _Memory(NamedTuple):
    """What graphs have the addresses of, beside the group's pages."""

    plan: FixedPlan
    inputs: Buffer
    results: Buffer


@dataclass
class _Loaded:
    """A step that is in the buffers, and the rows that its calls use.

    Attributes:
        metadata: the step.
        inputs: rows of q, k, v and slots.
        results: rows of output and lse.
        copies: what the copies of its first call took; None: there was none yet. All its calls copy as many bytes, and
            to time each would cost more than these differ. Those within a graph were timed when it was captured.
    """

    metadata: AttentionMetadata
    inputs: Head
    results: Head
    copies: Copies | None


class DecodeGraphs:
    """Decode steps of one layer group that fit one shape, of layers with the same options.

    Attributes:
        shape: the steps that fit.
        backend: what computes them.
        num_bytes: bytes of the device's memory that its buffers take, the plan's included.
    """

    def __init__(
        self,
        group: LayerGroup,
        options: AttentionOptions,
        plan: FixedPlan,
        backend: AttentionBackend,
        shape: DecodeShape,
    ) -> None:
        """Takes the memory."""
        num_rows = shape.num_reqs * shape.query_len
        inputs, results = (Buffer(num_rows, fields, group.device) for fields in call_fields(group.config, options))
        for slots in (inputs.device[0], inputs.host[0]):
            slots.fill_(-1)  # what is launched before the first call stores nothing
        self.shape = shape
        self.backend = backend
        self.num_bytes = plan.num_bytes + buffer_bytes(group.config, options, shape)
        self._memory: _Memory | None = _Memory(plan, inputs, results)
        self._device = group.device
        self._replays: list[Launches] = []
        self._loaded: _Loaded | None = None
        self._has_copies = sum(tensor.nbytes for tensor in inputs.device[1:]) < DIRECT_BYTES
        self._copies_of_graph = NO_COPIES
        # The last steps whose copies were timed: calls of several may alternate.
        self._timed: deque[tuple[AttentionMetadata, Copies]] = deque(maxlen=KEPT_TIMES)

    @property
    def num_graphs(self) -> int:
        """Graphs that were captured, in the end one for each layer; 0 after `close`."""
        return len(self._replays)

    @property
    def _held(self) -> _Memory:
        if self._memory is None:
            raise RuntimeError("the graphs were closed, but something still uses them")
        return self._memory

    def fits(self, metadata: AttentionMetadata) -> bool:
        """Whether the graphs serve a step."""
        return self._held.plan.refusal(metadata) is None

    def launch(self, group: LayerGroup, layer: int) -> None:
        """Stores and attends one layer of the step in the buffers."""
        plan, inputs, results = self._held
        slots, k, v, q = inputs.device
        *lse, output = results.device
        if self._has_copies:
            inputs.fetch()
        group.store_at(layer, k, v, slots)
        plan.launch(output, lse[0] if lse else None, q, k, v, group.layers[layer])
        if self._has_copies:
            results.send()

    def capture_next(self, group: LayerGroup, capture: Capture) -> None:
        """Captures the first layer that was not yet, after a step was loaded. On the executor's thread."""
        launches = partial(self.launch, group, len(self._replays))
        with for_graphs():
            launches()  # a kernel that is not on the device yet cannot be captured
        self._replays.append(capture(launches))
        if self._has_copies and len(self._replays) == 1 and self._device.type == "cuda":
            buffers = self._held
            self._copies_of_graph = timed_behind(
                self._replays[0], buffers.inputs.fetch, buffers.results.send, self._device
            )

    def capture_again(self, group: LayerGroup, layer: int, capture: Capture) -> None:
        """Captures a layer once more, unless the graphs were closed. On the executor's thread; launches nothing."""
        if self._replays:
            self._replays[layer] = capture(partial(self.launch, group, layer))

    def load(self, metadata: AttentionMetadata) -> _Loaded:
        """Makes a step that fits the one that calls run, until another is loaded. Does not wait for the device."""
        plan, inputs, results = self._held
        self._loaded = None
        plan.update(metadata)
        slots = inputs.host[0]
        slots.fill_(-1)
        if metadata.slot_mapping is not None:
            slots[: metadata.num_tokens] = metadata.slot_mapping
        copies = None if self._device.type == "cuda" else NO_COPIES
        copies = next((each for timed, each in self._timed if timed is metadata), copies)
        loaded = _Loaded(metadata, inputs.head(metadata.num_tokens), results.head(metadata.num_tokens), copies)
        self._loaded = loaded
        return loaded

    def attend(
        self, metadata: AttentionMetadata, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, Copies]:
        """One layer of a step that fits: stores and attends.

        Args:
            metadata: the step.
            layer: index among those of the group.
            q: `[num_tokens, num_heads, head_dim]` on the host.
            k: `[num_tokens, num_kv_heads, head_dim]` on the host.
            v: `[num_tokens, num_kv_heads, head_dim_v]` on the host.

        Returns:
            Output and lse as `AttentionKernel.run`, on the host: views of a buffer that the next call overwrites. And
            what copies took, see `CopyTimer.staged`.
        """
        loaded = self._loaded
        try:
            if loaded is None or loaded.metadata is not metadata:
                loaded = self.load(metadata)
            inputs, results = loaded.inputs, loaded.results
            if self._has_copies:
                return self._replayed(loaded, layer, (k, v, q))
            timer = CopyTimer(self._device) if loaded.copies is None else None
            mark = _no_mark if timer is None else timer.mark
            if _is_direct((k, v, q)):
                mark()
                self._copy_directly((k, v, q))
            else:
                inputs.fill(1, (k, v, q))
                mark()
                inputs.on_device.copy_(inputs.on_host, non_blocking=True)
            mark()
            self._replays[layer]()
            mark()
            results.on_host.copy_(results.on_device, non_blocking=True)
            mark()
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            if timer is not None:
                loaded.copies = timer.staged()
                self._timed.append((metadata, loaded.copies))
        except BaseException:
            self._loaded = None  # whoever tries again starts from the beginning
            raise
        *lse, output = results.tensors
        return output, lse[0] if lse else None, loaded.copies or NO_COPIES

    def _replayed(
        self, loaded: _Loaded, layer: int, tensors: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None, Copies]:
        """As `attend`, where the graph has the copies."""
        started = time.perf_counter()
        loaded.inputs.fill(1, tensors)
        if loaded.copies is None:
            host_us, (in_us, out_us) = (time.perf_counter() - started) * 1e6, self._copies_of_graph
            loaded.copies = Copies(round(host_us) + in_us, out_us)
            self._timed.append((loaded.metadata, loaded.copies))
        self._replays[layer]()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        *lse, output = loaded.results.tensors
        return output, lse[0] if lse else None, loaded.copies

    def _copy_directly(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Starts to copy k, v and q to the device from where they are, and the slots from their buffer."""
        inputs = self._held.inputs
        for target, source in zip(inputs.device, (inputs.host[0], *tensors), strict=True):
            target[: len(source)].copy_(source, non_blocking=True)

    def close(self) -> None:
        """Frees graphs and buffers, whoever still holds the object."""
        self._replays.clear()
        self._timed.clear()
        self._memory = self._loaded = None


def _is_direct(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether the tensors of a call are worth a copy each, and in memory that the device reads by itself."""
    return sum(tensor.nbytes for tensor in tensors) >= DIRECT_BYTES and all(tensor.is_pinned() for tensor in tensors)


def _no_mark() -> None:
    """Of a call whose copies are not timed."""

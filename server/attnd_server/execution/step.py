"""A step as the device sees it: what its layers share, and the attention of one layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import torch

from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.kernels.pages import StoredTokens, stored_tokens
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.ops import Plan, TritonAttentionOps
from attnd_server.device.copy_timer import NO_COPIES, Copies, CopyTimer
from attnd_server.execution.captured_graphs import CapturedGraphs
from attnd_server.execution.decode_graphs import DecodeGraphs
from attnd_server.kv.cache import Cache

# Tokens that a call of a small step attends to, over all its rows: on the processor, and on a GPU, where it takes half
# a millisecond at most.
SMALL_STEP_TOKENS, SMALL_GPU_STEP_TOKENS = 4_096, 1 << 19


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


class ShareKey(NamedTuple):
    """Equal for calls that can share a launch; see `batch`.

    Attributes:
        has_graphs: whether each would be the replay of a CUDA graph.
        rest: what else must be equal.
    """

    has_graphs: bool
    rest: tuple[object, ...]


@dataclass(eq=False)
class Step:
    """A validated step of one cache. Its methods fill in what calls share, for whoever has the device.

    Attributes:
        id: the client's number for it.
        cache: the cache that it reads and writes.
        metadata: lengths, page tables, slots, masks.
        call_timeout_s: seconds within which a call must have started; None is forever.
        captured: the graphs of the device; None: there are none.
        graphs: by the options of a layer; None where no warm-up captured any that fit.
        plans: likewise, of layers without graphs.
        stored: its slots on the device, for layers without graphs.
        share_keys: by the options of a layer, what calls can share a launch by, see `batch`.
        is_marked: whether the cache was told which pages it writes.
        counts: of whoever sent it; None: its calls are nobody's.
        trace: of the step; None: it has none.
    """

    id: int
    cache: Cache
    metadata: AttentionMetadata
    call_timeout_s: float | None = None
    captured: CapturedGraphs | None = None
    graphs: dict[AttentionOptions, DecodeGraphs | None] = field(default_factory=dict)
    plans: dict[AttentionOptions, Plan] = field(default_factory=dict)
    stored: StoredTokens | None = None
    share_keys: dict[AttentionOptions, ShareKey | None] = field(default_factory=dict)
    is_marked: bool = False
    counts: StepCounts | None = None
    trace: StepTrace | None = None

    @cached_property
    def is_small(self) -> bool:
        """Whether its calls, and what comes before the first, take no longer than a few switches of thread each."""
        most = SMALL_STEP_TOKENS if self.cache.device.type == "cpu" else SMALL_GPU_STEP_TOKENS
        return self.metadata.is_decode and self.metadata.num_tokens * (self.metadata.max_context_len + 1) <= most

    def graphs_for(self, options: AttentionOptions) -> DecodeGraphs | None:
        """What serves layers with these options, if a warm-up captured it."""
        if options not in self.graphs:
            captured = self.captured
            self.graphs[options] = None if captured is None else captured.find(self.cache, options, self.metadata)
        return self.graphs[options]

    def plan_for(self, options: AttentionOptions, ops: TritonAttentionOps) -> Plan:
        """What else serves them. Raises Unsupported as `TritonAttentionOps.choose` does."""
        plan = self.plans.get(options)
        if plan is None:
            began_ns = time.time_ns()
            plan = self.plans[options] = ops.plan(self.cache.config, self.metadata, options)
            if self.trace is not None:
                self.trace.planned(began_ns)
        return plan

    def make_ready(self, options: AttentionOptions, ops: TritonAttentionOps) -> None:
        """Does what the first call with these options would do before it looks at its tensors."""
        if self.cache.is_closed or self.metadata.store_only:
            return
        graphs = self.graphs_for(options)
        if graphs is None:
            self.plan_for(options, ops)
        else:
            graphs.load(self.metadata)

    def mark_written(self) -> None:
        """Tells the cache once which pages the step writes."""
        if not self.is_marked and self.metadata.slot_mapping is not None:
            self.cache.mark_written(self.metadata.slot_mapping)
            self.is_marked = True


class Call(NamedTuple):
    """One layer of one step, tensors on the host.

    Attributes:
        step: the step.
        layer: of the step's cache.
        options: of the layer.
        q: `[num_tokens, num_heads, head_dim]`, or None in a store-only step.
        k: `[num_tokens, num_kv_heads, head_dim]`, or None in a cache-only step.
        v: `[num_tokens, num_kv_heads, head_dim_v]`, or None in a cache-only step.
        encode: makes its reply; None: of a call that nobody answers.
        plane: over which it came.
    """

    step: Step
    layer: int
    options: AttentionOptions
    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    encode: Encode | None = None
    plane: str = ""

    @property
    def cache_id(self) -> bytes:
        """The id of its cache."""
        return self.step.cache.id

    @property
    def principal(self) -> str:
        """Whose cache it is."""
        return self.step.cache.principal


class Result(NamedTuple):
    """What a call gives, tensors on the host. The next call may overwrite them.

    Attributes:
        output: `[num_tokens, num_heads, head_dim_v]`; None in a store-only step.
        lse: float32 `[num_tokens, num_heads]`, if asked for.
        backend: what ran; None in a store-only step.
        copies: what it took to bring q, k and v to the device, and output and lse back.
    """

    output: torch.Tensor | None
    lse: torch.Tensor | None
    backend: AttentionBackend | None
    copies: Copies = NO_COPIES


Encode = Callable[[Call, Result, int, int], bytes]
"""Makes the reply to a call of its result, its `queue_us` and its `kernel_us`; before the next call runs."""


def attend(call: Call, ops: TritonAttentionOps) -> Result:
    """One layer: store, attend.

    Raises:
        CacheLost: the cache is closed.
        Unsupported: no backend, or not the one that is named, can serve the step.
    """
    step, layer, options, q, k, v, *_ = call
    step.cache.refuse_if_closed()
    graphs = step.graphs_for(options)
    if graphs is not None and q is not None and k is not None and v is not None:
        step.mark_written()
        output, lse, copies = graphs.attend(step.metadata, layer, q, k, v)
        return Result(output, lse, graphs.backend, copies)
    return _attend_without_graphs(call, ops)


def _attend_without_graphs(call: Call, ops: TritonAttentionOps) -> Result:
    if ops.device.type == "cpu":
        return Result(*_store_and_attend(call, call.q, call.k, call.v, ops), NO_COPIES)
    timer = CopyTimer(ops.device)
    timer.mark()
    # What is pinned is copied while the rest is launched, for which the call waits before it ends. What is not is
    # in the driver's hands when this returns.
    q, k, v = (
        None if tensor is None else tensor.to(ops.device, non_blocking=True) for tensor in (call.q, call.k, call.v)
    )
    timer.mark()
    output, lse, backend = _store_and_attend(call, q, k, v, ops)
    if output is None:
        return Result(None, None, None, timer.copied())
    timer.mark()
    output, lse = output.cpu(), None if lse is None else lse.cpu()
    return Result(output, lse, backend, timer.waited())


def _store_and_attend(
    call: Call,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    ops: TritonAttentionOps,
) -> tuple[torch.Tensor | None, torch.Tensor | None, AttentionBackend | None]:
    """Output, lse and what computed them, on the device, as q, k and v."""
    step, cache, metadata = call.step, call.step.cache, call.step.metadata
    plan = None if metadata.store_only else step.plan_for(call.options, ops)
    if metadata.slot_mapping is not None and k is not None and v is not None:
        step.mark_written()
        if step.stored is None:
            step.stored = stored_tokens(metadata.slot_mapping, ops.device)
        cache.store(call.layer, k, v, step.stored)
    if plan is None or q is None:
        return None, None, None
    output, lse = plan.run(q, k, v, cache.layers[call.layer])
    return output, lse, plan.kernel.backend

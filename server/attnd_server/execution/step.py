"""A step as the device sees it: what its layers share, and the attention of one layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch

from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.kernels.pages import StoredTokens, replace_slot, stored_tokens
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.ops import Plan, TritonAttentionOps
from attnd_server.device.copy_timer import NO_COPIES, Copies, CopyTimer
from attnd_server.device.host_results import on_host
from attnd_server.execution.by_options import ByOptions, Shareable
from attnd_server.execution.captured_graphs import CapturedGraphs
from attnd_server.execution.cost import Cost, cost_of, too_costly
from attnd_server.execution.decode_graphs import DecodeGraphs
from attnd_server.execution.kept_plans import KeptPlans, Plans, most_bytes, tensor_bytes
from attnd_server.execution.replaced_slots import replaced
from attnd_server.execution.step_observers import StepCounts, StepTrace
from attnd_server.kv.cache import Cache
from attnd_server.kv.layer_group import LayerGroup

# Tokens that a call of a small step attends to, over all its rows. On a GPU it takes half a millisecond at most.
SMALL_STEP_TOKENS, SMALL_GPU_STEP_TOKENS = 4_096, 1 << 19
# Elements of the page tables of a small step.
SMALL_STEP_PAGES = 1 << 17


@dataclass(eq=False)
class Step:
    """A validated step of one layer group. Its methods fill in what calls share, for whoever has the device.

    Attributes:
        id: the client's number for it.
        cache: the cache that it reads and writes.
        group: the cache's layer group whose layers it has: each group has a step of its own.
        metadata: lengths, page tables, slots, masks.
        call_timeout_s: seconds within which a call must have started; None is forever.
        captured: the graphs of the device; None: there are none.
        kept: decides which of its plans are kept; None: all.
        most_work: that a call may ask for.
        costs: of its calls, by the options of a layer.
        graphs: by the options of a layer; None where no warm-up captured any that fit.
        plans: likewise, of layers without graphs.
        stored: its slots on the device, for layers without graphs.
        shareable: by the options of a layer, how calls can share a launch, see `batch`; None where they cannot.
        is_marked: whether the group was told which pages it writes.
        counts: of whoever sent it, or None.
        trace: of the step; None: it has none.
        held: what it holds for as long as it lives: room for its arrays.
    """

    id: int
    cache: Cache
    group: LayerGroup
    metadata: AttentionMetadata
    call_timeout_s: float | None = None
    captured: CapturedGraphs | None = None
    kept: KeptPlans | None = None
    most_work: float = math.inf
    costs: ByOptions[Cost] = field(default_factory=ByOptions)
    graphs: ByOptions[DecodeGraphs | None] = field(default_factory=ByOptions)
    plans: Plans = field(default_factory=Plans)
    stored: StoredTokens | None = None
    shareable: ByOptions[Shareable | None] = field(default_factory=ByOptions)
    is_marked: bool = False
    counts: StepCounts | None = None
    trace: StepTrace | None = None
    held: object = None

    @cached_property
    def is_small(self) -> bool:
        """Whether what comes before its first call takes no longer than a few switches of thread; see `Call`'s too."""
        most, metadata = SMALL_STEP_TOKENS if self.group.device.type == "cpu" else SMALL_GPU_STEP_TOKENS, self.metadata
        is_short = metadata.is_decode and metadata.num_tokens * (metadata.max_context_len + 1) <= most
        return is_short and metadata.page_tables.numel() <= SMALL_STEP_PAGES

    @cached_property
    def only_slot(self) -> int:
        """Of its only token, which has one."""
        return int(self.metadata.slot_mapping[0])  # type: ignore[index]

    def cost(self, options: AttentionOptions) -> Cost:
        """The cost of a call with these options. On any thread. Raises Exhausted: it is above `most_work`."""
        cost = self.costs.get(options)
        if cost is None:
            cost = cost_of(self.group.config, self.metadata, options, self.group.device)
            if cost.work > self.most_work:
                raise too_costly(cost.work, self.most_work)
            cost = self.costs.put(options, cost._replace(is_small=cost.is_small and self.is_small))
        return cost

    def graphs_for(self, options: AttentionOptions) -> DecodeGraphs | None:
        """What serves layers with these options, if a warm-up captured it."""
        if options in self.graphs:
            return self.graphs[options]
        found = None if (graphs := self.captured) is None else graphs.find(self.group, options, self.metadata)
        return self.graphs.put(options, found)

    def plan_for(self, options: AttentionOptions, ops: TritonAttentionOps) -> Plan:
        """What else serves them. Raises Unsupported as `TritonAttentionOps.choose` does."""
        plan = self.plans.get(options)
        if plan is None:
            began_ns = time.time_ns()
            plan = ops.plan(self.group.config, self.metadata, options)
            if self.trace is not None:
                self.trace.planned(began_ns)
            if self.kept is None:
                self.plans[options] = plan
            else:
                num_bytes = most_bytes(self.metadata) if self.is_small else tensor_bytes(plan.state)
                self.kept.keep(self.cache.principal, self.plans, options, plan, num_bytes + options.num_bytes)
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

    def stored_on(self, device: torch.device) -> StoredTokens:
        """Its slots, which it has, on the device."""
        if self.stored is None:
            assert self.metadata.slot_mapping is not None
            self.stored = stored_tokens(self.metadata.slot_mapping, device)
        return self.stored

    def mark_written(self) -> None:
        """Tells the group which pages the step writes, once, and of every call that it does."""
        if self.metadata.slot_mapping is None:
            return
        if not self.is_marked:
            self.group.mark_written(self.metadata.slot_mapping)
            self.is_marked = True
        elif self.group.writers:  # rarely
            self.group.about_to_write()


class Call(NamedTuple):
    """One layer of one step, tensors on the host.

    Attributes:
        step: the step.
        layer: index among the layers of the step's group.
        options: of the layer.
        q: `[num_tokens, num_heads, head_dim]`, or None in a store-only step.
        k: `[num_tokens, num_kv_heads, head_dim]`, or None in a cache-only step.
        v: `[num_tokens, num_kv_heads, head_dim_v]`, or None in a cache-only step.
        encode: makes its reply; None: of a call that nobody answers.
        plane: over which it came.
        is_sampled: whether verification looks at it; then nobody else writes to its tensors.
        into: where output and lse are to lie on the host, for a GPU to copy them. The client may write there. Or None.
        at: addresses of q, k, v, output and lse, if they lie where the device reads and writes of its own. Or None.
    """

    step: Step
    layer: int
    options: AttentionOptions
    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    encode: Encode | None = None
    plane: str = ""
    is_sampled: bool = False
    into: tuple[torch.Tensor, torch.Tensor | None] | None = None
    at: tuple[int, int, int, int, int] | None = None

    @property
    def cache_id(self) -> bytes:
        """Of its cache."""
        return self.step.cache.id

    @property
    def principal(self) -> str:
        """Whose cache it is."""
        return self.step.cache.principal

    @property
    def is_small(self) -> bool:
        """Whether it takes no longer than a few switches of thread, so that it may run where others wait for it."""
        return self.step.cost(self.options).is_small

    @property
    def is_long(self) -> bool:
        """Whether it takes so long that others should have turns meanwhile."""
        return self.step.cost(self.options).is_long


class Result(NamedTuple):
    """What a call gives, tensors on the host. The next call may overwrite them.

    Attributes:
        output: `[num_tokens, num_heads, head_dim_v]`; None in a store-only step.
        lse: float32 `[num_tokens, num_heads]`, if asked for.
        backend: what ran; None in a store-only step.
        copies: what it took to bring q, k and v to the device, and output and lse back.
        store: stores K and V, once nothing else of the call can fail; None: nothing is left to store.
    """

    output: torch.Tensor | None
    lse: torch.Tensor | None
    backend: AttentionBackend | None
    copies: Copies = NO_COPIES
    store: Callable[[], None] | None = None


Encode = Callable[[Call, Result, int, int], bytes]
"""Makes the reply to a call of its result, its `queue_us` and its `kernel_us`; before the next call runs."""


def attend(call: Call, ops: TritonAttentionOps) -> Result:
    """One layer: attends, then stores, so that a call that fails has stored nothing.

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
    plan = None if q is None else step.plan_for(options, ops)
    if ops.device.type == "cpu":
        return _attend_on_processor(call, plan, ops)
    return _attend_on_gpu(call, plan, ops)


def _attend_on_processor(call: Call, plan: Plan | None, ops: TritonAttentionOps) -> Result:
    step, layer, _, q, k, v, *_ = call
    if plan is None:
        return Result(None, None, None, NO_COPIES, partial(store, call, k, v, ops))
    if step.metadata.reads_stored:
        with stored_before(call, k, v, ops):
            output, lse = plan.run(q, k, v, step.group.layers[layer])
        return Result(output, lse, plan.kernel.backend, NO_COPIES)
    if not plan.reads_stored:
        output, lse = plan.run(q, k, v, step.group.layers[layer])
        return Result(output, lse, plan.kernel.backend, NO_COPIES, partial(store, call, k, v, ops))
    assert k is not None
    assert v is not None
    step.mark_written()
    put_back = replace_slot(step.group.layers[layer], k, v, step.only_slot)
    try:
        output, lse = plan.run(q, k, v, step.group.layers[layer])
    except BaseException:
        put_back()
        raise
    return Result(output, lse, plan.kernel.backend, NO_COPIES)


def _attend_on_gpu(call: Call, plan: Plan | None, ops: TritonAttentionOps) -> Result:
    timer = CopyTimer(ops.device)
    timer.mark()
    # What is pinned is copied while the rest is launched. What is not is in the driver's hands when this returns.
    q, k, v = (
        None if tensor is None else tensor.to(ops.device, non_blocking=True) for tensor in (call.q, call.k, call.v)
    )
    timer.mark()
    if plan is None:
        store(call, k, v, ops)
        return Result(None, None, None, timer.copied())
    stores_first = call.step.metadata.reads_stored
    with stored_before(call, k, v, ops) if stores_first else nullcontext():
        output, lse = plan.run(q, k, v, call.step.group.layers[call.layer])
    if not stores_first:
        store(call, k, v, ops)
    timer.mark()
    output, lse = on_host(output, lse, None if call.is_sampled else call.into)
    return Result(output, lse, plan.kernel.backend, timer.waited())


def stored_before(
    call: Call, k: torch.Tensor | None, v: torch.Tensor | None, ops: TritonAttentionOps
) -> AbstractContextManager[None]:
    """Stores K and V, for attention that reads them in pages; if that fails, what lay there comes back."""
    return replaced(call.step.group, call.layer, call.step.stored_on(ops.device), partial(store, call, k, v, ops))


def store(call: Call, k: torch.Tensor | None, v: torch.Tensor | None, ops: TritonAttentionOps) -> None:
    """Stores what is to be stored of K and V, on the device."""
    step = call.step
    if step.metadata.slot_mapping is None or k is None or v is None:
        return
    step.mark_written()
    step.group.store(call.layer, k, v, step.stored_on(ops.device))

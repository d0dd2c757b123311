"""Decode calls of several callers in one launch.

Attention has no weights: calls of different layers, steps and caches differ in their page ids and tensors alone, if the
caches lie in one space (see `kv.page_space`) and the layers have the same options. A step made of all their requests is
planned like any other; each launch only adds to a request's page ids where its cache's layer begins. Outputs have the
bits of calls that are alone, because only kernels and steps that promise that take part.
"""

from __future__ import annotations

import torch
from cachetools import LRUCache

from attnd.errors import Unsupported
from attnd_server.attention.backends.base import ShiftsPages
from attnd_server.attention.kernels.pages import StoredTokens
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.attention.staging import Buffer, Field, call_fields
from attnd_server.config import ServerConfig
from attnd_server.device.copy_timer import NO_COPIES, CopyTimer
from attnd_server.execution.by_options import Shareable, ShareKey
from attnd_server.execution.cost import LONG_WORK
from attnd_server.execution.decode_graphs import Capture
from attnd_server.execution.joined.graphs import MAX_CALLS, JoinedGraphs
from attnd_server.execution.step import Call, Result, Step
from attnd_server.execution.work import Work
from attnd_server.kv.page_spaces import CachePages

# Sets of steps whose plans are kept: workers call layer after layer, so that a set comes again.
_MAX_SETS = 16
# Bytes of the tensors of a call from which on it is its own launch, rather than to be copied: on an H200 calls of 64
# tokens with 32/8 heads x 128 took 502 us so and 684 with copies, those of 16 tokens 264 and 236.
MIN_BYTES_ALONE = 512 << 10
# Calls that replay graphs of their own share a launch from so many on.
MIN_CALLS_WITH_GRAPHS = 2
# Work of a launch, and bytes of its tensors: bigger calls gain nothing by a launch with others.
MAX_WORK, MAX_GPU_WORK, MAX_BYTES = LONG_WORK, 1 << 36, 8 << 20


class Batch:
    """Calls that can share a launch."""

    def __init__(self, call: Shareable, ops: TritonAttentionOps, limits: ServerConfig) -> None:
        """With one call. Together they obey the limits of one step."""
        self._key = call.key
        self._ops = ops
        self._limits = limits
        self._num_calls = self._num_reqs = self._num_tokens = self._max_pages = self._work = self._num_bytes = 0
        self._max_work = MAX_WORK if ops.device.type == "cpu" else MAX_GPU_WORK
        self._is_big = not self._add(call)

    def takes(self, work: Work) -> bool:
        """Adds some work if it is a call that can be. With the device."""
        call = shareable(work, self._ops) if isinstance(work, Call) else None
        return call is not None and self.adds(call)

    def adds(self, call: Shareable) -> bool:
        """Adds a call if it can share the launch. With the device."""
        has_room = self._num_calls < MAX_CALLS and not self._is_big
        return has_room and call.key == self._key and self._add(call)

    @property
    def is_worth_it(self) -> bool:
        """Whether one launch for all takes less time than one for each."""
        return self._num_calls >= (MIN_CALLS_WITH_GRAPHS if self._key.has_graphs else 2)

    def _add(self, call: Shareable) -> bool:
        work, num_bytes = self._work + call.work, self._num_bytes + call.num_bytes
        num_reqs, num_tokens = self._num_reqs + call.num_reqs, self._num_tokens + call.num_tokens
        max_pages, limits = max(self._max_pages, call.num_pages), self._limits
        if work > self._max_work or num_bytes > MAX_BYTES:
            return False
        if num_tokens > limits.max_step_tokens or num_reqs * max_pages > limits.max_page_table_elements:
            return False
        self._num_calls += 1
        self._num_reqs, self._num_tokens, self._max_pages = num_reqs, num_tokens, max_pages
        self._work, self._num_bytes = work, num_bytes
        return True


def batch_of(call: Call, ops: TritonAttentionOps, limits: ServerConfig) -> Batch | None:
    """A batch with one call; None: the call can share no launch. With the device."""
    found = shareable(call, ops)
    return None if found is None else Batch(found, ops, limits)


def shareable(call: Call, ops: TritonAttentionOps) -> Shareable | None:
    """How a call can share a launch with others, of any layers; None: it cannot. Kept in the step for each options."""
    step, options = call.step, call.options
    if step.group.pages is None or call.q is None or call.k is None or call.v is None:
        return None
    if options in step.shareable:
        return step.shareable[options]
    key = _share_key(step, step.group.pages, options, ops)
    if key is None:
        return step.shareable.put(options, None)
    metadata, config = step.metadata, step.group.config
    num_heads = options.num_heads + config.num_kv_heads
    num_bytes = metadata.num_tokens * num_heads * (config.head_dim + config.head_dim_v) * config.dtype.itemsize
    sizes = num_bytes, metadata.num_reqs, metadata.num_tokens, metadata.page_tables.shape[1]
    return step.shareable.put(options, Shareable(key, step.cost(options).work, *sizes))


def _share_key(step: Step, pages: CachePages, options: AttentionOptions, ops: TritonAttentionOps) -> ShareKey | None:
    metadata, config = step.metadata, step.group.config
    if not metadata.is_decode or metadata.has_absent_pages(config.page_size):
        return None
    if metadata.reads_stored or not metadata.is_plain or metadata.reads_rounded(config):
        return None  # what is joined attends first, and reads all new tokens as calls bring them
    query_len = metadata.num_tokens // metadata.num_reqs
    split = config.kv_split
    by_own_length = query_len == 1 if split.batch_invariant is None else split.batch_invariant
    if not (by_own_length or split.chunk_size):
        return None  # bits may depend on what shares the batch
    try:
        kernel = ops.choose(config, metadata, options)
    except Unsupported:
        return None
    if not (kernel.batch_invariant and isinstance(kernel, ShiftsPages)):
        return None
    return ShareKey(
        step.graphs_for(options) is not None, (pages.space.id, kernel.backend.value, query_len, options.key)
    )


class _SharedStep:
    """The requests of several steps as one step on the space of their caches."""

    def __init__(self, steps: list[Step], options: AttentionOptions, ops: TritonAttentionOps) -> None:
        group = steps[0].group
        assert group.pages is not None
        space = group.pages.space
        metadata = _joined([step.metadata for step in steps])
        kernel = ops.choose(group.config, steps[0].metadata, options)
        assert isinstance(kernel, ShiftsPages)
        self._steps = steps  # held, so that their ids are not given to others
        self._group, self._space, self._kernel = group, space, kernel
        self._pages = group.layers[0]._replace(k=space.k, v=space.v)  # scales are those of the whole group
        self._state = kernel.plan(space.config, metadata, options, ops.device)
        self._num_reqs = torch.tensor([step.metadata.num_reqs for step in steps])
        self._num_tokens = torch.tensor([step.metadata.num_tokens for step in steps])
        self._token_counts: list[int] = self._num_tokens.tolist()
        inputs, results = call_fields(space.config, options)
        # Before the inputs of a call the pages of the space that come before those of each request's layer.
        self._inputs = Buffer(metadata.num_tokens, [Field(torch.int32, ()), *inputs], ops.device)
        self._results = Buffer(metadata.num_tokens, results, ops.device)
        self._device = ops.device
        # What the copies of the first launch took; None: there was none yet. All of them copy as many bytes.
        self._copies = None if ops.device.type == "cuda" else NO_COPIES
        self._slots = metadata.slot_mapping
        self._stored: torch.Tensor | None = None  # the tokens that are stored, on the device; None: all
        if self._slots is not None and (self._slots < 0).any():
            self._stored = (self._slots >= 0).nonzero().squeeze(1).to(ops.device)

    def attend(self, calls: list[Call]) -> list[Result]:
        """Runs a call of each step, in the order of the steps: attends all, stores all."""
        timer = CopyTimer(self._device) if self._copies is None else None
        self._stage(calls)
        if timer is not None:
            timer.mark()
        whole = self._inputs.head(sum(self._token_counts))
        whole.on_device.copy_(whole.on_host, non_blocking=True)
        if timer is not None:
            timer.mark()
        offsets, slots, k, v, q = self._inputs.device
        self._state = self._kernel.shifted(self._state, offsets[: int(self._num_reqs.sum())])
        output, lse = self._kernel.run(self._state, q, k, v, self._pages)
        if self._slots is not None:  # now that the launch has its memory
            for step in self._steps:
                step.mark_written()
            self._group.store_in(self._pages, k, v, StoredTokens(slots, self._stored))
        tensors = [output] if lse is None else [lse, output]
        if timer is not None:
            timer.mark()
        for host, tensor in zip(self._results.host, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        if timer is not None:
            timer.mark()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        if timer is not None:
            self._copies = timer.staged()
        *lses, outputs = (host.split(self._token_counts) for host in self._results.host)
        by_call = zip(outputs, lses[0] if lses else [None] * len(calls), strict=True)
        return [Result(*each, self._kernel.backend, self._copies or NO_COPIES) for each in by_call]

    def _stage(self, calls: list[Call]) -> None:
        """Puts what is new of the calls where one copy takes it from."""
        offsets, slots, k, v, q = self._inputs.host
        firsts = torch.tensor([_first_page(call) for call in calls], dtype=torch.int32)
        by_request = firsts.repeat_interleave(self._num_reqs)
        offsets[: len(by_request)] = by_request
        if self._slots is not None:
            first_slots = firsts.long() * self._space.config.page_size
            shifted = self._slots + first_slots.repeat_interleave(self._num_tokens)
            slots.copy_(torch.where(self._slots < 0, -1, shifted))
        for host, name in ((k, "k"), (v, "v"), (q, "q")):
            torch.cat([getattr(call, name) for call in calls], out=host)


def _first_page(call: Call) -> int:
    group = call.step.group
    assert group.pages is not None
    return group.pages.first + call.layer * group.config.num_pages


def _joined(steps: list[AttentionMetadata]) -> AttentionMetadata:
    """One decode step with the requests of several, all with equally many new tokens."""
    num_pages = max(step.page_tables.shape[1] for step in steps)
    num_reqs = sum(step.num_reqs for step in steps)
    tables = torch.zeros(num_reqs, num_pages, dtype=torch.int32)
    first = 0
    for step in steps:
        tables[first : first + step.num_reqs, : step.page_tables.shape[1]] = step.page_tables
        first += step.num_reqs
    num_tokens = sum(step.num_tokens for step in steps)

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(step, name) for step in steps])

    slots = None
    if any(step.slot_mapping is not None for step in steps):
        slots = torch.cat([_slots(step) for step in steps])
    return AttentionMetadata(
        is_decode=True,
        num_tokens=num_tokens,
        cu_seqlens_q=torch.arange(num_reqs + 1) * (num_tokens // num_reqs),
        context_lens=joined("context_lens"),
        page_tables=tables,
        slot_mapping=slots,
        valid_lens=joined("valid_lens"),
        block_sizes=joined("block_sizes"),
        prefix_lens=joined("prefix_lens"),
        padded_prefix_lens=joined("padded_prefix_lens"),
        hole_starts=joined("hole_starts"),
        hole_ends=joined("hole_ends"),
    )


def _slots(step: AttentionMetadata) -> torch.Tensor:
    if step.slot_mapping is None:
        return torch.full((step.num_tokens,), -1)
    return step.slot_mapping.long()


class SharedLaunches:
    """Runs calls together. With the device.

    Attributes:
        joined: the graphs of such launches.
    """

    def __init__(self, ops: TritonAttentionOps, capture: Capture | None = None) -> None:
        """Keeps nothing yet. Without `capture` no launch is a graph."""
        self._ops = ops
        self.joined = JoinedGraphs(ops, capture)
        self._sets: LRUCache[tuple[object, ...], _SharedStep] = LRUCache(_MAX_SETS)

    def attend(self, calls: list[Call]) -> list[Result]:
        """One layer of each of several steps of a `Batch`, all of different caches.

        Returns:
            The results in the order of the calls. The next call may overwrite them.
        """
        first = shareable(calls[0], self._ops)
        if first is not None and (graph := self.joined.find(calls, first.key)) is not None:
            return graph.attend(calls)
        # The same steps come in another order for the next layer, but are the same set.
        order = sorted(range(len(calls)), key=lambda index: id(calls[index].step))
        ordered = [calls[index] for index in order]
        steps = (ordered[0].options.key, *(id(call.step) for call in ordered))
        shared = self._sets.get(steps)
        if shared is None:
            shared = _SharedStep([call.step for call in ordered], ordered[0].options, self._ops)
            self._sets[steps] = shared
        try:
            results = dict(zip(order, shared.attend(ordered), strict=True))
        except BaseException:
            del self._sets[steps]  # the device may still read what was staged
            raise
        return [results[index] for index in range(len(calls))]

    def attend_alone(self, call: Call) -> Result | None:
        """One call whose tensors are many, if the device reads and writes them where they lie; None: it does not."""
        if call.at is None or call.is_sampled:
            return None
        found = shareable(call, self._ops)
        if found is None or found.num_bytes < MIN_BYTES_ALONE:
            return None
        graph = self.joined.find([call], found.key)
        return None if graph is None else graph.attend([call])[0]

    def forget(self) -> None:
        """Keeps nothing any more: steps and plans that are over take memory."""
        self._sets.clear()
        self.joined.forget()

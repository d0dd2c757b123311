"""A fixed plan of Hopper's kernels: decode steps of a shape in buffers that never change, laid out on the device.

The host writes a few numbers of each request and the page tables into pinned memory, one copy takes them over, and a
launch of `decode_items`, captured as a CUDA graph because launching costs the host more than anything else here, makes
items and merges of them.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from attnd_server.attention.backends.base import DecodeShape, DeviceStep
from attnd_server.attention.backends.triton.hopper_parts import is_chunked, is_even, most_parts
from attnd_server.attention.backends.triton.launches import LaunchShape, fits_hopper, launches_of, multiprocessors
from attnd_server.attention.backends.triton.limits import MAX_CONTEXT_LEN
from attnd_server.attention.backends.triton.plan import Launch, TritonPlan
from attnd_server.attention.backends.triton.staged_step import StagedStep
from attnd_server.attention.backends.triton.work import Rows
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.kernels.decode_items import MAX_REQUESTS, STEP_HEADER, decode_items
from attnd_server.attention.kernels.items import ITEM_FIELDS, MERGE_FIELDS, NUM_NEW, PREFETCHED
from attnd_server.attention.kernels.launch_shapes import HOPPER_KEYS, MAX_SPLIT_TOKENS
from attnd_server.attention.kernels.softmax import LOG2E
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import REQUEST_COLUMNS, AttentionMetadata, AttentionOptions
from attnd_server.device.cuda_graph import Launches, captured

# Elements: where the page tables start, as far apart as the copy engine and the memory like it.
_ALIGNMENT = 32
# Items count elements of the page tables in int32.
_MAX_TABLE_ELEMENTS = (1 << 31) - 1
# Of a shape: least and most.
_BOUNDS = (("num_reqs", 1, MAX_REQUESTS), ("query_len", 1, MAX_SPLIT_TOKENS), ("max_context_len", 0, MAX_CONTEXT_LEN))
_META = torch.device("meta")
# Programs of an attention kernel that a multiprocessor runs at once, at the most.
_MOST_PROGRAMS = 8


def device_step(config: AttentionConfig, shape: DecodeShape, device: torch.device) -> DeviceStep:
    """Room for the steps of a shape: zeros, which are a step without requests."""
    tables = -(-(STEP_HEADER + len(REQUEST_COLUMNS) * shape.num_reqs) // _ALIGNMENT) * _ALIGNMENT
    # Page tables that nobody reads are still a pointer.
    num_pages = max(1, shape.num_reqs * -(-shape.max_context_len // config.page_size))
    return DeviceStep(torch.zeros(tables + num_pages + PREFETCHED, dtype=torch.int32, device=device), tables, num_pages)


def make_fixed_plan(
    config: AttentionConfig,
    shape: DecodeShape,
    options: AttentionOptions,
    is_grouped: bool,
    device: torch.device,
    step: DeviceStep | None = None,
) -> FixedTritonPlan | str:
    """A fixed plan where Hopper's kernels serve the shape, or the reason why there is none."""
    launch = _launch_of(config, shape, options, is_grouped, device)
    return launch if isinstance(launch, str) else FixedTritonPlan(config, shape, options, launch, device, step)


def fixed_plan_bytes(
    config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, is_grouped: bool, device: torch.device
) -> int | str:
    """Memory that such a plan of a given step takes, or the reason why there is none. Takes none itself."""
    launch = _launch_of(config, shape, options, is_grouped, device)
    if isinstance(launch, str):
        return launch
    items, merges, partials = _results(config, shape, options, _rows(config, options, launch, device), _META)
    return sum(each.nbytes for each in (items, merges, *partials))


def _launch_of(
    config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, is_grouped: bool, device: torch.device
) -> LaunchShape | str:
    """The only launch of a plan, or the reason why there is none."""
    dtype = config.precision.dtype(config.dtype)
    if not is_grouped:
        return "its programs for each query head are planned on the host"
    if not fits_hopper(config, dtype, device):
        return "Hopper's kernels do not serve this cache on this device"
    for name, least, most in _BOUNDS:
        if not least <= getattr(shape, name) <= most:
            return f"{name} is {getattr(shape, name)}, but must be {least}..{most}"
    num_elements = shape.num_reqs * -(-shape.max_context_len // config.page_size)
    if num_elements > _MAX_TABLE_ELEMENTS:
        return f"the page tables have up to {num_elements} elements, but must have at most {_MAX_TABLE_ELEMENTS}"
    request = np.zeros((1, ITEM_FIELDS), np.int32)
    request[:, NUM_NEW.value] = shape.query_len
    group = options.num_heads // config.num_kv_heads
    ((launch, _),) = launches_of(request, config, group, dtype, hopper=True)
    if launch.tile is not None:
        return "Hopper's kernels do not serve this shape"
    return launch


def _rows(config: AttentionConfig, options: AttentionOptions, launch: LaunchShape, device: torch.device) -> Rows:
    group = options.num_heads // config.num_kv_heads
    return Rows(group, config.num_kv_heads, launch.rows, HOPPER_KEYS, multiprocessors(device))


class FixedTritonPlan:
    """Decode steps of one shape; see `base.FixedPlan`.

    Args:
        config: the cache's.
        shape: the steps.
        options: the layers'.
        launch: of its only launch.
        device: of pages and tensors. Planning runs in Triton's interpreter too, `launch` on a Hopper GPU alone.
        given: a step that something on the device writes, and several plans may share: `update` is of no use then.
            None: the plan's own, which `update` writes.

    Attributes:
        shape: the steps.
        num_bytes: memory of the device that the buffers take, but a step that was given.
        lay_out: launches what makes items of the step, to be captured by whoever writes it.
    """

    lay_out: Launches
    _lay_out: Launches

    def __init__(
        self,
        config: AttentionConfig,
        shape: DecodeShape,
        options: AttentionOptions,
        launch: LaunchShape,
        device: torch.device,
        given: DeviceStep | None = None,
    ) -> None:
        group = options.num_heads // config.num_kv_heads
        sizes = _rows(config, options, launch, device)
        is_own = given is None
        step, tables, num_pages = given or device_step(config, shape, device)
        items, merges, partials = _results(config, shape, options, sizes, device)
        num_partial_rows = len(partials[0])
        merges_if_any = merges if num_partial_rows else None
        self.shape = shape
        self.num_bytes = sum(each.nbytes for each in (items, merges, *partials)) + (step.nbytes if is_own else 0)
        self.plan = TritonPlan(
            config=config,
            options=options,
            group=group,
            launches=[Launch(launch, num_partial_rows, items, merges_if_any, None, shape.query_len)],
            page_tables=step[tables : tables + num_pages],
            alibi_slopes=_log2(options.alibi_slopes, device),
            sinks=_log2(options.sinks, device),
            partials={0: partials},
        )
        self._page_size = config.page_size
        self._written = items, merges  # held here: the captured launch has only their addresses
        self._staged = [StagedStep(step, tables) for _ in range(2)] if is_own else []
        most_looked_at = -(-_MOST_PROGRAMS * sizes.num_multiprocessors // config.num_kv_heads)
        lay_out = partial(
            decode_items,
            items,
            merges,
            step,
            query_len=shape.query_len,
            group=group,
            num_groups=sizes.num_groups,
            rows=launch.rows,
            num_multiprocessors=sizes.num_multiprocessors,
            num_looked_at=min(len(items), most_looked_at),
            kv_split=config.kv_split,
            is_chunked=is_chunked(config.kv_split, sizes),
            is_even=is_even(config.kv_split, shape.query_len),
            window=options.window,
        )
        lay_out()  # compiles
        self.lay_out = self._lay_out = lay_out
        if is_own and device.type == "cuda":
            self._lay_out = captured(lay_out, torch.cuda.Stream(device))
            torch.cuda.current_stream(device).synchronize()  # steps may come on another stream

    def refusal(self, metadata: AttentionMetadata) -> str | None:
        """None, or the reason why a step does not fit."""
        shape = self.shape
        if not metadata.is_decode or metadata.store_only or metadata.cache_only:
            return "it is not a decode step that attends to new tokens"
        if metadata.num_reqs > shape.num_reqs:
            return f"it has {metadata.num_reqs} requests, but must have at most {shape.num_reqs}"
        if metadata.num_tokens != metadata.num_reqs * shape.query_len:
            return f"it has {metadata.num_tokens} new tokens, but must have {shape.query_len} for each request"
        if metadata.max_context_len > shape.max_context_len:
            return f"a context has {metadata.max_context_len} tokens, but must have at most {shape.max_context_len}"
        if not metadata.is_plain:
            return "it has new tokens that are no keys, or requests without sinks"
        if metadata.reads_rounded(self.plan.config):
            return "it reads new tokens as FP8 pages have them"
        if metadata.has_absent_pages(self._page_size):
            return "page_tables has -1 within a context, but every page must be there"
        return None

    def update(self, metadata: AttentionMetadata) -> None:
        """Makes a step that fits the one that `launch` computes. Does not wait for the device.

        Unless it is two updates ahead of it: what an update sends must stay until the device has it.
        """
        staged = self._staged[0]
        self._staged.reverse()
        staged.wait()
        num_pages = -(-metadata.max_context_len // self._page_size)
        parts = staged.parts(metadata.num_reqs, num_pages)
        parts.columns[...] = metadata.columns
        parts.page_tables[...] = metadata.page_tables.numpy()[:, :num_pages]
        staged.send(parts)
        self._lay_out()

    def launch(
        self,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pages: LayerPages,
    ) -> None:
        """Attention of one layer; see `base.FixedPlan.launch`."""
        self.plan.launch(output, lse, q, k, v, pages)


def _results(
    config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, sizes: Rows, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Room for items, merges and partial results of the worst step; no rows of these if no request is ever cut."""
    num_parts = most_parts(
        shape.num_reqs, shape.query_len, shape.max_context_len, config.kv_split, options.window, sizes
    )
    num_items = num_parts * -(-shape.query_len * sizes.group // sizes.rows)
    num_rows = num_parts * shape.query_len if num_parts > shape.num_reqs else 0
    return (
        torch.zeros(num_items, ITEM_FIELDS, dtype=torch.int32, device=device),
        torch.zeros(shape.num_reqs, MERGE_FIELDS, dtype=torch.int32, device=device),
        (
            torch.zeros(num_rows, options.num_heads, config.head_dim_v, device=device),
            torch.zeros(num_rows, options.num_heads, device=device),
        ),
    )


def _log2(per_head: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A float32 tensor in units of log2 on the device."""
    return None if per_head is None else (per_head.float() * LOG2E).to(device)

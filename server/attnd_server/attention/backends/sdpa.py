"""Backend `sdpa`: torch's scaled_dot_product_attention over gathered pages. Fast on a processor.

Prefill without context gathers nothing and has no masks: on a GPU, cuDNN's kernel serves it, or FlashAttention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from attnd.protocol.alignment import aligned
from attnd_server.attention.backends.base import DecodeShape
from attnd_server.attention.backends.dense_prefill import dense_kernels, dense_prefill
from attnd_server.attention.backends.gather import Part, mask_elements, split
from attnd_server.attention.backends.part_costs import FEW_KEYS, PartCosts, longest, part_costs
from attnd_server.attention.config import AttentionBackend, AttentionConfig, Layout
from attnd_server.attention.kernels.pages import as_stored, of_kv_heads, read_kv
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.scales import MIN_SCALE, plain_scale, refusal
from attnd_server.attention.tiles import SCRATCH_BYTES

MAX_MASK_ELEMENTS = 2**30
"""Most elements of all masks of a step, which are made anew for each layer where they are many."""


@dataclass(frozen=True, eq=False)
class _Plan:
    parts: Iterable[Part]
    is_one_part: bool  # with all rows in their order, and all heads at once
    costs: PartCosts
    num_tokens: int
    layout: Layout
    dtype: torch.dtype  # to multiply in
    scale: float
    head_dim_v: int
    enable_gqa: bool
    is_dense_on_gpu: bool
    reads_rounded: bool  # new tokens as FP8 pages have them


class SdpaAttention:
    """Serves steps without softcap, ALiBi, sinks and lse. Every part of a step (see `gather`) is one call of torch.

    Not batch-invariant: contexts are padded to the longest of their part, which changes the order of sums.
    """

    backend = AttentionBackend.SDPA
    batch_invariant = False

    def supports(self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions) -> str | None:
        """None, or the option that torch's function does not have."""
        missing = missing_option(options)
        if missing:
            return f"torch's scaled_dot_product_attention has no {missing}"
        reason = refusal(options)
        if reason:
            return reason
        elements = mask_elements(config, metadata, options)
        if elements > MAX_MASK_ELEMENTS:
            return f"the masks of this step have {elements} elements, but sdpa holds at most {MAX_MASK_ELEMENTS}"
        # No request has more keys than this. Most steps are told by it, at less than `longest` costs.
        if metadata.max_context_len + metadata.num_tokens <= FEW_KEYS:
            return None
        num_keys = longest(metadata, options)
        if num_keys <= FEW_KEYS:
            return None
        num_bytes = sum(part_costs(config, options, enable_gqa=False).bytes_of_heads(1, 1, num_keys))
        if num_bytes > SCRATCH_BYTES:
            return f"a head of {num_keys} keys takes {num_bytes} bytes, but sdpa takes at most {SCRATCH_BYTES} at once"
        return None

    def supports_context_length(self, num_tokens: int) -> bool:
        """True: memory is the only limit."""
        return True

    def plan(
        self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
    ) -> _Plan:
        """The parts of the step with their slots and masks."""
        dense = dense_prefill(config, metadata, options, device)
        parts = split(config, metadata, options, device) if dense is None else dense
        # On a GPU only the kernels that take no mask know grouped heads; with a mask torch would hold all scores.
        enable_gqa = device.type == "cpu" or dense is not None
        costs = part_costs(config, options, enable_gqa=enable_gqa, on_processor=device.type == "cpu")
        is_one = isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0].rows, slice)
        return _Plan(
            parts=parts,
            is_one_part=is_one and len(costs.blocks(next(iter(parts)))) == 1,
            costs=costs,
            num_tokens=metadata.num_tokens,
            layout=config.layout,
            dtype=config.precision.dtype(config.dtype),
            scale=options.scale,
            head_dim_v=config.head_dim_v,
            enable_gqa=enable_gqa,
            is_dense_on_gpu=device.type != "cpu" and dense is not None,
            reads_rounded=metadata.reads_rounded(config),
        )

    def reads_stored(self, plan: _Plan) -> bool:
        """Whether a step's only token is read where it lies, with its context; see `ReadsStored`."""
        return isinstance(plan.parts, list) and len(plan.parts) == 1 and plan.parts[0].side_by_side is not None

    def fixed_plan(
        self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, device: torch.device
    ) -> str:
        """The reason why there is none."""
        return "it gathers the pages of each step anew"

    def run(
        self,
        plan: _Plan,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one layer; see `AttentionKernel.run`."""
        if plan.is_one_part:
            (part,) = plan.parts
            return _run_part(plan, part, q, *_as_read(plan, k, v, pages), pages), None
        output = q.new_empty(plan.num_tokens, q.shape[1], plan.head_dim_v)
        self.launch(plan, output, None, q, k, v, pages)
        return output, None

    def launch(
        self,
        plan: _Plan,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> None:
        """As `run`, into `output`; see `AttentionKernel.launch`."""
        for _ in self.pieces(plan, output, lse, q, k, v, pages):
            pass

    def pieces(
        self,
        plan: _Plan,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> Iterator[None]:
        """As `launch`, some heads of a part at a time; see `RunsInPieces`."""
        k, v = _as_read(plan, k, v, pages)
        for part in plan.parts:
            blocks = plan.costs.blocks(part)
            if len(blocks) == 1:
                output[part.rows] = _run_part(plan, part, q, k, v, pages)
                yield
                continue
            for heads in blocks:
                some_k, some_v = (None if tensor is None else tensor[:, heads.kv] for tensor in (k, v))
                some_pages = of_kv_heads(pages, heads.kv, plan.layout)
                some = _run_part(plan, part, q[:, heads.query], some_k, some_v, some_pages)
                output[part.rows, heads.query] = some
                yield


def missing_option(options: AttentionOptions) -> str:
    """The name of an option that is asked for and that torch's function does not have; "": it has all."""
    if options.softcap:
        return "softcap"
    if options.alibi_slopes is not None:
        return "alibi_slopes"
    if options.sinks is not None:
        return "sinks"
    return "return_lse" if options.return_lse else ""


def _as_read(
    plan: _Plan, k: torch.Tensor | None, v: torch.Tensor | None, pages: LayerPages
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """K and V of new tokens as the step's parts read them."""
    if not plan.reads_rounded or k is None or v is None:
        return k, v
    return as_stored(k, pages.k_scales, k.dtype), as_stored(v, pages.v_scales, v.dtype)


def _run_part(
    plan: _Plan,
    part: Part,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    pages: LayerPages,
) -> torch.Tensor:
    """Output of a part's rows, `[num_reqs * num_rows, num_heads, head_dim_v]`."""
    if part.side_by_side is not None:
        return _attend_in_place(plan, part.side_by_side, q, pages)
    if part.slots is not None:
        keys, values = read_kv(pages, part.slots, plan.layout, plan.dtype)
        keys, values = _by_request(keys, part), _by_request(values, part)
        if k is not None and v is not None:
            keys[:, part.num_cached :] = _by_request(k[part.new_rows], part)
            values[:, part.num_cached :] = _by_request(v[part.new_rows], part)
    elif k is not None and v is not None:
        keys, values = _by_request(k[part.new_rows], part), _by_request(v[part.new_rows], part)
        if part.unused is not None:
            keys, values = keys.clone(), values.clone()
    if part.unused is not None:  # 0 * NaN is NaN, whatever the mask
        keys.flatten(0, 1).index_fill_(0, part.unused, 0)
        values.flatten(0, 1).index_fill_(0, part.unused, 0)
    output = _attend(plan, part, _by_request(q[part.rows], part), keys, values)
    if part.blind is not None:
        output = output.masked_fill(part.blind, 0)
    return output.flatten(0, 1).to(q.dtype)


def _attend_in_place(plan: _Plan, slots: slice, q: torch.Tensor, pages: LayerPages) -> torch.Tensor:
    """Attention of one token to slots that follow each other in unified pages, `[1, num_heads, head_dim_v]`.

    With as few operations of torch as there can be: each costs what a dozen keys cost.
    """
    _, num_heads, head_dim = q.shape
    scale = plan.scale
    if scale < MIN_SCALE:  # not asked of `plain_scale`: this is the way of a single token
        q, scale = plain_scale(q, scale)
    queries = q.reshape(1, pages.k.shape[2], -1, head_dim)  # as in `_attend`, heads of a KV head are rows
    keys, values = _heads_of_slots(pages.k, slots), _heads_of_slots(pages.v, slots)
    if plan.dtype is not q.dtype:
        queries, keys, values = queries.to(plan.dtype), keys.to(plan.dtype), values.to(plan.dtype)
    output = scaled_dot_product_attention(aligned(queries), aligned(keys), aligned(values), scale=scale)
    return output.reshape(1, num_heads, plan.head_dim_v).to(q.dtype)


def _heads_of_slots(pages: torch.Tensor, slots: slice) -> torch.Tensor:
    """A view of slots that follow each other in unified pages: `[1, num_kv_heads, num_slots, head_dim]`."""
    _, _, num_kv_heads, head_dim = pages.shape
    slot = pages.stride(1)  # of V in latent pages it is that of K's rows
    shape = (1, num_kv_heads, slots.stop - slots.start, head_dim)
    return pages.as_strided(shape, (0, head_dim, slot, 1), pages.storage_offset() + slots.start * slot)


def _by_request(tokens: torch.Tensor, part: Part) -> torch.Tensor:
    """`[num_reqs * num, num_heads, head_dim]` as `[num_reqs, num, num_heads, head_dim]`."""
    return tokens.view(part.num_reqs, -1, tokens.shape[1], tokens.shape[2])


def _attend(plan: _Plan, part: Part, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Dense attention, `[num_reqs, num_rows, num_heads, head_dim_v]`.

    Args:
        plan: of the step.
        part: of the step.
        queries: `[num_reqs, num_rows, num_heads, head_dim]`.
        keys: `[num_reqs, num_keys, num_kv_heads, head_dim]`.
        values: `[num_reqs, num_keys, num_kv_heads, head_dim_v]`.
    """
    num_reqs, num_rows, num_heads, _ = queries.shape
    num_kv_heads = keys.shape[2]
    queries, scale = plain_scale(queries, plan.scale)
    queries, keys, values = (aligned(tensor.to(plan.dtype)) for tensor in (queries, keys, values))
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if num_rows == 1:
        # The query heads of a KV head become rows: all see the same keys, and nothing is copied.
        queries = queries.view(num_reqs, num_kv_heads, num_heads // num_kv_heads, -1)
        output = scaled_dot_product_attention(queries, keys, values, attn_mask=part.mask, scale=scale)
        return output.reshape(num_reqs, 1, num_heads, plan.head_dim_v)
    if not plan.enable_gqa:
        keys, values = (tensor.repeat_interleave(num_heads // num_kv_heads, dim=1) for tensor in (keys, values))
    kernels: AbstractContextManager[None] = nullcontext()
    if plan.is_dense_on_gpu:
        kernels = dense_kernels()
    with kernels:
        output = scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys,
            values,
            attn_mask=part.mask,
            is_causal=part.is_causal,
            scale=scale,
            enable_gqa=plan.enable_gqa,
        )
    return output.transpose(1, 2)

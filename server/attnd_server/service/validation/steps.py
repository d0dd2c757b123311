"""A step's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch

from attnd.v1 import step_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import AttentionMetadata
from attnd_server.config import ServerConfig
from attnd_server.service.validation.arrays import (
    INT32,
    INT32_OR_INT64,
    check_range,
    optional_int32,
    refuse,
    refuse_first,
    required,
    view,
)
from attnd_server.service.validation.page_tables import page_tables as checked_page_tables
from attnd_server.service.validation.pages import Int64s, check_stores

# Of a unary request, which stands alone.
NO_STEPS: Mapping[int, AttentionMetadata] = MappingProxyType({})
_INT32_MAX = 2**31 - 1
_MASKS = "MASK_CAUSAL, MASK_BLOCK_CAUSAL, MASK_BIDIRECTIONAL or MASK_PREFIX_FULL"


def step(
    message: step_pb2.Step,
    config: AttentionConfig,
    limits: ServerConfig,
    open_steps: Mapping[int, AttentionMetadata] = NO_STEPS,
) -> AttentionMetadata:
    """A step's metadata, every tensor in memory of its own.

    Args:
        message: the step; its id and cache are the caller's business.
        config: the cache that it names.
        limits: what one step may take.
        open_steps: by id, those of its stream, which its page tables may be told by.

    Raises:
        InvalidRequest: the step breaks a rule of step.proto.
    """
    _check_flags(message)
    cu_seqlens_q = _cu_seqlens_q(message, limits)
    query_lens = np.diff(cu_seqlens_q)
    num_reqs = len(query_lens)
    if message.kind == step_pb2.STEP_KIND_DECODE and (query_lens != query_lens[0]).any():
        request = int((query_lens != query_lens[0]).argmax())
        rule = f"must give {query_lens[0]} as to request 0: in a decode step all have equally many"
        refuse("cu_seqlens_q", f"cu_seqlens_q gives {query_lens[request]} new tokens to request {request}, but {rule}")
    context_lens = _lens(message, "context_lens", num_reqs)
    rule = f"a request has at most {limits.max_context_len} tokens of context"
    check_range(context_lens, 0, limits.max_context_len, "context_lens", rule)
    page_tables = checked_page_tables(message, context_lens, config, limits, open_steps)
    valid_lens = _valid_lens(message, query_lens)
    masks = _masks(message, num_reqs)
    prefix_lens, padded_prefix_lens = _prefix_lens(message, masks)
    nothing = np.zeros_like(prefix_lens)
    hole_starts, hole_ends = (prefix_lens, padded_prefix_lens) if message.mask_prefix_hole else (nothing, nothing)
    slot_mapping = _slot_mapping(message, int(cu_seqlens_q[-1]), config)
    if slot_mapping is not None:
        read_tables = None if message.store_only else page_tables  # nothing is attended: nothing is read
        check_stores(slot_mapping, read_tables, context_lens, hole_starts, hole_ends, config)
    is_prefix_full = masks == step_pb2.MASK_PREFIX_FULL
    metadata = AttentionMetadata(
        is_decode=message.kind == step_pb2.STEP_KIND_DECODE,
        num_tokens=int(cu_seqlens_q[-1]),
        cu_seqlens_q=torch.from_numpy(cu_seqlens_q),
        context_lens=torch.from_numpy(context_lens),
        page_tables=torch.from_numpy(page_tables),
        slot_mapping=None if slot_mapping is None else torch.from_numpy(slot_mapping),
        valid_lens=torch.from_numpy(valid_lens),
        block_sizes=torch.from_numpy(_block_sizes(masks, message.block_size)),
        prefix_lens=torch.from_numpy(prefix_lens * is_prefix_full),
        padded_prefix_lens=torch.from_numpy(padded_prefix_lens * is_prefix_full),
        hole_starts=torch.from_numpy(hole_starts),
        hole_ends=torch.from_numpy(hole_ends),
        cache_only=message.cache_only,
        store_only=message.store_only,
    )
    # Made here, where steps are checked side by side, and not where they wait for each other.
    _ = metadata.columns, metadata.max_context_len, metadata.first_absent_pages
    return metadata


def _check_flags(message: step_pb2.Step) -> None:
    if message.kind not in (step_pb2.STEP_KIND_PREFILL, step_pb2.STEP_KIND_DECODE):
        refuse("kind", f"kind is {message.kind or 'unspecified'}, but must be STEP_KIND_PREFILL or STEP_KIND_DECODE")
    if message.cache_only and message.store_only:
        refuse("store_only", "store_only is true, but must be false in a cache-only step")
    if message.cache_only and message.HasField("slot_mapping"):
        refuse("slot_mapping", "slot_mapping is given, but must be absent in a cache-only step")
    if message.store_only and not message.HasField("slot_mapping"):
        refuse("slot_mapping", "slot_mapping is absent, but must be given in a store-only step")


def _cu_seqlens_q(message: step_pb2.Step, limits: ServerConfig) -> Int64s:
    values = view(required(message, "cu_seqlens_q"), "cu_seqlens_q", INT32, ("num_reqs + 1",))
    num_reqs = len(values) - 1
    if not 1 <= num_reqs <= limits.max_step_reqs:
        rule = f"must have 2..{limits.max_step_reqs + 1}: a step has 1..{limits.max_step_reqs} requests"
        refuse("cu_seqlens_q", f"cu_seqlens_q has {len(values)} elements, but {rule}")
    if values[0] != 0:
        refuse("cu_seqlens_q", f"cu_seqlens_q[0] is {values[0]}, but must be 0")
    falls = values[1:] < values[:-1]
    if falls.any():
        index = int(falls.argmax()) + 1
        rule = f"must be at least {values[index - 1]}, the element before it"
        refuse("cu_seqlens_q", f"cu_seqlens_q[{index}] is {values[index]}, but {rule}")
    if not 1 <= values[-1] <= limits.max_step_tokens:
        rule = f"a step has 1..{limits.max_step_tokens} new tokens"
        refuse("cu_seqlens_q", f"cu_seqlens_q[{num_reqs}] is {values[-1]}, but {rule}")
    return values.astype(np.int64)


def _lens(message: step_pb2.Step, field: str, num_reqs: int) -> Int64s:
    """The required int32 `[num_reqs]` tensor `field`, none below 0."""
    values = view(required(message, field), field, INT32, (num_reqs,))
    check_range(values, 0, _INT32_MAX, field, "must be at least 0")
    return values.astype(np.int64)


def _valid_lens(message: step_pb2.Step, query_lens: Int64s) -> Int64s:
    values = optional_int32(message, "valid_lens", query_lens.shape)
    if values is None:
        return query_lens
    wrong = (values < 0) | (values > query_lens)
    if wrong.any():
        most = query_lens[int(wrong.argmax())]
        refuse_first(wrong, values, "valid_lens", f"must be 0..{most}, the request's new tokens")
    return values.astype(np.int64)


def _masks(message: step_pb2.Step, num_reqs: int) -> Int64s:
    """A value of Mask for each request."""
    values = optional_int32(message, "masks", (num_reqs,))
    if values is not None:
        check_range(values, step_pb2.MASK_CAUSAL, step_pb2.MASK_PREFIX_FULL, "masks", f"must be {_MASKS}")
    elif not step_pb2.MASK_CAUSAL <= message.mask <= step_pb2.MASK_PREFIX_FULL:
        refuse("mask", f"mask is {message.mask or 'unspecified'}, but must be {_MASKS}")
    masks = np.full(num_reqs, message.mask, np.int64) if values is None else values.astype(np.int64)
    in_blocks = (masks == step_pb2.MASK_BLOCK_CAUSAL) | (masks == step_pb2.MASK_PREFIX_FULL)
    if message.block_size < 1 and in_blocks.any():
        refuse("block_size", "block_size is 0, but must be at least 1 for a block-causal or prefix-full mask")
    return masks


def _block_sizes(masks: Int64s, block_size: int) -> Int64s:
    """The masks as metadata has them: causal is block-causal with 1, bidirectional is 0."""
    by_mask = np.zeros(step_pb2.MASK_PREFIX_FULL + 1, np.int64)
    by_mask[step_pb2.MASK_CAUSAL] = 1
    by_mask[[step_pb2.MASK_BLOCK_CAUSAL, step_pb2.MASK_PREFIX_FULL]] = block_size
    return by_mask[masks]


def _prefix_lens(message: step_pb2.Step, masks: Int64s) -> tuple[Int64s, Int64s]:
    """Prefix and padded prefix of each request as sent; 0 where neither mask nor hole asks for them."""
    num_reqs = len(masks)
    needed = message.mask_prefix_hole or (masks == step_pb2.MASK_PREFIX_FULL).any()
    zeros = np.zeros(num_reqs, np.int64)
    lens = {
        field: _lens(message, field, num_reqs) if needed or message.HasField(field) else zeros
        for field in ("prefix_lens", "padded_prefix_lens")
    }
    prefix_lens, padded_prefix_lens = lens["prefix_lens"], lens["padded_prefix_lens"]
    short = padded_prefix_lens < prefix_lens
    if message.HasField("padded_prefix_lens") and short.any():
        rule = f"must be at least {prefix_lens[int(short.argmax())]}, the request's prefix_lens"
        refuse_first(short, padded_prefix_lens, "padded_prefix_lens", rule)
    return prefix_lens, padded_prefix_lens


def _slot_mapping(message: step_pb2.Step, num_tokens: int, config: AttentionConfig) -> Int64s | None:
    if not message.HasField("slot_mapping"):
        return None
    values = view(message.slot_mapping, "slot_mapping", INT32_OR_INT64, (num_tokens,))
    rule = f"the cache has slots 0..{config.num_slots - 1}, and -1 is not stored"
    check_range(values, -1, config.num_slots - 1, "slot_mapping", rule)
    return values.astype(np.int64)

"""What the layer groups of a step have in common: lengths, masks, owners."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from attnd.v1 import step_pb2
from attnd_server.config import ServerConfig
from attnd_server.service.validation.arrays import (
    INT32,
    check_range,
    optional_int32,
    refuse,
    refuse_first,
    required,
    view,
)
from attnd_server.service.validation.pages import Int64s

_INT32_MAX = 2**31 - 1
_MASKS = "MASK_CAUSAL, MASK_BLOCK_CAUSAL, MASK_BIDIRECTIONAL or MASK_PREFIX_FULL"
_IN_BLOCKS = (step_pb2.MASK_BLOCK_CAUSAL, step_pb2.MASK_PREFIX_FULL)
# Greatest first position: sums with lengths fit int32.
_MAX_POSITION = 1 << 30


class StepLengths(NamedTuple):
    """Of each request of a step, as sent but for what is said here. Positions are those after `first_position`.

    Attributes:
        cu_seqlens_q: `[num_reqs + 1]`.
        query_lens: `[num_reqs]`.
        context_lens: `[num_reqs]`; 0 of padded rows.
        valid_lens: `[num_reqs]`; 0 of padded rows.
        is_padded: bool `[num_reqs]`, rows that an engine padded its batch with; None: there are none.
        block_sizes: `[num_reqs]`; 1 is causal, 0 is bidirectional.
        prefix_lens: `[num_reqs]`; 0 unless the mask is prefix-full.
        padded_prefix_lens: `[num_reqs]`; likewise.
        hole_starts: `[num_reqs]`.
        hole_ends: `[num_reqs]`.
        attend_new: bool `[num_reqs]`; None: all do.
        all_have_tokens: whether every request has new tokens.
    """

    cu_seqlens_q: Int64s
    query_lens: Int64s
    context_lens: Int64s
    valid_lens: Int64s
    is_padded: npt.NDArray[np.bool_] | None
    block_sizes: Int64s
    prefix_lens: Int64s
    padded_prefix_lens: Int64s
    hole_starts: Int64s
    hole_ends: Int64s
    attend_new: npt.NDArray[np.bool_] | None
    all_have_tokens: bool

    @property
    def num_tokens(self) -> int:
        """New tokens of the step."""
        return int(self.cu_seqlens_q[-1])


def step_lengths(message: step_pb2.Step, limits: ServerConfig) -> StepLengths:
    """Lengths, masks and owners of a step.

    Raises:
        InvalidRequest: the step breaks a rule of step.proto.
    """
    cu_seqlens_q = _cu_seqlens_q(message, limits)
    query_lens = np.diff(cu_seqlens_q)
    if message.kind == step_pb2.STEP_KIND_DECODE:
        _check_alike(query_lens)
    context_lens, is_padded = _context_lens(message, query_lens, limits)
    valid_lens = _valid_lens(message, query_lens)
    if is_padded is not None:
        context_lens, valid_lens = (np.where(is_padded, 0, lens) for lens in (context_lens, valid_lens))
    masks = _masks(message, len(query_lens))
    prefix_lens, padded_prefix_lens = _prefix_lens(message, masks)
    first_position = _first_position(message, masks)
    if first_position is not None:
        prefix_lens = np.maximum(prefix_lens - first_position, 0)
        padded_prefix_lens = np.maximum(padded_prefix_lens - first_position, 0)
    hole_starts = hole_ends = nothing = np.zeros_like(prefix_lens)
    if message.mask_prefix_hole:
        hole_starts, hole_ends = prefix_lens, padded_prefix_lens
    if message.HasField("masks"):
        is_prefix_full = masks == step_pb2.MASK_PREFIX_FULL
        prefix_lens, padded_prefix_lens = prefix_lens * is_prefix_full, padded_prefix_lens * is_prefix_full
    elif message.mask != step_pb2.MASK_PREFIX_FULL:
        prefix_lens = padded_prefix_lens = nothing
    return StepLengths(
        cu_seqlens_q=cu_seqlens_q,
        query_lens=query_lens,
        context_lens=context_lens,
        valid_lens=valid_lens,
        is_padded=is_padded,
        block_sizes=_block_sizes(message, masks),
        prefix_lens=prefix_lens,
        padded_prefix_lens=padded_prefix_lens,
        hole_starts=hole_starts,
        hole_ends=hole_ends,
        attend_new=_attend_new(message, len(query_lens)),
        all_have_tokens=bool(query_lens.all()),
    )


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


def _check_alike(query_lens: Int64s) -> None:
    """Refuses a decode step in which requests that have new tokens have different numbers of them."""
    if (query_lens == query_lens[0]).all():
        return
    first = int((query_lens > 0).argmax())  # there is one
    wrong = (query_lens != query_lens[first]) & (query_lens > 0)
    if wrong.any():
        request = int(wrong.argmax())
        rule = f"must give {query_lens[first]} as to request {first}: in a decode step all have equally many"
        refuse("cu_seqlens_q", f"cu_seqlens_q gives {query_lens[request]} new tokens to request {request}, but {rule}")


def _lens(message: step_pb2.Step, field: str, num_reqs: int) -> Int64s:
    """The required int32 `[num_reqs]` tensor `field`, none below 0."""
    values = view(required(message, field), field, INT32, (num_reqs,))
    check_range(values, 0, _INT32_MAX, field, "must be at least 0")
    return values.astype(np.int64)


def _context_lens(
    message: step_pb2.Step, query_lens: Int64s, limits: ServerConfig
) -> tuple[Int64s, npt.NDArray[np.bool_] | None]:
    """The context lengths, and which requests are rows that an engine padded: their context takes their tokens back."""
    values = view(required(message, "context_lens"), "context_lens", INT32, query_lens.shape).astype(np.int64)
    is_padded = None
    if values.min() < 0:
        is_padded = (values < 0) & (values == -query_lens)
        wrong = (values < 0) & ~is_padded
        if wrong.any():
            refuse_first(wrong, values, "context_lens", "must be at least 0")
    if values.max() > limits.max_context_len:
        rule = f"a request has at most {limits.max_context_len} tokens of context"
        refuse_first(values > limits.max_context_len, values, "context_lens", rule)
    return values, is_padded


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
    if message.block_size < 1 and (message.mask in _IN_BLOCKS if values is None else _in_blocks(masks).any()):
        refuse("block_size", "block_size is 0, but must be at least 1 for a block-causal or prefix-full mask")
    return masks


def _in_blocks(masks: Int64s) -> npt.NDArray[np.bool_]:
    block_causal, prefix_full = _IN_BLOCKS
    in_blocks: npt.NDArray[np.bool_] = (masks == block_causal) | (masks == prefix_full)
    return in_blocks


def _block_sizes(message: step_pb2.Step, masks: Int64s) -> Int64s:
    """The masks as metadata has them: causal is block-causal with 1, bidirectional is 0."""
    by_mask = [0, 1, message.block_size, 0, message.block_size]  # causal, block-causal, bidirectional, prefix-full
    if message.HasField("masks"):
        return np.array(by_mask, np.int64)[masks]
    return np.full(len(masks), by_mask[message.mask], np.int64)


def _prefix_lens(message: step_pb2.Step, masks: Int64s) -> tuple[Int64s, Int64s]:
    """Prefix and padded prefix of each request as sent; 0 where neither mask nor hole asks for them."""
    num_reqs = len(masks)
    needed = message.mask_prefix_hole or message.mask == step_pb2.MASK_PREFIX_FULL
    if message.HasField("masks"):
        needed = message.mask_prefix_hole or (masks == step_pb2.MASK_PREFIX_FULL).any()
    zeros = np.zeros(num_reqs, np.int64)
    if not (needed or message.HasField("prefix_lens") or message.HasField("padded_prefix_lens")):
        return zeros, zeros
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


def _first_position(message: step_pb2.Step, masks: Int64s) -> Int64s | None:
    """Where each context begins; None: at 0.

    All else depends on distances alone, so that positions are counted from there; but blocks begin at their multiples.
    """
    sent = optional_int32(message, "first_position", masks.shape)
    if sent is None:
        return None
    check_range(sent, 0, _MAX_POSITION, "first_position", f"must be 0..{_MAX_POSITION}")
    values: Int64s = sent.astype(np.int64)  # a block size may not fit int32
    wrong = _in_blocks(masks) & (values % max(1, message.block_size) != 0)
    if wrong.any():
        rule = f"must be a multiple of block_size, {message.block_size}, for a block-causal or prefix-full mask"
        refuse_first(wrong, values, "first_position", rule)
    return values


def _attend_new(message: step_pb2.Step, num_reqs: int) -> npt.NDArray[np.bool_] | None:
    values = optional_int32(message, "attend_new", (num_reqs,))
    if values is None:
        return None
    check_range(values, 0, 1, "attend_new", "must be 0 or 1")
    return None if values.all() else values.astype(np.bool_)

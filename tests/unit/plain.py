"""Attention of a step in plain torch, one token at a time: what the client's tests compare with.

Reads the wire's message, so it also proves that the message says what the caller meant. Slow and small on purpose;
it shares no code with the server.
"""

from __future__ import annotations

import math

import torch

from attnd.v1 import step_pb2, tensor_pb2


def elements(tensor: tensor_pb2.Tensor) -> list:
    """The elements of an int32 or int64 tensor, as nested lists."""
    dtype = {tensor_pb2.DTYPE_INT32: torch.int32, tensor_pb2.DTYPE_INT64: torch.int64}[tensor.dtype]
    if not tensor.data:
        return torch.empty(tuple(tensor.shape), dtype=dtype).tolist()
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tuple(tensor.shape)).tolist()


def with_narrow_slots(step: step_pb2.Step) -> step_pb2.Step:
    """The same step, with slots that were given as int64 in int32."""
    same = step_pb2.Step()
    same.CopyFrom(step)
    for part in (same, *same.groups):
        slots = part.slot_mapping
        if slots.dtype == tensor_pb2.DTYPE_INT64:
            slots.data = torch.tensor(elements(slots), dtype=torch.int32).numpy().tobytes()
            slots.dtype = tensor_pb2.DTYPE_INT32
    return same


def seen(step: step_pb2.Step, request: int, i: int) -> tuple[list[int], list[int]]:
    """What new token `i` of a request sees: cached positions, and indices of new tokens of the request."""
    bounds = elements(step.cu_seqlens_q)
    num_new = bounds[request + 1] - bounds[request]
    valid = elements(step.valid_lens)[request] if step.HasField("valid_lens") else num_new
    context = elements(step.context_lens)[request]
    prefix = elements(step.prefix_lens)[request] if step.HasField("prefix_lens") else 0
    padded = elements(step.padded_prefix_lens)[request] if step.HasField("padded_prefix_lens") else 0
    if i >= valid:
        return [], []
    hole = range(prefix, padded) if step.mask_prefix_hole else range(0)
    cached = [position for position in range(context) if position not in hole]
    mask = elements(step.masks)[request] if step.HasField("masks") else step.mask
    limit = _limit(step, mask, context + i, prefix, padded)
    return cached, [] if step.cache_only else [j for j in range(valid) if context + j < limit]


def _limit(step: step_pb2.Step, mask: int, position: int, prefix: int, padded: int) -> float:
    if mask == step_pb2.MASK_CAUSAL:
        return position + 1
    if mask == step_pb2.MASK_BIDIRECTIONAL:
        return math.inf
    if mask == step_pb2.MASK_PREFIX_FULL and position < padded:
        return prefix if position < prefix else padded
    return (position // step.block_size + 1) * step.block_size


class PlainCache:
    """K and V of one layer by slot, and the attention of steps over them. Slots that were never stored are NaN."""

    def __init__(self, num_slots: int, page_size: int, num_kv_heads: int, head_dim: int) -> None:
        """All slots empty."""
        self.page_size = page_size
        self.k = torch.full((num_slots, num_kv_heads, head_dim), math.nan, dtype=torch.float64)
        self.v = self.k.clone()

    def attend(
        self, step: step_pb2.Step, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """Attends, then stores.

        Args:
            step: the message.
            q: `[num_tokens, num_heads, head_dim]`.
            k: `[num_tokens, num_kv_heads, head_dim]`, None in a cache-only step.
            v: as k.
            scale: factor of q.k.

        Returns:
            `[num_tokens, num_heads, head_dim]` in q's dtype.
        """
        output = torch.zeros_like(q)
        bounds, tables = elements(step.cu_seqlens_q), elements(step.page_tables)
        for request, table in enumerate(tables):
            for i in range(bounds[request + 1] - bounds[request]):
                cached, new = seen(step, request, i)
                slots = [table[p // self.page_size] * self.page_size + p % self.page_size for p in cached]
                slots = [slot for slot in slots if slot >= 0]
                rows = [bounds[request] + j for j in new]
                keys, values = self.k[slots], self.v[slots]
                if k is not None:
                    keys, values = torch.cat([keys, k[rows].double()]), torch.cat([values, v[rows].double()])
                if len(keys):
                    row = bounds[request] + i
                    output[row] = one_row(q[row].double(), keys, values, scale).to(q.dtype)
        if step.HasField("slot_mapping"):
            self.store(elements(step.slot_mapping), k, v)
        return output

    def store(self, slots: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores token `i` at `slots[i]`, unless that is -1."""
        for i, slot in enumerate(slots):
            if slot >= 0:
                self.k[slot], self.v[slot] = k[i].double(), v[i].double()


def one_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """`[num_heads, head_dim]` of one token: q `[num_heads, head_dim]`, k and v `[num_seen, num_kv_heads, head_dim]`."""
    group = q.shape[0] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    weights = torch.softmax(scale * torch.einsum("hd,shd->hs", q, k), dim=1)
    return torch.einsum("hs,shd->hd", weights, v)

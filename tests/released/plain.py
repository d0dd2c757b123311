"""A paged cache in float64, one number at a time. Knows torch alone, so that it runs beside any version of attnd."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

FP8_MAX = 448
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES, NUM_LAYERS = 6, 2, 16, 4, 40, 2
# Absolute and relative error that a result may have.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (5e-3, 8e-3)}


@dataclass
class PlainCache:
    """K and V by layer and slot, as they are worth in the pages.

    Attributes:
        head_dim_v: elements per head of V.
        k_scale: of FP8 pages; 0: the pages have the type of the calls.
        v_scale: likewise.
    """

    head_dim_v: int = HEAD_DIM
    k_scale: float = 0.0
    v_scale: float = 0.0
    kv: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def store(self, layer: int, slots: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
        """As StoreKv."""
        for slot, key, value in zip(slots, k, v, strict=True):
            if slot != -1:
                self.kv[layer, slot] = _worth(key, self.k_scale), _worth(value, self.v_scale)

    def read(self, layer: int, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """As ReadKv; what was never stored is 0."""
        zeros = torch.zeros(KV_HEADS, HEAD_DIM).double(), torch.zeros(KV_HEADS, self.head_dim_v).double()
        k, v = zip(*(self.kv.get((layer, slot), zeros) for slot in slots), strict=True)
        return torch.stack(k), torch.stack(v)

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """As CopyPages."""
        for layer, slot in list(self.kv):
            page, offset = divmod(slot, PAGE_SIZE)
            if page in sources:
                target = targets[sources.index(page)]
                self.kv[layer, target * PAGE_SIZE + offset] = self.kv[layer, slot]

    def attend(
        self, layer: int, step: Mapping[str, Any], q: Any, k: Any, v: Any, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and lse of a layer of a step, whose new tokens are stored.

        Args:
            layer: of the model.
            step: what `StepMetadata` is given.
            q: `[num_tokens, HEADS, HEAD_DIM]`; None: nothing is asked for.
            k: `[num_tokens, KV_HEADS, HEAD_DIM]`, or None.
            v: `[num_tokens, KV_HEADS, head_dim_v]`, or None.
            options: what `AttentionOptions` is given.
        """
        num_tokens = sum(step["query_lens"])
        output = torch.zeros(num_tokens, HEADS, self.head_dim_v).double()
        lse = torch.full((num_tokens, HEADS), -math.inf).double()
        start = 0
        for request, length in enumerate(step["query_lens"]):
            valid = step.get("valid_lens", step["query_lens"])[request]
            for row in range(valid if q is not None else 0):
                keys = self._seen(layer, step, request, row)
                if k is not None:
                    base = step["context_lens"][request]
                    news = [new for new in range(valid) if _sees_new(step, request, row, new)]
                    keys += [(base + new, k[start + new].double(), v[start + new].double()) for new in news]
                position = step["context_lens"][request] + row
                attend_row(position, q[start + row].double(), keys, options, output[start + row], lse[start + row])
            start += length
        if k is not None and step.get("slot_mapping") is not None:
            self.store(layer, step["slot_mapping"], k, v)
        return output, lse

    def _seen(self, layer: int, step: Mapping[str, Any], request: int, row: int) -> list[tuple[int, Any, Any]]:
        """Position, K and V of each token of the context that a row sees but for its window."""
        seen = []
        for position in range(step["context_lens"][request]):
            page = step["page_tables"][request][position // PAGE_SIZE]
            hole = step.get("mask_prefix_hole", False)
            if hole and step["prefix_lens"][request] <= position < step["padded_prefix_lens"][request]:
                continue
            if page != -1:
                seen.append((position, *self.kv[layer, page * PAGE_SIZE + position % PAGE_SIZE]))
        return seen


def attend_row(
    position: int,
    q: torch.Tensor,
    keys: list[tuple[int, torch.Tensor, torch.Tensor]],
    options: Mapping[str, Any],
    output: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Writes output and lse of one row, which sees these keys, by their positions, but for its window."""
    window, softcap = options.get("window", 0), options.get("softcap", 0.0)
    keys = [key for key in keys if not window or position - key[0] < window]
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        scores = [options.get("scale", HEAD_DIM**-0.5) * float(q[head] @ k[kv_head]) for _, k, _ in keys]
        if softcap:
            scores = [softcap * math.tanh(score / softcap) for score in scores]
        if "alibi_slopes" in options:
            slope = options["alibi_slopes"][head]
            scores = [score + slope * (key[0] - position) for score, key in zip(scores, keys, strict=True)]
        sinks = [options["sinks"][head]] if "sinks" in options else []
        if scores + sinks:
            lse[head] = torch.tensor(scores + sinks).double().logsumexp(0)
            for score, (_, _, v) in zip(scores, keys, strict=True):
                output[head] += math.exp(score - float(lse[head])) * v[kv_head]


def error(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest error as a part of what it may be; infinite where it cannot be told."""
    if actual.shape != expected.shape:
        return math.inf
    absolute, relative = TOLERANCES[dtype]
    parts = (actual.double() - expected).abs() / (absolute + relative * expected.abs())
    parts[actual.double() == expected] = 0.0
    return float(parts.nan_to_num(nan=math.inf).max())


def _sees_new(step: Mapping[str, Any], request: int, row: int, new: int) -> bool:
    base, masks = step["context_lens"][request], step.get("mask", "causal")
    position, other = base + row, base + new
    mask = masks if isinstance(masks, str) else masks[request]
    if mask == "bidirectional":
        return True
    if mask == "causal":
        return other <= position
    if mask == "prefix_full":
        for end in (step["prefix_lens"][request], step["padded_prefix_lens"][request]):
            if position < end:
                return other < end
    block_size = step["block_size"]
    return other < (position // block_size + 1) * block_size


def _worth(x: torch.Tensor, scale: float) -> torch.Tensor:
    if not scale:
        return x.double()
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).double() * scale

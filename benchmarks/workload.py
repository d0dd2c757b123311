"""A decode step to time, and what every way of computing it must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import attnd
from attnd_server.backends.naive import reference_torch_attention
from attnd_server.config import AttentionConfig
from benchmarks.report import refuse_wrong

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
NUM_LAYERS = 30
"""Calls of a step."""
KV_BYTES = 512 << 20
"""Most KV of one cache, so that three of them fit on a small machine. A step's further calls start over at layer 0."""


@dataclass(frozen=True)
class DecodeStep:
    """One new token for each request, over contexts of one length that lie in pages in random order.

    Everything is drawn from seeds, so that processes agree on it.

    Attributes:
        num_reqs: requests, and so new tokens.
        context_len: tokens of each request that are in its pages already.
        dtype: of q, k, v and the pages.
    """

    num_reqs: int
    context_len: int
    dtype: torch.dtype

    @property
    def pages_per_req(self) -> int:
        """Pages of a request, the new token's included."""
        return self.context_len // PAGE_SIZE + 1

    @property
    def geometry(self) -> dict[str, Any]:
        """Of a cache that has exactly this step's pages; arguments of `create_cache` and of `AttentionConfig`."""
        one_layer: dict[str, Any] = {
            "num_layers": 1,
            "num_kv_heads": NUM_KV_HEADS,
            "head_dim": HEAD_DIM,
            "num_pages": self.num_reqs * self.pages_per_req,
            "page_size": PAGE_SIZE,
            "dtype": self.dtype,
        }
        num_layers = min(NUM_LAYERS, max(1, KV_BYTES // AttentionConfig(**one_layer).num_bytes))
        return {**one_layer, "num_layers": num_layers}

    @cached_property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """q, k and v of each layer of the cache, `[num_reqs, heads, HEAD_DIM]` on the host."""
        return [self._qkv(layer) for layer in range(self.geometry["num_layers"])]

    @cached_property
    def page_tables(self) -> torch.Tensor:
        """int32 `[num_reqs, pages_per_req]`."""
        order = torch.randperm(self.num_reqs * self.pages_per_req, generator=torch.Generator().manual_seed(0))
        return order.view(self.num_reqs, -1).int()

    def slots(self, first: int, end: int) -> torch.Tensor:
        """int64 `[num_reqs * (end - first)]`: where the tokens at positions `[first, end)` lie, request by request."""
        positions = torch.arange(first, end)
        return (self.page_tables[:, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE).flatten()

    @cached_property
    def metadata(self) -> attnd.StepMetadata:
        """Stores the new token and attends it. A second run of the step gives the same."""
        return attnd.StepMetadata(
            query_lens=[1] * self.num_reqs,
            context_lens=[self.context_len] * self.num_reqs,
            page_tables=self.page_tables,
            slot_mapping=self.slots(self.context_len, self.context_len + 1).int(),
            kind="decode",
        )

    def fill(self, cache: Any) -> None:
        """Stores the context of every layer in `cache`, which has a `store_kv` as `attnd.Cache` has."""
        for layer in range(self.geometry["num_layers"]):
            cache.store_kv(layer, self.slots(0, self.context_len), *self._context(layer))

    def check(self, what: str, cache: Any, call: Callable[[int], torch.Tensor]) -> None:
        """Refuses outputs that are wrong, and new tokens that are not stored, in the first and the last layer.

        Args:
            what: the name of the way that is checked, for the error.
            cache: where `call` stores; has `store_kv` and `read_kv` as `attnd.Cache` has.
            call: computes a layer.

        Raises:
            WrongResult: something is wrong.
        """
        slots = self.slots(self.context_len, self.context_len + 1)
        for layer in sorted({0, self.geometry["num_layers"] - 1}):
            _, k, v = self.layers[layer]
            cache.store_kv(layer, slots, torch.zeros_like(k), torch.zeros_like(v))
            output = call(layer).cpu()
            refuse_wrong(f"{what}, layer {layer}", output, self.expected[layer])
            for name, stored, sent in zip("kv", cache.read_kv(layer, slots, like=k), (k, v), strict=True):
                refuse_wrong(f"{what}, stored {name} of layer {layer}", stored, sent.double(), limit=0.0)

    @cached_property
    def expected(self) -> dict[int, torch.Tensor]:
        """Output of the first and the last layer in float64."""
        return {layer: self._reference(layer) for layer in (0, self.geometry["num_layers"] - 1)}

    def _reference(self, layer: int) -> torch.Tensor:
        q, k, v = self.layers[layer]
        keys, values = (tensor.view(self.num_reqs, -1, *tensor.shape[1:]) for tensor in self._context(layer))
        positions = torch.arange(self.context_len + 1)
        outputs = [
            reference_torch_attention(
                q[request, None],
                torch.cat([keys[request], k[request, None]]),
                torch.cat([values[request], v[request, None]]),
                torch.ones(1, self.context_len + 1, dtype=torch.bool),
                positions[-1:],
                positions,
                HEAD_DIM**-0.5,
                dtype=torch.float64,
            )[0]
            for request in range(self.num_reqs)
        ]
        return torch.cat(outputs)

    def _qkv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1 + layer)
        q, k, v = (
            torch.randn(self.num_reqs, heads, HEAD_DIM, generator=generator).to(self.dtype)
            for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        )
        return q, k, v

    def _context(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the context, `[num_reqs * context_len, NUM_KV_HEADS, HEAD_DIM]`, request by request."""
        generator = torch.Generator().manual_seed(1_000_000 + layer)
        shape = (self.num_reqs * self.context_len, NUM_KV_HEADS, HEAD_DIM)
        k, v = (torch.randn(shape, generator=generator).to(self.dtype) for _ in range(2))
        return k, v

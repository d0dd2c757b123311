"""A decode step to time, and what every way of computing it must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

import attnd
from attnd_server.attention.backends.reference import reference_torch_attention
from attnd_server.attention.config import AttentionConfig
from benchmarks.report import refuse_wrong

PAGE_SIZE = 16
NUM_CALLS = 32
"""Calls of a step, one for each layer of a model."""
CPU = torch.device("cpu")
KV_BYTES = 512 << 20
"""Most KV of one cache, so that three of them fit on a small machine. A step's further calls start over at layer 0."""


class Heads(NamedTuple):
    """The heads of a model.

    Attributes:
        name: for people.
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: dimensions of each.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads} heads x {self.head_dim}"


LLAMA_8B = Heads("8B", 32, 8, 128)
MODELS = (LLAMA_8B, Heads("70B", 64, 8, 128), Heads("30B-A3B", 32, 4, 128))
"""Llama of 8 and 70 billion parameters, and Qwen3-30B-A3B."""


@dataclass(frozen=True)
class DecodeStep:
    """One new token for each request, over contexts of one length that lie in pages in random order.

    Everything is drawn from seeds, so that processes agree on it.

    Attributes:
        num_reqs: requests, and so new tokens.
        context_len: tokens of each request that are in its pages already.
        dtype: of q, k, v and the pages.
        heads: of the model.
        device: where contexts are drawn and results computed in float64: what is long is soon done on a GPU.
        kv_bytes: most KV of its cache, unless a single layer has more.
    """

    num_reqs: int
    context_len: int
    dtype: torch.dtype
    heads: Heads = LLAMA_8B
    device: torch.device = CPU
    kv_bytes: int = KV_BYTES

    @property
    def pages_per_req(self) -> int:
        """Pages of a request, the new token's included."""
        return self.context_len // PAGE_SIZE + 1

    @property
    def geometry(self) -> dict[str, Any]:
        """Of a cache that has exactly this step's pages; arguments of `create_cache` and of `AttentionConfig`."""
        one_layer: dict[str, Any] = {
            "num_layers": 1,
            "num_kv_heads": self.heads.num_kv_heads,
            "head_dim": self.heads.head_dim,
            "num_pages": self.num_reqs * self.pages_per_req,
            "page_size": PAGE_SIZE,
            "dtype": self.dtype,
        }
        num_layers = min(NUM_CALLS, max(1, self.kv_bytes // AttentionConfig(**one_layer).num_bytes))
        # A power of two, so that a step visits all of them equally often.
        return {**one_layer, "num_layers": 1 << num_layers.bit_length() - 1}

    @cached_property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """q, k and v of each layer of the cache, `[num_reqs, heads, head_dim]` on the host."""
        return [self._qkv(layer) for layer in range(self.geometry["num_layers"])]

    @cached_property
    def page_tables(self) -> torch.Tensor:
        """int32 `[num_reqs, pages_per_req]`."""
        order = torch.randperm(self.num_reqs * self.pages_per_req, generator=torch.Generator().manual_seed(0))
        return order.view(self.num_reqs, -1).int()

    def slots(self, first: int, end: int) -> torch.Tensor:
        """int64 `[num_reqs * (end - first)]`: where the tokens at positions `[first, end)` lie, request by request."""
        return torch.cat([self._slots(request, first, end) for request in range(self.num_reqs)])

    def _slots(self, request: int, first: int, end: int) -> torch.Tensor:
        positions = torch.arange(first, end)
        return self.page_tables[request, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE

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

    def fill(self, *caches: Any) -> None:
        """Stores the context of every layer in each of `caches`, which have a `store_kv` as `attnd.Cache` has."""
        for layer in range(self.geometry["num_layers"]):
            for request in range(self.num_reqs):
                slots, (k, v) = self._slots(request, 0, self.context_len), self._context(layer, request)
                for cache in caches:
                    cache.store_kv(layer, slots, k, v)

    def check(self, what: str, cache: Any, call: Callable[[int], torch.Tensor]) -> dict[int, torch.Tensor]:
        """Refuses outputs that are wrong, and new tokens that are not stored, in the first and the last layer.

        Args:
            what: the name of the way that is checked, for the error.
            cache: where `call` stores; has `store_kv` and `read_kv` as `attnd.Cache` has.
            call: computes a layer; called for each in order.

        Returns:
            The outputs by layer, on the host.

        Raises:
            WrongResult: something is wrong.
        """
        slots = self.slots(self.context_len, self.context_len + 1)
        for layer in self.expected:
            _, k, v = self.layers[layer]
            cache.store_kv(layer, slots, torch.zeros_like(k), torch.zeros_like(v))
        outputs = {}
        for layer in range(len(self.layers)):
            output = call(layer)
            if layer in self.expected:
                outputs[layer] = output.cpu()
        for layer, output in outputs.items():
            refuse_wrong(f"{what}, layer {layer}", output, self.expected[layer])
            _, k, v = self.layers[layer]
            for name, stored, sent in zip("kv", cache.read_kv(layer, slots, like=k), (k, v), strict=True):
                refuse_wrong(f"{what}, stored {name} of layer {layer}", stored, sent.double(), limit=0.0)
        return outputs

    @cached_property
    def expected(self) -> dict[int, torch.Tensor]:
        """Output of the first and the last layer in float64, on the host."""
        return {layer: self._reference(layer) for layer in (0, self.geometry["num_layers"] - 1)}

    def _reference(self, layer: int) -> torch.Tensor:
        q, k, v = (tensor.to(self.device) for tensor in self.layers[layer])
        positions = torch.arange(self.context_len + 1, device=self.device)
        outputs = []
        for request in range(self.num_reqs):
            keys, values = self._context(layer, request)
            output, _ = reference_torch_attention(
                q[request, None],
                torch.cat([keys, k[request, None]]),
                torch.cat([values, v[request, None]]),
                torch.ones(1, self.context_len + 1, dtype=torch.bool, device=self.device),
                positions[-1:],
                positions,
                self.heads.head_dim**-0.5,
                dtype=torch.float64,
            )
            outputs.append(output.cpu())
        return torch.cat(outputs)

    def _qkv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1 + layer)
        _, num_heads, num_kv_heads, head_dim = self.heads
        q, k, v = (
            torch.randn(self.num_reqs, heads, head_dim, generator=generator).to(self.dtype)
            for heads in (num_heads, num_kv_heads, num_kv_heads)
        )
        return q, k, v

    def _context(self, layer: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a request's context, `[context_len, num_kv_heads, head_dim]` on `device`."""
        generator = torch.Generator(self.device).manual_seed(1_000_000 * (1 + request) + layer)
        shape = (self.context_len, self.heads.num_kv_heads, self.heads.head_dim)
        k, v = (torch.randn(shape, generator=generator, device=self.device).to(self.dtype) for _ in range(2))
        return k, v

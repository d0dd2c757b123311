"""The contexts of a decode cell: where they lie in pages, what is in them, and what attention over them must give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import attnd
from attnd_server.attention.backends.reference import reference_torch_attention
from benchmarks.report import refuse_wrong
from benchmarks.worker_model import Call, ModelShape

PAGE_SIZE = 16
FILL_TOKENS = 16_384
"""Of a store-only step: K and V of a layer of Llama 8B are 64 MiB then, half of a cuda plane's region."""


@dataclass(frozen=True)
class Batch:
    """Requests of one length, whose pages lie in random order.

    Attributes:
        num_reqs: requests.
        context_len: tokens of each before the first step.
        num_steps: most steps, and so new tokens, that there is room for.
    """

    num_reqs: int
    context_len: int
    num_steps: int

    @property
    def pages_per_req(self) -> int:
        """Pages of a request, with room for its new tokens."""
        return -(-(self.context_len + self.num_steps) // PAGE_SIZE)

    @property
    def num_pages(self) -> int:
        """Pages of all requests."""
        return self.num_reqs * self.pages_per_req

    @cached_property
    def page_tables(self) -> torch.Tensor:
        """int32 `[num_reqs, pages_per_req]` on the host."""
        order = torch.randperm(self.num_pages, generator=torch.Generator().manual_seed(0))
        return order.view(self.num_reqs, -1).int()

    def slots(self, request: int, first: int, end: int) -> torch.Tensor:
        """int64: where the tokens at positions `[first, end)` of a request lie."""
        positions = torch.arange(first, end)
        return self.page_tables[request, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE

    def decode(self, context_len: int) -> attnd.StepMetadata:
        """The step behind contexts of a length, made as an engine makes it: from the arrays that it has."""
        tables = self.page_tables.numpy()
        return attnd.StepMetadata(
            query_lens=[1] * self.num_reqs,
            context_lens=[context_len] * self.num_reqs,
            page_tables=tables,
            slot_mapping=tables[:, context_len // PAGE_SIZE] * PAGE_SIZE + context_len % PAGE_SIZE,
            kind="decode",
        )

    def store(self, requests: Sequence[int]) -> attnd.StepMetadata:
        """A step that only stores the contexts of some requests."""
        return attnd.StepMetadata(
            query_lens=[self.context_len] * len(requests),
            context_lens=[0] * len(requests),
            page_tables=self.page_tables[list(requests)],
            slot_mapping=torch.cat([self.slots(request, 0, self.context_len) for request in requests]),
            store_only=True,
        )


class Contexts:
    """K and V of contexts, drawn again whenever they are asked for: on all sides the same, and nobody keeps them."""

    def __init__(self, batch: Batch, shape: ModelShape, device: torch.device, seed: int = 0) -> None:
        self.batch, self.shape, self.device = batch, shape, device
        self._seed = seed

    def draw(self, layer: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a request, `[context_len, num_kv_heads, head_dim]`."""
        number = (self._seed * 4096 + layer) * 65_536 + request
        generator = torch.Generator(self.device).manual_seed(1 + number)
        size = (self.batch.context_len, self.shape.num_kv_heads, self.shape.head_dim)
        k, v = (torch.randn(size, generator=generator, device=self.device).to(self.shape.dtype) for _ in range(2))
        return k, v

    def draw_all(self, layer: int, requests: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of several requests, one behind the other."""
        drawn = [self.draw(layer, request) for request in requests]
        return torch.cat([k for k, _ in drawn]), torch.cat([v for _, v in drawn])

    def fill(self, session: Any) -> None:
        """Stores all contexts on a server, through store-only steps of a session.

        Args:
            session: has a `step` whose steps have `attend` and `finish`.
        """
        batch = self.batch
        per_step = max(1, FILL_TOKENS // batch.context_len)
        for first in range(0, batch.num_reqs, per_step):
            requests = range(first, min(first + per_step, batch.num_reqs))
            step = session.step(batch.store(requests))
            for layer in range(self.shape.num_layers):
                step.attend(layer, None, *self.draw_all(layer, requests))
            step.finish()

    def refuse_wrong(
        self, what: str, layer: int, call: Call, earlier: Sequence[tuple[torch.Tensor, torch.Tensor]], requests: Any
    ) -> None:
        """Compares attention of a layer with float64, given the q, k and v that it got.

        Args:
            what: the way's name, for the error.
            layer: of the model.
            call: what it got and gave.
            earlier: k and v of the steps since the contexts were stored, `[num_reqs, num_kv_heads, head_dim]`.
            requests: those that are looked at.

        Raises:
            WrongResult: it is not what it must be.
        """
        for request in requests:
            k, v = self.draw(layer, request)
            new = [*earlier, (call.k, call.v)]
            keys = torch.cat([k, *(each[request, None] for each, _ in new)])
            values = torch.cat([v, *(each[request, None] for _, each in new)])
            seen = torch.ones(1, len(keys), dtype=torch.bool, device=self.device)
            nowhere = torch.zeros(1, dtype=torch.int64, device=self.device)  # only ALiBi looks at positions
            expected, _ = reference_torch_attention(
                call.q[request, None], keys, values, seen, nowhere, nowhere, self.shape.scale, dtype=torch.float64
            )
            refuse_wrong(f"{what}, layer {layer}, request {request}", call.output[request, None], expected)

"""A small cache as its client knows it: what was stored, what comes next, and what attention over it must give."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt

import attnd

LAYERS, HEADS, KV_HEADS, DIM, PAGES, PAGE_SIZE = 2, 4, 2, 16, 12, 4
GEOMETRY: dict[str, Any] = {
    "num_layers": LAYERS,
    "num_kv_heads": KV_HEADS,
    "head_dim": DIM,
    "num_pages": PAGES,
    "page_size": PAGE_SIZE,
    "dtype": "float32",
}
NUM_REQS = 2
PAGES_EACH = PAGES // NUM_REQS
MOST_NEW = 4

Floats = npt.NDArray[np.float32]


class Planned:
    """A step that may have to be sent more than once.

    Attributes:
        metadata: what is sent.
        tables: `[num_reqs, pages]`, page ids.
        context_lens: of each request.
        query_len: new tokens of each.
        slots: of all new tokens.
        tensors: q, k and v of each layer.
    """

    def __init__(self, tables: list[list[int]], context_lens: list[int], query_len: int, numbers: Any) -> None:
        """Draws the tensors."""
        self.tables, self.context_lens, self.query_len = tables, context_lens, query_len
        self.slots = [
            table[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
            for table, context_len in zip(tables, context_lens, strict=True)
            for position in range(context_len, context_len + query_len)
        ]
        self.metadata = attnd.StepMetadata(
            [query_len] * len(tables), context_lens, tables, self.slots, kind="decode" if query_len == 1 else "prefill"
        )
        num_tokens = query_len * len(tables)
        self.tensors: list[list[Floats]] = [
            [numbers.standard_normal((num_tokens, heads, DIM), np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)]
            for _ in range(LAYERS)
        ]


class UsedCache:
    """A cache, and what was stored in it as far as the server said so.

    Attributes:
        k: `[layers, slots, kv_heads, head_dim]`.
        v: likewise.
        planned: a step that was begun and is not done.
        life: of the server, in which it was created or adopted, or the one before.
    """

    def __init__(self, cache: attnd.Cache, numbers: Any, life: int) -> None:
        """Of a new cache: nothing is stored."""
        self.cache = cache
        self.life = life
        self._numbers = numbers
        self.k = np.zeros((LAYERS, PAGES * PAGE_SIZE, KV_HEADS, DIM), np.float32)
        self.v = self.k.copy()
        self._written = np.zeros((LAYERS, PAGES * PAGE_SIZE), bool)
        self.planned: Planned | None = None
        self._new_sequences()

    def _new_sequences(self) -> None:
        pages = self._numbers.permutation(PAGES).tolist()
        self._tables = [pages[start : start + PAGES_EACH] for start in range(0, PAGES, PAGES_EACH)]
        self._context_lens = [0] * NUM_REQS

    def plan(self, random_: random.Random) -> Planned:
        """The next step: some tokens more for every sequence, or the first ones of new sequences."""
        query_len = random_.choice((1, 1, 1, MOST_NEW))
        if max(self._context_lens) + query_len > PAGES_EACH * PAGE_SIZE:
            self._new_sequences()
        planned = Planned(self._tables, list(self._context_lens), query_len, self._numbers)
        # What a step that is not answered has stored, nobody knows.
        self._written[:, planned.slots] = False
        self.planned = planned
        return planned

    def expected(self, planned: Planned, layer: int) -> npt.NDArray[np.float64]:
        """Causal attention of one layer in float64: `[num_tokens, heads, head_dim]`."""
        q, k, v = (tensor.astype(np.float64) for tensor in planned.tensors[layer])
        outputs = []
        for request, (table, context_len) in enumerate(zip(planned.tables, planned.context_lens, strict=True)):
            cached = [table[j // PAGE_SIZE] * PAGE_SIZE + j % PAGE_SIZE for j in range(context_len)]
            rows = slice(request * planned.query_len, (request + 1) * planned.query_len)
            keys = np.concatenate([self.k[layer, cached], k[rows]]).repeat(HEADS // KV_HEADS, axis=1)
            values = np.concatenate([self.v[layer, cached], v[rows]]).repeat(HEADS // KV_HEADS, axis=1)
            scores = np.einsum("thd,jhd->htj", q[rows], keys) * DIM**-0.5
            last = context_len + np.arange(planned.query_len)
            scores[:, np.arange(len(keys))[None, :] > last[:, None]] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            outputs.append(np.einsum("htj,jhd->thd", weights, values))
        return np.concatenate(outputs)

    def acknowledged(self, planned: Planned, layer: int) -> None:
        """The server said that a layer of a step is done, so what it stores is there."""
        _, self.k[layer, planned.slots], self.v[layer, planned.slots] = planned.tensors[layer]
        self._written[layer, planned.slots] = True

    def done(self) -> None:
        """Every layer of the planned step is done."""
        assert self.planned is not None
        self._context_lens = [length + self.planned.query_len for length in self._context_lens]
        self.planned = None

    def slots_written(self, layer: int) -> list[int]:
        """Slots of a layer whose content is known."""
        slots: list[int] = np.flatnonzero(self._written[layer]).tolist()
        return slots

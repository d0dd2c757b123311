"""One client of `benchmarks.callers` without torch, a process of its own: decode steps over one plane, in a row.

As `benchmarks.caller`: it connects, fills a cache, checks what comes back against float64, and does as it is told (see
`benchmarks.told_seconds`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import attnd
from benchmarks.told_seconds import run_as_told

PAGE_SIZE, NUM_CALLS, TIMEOUT_S = 16, 32, 300.0
# Largest relative error of a row and head, and requests that are compared, of the first and of the last.
TOLERANCES, COMPARED = {np.dtype(np.float16): 2e-3, np.dtype(np.float32): 1e-5}, 3

Array = npt.NDArray[Any]


class Sizes(NamedTuple):
    """Of a step of one token for each request.

    Attributes:
        num_reqs: requests.
        context_len: tokens of each.
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: dimensions of each.
        dtype: of tensors and pages.
        num_layers: of the cache; a step's calls go over them as often as it takes.
    """

    num_reqs: int
    context_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: np.dtype[Any]
    num_layers: int


class LightStep:
    """A step, its contexts, and what must come of it. Contexts are turns of one random row of tokens."""

    def __init__(self, sizes: Sizes) -> None:
        """Draws them, the same in every process."""
        self.sizes = sizes
        random = np.random.default_rng(0)
        num_pages = sizes.context_len // PAGE_SIZE + 1
        self.tables = random.permutation(sizes.num_reqs * num_pages).reshape(sizes.num_reqs, -1).astype(np.int32)
        draw = partial(self._draw, random)
        self._contexts = [draw(sizes.context_len, sizes.num_kv_heads) for _ in range(2)]
        heads = (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
        self.layers = [[draw(sizes.num_reqs, each) for each in heads] for _ in range(sizes.num_layers)]
        self.metadata = attnd.StepMetadata(
            query_lens=[1] * sizes.num_reqs,
            context_lens=[sizes.context_len] * sizes.num_reqs,
            page_tables=self.tables,
            slot_mapping=np.concatenate([self._slots(request)[-1:] for request in range(sizes.num_reqs)]),
            kind="decode",
        )

    @property
    def geometry(self) -> dict[str, Any]:
        """Of a cache for it."""
        sizes = self.sizes
        return {
            "num_layers": sizes.num_layers,
            "num_kv_heads": sizes.num_kv_heads,
            "head_dim": sizes.head_dim,
            "num_pages": self.tables.size,
            "page_size": PAGE_SIZE,
            "dtype": str(sizes.dtype),
        }

    def fill(self, cache: attnd.Cache) -> None:
        """Stores the contexts of all layers."""
        for layer in range(self.sizes.num_layers):
            for request in range(self.sizes.num_reqs):
                cache.store_kv(layer, self._slots(request)[:-1], *self._context(layer, request))

    def run(self, session: attnd.Session, call_us: list[float]) -> list[Array]:
        """A step. Notes the microseconds of each call, and returns the outputs of the last `num_layers`."""
        step, outputs = session.step(self.metadata), []
        for index in range(NUM_CALLS):
            layer = index % self.sizes.num_layers
            before = time.perf_counter()
            output = step.attend(layer, *self.layers[layer])
            call_us.append((time.perf_counter() - before) * 1e6)
            outputs.append(output)
        return outputs[-self.sizes.num_layers :]

    def check(self, session: attnd.Session) -> None:
        """Compares the first and last layer of a step with float64. Raises ValueError: it is wrong."""
        outputs = [np.array(output) for output in self.run(session, [])]
        num_reqs, limit = self.sizes.num_reqs, TOLERANCES[self.sizes.dtype]
        for layer in {0, self.sizes.num_layers - 1}:
            for request in {*range(min(COMPARED, num_reqs)), *range(max(0, num_reqs - COMPARED), num_reqs)}:
                expected = self._expected(layer, request)
                error = np.linalg.norm(outputs[layer][request] - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
                if not error.max() <= limit:
                    raise ValueError(
                        f"request {request}, layer {layer}: the relative error is {error.max():.2g}, > {limit}"
                    )

    def _expected(self, layer: int, request: int) -> Array:
        q, *new = (each[request].astype(np.float64) for each in self.layers[layer])
        k, v = (np.concatenate([old, one[None]]) for old, one in zip(self._context(layer, request), new, strict=True))
        group = self.sizes.num_heads // self.sizes.num_kv_heads
        rows = q.reshape(self.sizes.num_kv_heads, group, -1)
        logits = np.einsum("hgd,thd->hgt", rows, k) * self.sizes.head_dim**-0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        output = np.einsum("hgt,thd->hgd", weights / weights.sum(-1, keepdims=True), v)
        return output.reshape(self.sizes.num_heads, -1)

    def _slots(self, request: int) -> Array:
        """Of the context, and of the new token."""
        positions = np.arange(self.sizes.context_len + 1)
        return self.tables[request, positions // PAGE_SIZE] * PAGE_SIZE + (positions % PAGE_SIZE).astype(np.int32)

    def _context(self, layer: int, request: int) -> list[Array]:
        turns = 7 * layer + 13 * request
        return [np.roll(each, turns, axis=0) for each in self._contexts]

    def _draw(self, random: np.random.Generator, num_tokens: int, num_heads: int) -> Array:
        shape = (num_tokens, num_heads, self.sizes.head_dim)
        return random.standard_normal(shape, np.float32).astype(self.sizes.dtype)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.light_caller", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("address")
    parser.add_argument("--plane", required=True)
    parser.add_argument("--heads", type=int, nargs=3, required=True, metavar="N", help="query heads, KV heads, dims")
    parser.add_argument("--dtype", choices=["float16", "float32"], required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--kv-bytes", type=int, required=True, help="of a cache, unless a layer has more")
    parser.add_argument("--warm-up", action="store_true", help="captures decode steps, on a GPU")
    return parser.parse_args(arguments)


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The sizes that a command line asks for; as many layers as fit, a power of two up to `NUM_CALLS`."""
    num_heads, num_kv_heads, head_dim = options.heads
    dtype = np.dtype(options.dtype)
    tokens = options.tokens * (options.context // PAGE_SIZE + 1) * PAGE_SIZE
    layers = options.kv_bytes // (2 * tokens * num_kv_heads * head_dim * dtype.itemsize)
    num_layers = 1 << min(NUM_CALLS, max(1, layers)).bit_length() - 1
    return Sizes(options.tokens, options.context, num_heads, num_kv_heads, head_dim, dtype, num_layers)


def run(options: argparse.Namespace) -> None:
    """Until the input ends."""
    attnd.tune_process()
    step = LightStep(sizes_of(options))
    with ExitStack() as stack:
        client = stack.enter_context(attnd.connect(options.address, timeout_s=TIMEOUT_S))
        cache = stack.enter_context(client.create_cache(**step.geometry))
        step.fill(cache)
        if options.warm_up:
            sizes = {"max_reqs": options.tokens, "max_context_len": options.context}
            cache.warm_up(num_heads=step.sizes.num_heads, timeout_s=TIMEOUT_S, **sizes)
        session = stack.enter_context(cache.session(plane=options.plane))
        step.check(session)
        session.close()  # while it waits, it takes none of the planes that a server has
        run_as_told(lambda call_us: step.run(session, call_us), session.close)


if __name__ == "__main__":
    run(parse())

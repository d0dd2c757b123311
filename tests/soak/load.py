"""One client process: steps without end over a small cache, each answer and each stored slot checked."""

from __future__ import annotations

import os
import random
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import attnd
from tests.soak.counts import Counts, Shared, now_ns

LAYERS, HEADS, KV_HEADS, DIM, PAGES, PAGE_SIZE = 2, 4, 2, 16, 12, 4
GEOMETRY: dict[str, Any] = {
    "num_layers": LAYERS,
    "num_kv_heads": KV_HEADS,
    "head_dim": DIM,
    "num_pages": PAGES,
    "page_size": PAGE_SIZE,
    "dtype": "float32",
}
# Longer than any process is stopped for, so that a lease that ends is a fault.
TTL_S = 15.0
# Deadline of a request: shorter than a server is stopped for now and then, so that deadlines pass too.
TIMEOUT_S = 1.5
NUM_REQS = 2
PAGES_EACH = PAGES // NUM_REQS
MOST_NEW = 4
TOLERANCE = 2e-5

Floats = npt.NDArray[np.float32]


def run_client(address: str, plane: str, counts: Counts, shared: Shared, seed: int, log_path: str) -> None:
    """Runs until it is told to stop, through every restart of the server."""
    client = SoakClient(address, plane, counts, shared, seed)
    while not shared.stop:
        try:
            client.live()
        except (attnd.Disconnected, attnd.DeadlineExceeded):
            counts.reconnects += 1
            time.sleep(0.02)
        except Exception:
            counts.unexpected += 1
            with open(log_path, "a") as log:
                log.write(f"client {plane} {os.getpid()}:\n{traceback.format_exc()}\n")
            time.sleep(0.2)
    counts.leaks += num_left()


def num_left() -> int:
    """Shared regions that this process still has, and sockets."""
    left = Path("/proc/self/maps").read_text().count("memfd:attnd")
    for path in Path("/proc/self/fd").iterdir():
        try:
            left += "memfd:attnd" in os.readlink(path)
        except OSError:  # that of the listing itself
            pass
    return left


class SoakClient:
    """What one process does, and what it knows of its cache."""

    def __init__(self, address: str, plane: str, counts: Counts, shared: Shared, seed: int) -> None:
        """Connects to nothing yet."""
        self._address = address
        self._plane = plane
        self._counts = counts
        self._shared = shared
        self._numbers = np.random.default_rng(seed)
        self._random = random.Random(seed)

    def live(self) -> None:
        """A connection and its caches, until it breaks or it is time to stop.

        Raises:
            Disconnected: the server is away.
        """
        with attnd.connect(self._address, plane=self._plane, timeout_s=TIMEOUT_S, connect_timeout_s=60) as client:
            while not self._shared.stop:
                life = self._shared.server_life
                with client.create_cache(**GEOMETRY, ttl_s=TTL_S, name=f"soak {os.getpid()}") as cache:
                    self._use(client, UsedCache(cache, self._numbers, life))

    def _use(self, client: attnd.Client, used: UsedCache) -> None:
        """Fills a cache and uses it for a while; a stream that breaks is opened again."""
        num_left = self._random.randint(1, 8)
        while num_left and not self._shared.stop:
            try:
                self._run_session(used)
                self._read_back(used)
                num_left -= 1
            except (attnd.Disconnected, attnd.DeadlineExceeded):
                self._counts.reconnects += 1
                time.sleep(0.02)  # a server that drains still answers
                client.capabilities()  # waits for it
            except attnd.CacheLost:
                if not self._adopt(used):
                    return

    def _run_session(self, used: UsedCache) -> None:
        with used.cache.session() as session:
            for _ in range(self._random.randint(5, 60)):
                if self._shared.stop:
                    return
                self._step(session, used)

    def _adopt(self, used: UsedCache) -> bool:
        """Goes on with a cache after a restart; all that was acknowledged is there. False: it is lost."""
        life = self._shared.server_life
        if self._shared.has_snapshots:
            try:
                used.cache.adopt()
            except attnd.CacheLost:
                pass
            else:
                used.life = life
                self._counts.adoptions += 1
                self._read_back(used)
                return True
        if self._shared.last_loss <= used.life:
            self._counts.caches_lost += 1
        return False

    def _step(self, session: attnd.Session, used: UsedCache) -> None:
        """A step, or the last one again if it was not done to its end."""
        planned = used.planned or used.plan(self._random)
        step = session.step(planned.metadata)
        for layer in range(LAYERS):
            q, k, v = planned.tensors[layer]
            output = step.attend(layer, q, k, v)
            self._counts.answers += 1
            if np.abs(output - used.expected(planned, layer)).max() < TOLERANCE:
                self._counts.last_ok_ns = now_ns()
            else:
                self._counts.wrong_answers += 1
            used.acknowledged(planned, layer)
        used.done()
        self._counts.steps += 1

    def _read_back(self, used: UsedCache) -> None:
        for layer in range(LAYERS):
            slots = used.slots_written(layer)
            if not slots:
                continue
            k, v = used.cache.read_kv(layer, slots, like=np.zeros(1, np.float32))
            same = (k == used.k[layer, slots]).all((1, 2)) & (v == used.v[layer, slots]).all((1, 2))
            self._counts.writes += len(slots)
            self._counts.lost_writes += int((~same).sum())


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

"""Calls of several caches that wait for a device at the same time."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import attnd
from attnd.protocol import frames, requests
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.execution.work import Job, Work
from attnd_server.inproc import PRINCIPAL, InprocTransport
from attnd_server.observe.counts import CALLS_BOUNDS, Metrics
from attnd_server.service.service import AttendSession, AttentionService

HEADS, KV_HEADS, DIM, DIM_V, PAGE = 4, 2, 32, 16, 4
LAYERS, PAGES = 3, 24
GEOMETRY: dict[str, Any] = {
    "num_layers": LAYERS,
    "num_kv_heads": KV_HEADS,
    "head_dim": DIM,
    "head_dim_v": DIM_V,
    "num_pages": PAGES,
    "page_size": PAGE,
    "dtype": "float32",
}


@dataclass
class Waiting:
    """A server in this process whose calls can be made to wait for each other."""

    service: AttentionService
    client: attnd.Client

    def together(self, works: list[Work]) -> list[bytes | BaseException]:
        """What comes of works that all wait when the device becomes free."""
        release, started = threading.Event(), threading.Event()
        settled = [threading.Event() for _ in works]
        outcomes: dict[int, bytes | BaseException] = {}

        def hold() -> bytes:
            started.set()
            release.wait(60)
            return b""

        def settle(index: int) -> Callable[[bytes | None, BaseException | None], None]:
            def done(result: bytes | None, error: BaseException | None) -> None:
                outcomes[index] = error if error is not None else result or b""
                settled[index].set()

            return done

        self.service.executor.submit(hold, lambda result, error: None)
        assert started.wait(30)
        for index, work in enumerate(works):
            self.service.executor.submit(work, settle(index))
        release.set()
        assert all(event.wait(60) for event in settled)
        return [outcomes[index] for index in range(len(works))]

    def at_once(self, works: list[Work]) -> list[bytes | BaseException]:
        """What comes of works that one thread has at the same time and runs itself."""
        outcomes: dict[Work, bytes | BaseException] = {}

        def done(work: Work, result: bytes | None, error: BaseException | None) -> None:
            outcomes[work] = error if error is not None else result or b""

        now = time.perf_counter()
        jobs = [Job(work, partial(done, work), math.inf, now) for work in works]
        assert self.service.executor.settle_now(jobs) == []
        return [outcomes[work] for work in works]

    def launches(self) -> dict[int, int]:
        """How many launches there were of up to so many calls, for each bound; starts counting anew."""
        assert self.service.metrics is not None
        histogram = self.service.metrics.launches
        counts = {bound: count for bound, count in zip(CALLS_BOUNDS, histogram.counts, strict=False) if count}
        histogram.counts[:] = [0] * len(histogram.counts)
        histogram.sum = 0
        return counts


@contextmanager
def waiting(device: str = "cpu") -> Iterator[Waiting]:
    service = build_service(ServerConfig(device=device, kv_bytes=1 << 28), Metrics())
    with attnd.Client(InprocTransport(service), timeout_s=60) as client:
        yield Waiting(service, client)


@dataclass
class Caller:
    """One worker: a cache with something in it, and a stream.

    Attributes:
        context_lens: of its requests; they lie in pages one after the other.
        query_len: new tokens of each of its requests.
        more: of its steps' metadata. With a window, pages that it hides are given back.
    """

    server: Waiting
    context_lens: list[int]
    seed: int
    backend: str = "naive"
    query_len: int = 1
    num_layers: int = LAYERS
    num_pages: int = PAGES
    geometry: dict[str, Any] | None = None
    store: bool = True
    more: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        size = {"num_layers": self.num_layers, "num_pages": self.num_pages, "backend": self.backend}
        self.all = {**GEOMETRY, **size, **(self.geometry or {})}
        self.cache = self.server.client.create_cache(**self.all)
        self.random = torch.Generator().manual_seed(self.seed)
        num_slots = self.num_pages * self.all["page_size"]
        for layer in range(self.num_layers):
            self.cache.store_kv(layer, list(range(num_slots)), *self.kv(num_slots))
        self.session: AttendSession = self.server.service.open_session(PRINCIPAL)
        self.step_id = 0

    def normal(self, *shape: int) -> torch.Tensor:
        dtype = getattr(torch, self.all["dtype"])
        return torch.randn(*shape, generator=self.random).to(dtype)

    def kv(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """K and V of a layer; of a latent one K alone."""
        if "groups" in self.all:
            return self.normal(num_tokens, 1, self.all["head_dim"]), None
        dims = self.all["head_dim"], self.all["head_dim_v"]
        k, v = (self.normal(num_tokens, KV_HEADS, dim) for dim in dims)
        return k, v

    def metadata(self) -> attnd.StepMetadata:
        tables, slots, first, page = [], [], 0, self.all["page_size"]
        for context_len in self.context_lens:
            end = first + -(-(context_len + self.query_len) // page)
            tables.append(list(range(first, end))[::-1])  # so that no page is where its number says
            for position in range(context_len, context_len + self.query_len):
                slots.append(tables[-1][position // page] * page + position % page)
            first = end
        width = max(map(len, tables))
        tables = [[*table, *[-1] * (width - len(table))] for table in tables]
        lens, more = [self.query_len] * len(tables), self.more or {}
        if window := more.get("window", 0):
            for table, context_len in zip(tables, self.context_lens, strict=True):
                num_hidden = max(0, context_len - window + 1) // page
                table[:num_hidden] = [-1] * num_hidden
        slots_if_any = slots if self.store else None
        return attnd.StepMetadata(lens, self.context_lens, tables, slots_if_any, kind="decode", **more)

    def open(self, metadata: attnd.StepMetadata | None = None) -> None:
        """Opens another step."""
        self.step_id += 1
        message = (metadata or self.metadata()).to_message(self.step_id, self.cache.ref)
        self.session.request(frames.step_request(message))

    def call(self, layer: int, options: attnd.AttentionOptions) -> Work:
        """A call of the open step."""
        num_tokens = len(self.context_lens) * self.query_len
        k, v = self.kv(num_tokens)
        self.stored = k, k[..., : self.all["head_dim_v"]] if v is None else v
        q = self.normal(num_tokens, HEADS, self.all["head_dim"])
        work = self.session.request(requests.attend_call(self.step_id, layer, q, k, v, options))
        assert not isinstance(work, bytes)
        return work


def tensors(answer: bytes | BaseException) -> dict[str, bytes]:
    """Output and lse of an answer."""
    assert isinstance(answer, bytes), answer
    message, arrays = frames.ATTEND_RESPONSE.decode(answer)
    assert message.WhichOneof("message") == "call", message
    return {name: bytes(array.data) for name, array in arrays.items()}


def check_same_bits(server: Waiting, callers: list[Caller], options: attnd.AttentionOptions) -> None:
    """Runs layer after layer of all callers, each at another layer, together and then each alone."""
    for caller in callers:
        caller.open()
    for turn in range(LAYERS):
        layers = [(turn + index) % caller.num_layers for index, caller in enumerate(callers)]
        works = [caller.call(layer, options) for caller, layer in zip(callers, layers, strict=True)]
        server.launches()
        together = server.together(works)
        bound = next(bound for bound in CALLS_BOUNDS if bound >= len(callers))
        assert server.launches() == {bound: 1}
        for caller, layer in zip(callers, layers, strict=True):
            if caller.store:
                slots = [slot for slot in caller.metadata().slot_mapping if slot >= 0]
                read = caller.cache.read_kv(layer, slots, like=torch.ones(1))
                assert all(map(torch.equal, read, caller.stored))
        for work, answer in zip(works, together, strict=True):
            (alone,) = server.together([work])  # what it stores, it does not read
            assert tensors(answer) == tensors(alone)
        assert server.launches() == {1: len(works)}

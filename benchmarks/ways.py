"""The ways of computing a layer that `benchmarks.service` compares: the server's, the backend alone, a bare echo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import attnd
from attnd import requests
from attnd.page_table_deltas import SentPageTables
from attnd.tensors import to_array
from attnd.v1 import cache_pb2
from attnd_server import validation
from attnd_server.cache import Cache
from attnd_server.config import AttentionConfig, ServerConfig
from attnd_server.dispatcher import TritonAttentionOps
from attnd_server.inproc import connect as connect_inproc
from attnd_server.kernels.pages import stored_tokens
from attnd_server.metadata import AttentionOptions
from benchmarks import echo
from benchmarks.doorbell_echo import DoorbellEcho
from benchmarks.servers import running
from benchmarks.workload import HEAD_DIM, NUM_HEADS, DecodeStep

Call = Callable[[int], Any]
"""Computes a layer and returns its output, or the echo of one."""


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        name: for people.
        open: starts a step; what it returns makes the calls of its layers.
        floor: names of the ways that it cannot be faster than, together.
        cache: where it stores, with `store_kv` and `read_kv`; None for an echo.
        session: where the server's own times are; None if nowhere.
    """

    name: str
    open: Callable[[], Call]
    floor: tuple[str, ...] = ()
    cache: Any = None
    session: attnd.Session | None = None


@dataclass(frozen=True)
class Endpoints:
    """What runs for the whole benchmark."""

    device: torch.device
    client: attnd.Client
    inproc: attnd.Client
    channel: Any  # to the echo
    doorbell: DoorbellEcho


@contextmanager
def endpoints(device: torch.device, num_threads: int) -> Iterator[Endpoints]:
    """Starts the servers and connects to them; ends them with the block."""
    config = ServerConfig(device=str(device), threads=num_threads)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="attnd-"))
        options = ["--port", "0", "--device", str(device), "--threads", str(num_threads), "--socket-dir", folder]
        address = stack.enter_context(running("attnd_server", "serve", *options))
        echo_address = stack.enter_context(running("benchmarks.echo"))
        yield Endpoints(
            device,
            stack.enter_context(attnd.connect(address)),
            stack.enter_context(attnd.Client(connect_inproc(config))),
            stack.enter_context(echo.connect(echo_address)),
            stack.enter_context(DoorbellEcho()),
        )


@contextmanager
def ways(step: DecodeStep, ends: Endpoints) -> Iterator[list[Way]]:
    """All ways of computing `step`, its contexts stored; their caches go with the block."""
    with ExitStack() as stack:
        cache = stack.enter_context(ends.client.create_cache(**step.geometry))
        session = stack.enter_context(cache.session(plane="inline"))
        shm_session = stack.enter_context(cache.session(plane="shm"))
        inproc_cache = stack.enter_context(ends.inproc.create_cache(**step.geometry))
        inproc_session = stack.enter_context(inproc_cache.session())
        backend = BackendAlone(step, ends.device)
        for filled in (cache, inproc_cache, backend):
            step.fill(filled)
        stream = stack.enter_context(_echo_stream(step, cache, ends))
        yield [
            _echo_unary(step, cache, ends),
            stream,
            _echo_shm(step, ends),
            Way("backend", backend.open, cache=backend),
            _unary(step, cache, ends.client),
            _session("stream", step, session, ("echo stream", "backend")),
            _session("shm", step, shm_session, ("echo shm", "backend")),
            _session("inproc", step, inproc_session, ("backend",)),
        ]


def _unary(step: DecodeStep, cache: attnd.Cache, client: attnd.Client) -> Way:
    def call(layer: int) -> Any:
        return client.decode(cache, step.metadata, layer, *step.layers[layer])

    return Way("unary", lambda: call, ("echo unary", "backend"), cache)


def _session(name: str, step: DecodeStep, session: attnd.Session, floor: tuple[str, ...]) -> Way:
    def open_step() -> Call:
        opened = session.step(step.metadata)
        return lambda layer: opened.attend(layer, *step.layers[layer])

    return Way(name, open_step, floor, session.cache, session)


def _echo_unary(step: DecodeStep, cache: attnd.Cache, ends: Endpoints) -> Way:
    """The bytes of `client.decode`, metadata included, both ways."""
    q, k, v = step.layers[0]
    num_bytes = len(requests.unary_call("decode", step.metadata, cache.ref, 0, q, k, v, requests.DEFAULT_OPTIONS))
    data = echo.message(num_bytes, q.nbytes)
    caller = echo.UnaryEcho(ends.channel)
    return Way("echo unary", lambda: lambda layer: caller.call(data))


@contextmanager
def _echo_stream(step: DecodeStep, cache: attnd.Cache, ends: Endpoints) -> Iterator[Way]:
    """The bytes of `session.step` once a step, answered with a few, and those of `step.attend` for each layer."""
    q, k, v = step.layers[0]
    call_data = echo.message(len(requests.attend_call(1, 0, q, k, v, requests.DEFAULT_OPTIONS)), q.nbytes)
    step_data = echo.message(_step_bytes(step, cache), 8)
    stream = echo.StreamEcho(ends.channel)

    def open_step() -> Call:
        stream.send(step_data)
        unanswered = [True]

        def call(layer: int) -> bytes:
            stream.send(call_data)
            if unanswered:
                unanswered.pop()
                stream.receive()
            return stream.receive()

        return call

    try:
        yield Way("echo stream", open_step)
    finally:
        stream.close()


def _step_bytes(step: DecodeStep, cache: attnd.Cache) -> int:
    """Bytes of a step whose page tables are those of the step before."""
    sent_tables = SentPageTables()
    step.metadata.to_message(1, cache.ref, sent_tables)
    sent_tables.accept(1)
    return step.metadata.to_message(2, cache.ref, sent_tables).ByteSize()


def _echo_shm(step: DecodeStep, ends: Endpoints) -> Way:
    """q, k and v into shared memory, q's bytes out of it again; no step, which has none there."""
    layers = [[to_array(tensor, "tensor").data for tensor in layer] for layer in step.layers]
    return Way("echo shm", lambda: lambda layer: ends.doorbell.call(layers[layer], layers[layer][0].nbytes))


class BackendAlone:
    """Plan, store and run as the server's executor does them, tensors on the device already, each call to its end."""

    def __init__(self, step: DecodeStep, device: torch.device) -> None:
        self._device = device
        self._ops = TritonAttentionOps(device)
        config = AttentionConfig(**step.geometry)
        self._cache = Cache(config, epoch=0, principal="", ttl_s=0.0, name="", device=device)
        self._metadata = validation.step(step.metadata.to_message(1, cache_pb2.CacheRef()), config, ServerConfig())
        self._options = AttentionOptions(num_heads=NUM_HEADS, scale=HEAD_DIM**-0.5)
        self._layers = [tuple(tensor.to(device) for tensor in layer) for layer in step.layers]
        assert self._metadata.slot_mapping is not None
        self._stored = stored_tokens(self._metadata.slot_mapping, device)

    def open(self) -> Call:
        """Plans the step."""
        cache = self._cache
        plan = self._ops.plan(cache.config, self._metadata, self._options)

        def call(layer: int) -> torch.Tensor:
            q, k, v = self._layers[layer]
            cache.store(layer, k, v, self._stored)
            output, _ = plan.run(q, k, v, cache.k_pages[layer], cache.v_pages[layer])
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return output

        return call

    def store_kv(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """As `attnd.Cache.store_kv`."""
        self._cache.store(layer, k.to(self._device), v.to(self._device), stored_tokens(slots, self._device))

    def read_kv(self, layer: int, slots: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `attnd.Cache.read_kv`."""
        k, v = self._cache.read(layer, slots.to(self._device))
        return k.to(like.device), v.to(like.device)

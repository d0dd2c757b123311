"""The ways of computing a layer that are compared: the server's, over each plane; the backend alone; bare echoes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

import attnd
from attnd.planes.choice import plane_refusals
from attnd.protocol import requests
from attnd.protocol.page_table_deltas import SentPageTables
from attnd.protocol.tensors import to_array
from benchmarks import attending_echo, echo
from benchmarks.backend_alone import BackendAlone
from benchmarks.doorbell_echo import DoorbellEcho
from benchmarks.endpoints import Endpoints
from benchmarks.queued_ways import backend_ways, captured_ways, echo_way, queued_way
from benchmarks.way import Call, Way, Ways
from benchmarks.workload import DecodeStep

PLANES = ("inline", "shm", "cuda")
# Planes whose calls return before the device has computed them.
_QUEUED = ("cuda",)


@contextmanager
def all_ways(
    step: DecodeStep, ends: Endpoints, *, unary: bool = False, attending_echoes: bool = False
) -> Iterator[Ways]:
    """Each plane, `inproc://`, the backend and the echoes; contexts stored, decode warmed up.

    Args:
        step: to compute.
        ends: what it is computed with; what is made for the step alone goes with the block.
        unary: whether calls without a session are among them.
        attending_echoes: whether echoes with the backend behind them are.
    """
    with ExitStack() as stack:
        cache = stack.enter_context(ends.client.create_cache(**step.geometry))
        inproc_cache = stack.enter_context(ends.inproc.create_cache(**step.geometry))
        inproc_session = stack.enter_context(inproc_cache.session())
        backend = BackendAlone(step, ends.device)
        stack.callback(backend.close)
        step.fill(cache, inproc_cache, backend)
        for warmed in (cache, inproc_cache):
            warm_up(step, warmed, ends.device)
        sessions, reasons = open_planes(stack, ends.client, cache, step, ends.device)
        result = Ways([Way("backend", backend.open, cache=backend)], reasons)
        if ends.device.type == "cuda":
            result.ways += backend_ways(backend)
        if unary:
            unary_floor = ("echo unary", "backend")
            result.ways += [_echo_unary(step, cache, ends), unary_way("unary", step, cache, ends.client, unary_floor)]
        result.ways.append(session_way("inproc", step, inproc_session, ("backend",)))
        for plane, session in sessions.items():
            if plane in _ECHOES:
                result.ways.append(stack.enter_context(_ECHOES[plane](step, cache, ends)))
            if attending_echoes and plane in _ATTENDING_ECHOES:
                result.ways.append(stack.enter_context(_ATTENDING_ECHOES[plane](step, cache, ends)))
            result.ways.append(plane_way(plane, step, session, ends.device))
            if plane in _QUEUED:
                _add_captured(stack, cache.session(plane=plane), step, ends.device, result)
        yield result


def _add_captured(
    stack: ExitStack, session: attnd.Session, step: DecodeStep, device: torch.device, result: Ways
) -> None:
    """Adds the calls of a session as a CUDA graph of this process, or the reason why there is none."""
    stack.enter_context(session)
    try:
        result.ways += captured_ways(step, session, device)
    except (attnd.AttndError, RuntimeError) as error:
        result.reasons["cuda graph"] = str(error)


def warm_up(step: DecodeStep, cache: attnd.Cache, device: torch.device) -> None:
    """Captures decode steps of a cache on a GPU: else the first calls of each step would be planned and launched."""
    if device.type == "cuda":
        num_reqs, context_len = step.num_reqs, step.context_len
        cache.warm_up(num_heads=step.heads.num_heads, max_reqs=num_reqs, max_context_len=context_len, timeout_s=600)


def open_planes(
    stack: ExitStack, client: attnd.Client, cache: attnd.Cache, step: DecodeStep, device: torch.device
) -> tuple[dict[str, attnd.Session], dict[str, str]]:
    """A session on each plane that can be had, by name, and why not for each other plane.

    Args:
        stack: ends the sessions.
        client: of the cache.
        cache: of the sessions.
        step: run to see whether a plane can be had.
        device: of its tensors, on a plane that wants them there.
    """
    refused = plane_refusals(client.capabilities())
    sessions: dict[str, attnd.Session] = {}
    reasons = {plane: refused[plane] for plane in PLANES if plane in refused}
    for plane in PLANES:
        if plane in refused:
            continue
        try:
            session = stack.enter_context(cache.session(plane=plane))
            way = plane_way(plane, step, session, device)
            call = way.open()
            for layer in range(len(step.layers)):
                call(layer)
            if way.finish is not None:
                way.finish()
            sessions[plane] = session
        except attnd.AttndError as error:
            reasons[plane] = str(error)
    return sessions, reasons


def unary_way(name: str, step: DecodeStep, cache: attnd.Cache, client: attnd.Client, floor: tuple[str, ...]) -> Way:
    """Calls of `client.decode`."""

    def call(layer: int) -> Any:
        return client.decode(cache, step.metadata, layer, *step.layers[layer])

    return Way(name, lambda: call, floor, cache)


def plane_way(plane: str, step: DecodeStep, session: attnd.Session, device: torch.device) -> Way:
    """The calls of a session on a plane; on one that the device orders, with tensors there and one wait a step."""
    if plane in _QUEUED:
        return queued_way(plane, step, session, device)
    return session_way(plane, step, session, (f"echo {plane}", "backend"), limit_of(plane))


def limit_of(plane: str) -> str:
    """The name of the echo of a plane that has the backend behind it."""
    return f"echo {plane} + backend"


def session_way(name: str, step: DecodeStep, session: attnd.Session, floor: tuple[str, ...], limit: str = "") -> Way:
    """Calls of steps of `session`."""

    def open_step() -> Call:
        opened = session.step(step.metadata)
        return lambda layer: opened.attend(layer, *step.layers[layer])

    return Way(name, open_step, floor, session.cache, session, limit=limit)


def _echo_unary(step: DecodeStep, cache: attnd.Cache, ends: Endpoints) -> Way:
    """The bytes of `client.decode`, metadata included, both ways."""
    q, k, v = step.layers[0]
    num_bytes = len(requests.unary_call("decode", step.metadata, cache.ref, 0, q, k, v, requests.DEFAULT_OPTIONS))
    data = echo.message(num_bytes, q.nbytes)
    caller = echo.UnaryEcho(ends.channel)
    return Way("echo unary", lambda: lambda layer: caller.call(data))


@contextmanager
def _echo_inline(step: DecodeStep, cache: attnd.Cache, ends: Endpoints) -> Iterator[Way]:
    """The bytes of `session.step` once a step, answered with a few, and those of `step.attend` for each layer."""
    stream = echo.StreamEcho(ends.channel)
    try:
        yield _stream_way("echo inline", stream, step, cache)
    finally:
        stream.close()


@contextmanager
def _attending_echo_inline(step: DecodeStep, cache: attnd.Cache, ends: Endpoints) -> Iterator[Way]:
    """The same with a layer of the backend before each answer."""
    with attending_echo.stream_echo(step, torch.get_num_threads()) as stream:
        way = _stream_way(limit_of("inline"), stream, step, cache)
        yield replace(way, floor=("echo inline", "backend"))


def _stream_way(name: str, stream: echo.StreamEcho, step: DecodeStep, cache: attnd.Cache) -> Way:
    q, k, v = step.layers[0]
    call_data = echo.message(len(requests.attend_call(1, 0, q, k, v, requests.DEFAULT_OPTIONS)), q.nbytes)
    step_data = echo.message(_step_bytes(step, cache), echo.STEP_REPLY_BYTES)

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

    return Way(name, open_step)


def _step_bytes(step: DecodeStep, cache: attnd.Cache) -> int:
    """Bytes of a step whose page tables are those of the step before."""
    sent_tables = SentPageTables()
    step.metadata.to_message(1, cache.ref, sent_tables)
    sent_tables.accept(1)
    return step.metadata.to_message(2, cache.ref, sent_tables).ByteSize()


@contextmanager
def _echo_shm(step: DecodeStep, cache: attnd.Cache, ends: Endpoints) -> Iterator[Way]:
    """q, k and v into shared memory, q's bytes out of it again; no step, which has none there."""
    yield _doorbell_way("echo shm", ends.doorbell, step)


@contextmanager
def _attending_echo_shm(step: DecodeStep, cache: attnd.Cache, ends: Endpoints) -> Iterator[Way]:
    """The same with a layer of the backend before each answer."""
    with attending_echo.doorbell(step, torch.get_num_threads()) as bell:
        yield replace(_doorbell_way(limit_of("shm"), bell, step), floor=("echo shm", "backend"))


def _doorbell_way(name: str, bell: DoorbellEcho, step: DecodeStep) -> Way:
    layers = [[to_array(tensor, "tensor").data for tensor in layer] for layer in step.layers]
    return Way(name, lambda: lambda layer: bell.call(layers[layer], layers[layer][0].nbytes))


def _echo_cuda(step: DecodeStep, cache: attnd.Cache, ends: Endpoints) -> AbstractContextManager[Way]:
    """What the plane hands over, with nothing between the hand-overs."""
    return echo_way(step, ends.device, ends.server_device)


_ATTENDING_ECHOES: Mapping[str, Any] = {"inline": _attending_echo_inline, "shm": _attending_echo_shm}
"""Likewise, the plane's limit."""

_ECHOES: Mapping[str, Any] = {"inline": _echo_inline, "shm": _echo_shm, "cuda": _echo_cuda}
"""By the name of a plane, the bare floor of its transport: a context manager with a Way."""

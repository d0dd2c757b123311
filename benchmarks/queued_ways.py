"""Sessions on a plane that the device orders: calls return at once, and a step is waited for as a whole.

The server prepares every layer of the cache once for each step. So another step is opened whenever calls are back at
layer 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from benchmarks.backend_alone import BackendAlone
from benchmarks.flag_echo import FlagEcho
from benchmarks.graph_timing import synchronize
from benchmarks.way import Way
from benchmarks.workload import DecodeStep

# The hand-overs with nothing between them, and the same kernels in this process, launched as these are.
FLOOR, GRAPH_FLOOR = ("echo cuda", "backend queued"), ("echo cuda", "backend graph")
# Steps that follow each other, as a worker's do whose sampling is enqueued too.
STEPS_AHEAD = 8


def backend_ways(backend: BackendAlone) -> list[Way]:
    """The same kernels in this process: each layer launched by itself, and all as one CUDA graph."""
    ways = [Way("backend queued", backend.open_queued, cache=backend, finish=backend.wait)]
    if backend.is_captured:
        graph = Way("backend graph", backend.open_graph, cache=backend, finish=backend.wait)
        ways += [graph, replace(graph, name="backend ahead", num_steps=STEPS_AHEAD)]
    return ways


@contextmanager
def echo_way(step: DecodeStep, device: torch.device, server_device: torch.device) -> Iterator[Way]:
    """The hand-overs of all layers, as one CUDA graph on each side."""
    with FlagEcho(step, device, server_device) as echo:
        yield Way("echo cuda", lambda: lambda layer: echo.start() if layer == 0 else None, finish=echo.finish)


def queued_way(name: str, step: DecodeStep, session: Any, device: torch.device) -> Way:
    """Every call is launched by itself."""
    layers = [tuple(tensor.to(device) for tensor in layer) for layer in step.layers]
    opened: list[Any] = []

    def call(layer: int) -> torch.Tensor:
        if layer == 0:
            opened[:] = [session.step(step.metadata)]
        output: torch.Tensor = opened[0].attend(layer, *layers[layer])
        return output

    def finish() -> None:
        opened[0].finish()
        synchronize(device)

    return Way(name, lambda: call, FLOOR, session.cache, session, finish)


def captured_ways(step: DecodeStep, session: Any, device: torch.device) -> list[Way]:
    """The calls of all layers are one CUDA graph, as where a worker captures its whole model.

    Of a step alone, from its message to its answer; and of steps that follow each other, each told to the server while
    the one before it runs.
    """
    captured = _Captured(step, session, device)
    way = Way("cuda graph", lambda: captured.call, GRAPH_FLOOR, session.cache, session, captured.finish)
    alone = replace(way, beside="backend graph")
    return [alone, replace(way, name="cuda ahead", num_steps=STEPS_AHEAD, beside="backend ahead")]


class _Captured:
    """A graph of all calls, and what it reads and writes."""

    def __init__(self, step: DecodeStep, session: Any, device: torch.device) -> None:
        self._step, self._session, self._device = step, session, device
        self._layers = [tuple(tensor.to(device) for tensor in layer) for layer in step.layers]
        self._open()
        self._attend_all()  # what is not on the device yet cannot be captured
        self._opened.finish()
        self._open()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.Stream(device)):
            self._outputs = self._attend_all()
        self._graph.replay()  # the step that was captured is still to be computed
        self._opened.finish()

    def _open(self) -> None:
        self._opened = self._session.step(self._step.metadata, num_heads=self._step.heads.num_heads)

    def _attend_all(self) -> list[torch.Tensor]:
        return [self._opened.attend(layer, *tensors) for layer, tensors in enumerate(self._layers)]

    def call(self, layer: int) -> torch.Tensor:
        if layer == 0:
            self._open()
            self._graph.replay()
        return self._outputs[layer]

    def finish(self) -> None:
        self._opened.finish()
        synchronize(self._device)

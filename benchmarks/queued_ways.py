"""Sessions on a plane that the device orders: calls return at once, and a step is waited for as a whole.

The server prepares every layer of the cache once for each step. So another step is opened whenever calls are back at
layer 0.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.graph_timing import synchronize
from benchmarks.way import Way
from benchmarks.workload import DecodeStep

# Of the same kernels in this process, launched as these are. A ping-pong of flags belongs here too, once there is one.
FLOOR = ("backend queued",)


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


def captured_way(name: str, step: DecodeStep, session: Any, device: torch.device) -> Way:
    """The calls of all layers are one CUDA graph, as where a worker captures its whole model."""
    layers = [tuple(tensor.to(device) for tensor in layer) for layer in step.layers]

    def open_step() -> Any:
        return session.step(step.metadata, num_heads=step.heads.num_heads)

    def attend_all(opened: Any) -> list[torch.Tensor]:
        return [opened.attend(layer, *tensors) for layer, tensors in enumerate(layers)]

    opened = [open_step()]
    attend_all(opened[0])  # what is not on the device yet cannot be captured
    opened[0].finish()
    opened[:] = [open_step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = attend_all(opened[0])
    graph.replay()  # the step that was captured is still to be computed
    opened[0].finish()

    def call(layer: int) -> torch.Tensor:
        if layer == 0:
            opened[:] = [open_step()]
            graph.replay()
        return outputs[layer]

    def finish() -> None:
        opened[0].finish()
        synchronize(device)

    return Way(name, lambda: call, FLOOR, session.cache, session, finish)

"""Times all layers of a step as one CUDA graph: no launch costs, and no KV is left in the L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import islice

import torch

MIN_ROUNDS = 5
MAX_ROUNDS = 300


class Layers:
    """Calls of all layers, one after the other, ready to be replayed; on a processor they are simply called again.

    Args:
        call: launches a layer and returns its output. It may run in a capture.
        num_layers: layers, from 0.
        device: that it runs on.

    Attributes:
        outputs: of the first and the last layer, by index; each replay writes them.
    """

    def __init__(self, call: Callable[[int], torch.Tensor], num_layers: int, device: torch.device) -> None:
        self.num_layers = num_layers
        self.outputs: dict[int, torch.Tensor] = {}
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        call(0)  # compiles
        synchronize(device)
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run()
            self._graph = graph
        else:
            self._run()

    def _run(self) -> None:
        for layer in range(self.num_layers):
            output = self._call(layer)
            if layer in (0, self.num_layers - 1):
                self.outputs[layer] = output

    def replay(self) -> None:
        """Launches all layers."""
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()


def synchronize(device: torch.device) -> None:
    """Waits for all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_together(ways: Mapping[str, Layers], seconds: float, device: torch.device) -> dict[str, float]:
    """Microseconds of a layer by the name of the way, each the median of replays that took turns.

    Args:
        ways: what to time.
        seconds: for all ways together, roughly.
        device: that they run on.
    """
    if not ways:
        return {}
    milliseconds = time_calls({name: way.replay for name, way in ways.items()}, seconds, device)
    return {name: milliseconds[name] * 1e3 / way.num_layers for name, way in ways.items()}


def time_calls(calls: Mapping[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, float]:
    """Milliseconds of each call, the median of calls that took turns."""
    once_s = sum(times[-1] for times in _samples(calls, 2, device).values()) / 1e3
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / once_s)))
    # The first round fills the queue, so that the processor is ahead of the device in all others.
    samples = _samples(calls, rounds + 1, device)
    return {name: statistics.median(islice(times, 1, None)) for name, times in samples.items()}


def _samples(calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each call of each round."""
    synchronize(device)
    if device.type == "cpu":
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                before = time.perf_counter()
                call()
                samples[name].append((time.perf_counter() - before) * 1e3)
        return samples
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    synchronize(device)
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def host_us(call: Callable[[], object], device: torch.device, rounds: int = 30) -> float:
    """Microseconds of the processor's time, the median of calls after which nothing waits for the device."""
    samples = []
    for _ in range(rounds):
        before = time.perf_counter()
        call()
        samples.append((time.perf_counter() - before) * 1e6)
        synchronize(device)
    return statistics.median(samples)

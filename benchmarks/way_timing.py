"""Checks and times the ways of computing a step, which take turns, and says how they compare."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.report import WrongResult
from benchmarks.way import Way, Ways
from benchmarks.workload import NUM_CALLS, DecodeStep

MIN_ROUNDS = 3


@dataclass
class Samples:
    """Microseconds of each call, and of each step from its opening to its last output.

    Of a way whose calls do not wait, a step gives one time of a call: its own, divided by its calls.
    """

    call_us: list[float] = field(default_factory=list)
    step_us: list[float] = field(default_factory=list)

    def add_step(self, way: Way, num_layers: int) -> None:
        """Runs a step, whose calls go over a cache of `num_layers` as often as it takes."""
        call_us = []
        opened = time.perf_counter()
        call = way.open()
        for index in range(NUM_CALLS * way.num_steps):
            layer = index % num_layers
            before = time.perf_counter()
            call(layer)
            call_us.append((time.perf_counter() - before) * 1e6)
        if way.finish is not None:
            way.finish()
        step_us = (time.perf_counter() - opened) * 1e6 / way.num_steps
        self.step_us.append(step_us)
        self.call_us += call_us if way.finish is None else [step_us / NUM_CALLS]


def refuse_wrong_ways(step: DecodeStep, ways: Ways) -> None:
    """Compares every way with float64, and the planes with the backend in this process bit for bit.

    Raises:
        WrongResult: one gives something else.
    """
    outputs: dict[str, dict[int, torch.Tensor]] = {}
    for way in ways.ways:
        if way.cache is not None:
            outputs[way.name] = step.check(way.name, way.cache, way.open())
            if way.finish is not None:
                way.finish()
    refuse_other_bits(outputs, {way.name for way in ways.ways if way.session is not None})


def refuse_other_bits(outputs: Mapping[str, Mapping[int, torch.Tensor]], names: set[str]) -> None:
    """Raises WrongResult unless the outputs of `names`, by layer, have the bits of inproc's."""
    for name in sorted(names):
        for layer, output in outputs[name].items():
            expected = outputs["inproc"][layer]
            if not torch.equal(output, expected):
                num = int((output != expected).sum())
                raise WrongResult(
                    f"{name}, layer {layer}: {num} of {output.numel()} numbers have other bits than inproc's"
                )


def time_ways(
    ways: Sequence[Way], num_layers: int, seconds: float, tick: Callable[[float], None]
) -> dict[str, Samples]:
    """Runs steps of all ways in turn until the time is up: what disturbs the machine disturbs all alike.

    Args:
        ways: what to time.
        num_layers: of their caches.
        seconds: for all together, at least.
        tick: told between two steps how much of the time has passed, from 0 to 1. Nothing else may draw meanwhile: it
            would be timed too.
    """
    for way in ways:
        Samples().add_step(way, num_layers)
        if way.session is not None:
            way.session.reset_timings()
    samples = {way.name: Samples() for way in ways}
    order, rng = list(ways), random.Random(0)
    started, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or time.perf_counter() - started < seconds:
        rng.shuffle(order)
        for way in order:
            samples[way.name].add_step(way, num_layers)
            tick(min(1.0, (time.perf_counter() - started) / seconds))
        rounds += 1
    return samples


def rows(ways: Sequence[Way], samples: Mapping[str, Samples]) -> list[dict[str, Any]]:
    """What each way took, beside its floor and beside attention in this process.

    Returns:
        By way: p50 and p99 of a call, p50 of a step; `floor_us`, the p50 of the ways of its floor together, and `ratio`
        to it; `limit_ratio`, to the p50 of its limit, where that was timed; `step_to_inproc` and `step_to_backend`, its
        step to those of `inproc://` and of the backend; `over_us`, what a call of its step has more than one of the
        backend's step. The backend's step is the one that is launched alike (`Way.beside`), else the one that waits for
        the device once, where there is one.
    """
    p50 = {name: statistics.median(sample.call_us) for name, sample in samples.items()}
    step_p50 = {name: statistics.median(sample.step_us) for name, sample in samples.items()}
    result = []
    for way in ways:
        backend_us = step_p50.get(way.beside or "backend queued", step_p50["backend"])
        name, step_us = way.name, step_p50[way.name]
        floor_us = sum(p50[part] for part in way.floor) if way.floor else None
        computes = way.cache is not None
        row = {
            "way": name,
            "p50_us": p50[name],
            "p99_us": statistics.quantiles(samples[name].call_us, n=100)[98],
            "step_us": step_us,
            "layer_us": step_us / NUM_CALLS,
            "floor": list(way.floor),
            "floor_us": floor_us,
            "ratio": None if floor_us is None else p50[name] / floor_us,
            "limit_ratio": p50[name] / p50[way.limit] if way.limit in p50 else None,
            "step_to_inproc": step_us / step_p50["inproc"] if computes else None,
            "step_to_backend": step_us / backend_us if computes else None,
            "over_us": (step_us - backend_us) / NUM_CALLS if computes else None,
            "calls": len(samples[name].step_us) * NUM_CALLS * way.num_steps,
        }
        result.append({**row, **_server_times(way)})
    return result


def _server_times(way: Way) -> dict[str, Any]:
    """What the server says of a session's calls: averages, and bytes of a call with its share of the step."""
    timings = None if way.session is None else way.session.timings()
    if timings is None or not timings.num_calls:
        names = ("queue_us", "copies_us", "kernel_us", "backend", "bytes_sent", "bytes_received")
        return dict.fromkeys(names)
    return {
        "queue_us": timings.queue_us / timings.num_calls,
        "copies_us": (timings.copy_in_us + timings.copy_out_us) / timings.num_calls,
        "kernel_us": timings.kernel_us / timings.num_calls,
        "backend": timings.backend,
        "bytes_sent": timings.bytes_sent // timings.num_calls,
        "bytes_received": timings.bytes_received // timings.num_calls,
    }

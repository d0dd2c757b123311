"""What the server adds to a decode call: p50 and p99 against a bare gRPC echo of the same bytes and the backend alone.

`python -m benchmarks.service --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import attnd
from benchmarks import report
from benchmarks.ways import Endpoints, Way, endpoints, ways
from benchmarks.workload import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS, DecodeStep

NUM_TOKENS = (1, 16, 64)
MIN_ROUNDS = 3
COLUMNS = {
    "tokens": "tokens",
    "way": "way",
    "p50_us": "p50",
    "p99_us": "p99",
    "layer_us": "step/30",
    "queue_us": "queue",
    "copies_us": "copies",
    "kernel_us": "kernel",
    "floor_us": "floor",
    "ratio": "ratio",
}
CAPTION = """Times in us. step/30: a step of 30 calls with its opening, per call. queue, copies to and
from the device, kernel: the server's own, mean. floor: p50 of the echo of the same kind (none for inproc) + p50 of the
backend. ratio: p50 / floor."""


@dataclass
class Samples:
    """Microseconds of each call, and of each step from its opening to its last layer."""

    call_us: list[float] = field(default_factory=list)
    step_us: list[float] = field(default_factory=list)

    def add_step(self, way: Way, step: DecodeStep, num_layers: int = NUM_LAYERS) -> None:
        """Runs a step."""
        opened = before = time.perf_counter()
        call = way.open()
        for index in range(num_layers):
            layer = index % len(step.layers)
            before = time.perf_counter()
            call(layer)
            self.call_us.append((time.perf_counter() - before) * 1e6)
        self.step_us.append((time.perf_counter() - opened) * 1e6)


def time_ways(all_ways: Sequence[Way], step: DecodeStep, seconds: float, progress: Progress) -> dict[str, Samples]:
    """Runs steps of all ways in turn until the time is up: what disturbs the machine disturbs all alike."""
    task = progress.add_task(f"{step.num_reqs} tokens", total=seconds)
    for way in all_ways:
        Samples().add_step(way, step, num_layers=3)
        if way.session is not None:
            way.session.reset_timings()
    samples = {way.name: Samples() for way in all_ways}
    order, rng = list(all_ways), random.Random(0)
    started, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or time.perf_counter() - started < seconds:
        rng.shuffle(order)
        for way in order:
            samples[way.name].add_step(way, step)
            # By hand, between two steps: a thread that draws would be timed too.
            progress.update(task, completed=min(seconds, time.perf_counter() - started))
            progress.refresh()
        rounds += 1
    return samples


def rows(all_ways: Sequence[Way], samples: dict[str, Samples], num_tokens: int) -> list[dict[str, Any]]:
    """A row of the report for each way."""
    p50 = {name: statistics.median(sample.call_us) for name, sample in samples.items()}
    result = []
    for way in all_ways:
        sample = samples[way.name]
        floor_us = sum(p50[name] for name in way.floor) if way.floor else None
        row = {
            "tokens": num_tokens,
            "way": way.name,
            "p50_us": p50[way.name],
            "p99_us": statistics.quantiles(sample.call_us, n=100)[98],
            "layer_us": statistics.median(sample.step_us) / NUM_LAYERS,
            "floor": list(way.floor),
            "floor_us": floor_us,
            "ratio": None if floor_us is None else p50[way.name] / floor_us,
            "calls": len(sample.call_us),
        }
        result.append({**row, **_server_times(way)})
    return result


def _server_times(way: Way) -> dict[str, Any]:
    """What the server says of a session's calls: averages, and bytes of a call with its share of the step."""
    if way.session is None:
        names = ("queue_us", "copies_us", "kernel_us", "backend", "bytes_sent", "bytes_received")
        return dict.fromkeys(names)
    timings = way.session.timings()
    return {
        "queue_us": timings.queue_us / timings.num_calls,
        "copies_us": (timings.copy_in_us + timings.copy_out_us) / timings.num_calls,
        "kernel_us": timings.kernel_us / timings.num_calls,
        "backend": timings.backend,
        "bytes_sent": timings.bytes_sent // timings.num_calls,
        "bytes_received": timings.bytes_received // timings.num_calls,
    }


def benchmark(step: DecodeStep, ends: Endpoints, seconds: float, progress: Progress) -> list[dict[str, Any]]:
    """Checks every way of computing a step, then times them. Raises WrongResult."""
    with ways(step, ends) as all_ways:
        for way in all_ways:
            if way.cache is not None:
                step.check(way.name, way.cache, way.open())
        return rows(all_ways, time_ways(all_ways, step, seconds, progress), step.num_reqs)


def draw(path: Path, title: str, results: Sequence[dict[str, Any]]) -> None:
    """p50 of each way beside the floor that it stands on."""
    panels: dict[str, list[report.Bar]] = {}
    p50 = {(row["tokens"], row["way"]): row["p50_us"] for row in results}
    for row in results:
        if row["floor"]:
            floor = {name.split()[0]: p50[row["tokens"], name] for name in row["floor"]}
            panels.setdefault(f"{row['tokens']} tokens", []).append(report.Bar(row["way"], row["p50_us"], floor))
    report.plot(path, title, "p50 of a call, us", panels)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=description)
    parser.add_argument("--quick", action="store_true", help="3 seconds for each number of tokens")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU, or the CPU")
    parser.add_argument("--context", type=int, metavar="N", help="tokens in each context; default: 1024, on a CPU 256")
    parser.add_argument("--tokens", type=int, nargs="+", default=NUM_TOKENS, metavar="N", help="default: 1 16 64")
    parser.add_argument("--seconds", type=float, metavar="S", help="for each number of tokens, at least; default: 20")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of a call on a CPU; default: torch's")
    results = report.ROOT / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=results, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.context = options.context or (1024 if options.device == "cuda" else 256)
    options.seconds = options.seconds or (3.0 if options.quick else 20.0)
    options.threads = options.threads or torch.get_num_threads()
    return options


@torch.inference_mode()
def run(options: argparse.Namespace, console: Console) -> None:
    """Times, prints and writes."""
    attnd.tune_process()  # inproc and the backend run here: as in the server
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results: list[dict[str, Any]] = []
    columns = TextColumn("{task.description:>10}"), BarColumn(), TimeElapsedColumn()
    progress = Progress(*columns, console=console, auto_refresh=False, transient=True)
    with endpoints(device, options.threads) as ends, progress:
        for num_tokens in options.tokens:
            step = DecodeStep(num_tokens, options.context, dtype)
            results += benchmark(step, ends, options.seconds, progress)

    heads = f"{NUM_HEADS}/{NUM_KV_HEADS} heads x {HEAD_DIM}"
    dtype_name = str(dtype).removeprefix("torch.")
    title = f"decode call, {heads}, {dtype_name}, context {options.context}, {device.type}, {options.threads} threads"
    console.print(report.table(title, CAPTION, results, COLUMNS))
    path = options.out / f"service-{device.type}"
    parameters = {"heads": heads, "dtype": dtype_name, **{k: v for k, v in vars(options).items() if k != "out"}}
    report.write_json(path.with_suffix(".json"), "service", parameters, results)
    console.print(f"written: {path}.json")
    try:
        draw(path.with_suffix(".png"), title, results)
        console.print(f"written: {path}.png")
    except ModuleNotFoundError as error:  # a GPU machine may have no matplotlib
        console.print(f"no plot: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    console = Console()
    try:
        run(parse(arguments), console)
    except report.WrongResult as error:
        console.print(f"[red]wrong result:[/] {error}")
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

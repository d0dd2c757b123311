"""How long a call takes whose kernels nobody has used before, what that costs a neighbour, and what a restart keeps.

`python -m benchmarks.first_calls --help`; README.md beside this file says how to read the result. A server starts with
an empty folder of kernels. While nobody else calls, and then while caches of random geometries are created and called
for the first time, a neighbour runs decode steps. Then the server starts again with the same folder, and answers a
random mix of calls. Every answer is compared with float64.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import attnd
from benchmarks import report
from benchmarks.mixed_calls import Geometry, MixedCache
from benchmarks.report import Bar
from benchmarks.servers import Child, started
from benchmarks.workload import LLAMA_8B

TIMEOUT_S = 120.0
# Of Llama-3-8B, of half of it, of Qwen2.5-7B, Qwen2.5-0.5B and Gemma-2-9B; pages of 16.
MODELS = [
    Geometry(num_kv_heads, head_dim, 16, torch.bfloat16, None, "unified", group)
    for num_kv_heads, head_dim, group in ((8, 128, 4), (4, 128, 4), (4, 128, 7), (2, 64, 7), (8, 256, 2))
]
# Of the neighbour: its batch, its context, and the plane that it uses.
BATCH, CONTEXT_LEN, PLANE = 4, 1024, "shm"
# Of a row with so many calls at most, the report has each.
FEW = 20
COLUMNS = {
    "phase": "phase",
    "calls": "calls",
    "p50_ms": "p50",
    "most_ms": "most",
    "per_s": "calls/s",
    "neighbour_p50_us": "neighbour p50",
    "neighbour_p99_us": "p99",
    "p99_ratio": "p99/quiet",
}
CAPTION = """p50, most: ms of a call; of a first one with the creation of its cache. neighbour: us of its decode calls.
first: one call of each new geometry, whose kernels are compiled for it; mix: random calls after a restart. models: of
models that people run; Hopper has kernels of its own for these, and they share some."""


@dataclass
class Timed:
    """Seconds of calls, and what became of the neighbour meanwhile."""

    seconds: list[float] = field(default_factory=list)
    neighbour: dict[str, float] = field(default_factory=dict)

    def row(self, phase: str, quiet_p99_us: float) -> dict[str, Any]:
        """For the report."""
        row: dict[str, Any] = {"phase": phase, "calls": len(self.seconds)}
        if 0 < len(self.seconds) <= FEW:
            row["each_ms"] = [round(each * 1e3) for each in self.seconds]
        if self.seconds:
            row |= {"p50_ms": statistics.median(self.seconds) * 1e3, "most_ms": max(self.seconds) * 1e3}
            row["per_s"] = len(self.seconds) / sum(self.seconds)
        if self.neighbour:
            row |= {f"neighbour_{name}": self.neighbour[name] for name in ("p50_us", "p99_us")}
            row["p99_ratio"] = self.neighbour["p99_us"] / quiet_p99_us
        return row


class Mix:
    """Random calls of one server, the same for the same seed."""

    def __init__(self, client: attnd.Client, seed: int) -> None:
        """Has no caches yet."""
        self._client = client
        self._rng, self._generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self._caches: list[MixedCache] = []

    def first_call(self, timed: Timed, geometry: Geometry | None = None) -> None:
        """A cache of a new geometry, or of a random one, and its first call."""
        geometry = geometry or Geometry.drawn(self._rng)
        began = time.perf_counter()
        mixed = MixedCache(geometry, self._client.create_cache(**geometry.cache))
        took = time.perf_counter() - began
        self._caches.append(mixed)
        self._call(mixed, timed, took)

    def call(self, timed: Timed) -> None:
        """A call of any of the caches."""
        self._call(self._rng.choice(self._caches), timed)

    def _call(self, mixed: MixedCache, timed: Timed, spent_s: float = 0.0) -> None:
        call = mixed.drawn_call(self._rng, self._generator)
        began = time.perf_counter()
        answer = call(self._client)
        timed.seconds.append(time.perf_counter() - began + spent_s)
        call.check(f"a call of {mixed.geometry}", answer)


@contextmanager
def served(device: str, folder: Path) -> Iterator[tuple[attnd.Client, str]]:
    """A server that keeps its kernels in a folder, a client of it, and its address."""
    options = ["--port", "0", "--device", device, "--socket-dir", str(folder / "sockets")]
    options += ["--kernel-cache", str(folder / "kernels")]
    with started("attnd_server", "serve", *options) as child:
        address = child.address()
        with attnd.connect(address, timeout_s=TIMEOUT_S) as client:
            yield client, address


@contextmanager
def neighbour_of(address: str, device: str) -> Iterator[Child]:
    """Another client, which is ready to run decode steps."""
    device = "cuda:0" if device == "cuda" else device
    options = ["--plane", PLANE, "--device", device, "--model", LLAMA_8B.name, "--context", str(CONTEXT_LEN)]
    options += ["--kv-bytes", str(1 << 30), "--threads", "1", "--tokens", str(BATCH)]
    with started("benchmarks.caller", address, *options) as child:
        child.read(rb"^ready", TIMEOUT_S)
        yield child


def answer_of(child: Child, seconds: float) -> dict[str, float]:
    """What the neighbour says of the time for which it was asked to run."""
    said: dict[str, float] = json.loads(child.read(rb"^{", seconds + TIMEOUT_S).string)
    return said


def timed_first_calls(device: str, folder: Path, options: argparse.Namespace) -> tuple[Timed, Timed, Timed]:
    """Of a server without kernels: the neighbour alone, first calls of models, and others with the neighbour beside."""
    quiet, models, first = Timed(), Timed(), Timed()
    with ExitStack() as stack:
        client, address = stack.enter_context(served(device, folder))
        child = stack.enter_context(neighbour_of(address, device))
        child.write(f"{options.seconds:g}")
        quiet.neighbour = answer_of(child, options.seconds)
        mix = Mix(client, options.seed)
        for geometry in MODELS:
            mix.first_call(models, geometry)
        child.write(f"{options.seconds:g}")
        began = time.monotonic()
        while len(first.seconds) < options.geometries and time.monotonic() - began < options.seconds:
            mix.first_call(first)
        first.neighbour = answer_of(child, options.seconds)
    return quiet, models, first


def timed_mix(device: str, folder: Path, options: argparse.Namespace, num_calls: int) -> tuple[Timed, dict[str, Any]]:
    """Random calls of a server that starts with the kernels in a folder, and what it says of these at the end."""
    timed = Timed()
    with served(device, folder) as (client, _):
        mix = Mix(client, options.seed)
        for _ in range(options.geometries):
            mix.first_call(timed)
        while len(timed.seconds) < num_calls:
            mix.call(timed)
        return timed, kernel_counts(client)


def kernel_counts(client: attnd.Client) -> dict[str, Any]:
    """Kernels of a server: compiled since it started, found in its folder, and so on."""
    kernels = client.status().kernels
    return {descriptor.name: value for descriptor, value in kernels.ListFields() if isinstance(value, int)}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_calls", description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    parser.add_argument("--geometries", type=int, default=20, metavar="N", help="caches that are called; default: 20")
    parser.add_argument("--calls", type=int, default=1000, metavar="N", help="of the mix; default: 1000")
    parser.add_argument("--seconds", type=float, default=40.0, metavar="S", help="of each look at the neighbour")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is random; default: 0")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write JSON and the plot")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> None:
    """Times everything, prints and writes."""
    attnd.tune_process()
    with tempfile.TemporaryDirectory(prefix="attnd-") as name:
        folder = Path(name)
        quiet, models, first = timed_first_calls(options.device, folder, options)
        quiet_p99_us = quiet.neighbour["p99_us"]
        for phase, timed in (("quiet", quiet), ("first, models", models), ("first", first)):
            console.print(timed.row(phase, quiet_p99_us))
        # Once for what the mix needs beside the first calls, and once more, when all of it has been seen.
        seen, counts = timed_mix(options.device, folder, options, options.calls)
        console.print(seen.row("mix, some kernels new", quiet_p99_us), counts)
        again, counts_again = timed_mix(options.device, folder, options, options.calls)
        console.print(again.row("mix", quiet_p99_us), counts_again)
    phases = {"quiet": quiet, "first, models": models, "first": first, "mix, some new": seen, "mix": again}
    rows = [timed.row(phase, quiet_p99_us) for phase, timed in phases.items()]
    console.print(report.table(f"first calls, {options.device}", CAPTION, rows, COLUMNS))
    if options.out is not None:
        parameters = {key: value for key, value in vars(options).items() if key != "out"}
        parameters |= {"kernels": counts, "kernels_again": counts_again}
        bars = {
            "ms of a call": [Bar(str(row["phase"]), row["p50_ms"], {"most": row["most_ms"]}) for row in rows[1:]],
        }

        def draw(path: Path) -> None:
            report.plot(path, "first calls", "ms", bars)

        report.write(console, options.out / "first_calls", "first_calls", parameters, rows, draw)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    return report.exit_code(lambda console: run(parse(arguments), console))


if __name__ == "__main__":
    sys.exit(main())

"""What the server adds to a decode call: p50 and p99 against a bare gRPC echo of the same bytes and the backend alone.

`python -m benchmarks.service --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import attnd
from benchmarks import report
from benchmarks.endpoints import Endpoints, endpoints
from benchmarks.way_timing import refuse_wrong_ways, rows, time_ways
from benchmarks.ways import all_ways
from benchmarks.workload import LLAMA_8B, NUM_CALLS, DecodeStep

NUM_TOKENS = (1, 16, 64)
COLUMNS = {
    "tokens": "tokens",
    "way": "way",
    "p50_us": "p50",
    "p99_us": "p99",
    "layer_us": f"step/{NUM_CALLS}",
    "queue_us": "queue",
    "copies_us": "copies",
    "kernel_us": "kernel",
    "floor_us": "floor",
    "ratio": "ratio",
    "limit_ratio": "limit",
}
CAPTION = f"""Times in us. step/{NUM_CALLS}: a step of {NUM_CALLS} calls with its opening, per call.
queue, copies to and from the device, kernel: the server's own, mean. floor: p50 of the echo of the same kind (none for
inproc) + p50 of the backend. ratio: p50 / floor. limit: p50 / p50 of the echo with the backend behind it."""


def benchmark(step: DecodeStep, ends: Endpoints, seconds: float, progress: Progress) -> list[dict[str, Any]]:
    """Checks every way of computing a step, then times them. Raises WrongResult."""
    task = progress.add_task(f"{step.num_reqs} tokens", total=1.0)

    def tick(done: float) -> None:
        progress.update(task, completed=done)
        progress.refresh()

    tick(0.0)
    with all_ways(step, ends, unary=True, attending_echoes=True) as ways:
        refuse_wrong_ways(step, ways)
        samples = time_ways(ways.ways, len(step.layers), seconds, tick)
        return [{"tokens": step.num_reqs, **row} for row in rows(ways.ways, samples)]


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
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="on a CPU; default: torch's, beside a GPU 1"
    )
    results = report.ROOT / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=results, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.context = options.context or (1024 if options.device == "cuda" else 256)
    options.seconds = options.seconds or (3.0 if options.quick else 20.0)
    options.threads = options.threads or (torch.get_num_threads() if options.device == "cpu" else 1)
    return options


@torch.inference_mode()
def run(options: argparse.Namespace, console: Console) -> None:
    """Times, prints and writes."""
    attnd.tune_process()  # inproc and the backend run here: as in the server
    torch.set_num_threads(options.threads)
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results: list[dict[str, Any]] = []
    columns = TextColumn("{task.description:>10}"), BarColumn(), TimeElapsedColumn()
    progress = Progress(*columns, console=console, auto_refresh=False, transient=True)
    with endpoints(device, device, options.threads) as ends, progress:
        for num_tokens in options.tokens:
            step = DecodeStep(num_tokens, options.context, dtype, device=device)
            results += benchmark(step, ends, options.seconds, progress)

    heads = str(LLAMA_8B)
    dtype_name = str(dtype).removeprefix("torch.")
    title = f"decode call, {heads}, {dtype_name}, context {options.context}, {device.type}, {options.threads} threads"
    console.print(report.table(title, CAPTION, results, COLUMNS))
    path = options.out / f"service-{device.type}"
    parameters = {"heads": heads, "dtype": dtype_name, **{k: v for k, v in vars(options).items() if k != "out"}}
    report.write(console, path, "service", parameters, results, lambda plot: draw(plot, title, results))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    return report.exit_code(lambda console: run(parse(arguments), console))


if __name__ == "__main__":
    sys.exit(main())

"""Every plane beside attention in the same process and the bare floor of its transport; and many clients beside one.

`python -m benchmarks.planes --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import attnd
from benchmarks import callers
from benchmarks.endpoints import Endpoints, endpoints
from benchmarks.kernel_runs import as_command, release
from benchmarks.plane_options import Cell, parse
from benchmarks.plane_results import Results, show, write
from benchmarks.way_timing import refuse_wrong_ways, rows, time_ways
from benchmarks.ways import all_ways, open_planes
from benchmarks.workload import DecodeStep


class _Bar:
    """Progress, drawn only when it is told to: a thread that draws would be timed too."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def begin(self, name: str) -> Callable[[float], None]:
        """Shows another part, of which what is returned says how much is done."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        task = self._task = self._progress.add_task(name, total=1.0)

        def tick(done: float) -> None:
            self._progress.update(task, completed=done)
            self._progress.refresh()

        tick(0.0)
        return tick


def measure_cell(cell: Cell, options: argparse.Namespace, ends: Endpoints, bar: _Bar, results: Results) -> None:
    """Checks every way of computing a cell's step, then times them."""
    tick = bar.begin(str(cell))
    dtype = torch.bfloat16 if ends.device.type == "cuda" else torch.float32
    kv_bytes = int(options.kv_gib * (1 << 30))
    step = DecodeStep(cell.num_tokens, cell.context_len, dtype, cell.heads, ends.device, kv_bytes)
    with all_ways(step, ends) as ways:
        refuse_wrong_ways(step, ways)
        results.reasons.update(ways.reasons)
        samples = time_ways(ways.ways, len(step.layers), options.seconds, tick)
        names = {"cell": str(cell), "model": cell.heads.name, "tokens": cell.num_tokens, "context": cell.context_len}
        results.rows += [{**names, "layers": len(step.layers), **row} for row in rows(ways.ways, samples)]


def measure_callers(options: argparse.Namespace, ends: Endpoints, bar: _Bar, results: Results) -> None:
    """Tokens per second of many callers, on each plane that can be had."""
    dtype = torch.bfloat16 if ends.device.type == "cuda" else torch.float32
    probe = DecodeStep(1, 16, dtype)
    with ExitStack() as stack:
        cache = stack.enter_context(ends.client.create_cache(**probe.geometry))
        sessions, reasons = open_planes(stack, ends.client, cache, probe, ends.device)
    results.reasons.update(reasons)
    context_len = options.context[0] if ends.device.type == "cpu" else callers.GPU_CONTEXT_LEN
    for plane in options.caller_planes:
        if plane not in sessions:
            continue
        with results.noting(f"callers {plane}"):
            results.caller_rows += callers.benchmark(
                ends.address,
                plane,
                options.callers,
                device=ends.device,
                context_len=context_len,
                num_threads=options.threads,
                seconds=options.seconds,
                tick=bar.begin(f"callers {plane}"),
            )


@torch.inference_mode()
def measure(options: argparse.Namespace, results: Results, err: Console) -> None:
    """Measures everything that is asked for into `results`. What is there when this raises is good."""
    attnd.tune_process()  # inproc and the backend run here: as in the server
    torch.set_num_threads(options.threads)
    device, server_device = torch.device(options.device), torch.device(options.server_device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    columns = TextColumn("{task.description:>20}"), BarColumn(), TimeElapsedColumn()
    progress = Progress(*columns, console=err, auto_refresh=False, transient=True)
    with progress, endpoints(device, server_device, options.threads) as ends:
        bar = _Bar(progress)
        for cell in options.cells:
            with results.noting(str(cell)):
                measure_cell(cell, options, ends, bar, results)
            release(device)
        if options.caller_planes:
            measure_callers(options, ends, bar, results)


def run(options: argparse.Namespace, out: Console, err: Console) -> int:
    """Times, prints and writes, also what there is when something ends it early. Returns the exit code."""
    results, stopped = Results(), False
    try:
        measure(options, results, err)
    except KeyboardInterrupt:
        err.print("stopped")
        stopped = True
    show(options, results, out)
    if results.rows or results.caller_rows:
        write(options, results, err)
    return 130 if stopped else 1 if results.failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 if a part could not be timed."""
    return as_command(lambda out, err: run(parse(arguments), out, err))


if __name__ == "__main__":
    sys.exit(main())

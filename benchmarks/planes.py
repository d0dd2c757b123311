"""Every plane beside attention in the same process and the bare floor of its transport; and many clients beside one.

`python -m benchmarks.planes --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import attnd
from benchmarks import callers, report
from benchmarks.endpoints import Endpoints, endpoints
from benchmarks.kernel_runs import as_command, chosen, release
from benchmarks.way_timing import refuse_wrong_ways, rows, time_ways
from benchmarks.ways import PLANES, all_ways, open_planes
from benchmarks.workload import LLAMA_8B, MODELS, NUM_CALLS, DecodeStep, Heads

COLUMNS = {
    "cell": "cell",
    "way": "way",
    "p50_us": "p50",
    "p99_us": "p99",
    "step_us": "step",
    "floor_us": "floor",
    "ratio": "x floor",
    "step_to_inproc": "x inproc",
    "step_to_backend": "x backend",
    "over_us": "over",
}
CAPTION = f"""Times in us: p50 and p99 of a call; a step of {NUM_CALLS} calls, its opening included.
floor: p50 of the echo of the plane + of the backend. x floor: p50 / floor.
x inproc, x backend: step / theirs. over: (step - the backend's) / {NUM_CALLS}."""
CALLER_COLUMNS = {"plane": "plane", "callers": "callers", "tokens_per_s": "tokens/s", "ratio": "ratio"}
CALLER_CAPTION = f"""Client processes that decode at the same time, {NUM_CALLS} calls a step. ratio: tokens per second
to those of {callers.ONE_LARGE}."""


@dataclass(frozen=True)
class Cell:
    """A step to time."""

    heads: Heads
    num_tokens: int
    context_len: int

    def __str__(self) -> str:
        return f"{self.heads.name} {self.num_tokens} x {spell(self.context_len)}"

    @property
    def is_quick(self) -> bool:
        """Whether it is worth its time in a short run."""
        return self.heads is LLAMA_8B and self.num_tokens in (1, 16, 64) and self.context_len <= 8192


def spell(num_tokens: int) -> str:
    """A number of tokens, in units of 1024 where it is one."""
    return f"{num_tokens // 1024}k" if num_tokens % 1024 == 0 else str(num_tokens)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planes", description=description)
    parser.add_argument("--quick", action="store_true", help="8B alone, up to 8k of context, 2 seconds each")
    parser.add_argument(
        "--only", metavar="TEXT", help="cells that have TEXT in their name, such as '70B 16 x', callers"
    )
    parser.add_argument(
        "--device", type=_device, default="auto", metavar="NAME", help="cpu, cuda, cuda:N; default: best"
    )
    parser.add_argument("--server-device", type=_device, metavar="NAME", help="of the server; default: the same")
    parser.add_argument(
        "--context", type=_number, nargs="+", metavar="N", help="default: 1024 8192 32768, on a CPU 256"
    )
    parser.add_argument("--tokens", type=_number, nargs="+", metavar="N", help="default: 1 4 16 64, on a CPU 1 16")
    parser.add_argument("--callers", type=_number, nargs="+", metavar="N", help="default: 1 4 16, on a CPU 1 4")
    parser.add_argument("--seconds", type=float, metavar="S", help="for each cell, at least; default: 5, quick 2")
    about = "most KV of a cache, unless a layer has more; calls start over where it has no 32; default: 0.5"
    parser.add_argument("--kv-gib", type=float, metavar="G", default=0.5, help=about)
    parser.add_argument("--threads", type=_number, metavar="N", help="of a call on a CPU; default: torch's")
    results = report.ROOT / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=results, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("device", "server_device"):
        _check_device(parser, name, getattr(options, name))
    for name in ("seconds", "kv_gib"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"argument --{name.replace('_', '-')}: is {value:g}, but must be positive")
    _fill_in(parser, options)
    return options


def _fill_in(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What depends on the machine."""
    on_gpu = options.device != "cpu"
    options.server_device = options.server_device or options.device
    if (options.server_device != "cpu") != on_gpu:
        parser.error(f"argument --server-device: is {options.server_device}, but must be of --device's kind")
    options.context = options.context or ([1024, 8192, 32768] if on_gpu else [256])
    options.tokens = options.tokens or ([1, 4, 16, 64] if on_gpu else [1, 16])
    options.callers = sorted(options.callers or ([1, 4, 16] if on_gpu else [1, 4]))
    options.seconds = options.seconds or (2.0 if options.quick else 5.0)
    options.threads = options.threads or torch.get_num_threads()
    cells = [
        Cell(heads, tokens, context) for heads in MODELS for tokens in options.tokens for context in options.context
    ]
    if options.quick:
        cells = [cell for cell in cells if cell.is_quick] or cells[:1]
    names: dict[str, Cell | str] = {str(cell): cell for cell in cells}
    names |= {f"callers {plane}": plane for plane in PLANES}
    parts = chosen(parser, names, options.only)
    options.cells = [part for part in parts if isinstance(part, Cell)]
    options.caller_planes = [part for part in parts if isinstance(part, str)]


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if text in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdecimal()):
        return text
    raise argparse.ArgumentTypeError(f"is {text!r}, but must be cpu, cuda or cuda:N")


def _check_device(parser: argparse.ArgumentParser, name: str, device: str | None) -> None:
    count = torch.cuda.device_count()
    if device and device.startswith("cuda") and int(device.partition(":")[2] or 0) >= count:
        parser.error(f"argument --{name.replace('_', '-')}: is {device}, but torch finds {count} GPUs")


def _number(text: str) -> int:
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"is {text!r}, but must be a whole number from 1")


@dataclass
class Results:
    """What has been measured so far.

    Attributes:
        rows: of cells.
        caller_rows: of groups of callers.
        reasons: by the name of each plane that cannot be had, why.
        failures: by the name of each part without times, why: a wrong result, or not enough memory.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    caller_rows: list[dict[str, Any]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """Takes the failure of a part, because the other parts are worth having all the same."""
        try:
            yield
        except Exception as error:
            kind = "wrong result" if isinstance(error, report.WrongResult) else type(error).__name__
            self.failures[name] = f"{kind}: {error}"


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
    context_len = 8192 if 8192 in options.context else options.context[0]
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


def title_of(options: argparse.Namespace) -> str:
    """Above the table."""
    if options.device == "cpu":
        return f"planes: decode, float32, CPU, {options.threads} threads"
    name, server = torch.cuda.get_device_name(options.device), options.server_device
    where = "one GPU" if server == options.device else f"client at {options.device}, server at {server}"
    return f"planes: decode, bfloat16, {name}, {where}"


def show(options: argparse.Namespace, results: Results, out: Console) -> None:
    if results.rows:
        out.print(report.table(title_of(options), CAPTION, results.rows, COLUMNS))
    if results.caller_rows:
        out.print(report.table("callers", CALLER_CAPTION, results.caller_rows, CALLER_COLUMNS))
    lines = [f"{plane} cannot be had: {reason}" for plane, reason in results.reasons.items()]
    for line in [*lines, *(f"{name} was not timed: {reason}" for name, reason in results.failures.items())]:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def write(options: argparse.Namespace, results: Results, err: Console) -> None:
    """JSON and plot."""
    path = options.out / f"planes-{torch.device(options.device).type}"
    hidden = ("out", "cells", "caller_planes")
    parameters = {key: value for key, value in vars(options).items() if key not in hidden}
    parameters |= {"planes_that_cannot_be_had": results.reasons, "not_timed": results.failures}
    report.write_json(path.with_suffix(".json"), "planes", parameters, [*results.rows, *results.caller_rows])
    err.print(f"written: {path}.json", soft_wrap=True)
    try:
        draw(path.with_suffix(".png"), title_of(options), results.rows)
        err.print(f"written: {path}.png", soft_wrap=True)
    except ModuleNotFoundError as error:  # a GPU machine may have no matplotlib
        err.print(f"no plot: {error}")


def draw(path: Path, title: str, results: Sequence[dict[str, Any]]) -> None:
    """p50 of each plane beside the floor that it stands on, a panel for each cell."""
    p50 = {(row["cell"], row["way"]): row["p50_us"] for row in results}
    panels: dict[str, list[report.Bar]] = {}
    for row in results:
        if row["floor"]:
            floor = {name.split()[0]: p50[row["cell"], name] for name in row["floor"]}
            panels.setdefault(row["cell"], []).append(report.Bar(row["way"], row["p50_us"], floor))
    if panels:
        report.plot(path, title, "p50 of a call, us", panels)


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

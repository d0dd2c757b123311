"""What every benchmark of a kernel does around its cells: arguments, progress, reasons, a clean end."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from attnd.errors import Unsupported
from benchmarks import report
from benchmarks.ceilings import Ceilings
from benchmarks.report import WrongResult

Cell = TypeVar("Cell")
OURS = "ours"
"""The name of our own column."""


class NotThere(Exception):
    """A peer cannot run here, or not in this cell; the text says why."""


class Notes:
    """Why cells are empty: each reason once, with its cells."""

    def __init__(self) -> None:
        self._cells: dict[str, list[str]] = {}
        self.ours_failed = False
        self.not_found: set[str] = set()

    def add(self, way: str, reason: Exception, cell: str) -> None:
        """Notes that `way` has no time in a cell."""
        spoken = isinstance(reason, (NotThere, Unsupported))
        kind = "" if spoken else "wrong result: " if isinstance(reason, WrongResult) else f"{type(reason).__name__}: "
        text = f"{way}: {kind}{reason}".partition("\n")[0][:300]
        if isinstance(reason, NotThere) and str(reason).startswith("not found"):
            self.not_found.add(way)
        self._cells.setdefault(text, []).append(cell)
        self.ours_failed |= way == OURS

    def lines(self) -> list[str]:
        """A line for each reason."""
        return [
            f"{text} ({cells[0]}{f' and {len(cells) - 1} more' if cells[1:] else ''})"
            for text, cells in self._cells.items()
        ]


def base_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The arguments of every benchmark of a kernel."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="a few cells, timed briefly")
    parser.add_argument("--only", metavar="TEXT", help="cells that have TEXT in their name")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU, or the CPU")
    parser.add_argument("--seconds", type=float, metavar="S", help="of timing for each cell; default: 1, quick 0.3")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random data; default: another in each run")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all rows to this file, or folder")
    return parser


def parse_base(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses, checks and fills in what depends on the machine. Ends the process after an error."""
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: is cuda, but torch finds no GPU")
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    options.device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"argument --seconds: is {options.seconds:g}, but must be positive")
    options.seed = torch.seed() if options.seed is None else options.seed
    torch.manual_seed(options.seed)
    options.seconds = options.seconds or (0.3 if options.quick else 1.0)
    return options


def result_path(path: Path, name: str, suffix: str) -> Path:
    """The file that `path` names, or the file of this benchmark in the folder that it names."""
    return path if path.suffix and not path.is_dir() else path / f"{name}{suffix}"


def write_wanted(
    options: argparse.Namespace,
    name: str,
    parameters: Mapping[str, Any],
    rows: Sequence[report.Row],
    err: Console,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Writes JSON and the plot that `draw` makes, each if the arguments ask for it, and tells where."""
    if options.json:
        path = result_path(options.json, name, ".json")
        report.write_json(path, name, parameters, rows)
        err.print(f"written: {path}", soft_wrap=True)
    if draw is not None and options.plot:
        report.write_plot(err, result_path(options.plot, name, ".png"), draw)


def chosen(parser: argparse.ArgumentParser, cells: Mapping[str, Cell], only: str | None) -> list[Cell]:
    """The cells whose name has `only` in it. Ends the process if there is none."""
    result = [cell for name, cell in cells.items() if only is None or only in name]
    if not result:
        parser.error(f"argument --only: is {only!r}, but must be a part of one of: {', '.join(cells)}")
    return result


def measure_all(
    cells: Sequence[Cell],
    name: Callable[[Cell], str],
    measure: Callable[[Cell], dict[str, Any]],
    device: torch.device,
    err: Console,
) -> tuple[list[dict[str, Any]], bool]:
    """The rows of all cells, and whether Ctrl-C ended them early."""
    rows: list[dict[str, Any]] = []
    shown = TextColumn("{task.description:>30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*shown, console=err, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(cells))
        try:
            for cell in cells:
                # By hand, between two cells: a thread that draws would disturb the launches.
                progress.update(task, description=name(cell))
                progress.refresh()
                rows.append(measure(cell))
                release(device)
                progress.advance(task)
        except KeyboardInterrupt:
            return rows, True
    return rows, False


def release(device: torch.device) -> None:
    """Gives back the memory of a cell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def show(out: Console, table: Table, notes: Notes) -> None:
    """Prints a table, and why cells of it are empty."""
    out.print(table)
    for line in notes.lines():
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def run_parameters(options: argparse.Namespace, roof: Ceilings, notes: Notes) -> dict[str, Any]:
    """For the JSON."""
    return {
        "seconds": options.seconds,
        "quick": options.quick,
        "seed": options.seed,
        "ceilings": {key: round(value, 1) for key, value in roof._asdict().items()},
        "notes": notes.lines(),
    }


def as_command(run: Callable[[Console, Console], int]) -> int:
    """Runs a benchmark with consoles for its results and for its progress. Returns the exit code."""
    # Where nobody looks, wide enough for every table.
    out, err = Console(width=None if sys.stdout.isatty() else 140), Console(stderr=True)
    try:
        return run(out, err)
    except KeyboardInterrupt:
        err.print("stopped")
        return 130

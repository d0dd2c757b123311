"""What every benchmark says: a table for people, JSON for programs, a plot; and nothing about a wrong result."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
"""One line of a table and one object of the JSON: plain values by the name of their column, units in the names."""

ROOT = Path(__file__).resolve().parent.parent

# Most ||output - expected|| / ||expected|| of any token and head. A few times what rounding gives; one token of a
# thousand left out gives 3e-2.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1.5e-2}


# Variables of the environment that change how fast something runs.
_MATTERS = re.compile(r"(CUDA|GLIBC|GOMP|KMP|MALLOC|MKL|OMP|PYTORCH)_")


class WrongResult(Exception):
    """What was to be timed computes something else."""


def exit_code(run: Callable[[Console], None]) -> int:
    """Runs a benchmark that stops at the first wrong result. Returns the exit code of its command."""
    console = Console()
    try:
        run(console)
    except WrongResult as error:
        console.print(f"[red]wrong result:[/] {error}")
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    return 0


def refuse_wrong(what: str, output: torch.Tensor, expected: torch.Tensor, limit: float | None = None) -> None:
    """Raises unless `output` is `expected` up to rounding.

    Args:
        what: its name in the error.
        output: `[num_tokens, num_heads, head_dim]`.
        expected: the same in float64.
        limit: largest relative error of a row; None is that of output's dtype in `TOLERANCES`.

    Raises:
        WrongResult: another shape, or an error past the limit; NaN is past every limit.
    """
    limit = TOLERANCES[output.dtype] if limit is None else limit
    if output.shape != expected.shape:
        raise WrongResult(f"{what} has shape {list(output.shape)}, but must have {list(expected.shape)}")
    error = float(((output.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    if not error <= limit:
        raise WrongResult(f"{what} has a relative error of {error:.2g}, but must have at most {limit:g}")


def table(title: str, caption: str, rows: Sequence[Row], columns: Mapping[str, str]) -> Table:
    """Rows for people.

    Args:
        title: above the table.
        caption: below it: units, what a column means.
        rows: what to show; a section ends where the first column changes.
        columns: the key of each column that is shown, with its heading.
    """
    result = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in columns.values():
        result.add_column(heading, justify="left" if heading == "way" else "right", no_wrap=True)
    first = next(iter(columns))
    for row, following in zip(rows, [*rows[1:], {}], strict=True):
        result.add_row(*(_spell(row.get(key)) for key in columns), end_section=row[first] != following.get(first))
    return result


def _spell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
    return str(value)


def write_json(path: Path, benchmark: str, parameters: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Writes rows with everything that is needed to compare them with another run's."""
    result = {
        "benchmark": benchmark,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": versions(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if _MATTERS.match(key)},
        "parameters": dict(parameters),
        "rows": [
            {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()} for row in rows
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def write(
    console: Console,
    path: Path,
    benchmark: str,
    parameters: Mapping[str, Any],
    rows: Sequence[Row],
    draw: Callable[[Path], None],
) -> None:
    """Writes rows as JSON and as a plot, and tells where.

    Args:
        console: that is told.
        path: of both files, without their endings.
        benchmark: its name.
        parameters: of the run.
        rows: its results.
        draw: writes the plot to a path.
    """
    write_json(path.with_suffix(".json"), benchmark, parameters, rows)
    console.print(f"written: {path}.json", soft_wrap=True)
    write_plot(console, path.with_suffix(".png"), draw)


def write_plot(console: Console, path: Path, draw: Callable[[Path], None]) -> None:
    """Lets `draw` write a plot to a path, and tells where it is, or why there is none."""
    try:
        draw(path)
        console.print(f"written: {path}", soft_wrap=True)
    except ModuleNotFoundError as error:  # a GPU machine may have no matplotlib
        console.print(f"no plot: {error}")


def git_commit() -> str | None:
    """HEAD, with "-dirty" if files differ from it; None outside a repository."""
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if changes else "")


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, GPUs."""
    model = platform.processor() or platform.machine()
    memory_gib = None
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
        memory_gib = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": memory_gib,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str | None]:
    """Of Python, the system and the packages that matter here."""
    result: dict[str, str | None] = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("attnd", "grpcio", "protobuf", "numpy", "torch", "triton"):
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = None
    result["cuda"] = torch.version.cuda
    return result


class Bar(NamedTuple):
    """A measured bar, and beside it the parts of what it is compared with, stacked."""

    name: str
    value: float
    floor: Mapping[str, float]


def plot(path: Path, title: str, unit: str, panels: Mapping[str, Sequence[Bar]]) -> None:
    """Draws a panel of bars for each item of `panels`, each bar with its ratio to its floor. Writes a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3.4 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    parts = sorted({part for bars in panels.values() for bar in bars for part in bar.floor})
    colors = dict(zip(parts, ("#9aa5b1", "#d8a657", "#7daea3", "#b16286"), strict=False))
    for index, (heading, bars) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        axes.bar([i - 0.2 for i in range(len(bars))], [bar.value for bar in bars], 0.38, color="#3b6ea8", label="attnd")
        bottoms = [0.0] * len(bars)
        for part in parts:
            heights = [bar.floor.get(part, 0.0) for bar in bars]
            axes.bar([i + 0.2 for i in range(len(bars))], heights, 0.38, bottoms, color=colors[part], label=part)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        for i, bar in enumerate(bars):
            axes.text(i - 0.2, bar.value, f"x{bar.value / bottoms[i]:.2f}", ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(bars)), [bar.name for bar in bars])
        axes.set_title(heading, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
        if index == 0:
            axes.set_ylabel(unit)
            axes.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)

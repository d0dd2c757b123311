"""What `benchmarks.planes` has measured, as tables, JSON and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import callers, report
from benchmarks.workload import NUM_CALLS

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
CALLER_COLUMNS = {
    "plane": "plane",
    "callers": "callers",
    "tokens_per_s": "tokens/s",
    "ratio": "ratio",
    "to_echo": "to echo",
}
CALLER_CAPTION = f"""Client processes that decode at the same time, {NUM_CALLS} calls a step. ratio: tokens per second
to those of {callers.ONE_LARGE}. x echo: to those of as many bare callers of a process that attends for each call."""


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
    rows = [*results.rows, *results.caller_rows]
    report.write(err, path, "planes", parameters, rows, lambda plot: draw(plot, title_of(options), results.rows))


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

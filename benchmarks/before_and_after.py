"""The service benchmark of two checkouts, taking turns: is the second one slower?

Each pair runs `benchmarks.service` of either checkout, the order changing from pair to pair. For each way of calling,
the ratio of the two p50s is taken within a pair. The table has the median of the ratios, and an interval that holds the
true median with at least 95 %, from the order of the ratios alone; it needs 6 pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import comb
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.report import ROOT

# What goes through the server, and attention alone, by which one sees what is not the server's.
WAYS = ("backend", "unary", "inproc", "inline", "shm")
CONFIDENCE = 0.95

Key = tuple[int, str]
"""Tokens and way."""


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values between which the median of what they are drawn from lies, with at least 95 %.

    Raises:
        ValueError: there are too few values.
    """
    ordered, count = sorted(values), len(values)
    for rank in range((count + 1) // 2, 0, -1):
        # Chance that fewer than `rank` values lie on one side of the median.
        tail = sum(comb(count, below) for below in range(rank)) / 2**count
        if 1 - 2 * tail >= CONFIDENCE:
            return ordered[rank - 1], ordered[count - rank]
    raise ValueError(f"there are {count} values, but there must be at least 6")


def p50s(checkout: Path, arguments: Sequence[str]) -> dict[Key, float]:
    """Runs the benchmark of a checkout: p50 in us of each way."""
    paths = (str(checkout / name) for name in ("client", "server", ".metadata"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.service", "--out", folder, *arguments]
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
        (written,) = Path(folder).glob("*.json")
        rows = json.loads(written.read_text())["rows"]
    return {(row["tokens"], row["way"]): row["p50_us"] for row in rows if row["way"] in WAYS}


def table_of(before: list[dict[Key, float]], after: list[dict[Key, float]]) -> Table:
    """A row for each way."""
    table = Table(title=f"p50 of a call, {len(before)} pairs of runs")
    for column in ("tokens", "way", "before, us", "after, us", "ratio", "95 % interval"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for key in before[0]:
        ratios = [new[key] / old[key] for old, new in zip(before, after, strict=True)]
        low, high = median_interval(ratios)
        medians = (statistics.median(run[key] for run in runs) for runs in (before, after))
        cells = (*(f"{median:.0f}" for median in medians), f"{statistics.median(ratios):.3f}", f"{low:.3f}..{high:.3f}")
        table.add_row(str(key[0]), key[1], *cells)
    return table


def main() -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before_and_after", description=__doc__)
    parser.add_argument("before", type=Path, help="a checkout of the code before")
    parser.add_argument("--pairs", type=int, default=10, metavar="N", help="default: 10")
    options, arguments = parser.parse_known_args()
    console, before, after = Console(), [], []
    for pair in range(options.pairs):
        sides = [(options.before.resolve(), before), (ROOT, after)]
        for checkout, runs in sides if pair % 2 == 0 else reversed(sides):
            runs.append(p50s(checkout, arguments))
        console.print(f"pair {pair + 1} of {options.pairs}")
    console.print(table_of(before, after))
    return 0


if __name__ == "__main__":
    sys.exit(main())

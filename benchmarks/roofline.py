"""The roofline plot: operations by the byte against operations by the second, under the machine's ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.ceilings import Ceilings
from benchmarks.report import Row

# Cells under this share of the ceiling are named: those above crowd under the line, and there is nothing to find there.
_NAMED_BELOW = 0.8


def plot(path: Path, title: str, rows: Sequence[Row], roof: Ceilings) -> None:
    """Draws ours and the fastest peer of each row. Writes a PNG.

    Args:
        path: of the PNG.
        title: above the plot.
        rows: with `cell`, `operations`, `bytes`, `ours_us` and `best_peer_us`.
        roof: the lines above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    marks = {"ours_us": ("o", "#3b6ea8", "ours"), "best_peer_us": ("x", "#d8743f", "fastest peer")}
    for key, (marker, color, label) in marks.items():
        points = [
            (row["operations"] / row["bytes"], row["operations"] / row[key] / 1e6) for row in rows if row.get(key)
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, color=color, label=label, zorder=3)
    for row in rows:
        if row.get("ours_us"):
            intensity, tflops = row["operations"] / row["bytes"], row["operations"] / row["ours_us"] / 1e6
            if tflops < _NAMED_BELOW * roof.tflops(intensity):
                axes.annotate(row["cell"], (intensity, tflops), (5, -3), textcoords="offset points", fontsize=7)
    ridge = roof.matmul_tflops * 1e3 / roof.read_gbs
    intensities = [row["operations"] / row["bytes"] for row in rows]
    line = sorted({min([ridge, *intensities]) / 2, ridge, max([ridge, *intensities]) * 2})
    label = f"{roof.read_gbs:.0f} GB/s read, {roof.matmul_tflops:.3g} TFLOP/s matmul"
    axes.plot(line, [roof.tflops(x) for x in line], color="#555555", label=label)
    axes.set_xlabel("operations by the byte")
    axes.set_ylabel("TFLOP/s")
    axes.grid(which="both", linewidth=0.3)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.set_title(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)

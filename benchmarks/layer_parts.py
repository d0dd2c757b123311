"""Where a layer's time goes between a worker's GPU and a server's: each part alone, and all of them together.

`python -m benchmarks.layer_parts --help`. Both sides run in this process, from the product's own pieces: hand-over and
gates, store, and the attention of a fixed plan. All layers of a step are one CUDA graph on each side, and steps are
enqueued ahead, so that no host takes part. Output stays in memory of the server's GPU, or goes to the worker's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.kernel_runs import Notes, as_command, measure_all, write_wanted
from benchmarks.layer_cell import PARTS, make_layers
from benchmarks.worker_model import LLAMA_8B, TINY, ModelShape
from benchmarks.worker_options import READ_BYTES_PER_US, CellSize, add_common, cell_size, number, refuse_one_gpu

CELLS = [CellSize(1, 2048), CellSize(16, 2048), CellSize(64, 1024), CellSize(64, 2048)]
DRY_CELLS = [CellSize(1, 40), CellSize(3, 20)]
_UNTIMED = 2
"""Runs of a batch that do not count: the queue fills."""
COLUMNS = {
    "cell": "cell",
    "way": "way",
    "layer_us": "us",
    "least_us": "least",
    "floor_us": "floor us",
    "x_floor": "x floor",
}
CAPTION = """us: of a layer, the median of runs of all layers; least: of the fastest. floor: to read KV at 4.56 TB/s.
Rows with + have all that is in the row above, too."""


def measure(size: CellSize, options: argparse.Namespace, notes: Notes) -> dict[str, Any]:
    """Checks and times the parts of a cell: its rows, as `{"rows": [...]}`; none if something is wrong."""
    shape = TINY if options.dry_run else LLAMA_8B
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        try:
            layers = make_layers(size, shape, options.dry_run)
            stack.callback(layers.close)
            runs = {part.name: layers.prepare(part) for part in PARTS}
            layers.refuse_wrong(runs)
            samples: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(options.rounds):
                for name, (server, worker) in runs.items():
                    samples[name] += layers.sides.times_us(server, worker, _UNTIMED + options.runs)[_UNTIMED:]
            rows = rows_of(size, shape, samples)
        except Exception as reason:  # the other cells are worth having all the same
            notes.add("ours", reason, str(size))
    return {"rows": rows}


def rows_of(size: CellSize, shape: ModelShape, samples: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The table's rows of a cell, from microseconds of all layers."""
    num_reqs, context_len = size
    kv_bytes = 2 * num_reqs * context_len * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
    floor_us = kv_bytes / READ_BYTES_PER_US
    rows = []
    for part in PARTS:
        times = [each / shape.num_layers for each in samples[part.name]]
        us = statistics.median(times)
        rows.append(
            {
                "cell": str(size),
                "way": part.name,
                "layer_us": us,
                "least_us": min(times),
                "floor_us": floor_us if part.attends else None,
                "x_floor": us / floor_us if part.attends else None,
                "runs": len(times),
            }
        )
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_parts", description=description)
    about = "requests x context; default: 1x2k 16x2k 64x1k 64x2k"
    parser.add_argument("--cells", type=cell_size, nargs="+", metavar="BxC", help=about)
    parser.add_argument("--runs", type=number, default=12, metavar="N", help="of each part in a round; default: 12")
    add_common(parser)
    options = parser.parse_args(arguments)
    refuse_one_gpu(parser, options.dry_run)
    options.cells = options.cells or (DRY_CELLS if options.dry_run else CELLS)
    return options


def draw(path: Path, title: str, rows: Sequence[report.Row]) -> None:
    """The parts with attention beside the floor."""
    panels: dict[str, list[report.Bar]] = {}
    for row in rows:
        if row["floor_us"]:
            name = row["way"].replace("attention", "").replace(", ", "\n")
            panels.setdefault(row["cell"], []).append(report.Bar(name, row["layer_us"], {"reading": row["floor_us"]}))
    report.plot(path, title, "us of a layer", panels)


@torch.inference_mode()
def run(options: argparse.Namespace, out: Console, err: Console) -> int:
    """Times, prints and writes. Returns the exit code."""
    notes, device = Notes(), torch.device("cpu" if options.dry_run else "cuda")
    cells, stopped = measure_all(options.cells, str, partial(measure, options=options, notes=notes), device, err)
    rows = [row for cell in cells for row in cell["rows"]]
    shape = TINY if options.dry_run else LLAMA_8B
    kind = f"{shape.num_heads}/{shape.num_kv_heads} heads x {shape.head_dim}, {str(shape.dtype).removeprefix('torch.')}"
    title = f"layer_parts: {kind}, {'CPU, a dry run' if options.dry_run else torch.cuda.get_device_name(0)}"
    if rows:
        out.print(report.table(title, CAPTION, rows, COLUMNS))
        parameters = {"runs": options.runs, "rounds": options.rounds, "dry_run": options.dry_run}
        parameters |= {"notes": notes.lines()}
        write_wanted(options, "layer_parts", parameters, rows, err, lambda path: draw(path, title, rows))
    for line in notes.lines():
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    return 130 if stopped else 1 if notes.ours_failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 if something computes something else."""
    return as_command(lambda out, err: run(parse(arguments), out, err))


if __name__ == "__main__":
    sys.exit(main())

"""Windowed decode whose pages before the window were given back, beside the same with all its pages.

`python -m benchmarks.windows --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from attnd_server.attention.backends.window import first_visible_pages
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import AttentionMetadata
from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.service.validation.page_tables import checked_page_tables
from benchmarks import ceilings, report
from benchmarks.decode import decode
from benchmarks.graph_timing import Layers, time_together
from benchmarks.kernel_cases import Case, K
from benchmarks.kernel_runs import (
    Notes,
    as_command,
    base_parser,
    chosen,
    measure_all,
    parse_base,
    release,
    run_parameters,
    show,
    write_wanted,
)
from benchmarks.kernel_tensors import draw

WINDOW = 1024
CELLS = [decode(num_reqs, context * K) for num_reqs, context in ((1, 8), (8, 8), (64, 8), (8, 32), (64, 32))]
QUICK = ("1 x 8k", "64 x 8k")
COLUMNS = {
    "cell": "requests x context",
    "all_us": "all pages us",
    "freed_us": "freed us",
    "ratio": "ratio",
    "absent_us": "absent us",
    "absent_ratio": "ratio",
}
CAPTION = (
    "us: microseconds of a layer, median of turns. freed: pages before the window are -1, in a step with that window. "
    "absent: the same in a step that does not, so that the kernels must look."
)


def freed(case: Case, window: int, config: AttentionConfig) -> tuple[AttentionMetadata, AttentionMetadata]:
    """The step without the pages before its window: after the server's check, and as it comes."""
    metadata = case.metadata()
    first_pages = first_visible_pages(metadata.context_lens, window, case.page_size)
    hidden = torch.arange(metadata.page_tables.shape[1]) < first_pages[:, None]
    tables = metadata.page_tables.masked_fill(hidden, -1)
    checked = checked_page_tables(tables.numpy(), metadata.context_lens.numpy(), window, config)
    return (
        replace(metadata, page_tables=torch.from_numpy(checked), window=window),
        replace(metadata, page_tables=tables),
    )


def measure(case: Case, window: int, seconds: float, notes: Notes, device: torch.device) -> dict[str, Any]:
    """Checks and times a cell. All three must give the same bits, or what is freed is read."""
    ops, data = TritonAttentionOps(device), draw(case, device)
    options, config = replace(case.options(), window=window), data.config(case)
    checked, absent = freed(case, window, config)
    ready: dict[str, Layers] = {}
    expected: torch.Tensor | None = None
    for name, metadata in (("all", case.metadata()), ("freed", checked), ("absent", absent)):
        plan = ops.plan(config, metadata, options)

        def call(layer: int, plan: Any = plan) -> torch.Tensor:
            output: torch.Tensor = plan.run(data.q, data.k, data.v, data.layers[layer])[0]
            return output

        try:
            layers = Layers(call, len(data.layers), device)
            layers.replay()
            output = layers.outputs[0].clone()
            if expected is None:
                expected = output
            report.refuse_wrong(f"{name} in {case.name}", output, expected)
            ready[name] = layers
        except report.WrongResult as reason:
            notes.add(name, reason, case.name)
    times_us = time_together(ready, seconds, device)
    all_us, freed_us, absent_us = (times_us.get(name) for name in ("all", "freed", "absent"))
    return {
        "cell": case.name,
        "all_us": all_us,
        "freed_us": freed_us,
        "ratio": freed_us / all_us if freed_us and all_us else None,
        "absent_us": absent_us,
        "absent_ratio": absent_us / all_us if absent_us and all_us else None,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = base_parser("windows", "Windowed decode without the pages that its window hides, and with them.")
    parser.add_argument("--window", type=int, default=WINDOW, metavar="N", help=f"tokens; default: {WINDOW}")
    for name in ("--peers", "--plot"):
        parser.add_argument(name, metavar="PATH", help="of the other kernels' benchmarks; nothing here")
    options = parse_base(parser, arguments)
    cells = [case for case in CELLS if not options.quick or case.name in QUICK]
    options.cells = chosen(parser, {case.name: case for case in cells}, options.only)
    return options


@torch.inference_mode()
def run(options: argparse.Namespace, out: Console, err: Console) -> int:
    """Times, prints and writes. Returns the exit code."""
    device, notes, window = options.device, Notes(), options.window
    cells = options.cells
    if device.type == "cpu":
        cells, window = [case.small() for case in cells], max(1, window // 64)
    roof = ceilings.measure(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    release(device)
    rows, stopped = measure_all(
        cells, lambda case: case.name, lambda case: measure(case, window, options.seconds, notes, device), device, err
    )
    case = cells[0]
    title = f"windows: {window} tokens, {case.num_heads}/{case.num_kv_heads} heads x {case.head_dim}, {device.type}"
    show(out, report.table(title, f"{CAPTION}\n{roof}", rows, COLUMNS), notes)
    if stopped:
        err.print("stopped")
        return 130
    write_wanted(options, "windows", run_parameters(options, roof, notes), rows, err)
    return 1 if notes.lines() else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 if a cell is empty."""
    return as_command(lambda out, err: run(parse(arguments), out, err))


if __name__ == "__main__":
    sys.exit(main())

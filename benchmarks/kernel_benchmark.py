"""What the benchmarks of attention kernels share: a cell's checks and times, and the table.

In each cell ours and the peers compute the same tensors. What gives a wrong result is not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.kv_split import KVSplitConfig
from benchmarks import ceilings, report, roofline
from benchmarks.dense_peers import dense_peers
from benchmarks.exactness import Expected, expected
from benchmarks.graph_timing import Layers, time_together
from benchmarks.kernel_cases import CPU_DIVISOR, Case
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
from benchmarks.kernel_tensors import Tensors, draw
from benchmarks.peers import FlashAttention3, Ours, Way

INVARIANCE = {"auto": None, "yes": True, "no": False}
CAPTION = (
    "us: microseconds of a layer, median. ratio: ours to the fastest peer. share: of the machine's best, in reading or "
    "in multiplying, whichever is the limit. plan: host time of our plan, once per step."
)


@dataclass(frozen=True)
class Benchmark:
    """One of them.

    Attributes:
        name: of its module.
        description: a line for people.
        cells: what it times.
        quick: names of the cells of --quick.
        unit: of its rates, "GB/s" or "TFLOP/s".
        dense: whether peers that know no pages can take part.
    """

    name: str
    description: str
    cells: Sequence[Case]
    quick: Sequence[str]
    unit: str = "GB/s"
    dense: bool = False


def prepare(
    way: Way, case: Case, tensors: Tensors, reference: Callable[[int, bool], Expected], device: torch.device
) -> tuple[Layers, float, float | None]:
    """Captures a way's layers and checks what their replay gives.

    Returns:
        The layers, the largest relative error, and the host time of the plan in microseconds if it is known.

    Raises:
        WrongResult: they give something else.
    """
    prepared = way.prepare(case, tensors)
    layers = Layers(prepared.call, len(tensors.layers), device)
    for output in layers.outputs.values():
        output.fill_(torch.nan)
    layers.replay()
    error = max(
        reference(layer, prepared.scaled).check(
            f"output of layer {layer}", prepared.rows(output), prepared.limit, prepared.row_limit
        )
        for layer, output in layers.outputs.items()
    )
    return layers, error, prepared.plan_us


def measure(
    case: Case, ways: Sequence[Way], roof: ceilings.Ceilings, seconds: float, notes: Notes, device: torch.device
) -> dict[str, Any]:
    """Checks and times a cell: a row of the report."""
    tensors = draw(case, device)
    references: dict[tuple[int, bool], Expected] = {}

    def reference(layer: int, scaled: bool) -> Expected:
        key = layer, scaled or not case.kv_dtype
        if key not in references:
            references[key] = expected(case, tensors, layer, scaled=scaled)
        return references[key]

    ready: dict[str, Layers] = {}
    errors: dict[str, float] = {}
    plan_us = None
    for way in ways:
        try:
            ready[way.name], errors[way.name], way_plan_us = prepare(way, case, tensors, reference, device)
            plan_us = way_plan_us if way_plan_us is not None else plan_us
        except Exception as reason:  # a peer may fail in any way, and the other cells are worth having all the same
            notes.add(way.name, reason, str(case))
    times_us = time_together(ready, seconds, device)
    return row(case, ways, times_us, errors, roof, plan_us)


def row(
    case: Case,
    ways: Sequence[Way],
    times_us: dict[str, float],
    errors: dict[str, float],
    roof: ceilings.Ceilings,
    plan_us: float | None,
) -> dict[str, Any]:
    """The report's row of a cell."""
    ours_us = times_us.get(Ours.name)
    best_peer_us = min(
        (times_us[way.name] for way in ways if way.name in times_us and way.name != Ours.name), default=None
    )
    return {
        "group": case.group,
        "cell": case.name,
        **{f"{way.name}_us": times_us.get(way.name) for way in ways},
        "best_peer_us": best_peer_us,
        "ratio": ours_us / best_peer_us if ours_us and best_peer_us else None,
        "gb_per_s": case.num_bytes / ours_us / 1e3 if ours_us else None,
        "tflops": case.operations / ours_us / 1e6 if ours_us else None,
        "share": roof.floor_us(case.operations, case.num_bytes) / ours_us if ours_us else None,
        "plan_us": plan_us,
        "operations": case.operations,
        "bytes": case.num_bytes,
        "relative_errors": {name: f"{error:.2g}" for name, error in errors.items()},
    }


def parse(benchmark: Benchmark, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = base_parser(benchmark.name, benchmark.description)
    backends = [backend.value for backend in AttentionBackend]
    parser.add_argument("--backend", choices=backends, help="ours; default: triton_grouped, on a CPU naive")
    parser.add_argument("--heads", type=_heads, default=(32, 8), metavar="Q/KV", help="default: 32/8")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="where a module fa3 lies; see README.md")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the roofline, a PNG in this file, or folder")
    about = "whether our output bits never depend on the batch; default: for one new token a request"
    parser.add_argument("--batch-invariant", choices=list(INVARIANCE), default="auto", help=about)
    options = parse_base(parser, arguments)
    if options.peers is not None and not options.peers.is_dir():
        parser.error(f"argument --peers: is {options.peers}, but must be a folder")
    default = AttentionBackend.TRITON_GROUPED if options.device.type == "cuda" else AttentionBackend.NAIVE
    options.backend = AttentionBackend(options.backend) if options.backend else default
    num_heads, num_kv_heads = options.heads
    cells = [replace(case, num_heads=num_heads, num_kv_heads=num_kv_heads) for case in benchmark.cells]
    if options.quick:
        cells = [case for case in cells if case.name in benchmark.quick]
    options.cells = chosen(parser, {str(case): case for case in cells}, options.only)
    if options.device.type == "cpu":
        options.cells = [case.small() for case in options.cells]
    return options


def _heads(text: str) -> tuple[int, int]:
    try:
        num_heads, num_kv_heads = map(int, text.split("/"))
        if num_kv_heads > 0 and num_heads > 0 and num_heads % num_kv_heads == 0:
            return num_heads, num_kv_heads
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"is {text!r}, but must be query heads/KV heads, such as 64/8")


def columns(ways: Sequence[Way], unit: str) -> dict[str, str]:
    """Keys of the columns that people see, with headings."""
    rate = {"GB/s": "gb_per_s", "TFLOP/s": "tflops"}[unit]
    times = {f"{way.name}_us": f"{way.name} us" for way in ways}
    return {"group": "", "cell": "cell", **times, "ratio": "ratio", rate: unit, "share": "share", "plan_us": "plan us"}


@torch.inference_mode()
def run(benchmark: Benchmark, options: argparse.Namespace, out: Console, err: Console) -> int:
    """Times, prints and writes. Returns the exit code."""
    device, notes = options.device, Notes()
    kv_split = KVSplitConfig(batch_invariant=INVARIANCE[options.batch_invariant])
    ways: list[Way] = [Ours(options.backend, device, kv_split), FlashAttention3(options.peers, device)]
    if benchmark.dense:
        ways += dense_peers(compiled=not options.quick and device.type == "cuda")
    roof = ceilings.measure(device, options.cells[0].dtype)
    release(device)
    rows, stopped = measure_all(
        options.cells, str, lambda case: measure(case, ways, roof, options.seconds, notes, device), device, err
    )
    title = title_of(benchmark, options)
    absent = {f"{name}_us": "not found" for name in notes.not_found}
    filled = [{**row, **{key: text for key, text in absent.items() if row[key] is None}} for row in rows]
    show(out, report.table(title, f"{CAPTION}\n{roof}", filled, columns(ways, benchmark.unit)), notes)
    if stopped:
        err.print("stopped")
        return 130
    write(benchmark.name, title, options, rows, roof, notes, err)
    return 1 if notes.ours_failed else 0


def title_of(benchmark: Benchmark, options: argparse.Namespace) -> str:
    """Above the table."""
    case, heads = options.cells[0], "/".join(map(str, options.heads))
    kind = f"{str(case.dtype).removeprefix('torch.')}, {heads} heads x {case.head_dim}, {options.backend.value}"
    if options.device.type == "cpu":
        return f"{benchmark.name}: {kind}, CPU, every length / {CPU_DIVISOR}"
    return f"{benchmark.name}: {kind}, {torch.cuda.get_device_name(options.device)}"


def write(
    name: str,
    title: str,
    options: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    roof: ceilings.Ceilings,
    notes: Notes,
    err: Console,
) -> None:
    """JSON and plot, if they are asked for."""
    parameters = {
        "backend": options.backend.value,
        "heads": "/".join(map(str, options.heads)),
        "batch_invariant": options.batch_invariant,
        **run_parameters(options, roof, notes),
    }
    write_wanted(options, name, parameters, rows, err, lambda path: roofline.plot(path, title, rows, roof))


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 if ours failed in a cell."""
    return as_command(lambda out, err: run(benchmark, parse(benchmark, arguments), out, err))

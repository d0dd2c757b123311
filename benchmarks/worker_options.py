"""The command line of `benchmarks.worker`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from attnd.protocol.cuda.driver import device
from benchmarks.kernel_cases import short
from benchmarks.worker_sessions import Load
from benchmarks.worker_ways import WAYS

DESCRIPTION = (
    "Whole workers: decode steps of an 8B model with attention from a server on another GPU, and with its own."
)
READ_BYTES_PER_US = 4.56e6
"""What an H200 reads of its memory, measured."""
TABLES = ("worker", "sessions", "halves", "all")


class CellSize(NamedTuple):
    """Requests, and tokens of the context of each."""

    num_reqs: int
    context_len: int

    def __str__(self) -> str:
        return f"{self.num_reqs} x {short(self.context_len)}"


CELLS = [CellSize(1, 2048), CellSize(16, 2048), CellSize(64, 1024)]
HALVES = [CellSize(64, 1024), CellSize(64, 8192)]
LOADS = [Load(1, 64), Load(1, 4), Load(4, 4), Load(8, 4), Load(16, 4)]
SESSION_CONTEXT = 2048
DRY_CELLS, DRY_LOADS, DRY_CONTEXT = [CellSize(1, 40), CellSize(3, 20)], [Load(1, 3), Load(2, 1)], 20


def add_common(parser: argparse.ArgumentParser) -> None:
    """The arguments that the benchmarks of a worker have in common."""
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU: shows that it works, and no speed")
    parser.add_argument("--rounds", type=number, default=3, metavar="N", help="in which all take turns; default: 3")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all rows to this file, or folder")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw them, a PNG in this file, or folder")


def refuse_one_gpu(parser: argparse.ArgumentParser, dry_run: bool) -> None:
    """Ends the process where there are no two GPUs for a run that needs them."""
    count = torch.cuda.device_count()
    if not dry_run and count < 2:
        parser.error(f"torch finds {count} GPUs, but there must be two, or --dry-run: the server's is not the worker's")


def _refuse_turns(parser: argparse.ArgumentParser) -> None:
    """Ends the process where two processes take turns on a GPU."""
    if not torch.cuda.is_available() or not device(0).has_mps:
        parser.error("argument --one-gpu: needs a GPU and CUDA's MPS: nvidia-cuda-mps-control -d, before this starts")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses, checks and fills in. Ends the process after an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=DESCRIPTION)
    parser.add_argument(
        "--table", choices=TABLES, default="worker", help="what to measure, all but halves; default: worker"
    )
    about = "requests x context of a worker's cells; default: 1x2k 16x2k 64x1k"
    parser.add_argument("--cells", type=cell_size, nargs="+", metavar="BxC", help=about)
    about = "sessions x requests of the table sessions; default: 1x64 1x4 4x4 8x4 16x4"
    parser.add_argument("--sessions", type=_load, nargs="+", metavar="SxB", help=about)
    about = f"of: {' '.join(WAYS)}; default: all"
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), metavar="WAY", help=about)
    parser.add_argument("--steps", type=number, default=60, metavar="N", help="timed in each round; default: 60")
    parser.add_argument("--warm-up", type=number, default=8, metavar="N", help="steps before these; default: 8")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="where a module fa3 lies, for the way local")
    about = "caches with KVSplit(batch_invariant=False): as FlashAttention-3 cuts, bits depend on what shares the batch"
    parser.add_argument("--cut-by-batch", action="store_true", help=about)
    parser.add_argument("--kv-gib", type=number, default=48, metavar="G", help="the server's --kv-bytes; default: 48")
    about = "worker and server share the first GPU, under CUDA's Multi-Process Service"
    parser.add_argument("--one-gpu", action="store_true", help=about)
    add_common(parser)
    options = parser.parse_args(arguments)
    if options.one_gpu:
        _refuse_turns(parser)
    else:
        refuse_one_gpu(parser, options.dry_run)
    options.ways = [name for name in WAYS if options.ways is None or name in options.ways]
    default = HALVES if options.table == "halves" else CELLS
    options.cells = options.cells or (DRY_CELLS if options.dry_run else default)
    options.sessions = options.sessions or (DRY_LOADS if options.dry_run else LOADS)
    options.session_context = DRY_CONTEXT if options.dry_run else SESSION_CONTEXT
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.steps < 2:
        parser.error(f"argument --steps: is {options.steps}, but must be at least 2")
    if options.warm_up < 4 and not options.dry_run:
        rule = "must be at least 4, in which the server captures the shapes of steps"
        parser.error(f"argument --warm-up: is {options.warm_up}, but {rule}")
    if options.peers is not None and not options.peers.is_dir():
        parser.error(f"argument --peers: is {options.peers}, but must be a folder")
    if options.table == "halves" and (options.dry_run or any(size.num_reqs % 2 for size in options.cells)):
        parser.error("argument --table: is halves, for which there must be two GPUs, and an even number of requests")
    if options.peers is None and not options.dry_run and options.table != "sessions" and "local" in options.ways:
        parser.error("argument --peers: is not given, but must be a folder with a module fa3 for the way local")


def number(text: str) -> int:
    """A whole number from 1."""
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"is {text!r}, but must be a whole number from 1")


def cell_size(text: str) -> CellSize:
    """Such as 16x2k."""
    num_reqs, by, context = text.partition("x")
    digits, factor = (context[:-1], 1024) if context.endswith("k") else (context, 1)
    if by and num_reqs.isdecimal() and digits.isdecimal() and int(num_reqs) and int(digits):
        return CellSize(int(num_reqs), int(digits) * factor)
    raise argparse.ArgumentTypeError(f"is {text!r}, but must be requests x context, such as 16x2k")


def _load(text: str) -> Load:
    num_sessions, by, num_reqs = text.partition("x")
    if by and num_sessions.isdecimal() and num_reqs.isdecimal() and int(num_sessions) and int(num_reqs):
        return Load(int(num_sessions), int(num_reqs))
    raise argparse.ArgumentTypeError(f"is {text!r}, but must be sessions x requests, such as 16x4")

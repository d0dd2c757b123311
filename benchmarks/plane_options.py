"""The command line of `benchmarks.planes`: which cells are measured, where, and for how long."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.kernel_runs import chosen
from benchmarks.ways import PLANES
from benchmarks.workload import LLAMA_8B, MODELS, Heads

DESCRIPTION = (
    "Every plane beside attention in the same process and the bare floor of its transport; many clients beside one."
)


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planes", description=DESCRIPTION)
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
    parser.add_argument("--threads", type=_number, metavar="N", help="on a CPU; default: torch's, beside a GPU 1")
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
    options.threads = options.threads or (torch.get_num_threads() if options.device == "cpu" else 1)
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

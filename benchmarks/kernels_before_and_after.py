"""The attention kernels of two checkouts on the same tensors, taking turns: is the second one slower, or another?

`python -m benchmarks.kernels_before_and_after CHECKOUT`. Each cell is captured as a CUDA graph of both checkouts, whose
replays take turns. The table has the time of a layer, the ratio of the two, and whether their outputs have the same
bits.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.graph_timing import Layers, time_together
from benchmarks.kernel_runs import release
from benchmarks.report import ROOT, write_json

K, FP8 = 1024, torch.float8_e4m3fn
_COLD_BYTES = 512 << 20


@dataclass(frozen=True)
class Cell:
    """A step of requests alike, over pages in random order."""

    name: str
    num_reqs: int
    context_len: int
    query_len: int = 1
    block_size: int = 1
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    layout: str = "unified"
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.num_reqs} x {self.context_len}"

    @property
    def pages_of_a_request(self) -> int:
        """Pages with room for context and new tokens."""
        return -(-(self.context_len + self.query_len) // self.page_size)

    @property
    def num_layers(self) -> int:
        """So many that no KV is still in the L2 cache when its layer comes again."""
        dtype = self.kv_dtype or self.dtype
        layer = 2 * self.num_reqs * self.context_len * self.num_kv_heads * self.head_dim * dtype.itemsize
        return max(2, min(64, math.ceil(_COLD_BYTES / max(1, layer))))


GRID = {1: (1, 8, 32, 128), 8: (1, 8, 32, 128), 64: (1, 8, 32), 256: (1, 8)}
DECODE = [Cell("decode", num_reqs, length * K) for num_reqs, lengths in GRID.items() for length in lengths]
BLOCKS = [
    Cell("block of 32", num_reqs, length * K, query_len=32, block_size=32)
    for num_reqs in (1, 8, 32)
    for length in (2, 8)
]
FP8_CELLS = [Cell("fp8 decode", num_reqs, 8 * K, kv_dtype=FP8) for num_reqs in (1, 8, 64)]
PLAIN = [Cell("pages of 8", num_reqs, 8 * K, page_size=8) for num_reqs in (1, 8, 64)]
PLAIN += [
    Cell("distinct", 8, 8 * K, layout="distinct"),
    Cell("float32", 8, 8 * K, dtype=torch.float32),
    Cell("pages of 8, 32 new", 8, 2 * K, query_len=32, block_size=32, page_size=8),
    Cell("pages of 8, prefill", 2, 2 * K, query_len=1024, page_size=8),
]
MORE = [
    Cell("decode, pages of 64", 8, 8 * K, page_size=64),
    Cell("decode, pages of 48", 8, 8 * K, page_size=48),
    Cell("decode, window 1000", 8, 8 * K, options={"window": 1000}),
    Cell("decode, sinks, lse", 8, 8 * K, options={"sinks": True, "return_lse": True}),
    Cell("decode, softcap", 8, 8 * K, options={"softcap": 30.0}),
    Cell("decode, 28/4 heads", 8, 8 * K, num_heads=28, num_kv_heads=4),
    Cell("prefill", 2, 0, query_len=8 * K),
    Cell("prefill, window", 2, 0, query_len=8 * K, options={"window": 1000}),
    Cell("prefill d64", 2, 0, query_len=4 * K, head_dim=64),
]
CELLS = [*DECODE, *BLOCKS, *FP8_CELLS, *PLAIN, *MORE]


class Side:
    """A checkout, whose modules are those of this process while it is used."""

    def __init__(self, path: Path) -> None:
        self._paths = [str(path / name) for name in ("client", "server")]
        self._modules: dict[str, ModuleType] = {}

    @contextmanager
    def used(self) -> Iterator[Callable[[str], Any]]:
        """Gives what imports a module of the checkout's server."""
        others = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
        sys.modules.update(self._modules)
        sys.path[:0] = self._paths
        try:
            yield lambda name: import_module(f"attnd_server.{name}")
        finally:
            del sys.path[: len(self._paths)]
            self._modules = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
            sys.modules.update(others)


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] in ("attnd", "attnd_server")


@dataclass(frozen=True, eq=False)
class Data:
    """Random tensors of a cell."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_pages: list[torch.Tensor]
    v_pages: list[torch.Tensor]
    scales: torch.Tensor | None
    page_tables: torch.Tensor


def draw(cell: Cell, device: torch.device) -> Data:
    """Fresh tensors, with a page set for each layer."""
    num_pages = cell.num_reqs * cell.pages_of_a_request
    tokens = cell.num_reqs * cell.query_len
    heads, dim, size = cell.num_kv_heads, cell.head_dim, cell.page_size
    unified = (num_pages, size, heads, dim)
    k_shape = unified if cell.layout == "unified" else (num_pages, heads, dim // 8, size, 8)
    v_shape = unified if cell.layout == "unified" else (num_pages, heads, dim, size)

    def random(*shape: int, dtype: torch.dtype = cell.dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16 if dtype is FP8 else dtype).to(dtype)

    pages_dtype = cell.kv_dtype or cell.dtype
    return Data(
        random(tokens, cell.num_heads, dim),
        random(tokens, heads, dim),
        random(tokens, heads, dim),
        [random(*k_shape, dtype=pages_dtype) for _ in range(cell.num_layers)],
        [random(*v_shape, dtype=pages_dtype) for _ in range(cell.num_layers)],
        0.5 + torch.rand(heads, device=device) if cell.kv_dtype else None,
        torch.randperm(num_pages, dtype=torch.int32).view(cell.num_reqs, -1),
    )


def captured(load: Callable[[str], Any], cell: Cell, data: Data, device: torch.device) -> Layers:
    """The layers of a cell as a checkout computes them: by its fixed plan if it has one, else by its plan."""
    config_module, metadata_module = load("attention.config"), load("attention.metadata")
    pages_module, base = load("attention.layer_pages"), load("attention.backends.base")
    scales = () if data.scales is None else tuple(data.scales.tolist())
    config = config_module.AttentionConfig(
        len(data.k_pages), cell.num_kv_heads, cell.head_dim, len(data.k_pages[0]), cell.page_size, dtype=cell.dtype,
        layout=config_module.Layout(cell.layout),
        **({"kv_dtype": cell.kv_dtype, "k_scales": scales, "v_scales": scales} if scales else {}),
    )  # fmt: skip
    zeros = torch.zeros(cell.num_reqs, dtype=torch.int64)
    metadata = metadata_module.AttentionMetadata(
        is_decode=cell.context_len > 0 and cell.query_len <= 256,
        num_tokens=len(data.q),
        cu_seqlens_q=torch.arange(cell.num_reqs + 1) * cell.query_len,
        context_lens=zeros + cell.context_len,
        page_tables=data.page_tables,
        slot_mapping=None,
        valid_lens=zeros + cell.query_len,
        block_sizes=zeros + cell.block_size,
        prefix_lens=zeros,
        padded_prefix_lens=zeros,
        hole_starts=zeros,
        hole_ends=zeros,
    )
    given = dict(cell.options)
    if given.pop("sinks", False):
        given["sinks"] = torch.linspace(-1, 1, cell.num_heads)
    backend = config_module.AttentionBackend.TRITON_GROUPED
    options = metadata_module.AttentionOptions(
        num_heads=cell.num_heads, scale=cell.head_dim**-0.5, backend=backend, **given
    )
    kernel = load("attention.backends.triton.attention").TritonPagedAttention(backend)
    outputs = [torch.full_like(data.q, torch.nan) for _ in range(2)]
    lse = torch.empty(data.q.shape[:2], device=device) if options.return_lse else None
    plan: Any = None
    if metadata.is_decode:
        shape = base.DecodeShape(cell.num_reqs, cell.query_len, cell.context_len)
        plan = kernel.fixed_plan(config, shape, options, device)
    if plan is None or isinstance(plan, str):
        plan = kernel.plan(config, metadata, options, device)
    else:
        plan.update(metadata)

    def call(layer: int) -> torch.Tensor:
        output = outputs[min(layer, 1)]
        pages = pages_module.LayerPages(data.k_pages[layer], data.v_pages[layer], data.scales, data.scales)
        plan.launch(output, lse, data.q, data.k, data.v, pages)
        return output

    return Layers(call, len(data.k_pages), device)


def measure(cell: Cell, sides: dict[str, Side], seconds: float, device: torch.device) -> dict[str, Any]:
    """A row of the table."""
    data = draw(cell, device)
    ways = {}
    for name, side in sides.items():
        with side.used() as load:
            ways[name] = captured(load, cell, data, device)
    for way in ways.values():
        way.replay()
    differences = [
        float((before.double() - after.double()).norm() / before.double().norm())
        for before, after in zip(*(way.outputs.values() for way in ways.values()), strict=True)
    ]
    times = time_together(ways, seconds, device)
    ratio = times["after"] / times["before"]
    return {
        "cell": str(cell),
        "before_us": times["before"],
        "after_us": times["after"],
        "ratio": ratio,
        "difference": max(differences),
    }


@torch.inference_mode()
def main() -> int:
    """The command line. Returns the exit code: 1 if outputs differ by more than rounding."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels_before_and_after", description=__doc__)
    parser.add_argument("before", type=Path, help="a checkout of the code before")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells that have TEXT in their name")
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="of timing for each cell; default: 0.5")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all rows to this file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cells = CELLS if device.type == "cuda" else [_small(cell) for cell in CELLS if cell.dtype is torch.float32]
    sides = {"before": Side(options.before.resolve()), "after": Side(ROOT)}
    table = Table(title="a layer's attention, before and after")
    for column in ("cell", "before, us", "after, us", "ratio", "difference"):
        table.add_column(column, justify="left" if column == "cell" else "right")
    rows, console = [], Console(width=None if sys.stdout.isatty() else 120)
    for cell in cells:
        if options.only not in str(cell):
            continue
        row = measure(cell, sides, options.seconds, device)
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        difference = "same bits" if row["difference"] == 0 else f"{row['difference']:.1e}"
        times = f"{row['before_us']:.1f}", f"{row['after_us']:.1f}", f"{row['ratio']:.3f}"
        table.add_row(row["cell"], *times, difference)
        release(device)
    console.print(table)
    if options.json:
        write_json(options.json, "kernels_before_and_after", {"before": str(options.before)}, rows)
    return 0 if all(row["difference"] < 1e-3 for row in rows) else 1


def _small(cell: Cell) -> Cell:
    """For a processor, where it shows no speed."""
    return replace(cell, num_reqs=1, context_len=20, num_heads=2, num_kv_heads=1)


if __name__ == "__main__":
    sys.exit(main())

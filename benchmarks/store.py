"""Moves K and V of tokens into slots in random order, and out of them: ours, and torch's index_copy_ and index_select.

`python -m benchmarks.store --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console

from attnd_server.attention.backends.triton.attention import availability
from attnd_server.attention.config import Layout
from attnd_server.attention.layer_pages import LayerPages
from benchmarks import ceilings, report
from benchmarks.graph_timing import Layers, synchronize, time_together
from benchmarks.kernel_runs import (
    Notes,
    NotThere,
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
from benchmarks.kernel_tensors import as_slots, normal

NUM_TOKENS = (1, 64, 256, 2048, 16384)
QUICK = (64, 2048, 16384)
NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_LAYERS = 8, 128, 16, 8
NUM_SLOTS = 32768
"""Of a layer."""
COLUMNS = {
    "operation": "operation",
    "tokens": "tokens",
    "ours_us": "ours us",
    "torch_us": "torch us",
    "ratio": "ratio",
    "gb_per_s": "GB/s",
    "share": "share",
}
CAPTION = "us: microseconds of a layer, median. GB/s: bytes read and written. share: of a copy's bandwidth."
KV = tuple[torch.Tensor, torch.Tensor]
Way = Callable[[KV, KV, torch.Tensor], KV]
"""From pages, new tokens and slots, what is written: pages for `store`, tokens for `gather`."""


def ours_store(pages: KV, new: KV, slots: torch.Tensor) -> KV:
    refuse_without_triton(slots.device)
    from attnd_server.attention.kernels.store import store_kv

    store_kv(LayerPages(*pages), *new, slots, Layout.UNIFIED)
    return pages


def index_copy(pages: KV, new: KV, slots: torch.Tensor) -> KV:
    for each, tokens in zip(pages, new, strict=True):
        as_slots(each).index_copy_(0, slots, tokens)
    return pages


def ours_gather(pages: KV, new: KV, slots: torch.Tensor) -> KV:
    refuse_without_triton(slots.device)
    from attnd_server.attention.kernels.gather import read_kv

    return read_kv(LayerPages(*pages), slots, Layout.UNIFIED, pages[0].dtype)


def index_select(pages: KV, new: KV, slots: torch.Tensor) -> KV:
    k, v = (as_slots(each).index_select(0, slots) for each in pages)
    return k, v


def refuse_without_triton(device: torch.device) -> None:
    """Raises NotThere if Triton's kernels do not run on the device."""
    reason = availability(device)
    if reason is not None:
        raise NotThere(reason)


WAYS: dict[str, dict[str, Way]] = {
    "store": {"ours": ours_store, "index_copy": index_copy},
    "gather": {"ours": ours_gather, "index_select": index_select},
}
"""Ours and torch's way of each operation."""


class Cell(NamedTuple):
    """What a row times."""

    operation: str
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.operation} {self.num_tokens} tokens"


class Data:
    """K, V and pages of each layer, and the slots of all.

    Args:
        num_tokens: to move.
        dtype: of everything.
        device: where they lie.
    """

    def __init__(self, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots = torch.randperm(NUM_SLOTS)[:num_tokens].to(device)

        def pair(*shape: int) -> KV:
            k, v = (normal((*shape, NUM_KV_HEADS, HEAD_DIM), dtype, device) for _ in "kv")
            return k, v

        self.layers = [(pair(NUM_SLOTS // PAGE_SIZE, PAGE_SIZE), pair(num_tokens)) for _ in range(NUM_LAYERS)]

    def layers_of(self, way: Way, device: torch.device) -> tuple[Layers, dict[int, KV]]:
        """A way's layers, ready to be replayed, and what each writes then."""
        written: dict[int, KV] = {}

        def call(layer: int) -> torch.Tensor:
            written[layer] = way(*self.layers[layer], self.slots)
            return written[layer][0]

        return Layers(call, NUM_LAYERS, device), written

    def check(self, what: str, operation: str, layers: Layers, written: dict[int, KV]) -> None:
        """Replays over NaN. Raises WrongResult unless exactly these slots become the tokens, or the tokens they."""
        expected = []
        for index, (pages, new) in enumerate(self.layers):
            for each, tokens, target in zip(pages, new, written[index], strict=True):
                if operation == "store":
                    expected.append(as_slots(each).index_copy(0, self.slots, tokens).view_as(each))
                    as_slots(each).index_fill_(0, self.slots, torch.nan)
                else:
                    expected.append(as_slots(each)[self.slots])
                    target.fill_(torch.nan)
        layers.replay()
        found = [each for layer in range(NUM_LAYERS) for each in written[layer]]
        for index, (have, want) in enumerate(zip(found, expected, strict=True)):
            if not torch.equal(have, want):
                kind = "pages" if operation == "store" else "tokens"
                raise report.WrongResult(f"{what}: {'kv'[index % 2]} {kind} of layer {index // 2} hold something else")


def measure(cell: Cell, roof: ceilings.Ceilings, seconds: float, notes: Notes, device: torch.device) -> dict[str, Any]:
    """Checks and times a cell."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    data, ready = Data(cell.num_tokens, dtype, device), {}
    for name, way in WAYS[cell.operation].items():
        try:
            layers, written = data.layers_of(way, device)
            data.check(name, cell.operation, layers, written)
            ready[name] = layers
        except Exception as reason:  # the other cells are worth having all the same
            notes.add(name, reason, str(cell))
    synchronize(device)
    times_us = time_together(ready, seconds, device)
    ours_us, torch_us = (times_us.get(name) for name in WAYS[cell.operation])
    num_bytes = 4 * cell.num_tokens * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize  # K and V, read and written
    rate = num_bytes / ours_us / 1e3 if ours_us else None
    return {
        "operation": cell.operation,
        "tokens": cell.num_tokens,
        "ours_us": ours_us,
        "torch_us": torch_us,
        "ratio": ours_us / torch_us if ours_us and torch_us else None,
        "gb_per_s": rate,
        "share": rate and rate / roof.copy_gbs,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = base_parser("store", "K and V into slots and out of them: ours and torch's, by tokens.")
    for name in ("--peers", "--plot"):
        parser.add_argument(name, metavar="PATH", help="of the other kernels' benchmarks; nothing here")
    options = parse_base(parser, arguments)
    sizes = QUICK if options.quick else NUM_TOKENS
    cells = [Cell(operation, num_tokens) for operation in WAYS for num_tokens in sizes]
    options.cells = chosen(parser, {str(cell): cell for cell in cells}, options.only)
    return options


@torch.inference_mode()
def run(options: argparse.Namespace, out: Console, err: Console) -> int:
    """Times, prints and writes. Returns the exit code."""
    device, notes = options.device, Notes()
    roof = ceilings.measure(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    release(device)
    rows, stopped = measure_all(
        options.cells, str, lambda cell: measure(cell, roof, options.seconds, notes, device), device, err
    )
    title = f"store: {NUM_KV_HEADS} heads x {HEAD_DIM}, pages of {PAGE_SIZE}, {device.type}"
    show(out, report.table(title, f"{CAPTION}\n{roof}", rows, COLUMNS), notes)
    if stopped:
        err.print("stopped")
        return 130
    write_wanted(options, "store", run_parameters(options, roof, notes), rows, err)
    return 1 if notes.ours_failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 if ours failed in a cell."""
    return as_command(lambda out, err: run(parse(arguments), out, err))


if __name__ == "__main__":
    sys.exit(main())

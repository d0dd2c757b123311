"""Stores K and V of new tokens in slots in random order: ours, and torch's index_copy_.

`python -m benchmarks.store --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from attnd_server.backends.triton import availability
from attnd_server.config import Layout
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
    result_path,
    run_parameters,
    show,
)
from benchmarks.kernel_tensors import normal

NUM_TOKENS = (1, 64, 256, 2048, 16384)
QUICK = (64, 2048, 16384)
NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_LAYERS = 8, 128, 16, 8
NUM_SLOTS = 32768
"""Of a layer."""
COLUMNS = {
    "tokens": "tokens",
    "ours_us": "ours us",
    "index_copy_us": "index_copy_ us",
    "ratio": "ratio",
    "gb_per_s": "GB/s",
    "share": "share",
}
CAPTION = "us: microseconds of a layer, median. GB/s: bytes read and written. share: of a copy's bandwidth."
Store = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def ours(k_pages: torch.Tensor, v_pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    reason = availability(k.device)
    if reason is not None:
        raise NotThere(reason)
    from attnd_server.kernels.store import store_kv

    store_kv(k_pages, v_pages, k, v, slots, Layout.UNIFIED)


def index_copy(
    k_pages: torch.Tensor, v_pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor
) -> None:
    for pages, tokens in ((k_pages, k), (v_pages, v)):
        pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, tokens)


WAYS: dict[str, Store] = {"ours": ours, "index_copy": index_copy}


class Data:
    """K, V and pages of each layer, and the slots of all.

    Args:
        num_tokens: to store.
        dtype: of everything.
        device: where they lie.
    """

    def __init__(self, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots = torch.randperm(NUM_SLOTS)[:num_tokens].to(device)
        pages, tokens = (NUM_SLOTS // PAGE_SIZE, PAGE_SIZE), (num_tokens,)
        self.layers = [
            [normal((*shape, NUM_KV_HEADS, HEAD_DIM), dtype, device) for shape in (pages, pages, tokens, tokens)]
            for _ in range(NUM_LAYERS)
        ]

    def layers_of(self, store: Store, device: torch.device) -> Layers:
        """A way's layers, ready to be replayed."""

        def call(layer: int) -> torch.Tensor:
            store(*self.layers[layer], self.slots)
            return self.layers[layer][0]

        return Layers(call, NUM_LAYERS, device)

    def check(self, what: str, layers: Layers) -> None:
        """Replays over slots full of NaN. Raises WrongResult unless exactly these slots become the tokens."""
        expected = []
        for *pages, k, v in self.layers:
            for each, tokens in zip(pages, (k, v), strict=True):
                as_slots = each.view(-1, *each.shape[2:])
                expected.append(as_slots.index_copy(0, self.slots, tokens).view_as(each))
                as_slots.index_fill_(0, self.slots, torch.nan)
        layers.replay()
        stored = [each for *pages, _, _ in self.layers for each in pages]
        for index, (have, want) in enumerate(zip(stored, expected, strict=True)):
            if not torch.equal(have, want):
                raise report.WrongResult(f"{what}: {'kv'[index % 2]} pages of layer {index // 2} hold something else")


def measure(
    num_tokens: int, roof: ceilings.Ceilings, seconds: float, notes: Notes, device: torch.device
) -> dict[str, Any]:
    """Checks and times a cell."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    data, ready = Data(num_tokens, dtype, device), {}
    for name, store in WAYS.items():
        try:
            layers = data.layers_of(store, device)
            data.check(name, layers)
            ready[name] = layers
        except Exception as reason:  # the other cells are worth having all the same
            notes.add(name, reason, _name(num_tokens))
    synchronize(device)
    times_us = time_together(ready, seconds, device)
    ours_us, peer_us = times_us.get("ours"), times_us.get("index_copy")
    num_bytes = 4 * num_tokens * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize  # K and V, read and written
    rate = num_bytes / ours_us / 1e3 if ours_us else None
    return {
        "tokens": num_tokens,
        "ours_us": ours_us,
        "index_copy_us": peer_us,
        "ratio": ours_us / peer_us if ours_us and peer_us else None,
        "gb_per_s": rate,
        "share": rate and rate / roof.copy_gbs,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = base_parser("store", "Stores of K and V: ours and index_copy_, by tokens.")
    for name in ("--peers", "--plot"):
        parser.add_argument(name, metavar="PATH", help="of the other kernels' benchmarks; nothing here")
    options = parse_base(parser, arguments)
    sizes = QUICK if options.quick else NUM_TOKENS
    options.cells = chosen(parser, {_name(num_tokens): num_tokens for num_tokens in sizes}, options.only)
    return options


def _name(num_tokens: int) -> str:
    return f"{num_tokens} tokens"


@torch.inference_mode()
def run(options: argparse.Namespace, out: Console, err: Console) -> int:
    """Times, prints and writes. Returns the exit code."""
    device, notes = options.device, Notes()
    roof = ceilings.measure(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    release(device)
    rows, stopped = measure_all(
        options.cells, _name, lambda cell: measure(cell, roof, options.seconds, notes, device), device, err
    )
    title = f"store: {NUM_KV_HEADS} heads x {HEAD_DIM}, pages of {PAGE_SIZE}, {device.type}"
    show(out, report.table(title, f"{CAPTION}\n{roof}", rows, COLUMNS), notes)
    if stopped:
        err.print("stopped")
        return 130
    if options.json:
        path = result_path(options.json, "store", ".json")
        report.write_json(path, "store", run_parameters(options, roof, notes), rows)
        err.print(f"written: {path}", soft_wrap=True)
    return 1 if notes.ours_failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 if ours failed in a cell."""
    return as_command(lambda out, err: run(parse(arguments), out, err))


if __name__ == "__main__":
    sys.exit(main())

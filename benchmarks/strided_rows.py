"""Places q, k and v whose rows lie apart, as slices of one projection do, and dense ones: in a region, in a message.

`python -m benchmarks.strided_rows --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import argparse
import mmap
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from attnd.planes.shm.lanes import Lanes
from attnd.planes.shm.messages import ShmMessages
from attnd.protocol import requests
from attnd.protocol.regions import Region, aligned
from benchmarks import report

NUM_TOKENS = (1, 16, 64, 256, 1024)
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
DENSE, LOOSE, MADE_DENSE = "dense", "loose", "loose, made dense"
COLUMNS = {"tokens": "tokens", "plane": "plane", "way": "way", "p50_us": "p50", "p99_us": "p99", "ratio": "ratio"}
CAPTION = """Times in us, of making the request of a call. loose: slices of one projection. made dense: copied first.
ratio: p50 over that of dense rows."""
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Request = Callable[[Tensors], bytes]


class Places:
    """A shm plane's region, and the bytes of the last call there. No server is needed: none is told."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = mmap.mmap(-1, num_bytes)
        self._lanes = Lanes(num_bytes, HEAD_DIM)
        self._messages = ShmMessages(Region(1, self._memory), self._lanes)

    def request(self, tensors: Tensors) -> bytes:
        """Places tensors where those of the call before lay."""
        made = self._messages.call_request(1, 0, *tensors, requests.DEFAULT_OPTIONS)
        self._messages.sent()
        self._lanes.answered()
        return made

    def placed(self, tensors: Tensors) -> bytes:
        """What lies where the tensors of a call do."""
        self._memory[:] = bytes(len(self._memory))
        self.request(tensors)
        return self._memory[: sum(aligned(tensor.nbytes) for tensor in tensors)]


def message(tensors: Tensors) -> bytes:
    """The request of a call on the inline plane."""
    return requests.attend_call(1, 0, *tensors, requests.DEFAULT_OPTIONS)


def slices(num_tokens: int) -> Tensors:
    """Slices of one projection."""
    sizes = [heads * HEAD_DIM for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
    projection = torch.randn(num_tokens, sum(sizes)).bfloat16()
    q, k, v = (part.unflatten(1, (-1, HEAD_DIM)) for part in projection.split(sizes, 1))
    return q, k, v


def dense(tensors: Tensors) -> Tensors:
    """Copies whose rows lie one behind the other."""
    q, k, v = (tensor.contiguous() for tensor in tensors)
    return q, k, v


def refuse_wrong(places: Places, loose: Tensors) -> None:
    """Raises WrongResult unless rows that lie apart give the bytes of dense ones, in the region and in the message."""
    expected = b"".join(bytes(tensor.view(torch.uint8).numpy().tobytes()) for tensor in dense(loose))
    if places.placed(loose) != expected or places.placed(dense(loose)) != expected:
        raise report.WrongResult(f"shm, {len(loose[0])} tokens: other bytes lie in the region than were given")
    if expected[: loose[0].nbytes] not in message(dense(loose)) or message(loose) != message(dense(loose)):
        raise report.WrongResult(f"inline, {len(loose[0])} tokens: the message has other bytes than were given")


def time_all(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Microseconds of each call, which take turns in random order."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, end = list(calls), time.perf_counter() + seconds
    for call in calls.values():
        call()
    while time.perf_counter() < end or len(samples[names[0]]) < 3:
        random.shuffle(names)
        for name in names:
            before = time.perf_counter()
            calls[name]()
            samples[name].append((time.perf_counter() - before) * 1e6)
    return samples


def measure(num_tokens: int, seconds: float) -> list[dict[str, Any]]:
    """Checks and times one number of tokens."""
    loose = slices(num_tokens)
    packed = dense(loose)
    places = Places(aligned(4 * sum(tensor.nbytes for tensor in loose)))
    refuse_wrong(places, loose)
    rows = []
    planes: dict[str, Request] = {"shm": places.request, "inline": message}
    for plane, make in planes.items():
        calls = {
            DENSE: lambda make=make: make(packed),
            LOOSE: lambda make=make: make(loose),
            MADE_DENSE: lambda make=make: make(dense(loose)),
        }
        samples = time_all(calls, seconds / len(planes))
        p50 = {way: statistics.median(values) for way, values in samples.items()}
        rows += [
            {
                "tokens": num_tokens,
                "plane": plane,
                "way": way,
                "p50_us": p50[way],
                "p99_us": statistics.quantiles(values, n=100)[98],
                "ratio": p50[way] / p50[DENSE],
                "calls": len(values),
            }
            for way, values in samples.items()
        ]
    return rows


def draw(path: Path, title: str, rows: Sequence[report.Row]) -> None:
    """Loose rows beside dense ones."""
    p50 = {(row["tokens"], row["plane"], row["way"]): row["p50_us"] for row in rows}
    panels: dict[str, list[report.Bar]] = {}
    for tokens, plane, way in p50:
        if way != DENSE:
            bar = report.Bar(f"{plane}\n{way}", p50[tokens, plane, way], {DENSE: p50[tokens, plane, DENSE]})
            panels.setdefault(f"{tokens} tokens", []).append(bar)
    report.plot(path, title, "us", panels)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strided_rows", description=description)
    parser.add_argument("--tokens", type=int, nargs="+", default=NUM_TOKENS, metavar="N", help="default: 1 16 ... 1024")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="for each number of tokens; default: 4")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch's copies; default: 1")
    results = report.ROOT / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=results, metavar="DIR", help="default: benchmarks/results")
    return parser.parse_args(arguments)


@torch.inference_mode()
def run(options: argparse.Namespace, console: Console) -> None:
    """Checks, times, prints and writes."""
    torch.set_num_threads(options.threads)
    rows = [row for num_tokens in options.tokens for row in measure(num_tokens, options.seconds)]
    title = f"q, k, v of {NUM_HEADS}/{NUM_KV_HEADS} heads x {HEAD_DIM}, bfloat16, {options.threads} threads"
    console.print(report.table(title, CAPTION, rows, COLUMNS))
    parameters = {key: value for key, value in vars(options).items() if key != "out"}
    path = options.out / "strided-rows"
    report.write(console, path, "strided_rows", parameters, rows, lambda plot: draw(plot, title, rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    return report.exit_code(lambda console: run(parse(arguments), console))


if __name__ == "__main__":
    sys.exit(main())

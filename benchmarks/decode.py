"""Decode: one new token for each request, or five to be verified, over paged contexts of one length.

`python -m benchmarks.decode --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import sys

from benchmarks.kernel_benchmark import Benchmark, main
from benchmarks.kernel_cases import Case, K, short

GRID = {1: (1, 8, 32, 128), 8: (1, 8, 32, 128), 64: (1, 8, 32), 256: (1, 8)}  # requests: contexts in K


def decode(num_reqs: int, context_len: int, query_len: int = 1, group: str = "decode") -> Case:
    """A cell of `num_reqs` requests alike."""
    name = f"{num_reqs} x {short(context_len)}"
    return Case(group, name, (context_len,) * num_reqs, (query_len,) * num_reqs)


BENCHMARK = Benchmark(
    name="decode",
    description="Decode over paged contexts: ours and peers, by requests x context.",
    cells=[
        *(decode(num_reqs, context * K) for num_reqs, contexts in GRID.items() for context in contexts),
        decode(64, 8 * K, query_len=5, group="5 new tokens"),
    ],
    quick=("1 x 1k", "1 x 8k", "8 x 8k", "64 x 8k", "1 x 128k"),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))

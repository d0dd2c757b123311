"""Block decode: 32 new tokens for each request that all see each other and the paged context.

`python -m benchmarks.blocks --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import sys

from benchmarks.kernel_benchmark import Benchmark, main
from benchmarks.kernel_cases import Case, K, short

BLOCK = 32
GRID = {1: (2 * K, 8 * K), 8: (512, 2 * K, 8 * K), 32: (2 * K, 8 * K), 64: (2 * K, 8 * K)}  # requests: contexts


def blocks(num_reqs: int, context_len: int) -> Case:
    """A cell of `num_reqs` requests alike, each with one aligned block of a block-causal mask."""
    name = f"{num_reqs} x {short(context_len)}"
    return Case(f"block of {BLOCK}", name, (context_len,) * num_reqs, (BLOCK,) * num_reqs, block_size=BLOCK)


BENCHMARK = Benchmark(
    name="blocks",
    description="Block-diffusion decode over paged contexts: ours and peers, by requests x context.",
    cells=[blocks(num_reqs, context) for num_reqs, contexts in GRID.items() for context in contexts],
    quick=("1 x 8k", "8 x 512", "8 x 8k", "64 x 8k"),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))

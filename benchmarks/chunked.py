"""Chunked prefill: many new tokens on a paged context, causal.

`python -m benchmarks.chunked --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import sys

from benchmarks.kernel_benchmark import Benchmark, main
from benchmarks.kernel_cases import Case, K, short

PAGE_SIZES = (16, 128)
CHUNKS = ((512, 8 * K, 8), (2 * K, 8 * K, 4), (2 * K, 32 * K, 1), (4 * K, 32 * K, 1))  # new tokens, context, requests


def chunked(page_size: int, new: int, context_len: int, num_reqs: int) -> Case:
    """A cell of `num_reqs` requests alike."""
    name = f"{num_reqs} x {short(new)} on {short(context_len)}"
    return Case(f"pages of {page_size}", name, (context_len,) * num_reqs, (new,) * num_reqs, page_size=page_size)


BENCHMARK = Benchmark(
    name="chunked",
    description="Chunked prefill: ours and peers, by requests x new tokens on context.",
    cells=[chunked(page_size, *chunk) for page_size in PAGE_SIZES for chunk in CHUNKS],
    quick=("8 x 512 on 8k", "4 x 2k on 8k"),
    unit="TFLOP/s",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))

"""Prefill: whole prompts without context, causal and block-causal.

`python -m benchmarks.prefill --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import sys

from benchmarks.kernel_benchmark import Benchmark, main
from benchmarks.kernel_cases import Case, K, short

MASKS = {"causal": 1, "block-causal": 32}  # block sizes
PROMPTS = {512: 32, 2 * K: 8, 8 * K: 2, 32 * K: 1}  # length: requests


def prefill(mask: str, length: int, num_reqs: int) -> Case:
    """A cell of `num_reqs` prompts alike."""
    return Case(mask, f"{num_reqs} x {short(length)}", (0,) * num_reqs, (length,) * num_reqs, MASKS[mask])


BENCHMARK = Benchmark(
    name="prefill",
    description="Prefill without context: ours and peers, by requests x prompt.",
    cells=[prefill(mask, *prompt) for mask in MASKS for prompt in PROMPTS.items()],
    quick=("8 x 2k", "2 x 8k"),
    unit="TFLOP/s",
    dense=True,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))

"""Decode over pages of FP8, with a scale for each KV head.

`python -m benchmarks.fp8 --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from benchmarks.decode import decode
from benchmarks.kernel_benchmark import Benchmark, main
from benchmarks.kernel_cases import FP8, K

BENCHMARK = Benchmark(
    name="fp8",
    description="Decode over FP8 pages: ours, and peers that multiply in FP8 too, by requests x context.",
    cells=[
        replace(decode(num_reqs, context * K, group="fp8 pages"), kv_dtype=FP8)
        for num_reqs, context in ((8, 8), (64, 8), (64, 32))
    ],
    quick=("8 x 8k", "64 x 8k"),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))

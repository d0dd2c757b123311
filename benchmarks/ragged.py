"""Uneven batches: decode of very different contexts, and a prefill among decodes.

`python -m benchmarks.ragged --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import random
import sys

from benchmarks.kernel_benchmark import Benchmark, main
from benchmarks.kernel_cases import Case, K


def log_uniform(num_reqs: int) -> tuple[int, ...]:
    """Contexts between 256 and 64k whose logarithms are evenly distributed; the same in each run."""
    rng = random.Random(0)
    return tuple(int(256 * 256 ** rng.random()) for _ in range(num_reqs))


BENCHMARK = Benchmark(
    name="ragged",
    description="Uneven batches over paged contexts: ours and peers.",
    cells=[
        Case("decode", "1 x 128k, 63 x 1k", (128 * K, *(K,) * 63), (1,) * 64),
        Case("decode", "64 of 256..64k", log_uniform(64), (1,) * 64),
        Case("decode", "256 of 256..64k", log_uniform(256), (1,) * 256),
        Case("mixed", "2k on 8k, 64 x 1 on 8k", (8 * K,) * 65, (2 * K, *(1,) * 64)),
    ],
    quick=("1 x 128k, 63 x 1k", "64 of 256..64k", "2k on 8k, 64 x 1 on 8k"),
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))

"""The simplest kernel that reads memory as fast as it comes: a sum of each tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 8192
"""Elements that a program sums."""


@triton.jit
def _sum_kernel(sums, data, TILE: tl.constexpr):  # noqa: ANN001, ANN202, N803 - as all Triton kernels are written
    """Grid: (tiles,). data float32 `[tiles * TILE]`, sums float32 `[tiles]`."""
    first = tl.program_id(0).to(tl.int64) * TILE  # int64: the data may have more than 2^31 bytes
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(data + first + tl.arange(0, TILE))))


def read(sums: torch.Tensor, data: torch.Tensor) -> None:
    """Writes the sum of each tile of `data`.

    Args:
        sums: float32 `[tiles]`.
        data: float32 `[tiles * TILE]`.
    """
    _sum_kernel[(sums.numel(),)](sums, data, TILE=TILE, num_warps=8)

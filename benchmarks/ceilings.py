"""What the machine can do at most, measured in the same run as what is compared with it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.graph_timing import time_calls


class Ceilings(NamedTuple):
    """Rates of simple kernels on large random data."""

    read_gbs: float
    """GB/s of reading, one sum over it all."""
    copy_gbs: float
    """GB/s of a copy, bytes read and written."""
    matmul_tflops: float
    """TFLOP/s of a square matrix product in the type of the tensors."""

    def __str__(self) -> str:
        rates = f"read {self.read_gbs:.0f} GB/s, copy {self.copy_gbs:.0f} GB/s, matmul {self.matmul_tflops:.3g} TFLOP/s"
        return f"Ceilings here and now: {rates}."

    def floor_us(self, operations: float, num_bytes: float) -> float:
        """Microseconds that so many operations and bytes read take at least."""
        return max(operations / self.matmul_tflops / 1e6, num_bytes / self.read_gbs / 1e3)

    def tflops(self, operations_per_byte: float) -> float:
        """The roof above a point of the roofline plot."""
        return min(self.matmul_tflops, operations_per_byte * self.read_gbs / 1e3)


def measure(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> Ceilings:
    """Takes about `seconds`, and 6 GiB of a GPU's memory while it does."""
    num_bytes, side = (4 << 30, 8192) if device.type == "cuda" else (64 << 20, 512)
    data = torch.randn(num_bytes // 4, device=device)
    half = data.numel() // 2
    calls = {"sum": data.sum, "copy": lambda: data[:half].copy_(data[half:])}
    if device.type == "cuda":
        from benchmarks.read_kernel import TILE, read

        sums = torch.empty(data.numel() // TILE, device=device)
        calls["sum of tiles"] = lambda: read(sums, data)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    calls["matmul"] = lambda: torch.matmul(left, right, out=product)
    milliseconds = time_calls(calls, seconds, device)
    read_ms = min(milliseconds[name] for name in calls if name.startswith("sum"))
    return Ceilings(
        read_gbs=num_bytes / read_ms / 1e6,
        copy_gbs=num_bytes / milliseconds["copy"] / 1e6,
        matmul_tflops=2 * side**3 / milliseconds["matmul"] / 1e9,
    )

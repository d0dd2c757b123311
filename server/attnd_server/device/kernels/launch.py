"""The one place from which kernels of Triton are launched."""

from __future__ import annotations

from typing import Any


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel on the current stream.

    Args:
        kernel: a function under `triton.jit` or `gluon.jit`.
        grid: programs of each dimension.
        args: of the kernel.
        options: the kernel's arguments by name, and Triton's: `num_warps` and so on.
    """
    kernel[grid](*args, **options)

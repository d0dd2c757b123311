"""The one place from which kernels of Triton are launched."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any


class KernelMissing(Exception):
    """A kernel is not on the device yet, and this thread must not wait for it. Nothing of it was launched.

    Attributes:
        ready: done once the kernel can be launched, or has the reason why it never will be.
    """

    def __init__(self, name: str, ready: Future[None]) -> None:
        super().__init__(f"kernel {name} is not on the device yet")
        self.ready = ready


class _Here(threading.local):
    """Of the calling thread: whether it may wait for a kernel."""

    may_wait = True


_here = _Here()


def let_wait(may_wait: bool) -> None:
    """Says whether the calling thread may wait for a kernel that is not there yet, as every thread may at first.

    Whoever has the device for others must not: what it launches then raises KernelMissing.
    """
    _here.may_wait = may_wait


def launch_kernel(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel on the current stream, once it is on the device.

    Args:
        kernel: a function under `triton.jit` or `gluon.jit`.
        grid: programs of each dimension.
        args: of the kernel.
        options: the kernel's arguments by name, and Triton's: `num_warps` and so on.

    Raises:
        KernelMissing: it is not there yet, and this thread must not wait.
    """
    while True:
        try:
            kernel[grid](*args, **options)
            return
        except KernelMissing as missing:
            if not (_here.may_wait or missing.ready.done()):
                raise
            missing.ready.result()  # or the reason why it cannot be had

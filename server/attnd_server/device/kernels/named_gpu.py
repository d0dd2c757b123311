"""A kind of GPU to compile for, where there is none or it is not to be touched."""

from __future__ import annotations

from typing import Any


class NamedGpu:
    """All that Triton asks of a driver before it loads a kernel."""

    def __init__(self, target: Any, number: int = 0) -> None:
        """Of a `GPUTarget`, and the number by which Triton tells its kernels from other devices'."""
        self._target, self._number = target, number

    @classmethod
    def of(cls, arch: int, number: int = 0) -> NamedGpu:
        """NVIDIA's of a compute capability: 90."""
        from triton.backends.compiler import GPUTarget

        return cls(GPUTarget("cuda", arch, 32), number)

    def get_current_device(self) -> int:
        """Its number."""
        return self._number

    def get_current_stream(self, device: int) -> int:
        """None in particular."""
        return 0

    def get_current_target(self) -> Any:
        """What to compile for."""
        return self._target

"""What a library says of its kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from attnd_server.device.kernels.spec import KernelSpec


class State(Enum):
    """Where a kernel is."""

    WAITING = auto()
    COMPILING = auto()
    COMPILED = auto()
    LOADED = auto()
    FAILED = auto()


@dataclass(frozen=True)
class KernelStates:
    """The kernels of a device.

    Attributes:
        num_loaded: that are on the device.
        num_waiting: that wait to be looked for or compiled.
        compiling: names of those that are being compiled, and for how many seconds the compiler has known of them.
        failed: names of those that cannot be had, and why.
        num_compiled: kernels that this process had compiled.
        num_found: kernels that it found compiled, in the cache on disk.
    """

    num_loaded: int = 0
    num_waiting: int = 0
    compiling: list[tuple[str, float]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    num_compiled: int = 0
    num_found: int = 0


def label(spec: KernelSpec) -> str:
    """A name for people: the function's, and the constants that the kernel was compiled for."""
    parameters = list(spec.signature)
    constants = [
        f"{parameters[path[0]]}={getattr(value, 'value', value)}"
        for path, value in spec.constexprs.items()
        if len(path) == 1 and value is not None
    ]
    return f"{spec.name.strip('_')}[{', '.join(constants)}]"

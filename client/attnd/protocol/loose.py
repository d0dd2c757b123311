"""Tensors whose rows lie apart, such as slices of one projection: copied once, to where they are sent from."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from attnd.protocol.tensors import (
    DTYPE_NAMES,
    ITEM_SIZES,
    Array,
    dtype_of_buffer,
    to_array,
    torch_array,
    torch_dtype,
    without_elements,
)

_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_address_of_bytes = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))


class Loose(NamedTuple):
    """As an Array, but what lies between its elements is not its own.

    Attributes:
        dtype: the wire's `Dtype`.
        shape: extent of each dimension.
        source: a torch tensor on the host, or a numpy array.
    """

    dtype: int
    shape: tuple[int, ...]
    source: Any

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


Sendable = Array | Loose


def to_sendable(value: Any, field: str) -> Sendable:
    """As `to_array`, but what is not dense is left as it is. Arguments and errors are the same."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        if value.is_contiguous() or not value.is_cpu or not value.numel():
            return torch_array(value, field)
        dtype, shape, _ = without_elements(value, field)
        return Loose(dtype, shape, value.detach())
    if numpy is not None and isinstance(value, numpy.ndarray) and not value.flags.c_contiguous and value.size:
        return Loose(dtype_of_buffer(memoryview(value), field), value.shape, value)
    return to_array(value, field)


def copy_elements(value: Sendable, target: memoryview) -> None:
    """Copies the elements of `value`, one behind the other, to all of `target`."""
    if isinstance(value, Array):
        target[:] = value.data
        return
    dtype, shape, source = value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        torch.frombuffer(target, dtype=torch_dtype(dtype)).view(shape).copy_(source)
    else:
        sys.modules["numpy"].frombuffer(target, DTYPE_NAMES[dtype]).reshape(shape)[...] = source


def joined(chunks: Sequence[bytes | memoryview | Loose]) -> bytes:
    """`chunks` one behind the other, each copied once."""
    sizes = [chunk.num_bytes if isinstance(chunk, Loose) else len(chunk) for chunk in chunks]
    # Bytes that nobody else has yet may be written, says Python's C API, and gRPC takes nothing else without a copy.
    result: bytes = _new_bytes(None, sum(sizes))
    target = memoryview((ctypes.c_char * len(result)).from_address(_address_of_bytes(result))).cast("B")
    start = 0
    for chunk, size in zip(chunks, sizes, strict=True):
        place = target[start : start + size]
        if isinstance(chunk, Loose):
            copy_elements(chunk, place)
        else:
            place[:] = chunk
        start += size
    return result

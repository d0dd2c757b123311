"""Integers in any kind of array or sequence as the wire's int32, or int64 where they must be.

Nothing here loops over elements in Python: `array`, numpy and torch do. numpy and torch are used where their arrays
come from, and never required.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from attnd.errors import InvalidRequest
from attnd.protocol.tensors import DTYPE_NAMES, Array, to_array
from attnd.v1 import tensor_pb2

_LEAST, _MOST = -(1 << 31), (1 << 31) - 1
# Types of torch whose values all fit into 32 bits.
_NARROW = ("bool", "int8", "uint8", "int16")


def is_sequence(values: Any) -> bool:
    """Whether `values` is a list or the like, to be packed; anything else is an array, or an error of `to_array`."""
    return isinstance(values, Sequence) and not isinstance(values, Array | array | memoryview | str | bytes | bytearray)


def integers(values: Any, field: str, *, is_wide: bool = False) -> Array:
    """An int32 Array of a flat sequence of ints, or of an array of integers of any shape and strides.

    Args:
        values: a sequence, a numpy array, a torch tensor on any device, an Array, or what has the buffer protocol.
        field: the name to use in errors.
        is_wide: int64 where 32 bits are too few, and of arrays that are int64, as releases have sent them.

    Raises:
        InvalidRequest: not integers, or beyond 32 bits.
    """
    if is_sequence(values):
        return packed(values, field, is_wide=is_wide)
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(values, torch.Tensor):
        elements = to_array(_of_torch(torch, numpy, values, field, is_wide), field)
    elif numpy is not None and isinstance(values, numpy.ndarray):
        elements = to_array(_of_numpy(numpy, values, field, is_wide), field)
    else:
        elements = to_array(values, field)
        if elements.dtype == tensor_pb2.DTYPE_INT64 and not is_wide:
            return _narrowed(elements, field)
    if elements.dtype not in (tensor_pb2.DTYPE_INT32, tensor_pb2.DTYPE_INT64):
        name = DTYPE_NAMES.get(elements.dtype, elements.dtype)
        raise InvalidRequest(f"{field} has dtype {name}, but must be int32 or int64", field=field)
    return elements


def packed(values: Iterable[int], field: str, *, is_wide: bool = False) -> Array:
    """A 1-D int32 Array of ints, or int64 where it may be and must. Raises as `integers`."""
    bits = 64 if is_wide else 32
    listed = values if isinstance(values, Sequence) else list(values)
    try:
        # Not a ctypes array: that takes six times as long, and wraps what does not fit.
        try:
            elements = array("i", listed)
        except OverflowError:
            if not is_wide:
                raise
            elements = array("q", listed)
    except (TypeError, OverflowError) as error:
        raise InvalidRequest(f"{field} must hold {bits}-bit integers: {error}", field=field) from None
    return to_array(elements, field)


def elements_of(elements: Array, field: str) -> list[int]:
    """The elements of a 1-D Array of integers. Raises InvalidRequest: it has other dimensions."""
    if len(elements.shape) != 1:
        raise InvalidRequest(f"{field} has shape {list(elements.shape)}, but must be 1-D", field=field)
    return _listed(elements)


def _of_torch(torch: Any, numpy: Any, values: Any, field: str, is_wide: bool) -> Any:
    """A tensor as int32 on the host; what cannot be is left to `to_array` to refuse."""
    if values.is_meta or values.dtype == torch.int32:
        return values
    host = values.detach().cpu()
    if host.dtype != torch.int64:
        is_narrow = str(host.dtype).removeprefix("torch.") in _NARROW
        return host.to(torch.int32) if is_narrow else host
    if is_wide:
        return host
    if numpy is not None:  # one thread of numpy's is there before those of torch's have woken up
        return _of_numpy(numpy, host.numpy(), field, False)
    least, most = map(int, host.aminmax()) if host.numel() else (0, 0)
    return host.to(torch.int32) if _fits(least, most, field, False) else host


def _of_numpy(numpy: Any, values: Any, field: str, is_wide: bool) -> Any:
    """An array as dense int32; one of another kind is left to `to_array` to refuse."""
    if values.dtype.kind not in "biu":
        return values
    if is_wide and values.dtype == numpy.int64:
        return numpy.ascontiguousarray(values)
    narrow = values.dtype == numpy.int32 or values.dtype.itemsize < 4 or not values.size
    if not narrow and not _fits(int(values.min()), int(values.max()), field, is_wide):
        return numpy.ascontiguousarray(values, numpy.int64)
    return numpy.ascontiguousarray(values, numpy.int32)


def _narrowed(elements: Array, field: str) -> Array:
    """An int64 Array as int32."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return packed(_listed(elements), field)._replace(shape=elements.shape)
    narrow = _of_numpy(numpy, numpy.frombuffer(elements.data, numpy.int64), field, False)
    return to_array(narrow, field)._replace(shape=elements.shape)


def _fits(least: int, most: int, field: str, is_wide: bool) -> bool:
    """Whether values are of 32 bits. Raises InvalidRequest: they are not, and must be."""
    if least >= _LEAST and most <= _MOST:
        return True
    if is_wide and least >= -(1 << 63) and most < 1 << 63:
        return False
    value = most if most > _MOST else least
    raise InvalidRequest(f"{field} must hold {64 if is_wide else 32}-bit integers: it has {value}", field=field)


def _listed(elements: Array) -> list[int]:
    if not elements.data.nbytes:
        return []
    listed: list[int] = elements.data.cast("i" if elements.dtype == tensor_pb2.DTYPE_INT32 else "q").tolist()
    return listed

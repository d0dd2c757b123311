"""Python numbers to the wire's tensors and back, without numpy."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from operator import index
from typing import Any

from attnd.errors import InvalidRequest
from attnd.protocol.tensors import DTYPE_NAMES, Array, to_array
from attnd.v1 import tensor_pb2


def uint32(value: Any, field: str) -> int:
    """`value` as an int that fits the wire's uint32.

    Raises:
        InvalidRequest: not an integer, or out of range.
    """
    try:
        number = index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 1 << 32:
        raise InvalidRequest(f"{field} is {value!r}, but must be an integer in 0..{(1 << 32) - 1}", field=field)
    return number


def ints(values: Any, field: str) -> list[int]:
    """The elements of a 1-D sequence or array, as Python ints.

    Raises:
        InvalidRequest: not integers, or not 1-D.
    """
    if _is_sequence(values):
        try:
            return list(map(index, values))
        except TypeError as error:
            raise InvalidRequest(f"{field} must hold integers: {error}", field=field) from None
    elements = _integers(values, field)
    if len(elements.shape) != 1:
        raise InvalidRequest(f"{field} has shape {list(elements.shape)}, but must be 1-D", field=field)
    return _to_list(elements)


def cumulated(lens: Any, field: str) -> tensor_pb2.Tensor:
    """Int32 `[num + 1]`: where each request's tokens start, and where the last one's end."""
    return tensor(_int32_array(list(accumulate(ints(lens, field), initial=0)), field))


def int32_tensor(values: Any, field: str) -> tensor_pb2.Tensor | None:
    """An int32 tensor of any sequence or array of integers; None stays None.

    Raises:
        InvalidRequest: not integers, or beyond 32 bits.
    """
    return None if values is None else tensor(_int32_array(values, field))


def slots_tensor(values: Any, field: str) -> tensor_pb2.Tensor | None:
    """As `int32_tensor`, but int64 arrays stay so, and a sequence becomes int64 where it must."""
    if values is None:
        return None
    if _is_sequence(values):
        slots = ints(values, field)
        # A cache of 2^31 slots or more needs int64; all others save the bytes.
        return tensor(_packed("i" if max(slots, default=0) < 1 << 31 else "q", slots, field))
    return tensor(_integers(values, field))


def page_tables_array(tables: Any, field: str) -> Array:
    """An int32 Array of equally long rows, or of a 2-D array.

    Raises:
        InvalidRequest: rows that differ in length, not integers, or beyond 32 bits.
    """
    if not _is_sequence(tables):
        return _int32_array(tables, field)
    flat = array("i")
    num_pages = 0
    for request, row in enumerate(tables):
        try:
            flat.fromlist(row if type(row) is list else list(row))
        except (TypeError, OverflowError) as error:
            raise InvalidRequest(f"{field}[{request}] must hold 32-bit integers: {error}", field=field) from None
        if request == 0:
            num_pages = len(flat)
        elif len(row) != num_pages:
            raise InvalidRequest(
                f"{field}[{request}] has {len(row)} pages, but must have {num_pages} as {field}[0]; pad with -1",
                field=field,
            )
    return Array(tensor_pb2.DTYPE_INT32, (len(tables), num_pages), memoryview(flat.tobytes()))


def float32_tensor(values: Any, field: str) -> tensor_pb2.Tensor | None:
    """A 1-D float32 tensor of any sequence or array of numbers; None stays None, and an Array what it is.

    Raises:
        InvalidRequest: not numbers, or not 1-D.
    """
    if values is None:
        return None
    if isinstance(values, Array):
        return tensor(values)
    # tolist is what torch and numpy have in common: any floating type, any device.
    listed = values if isinstance(values, Sequence) or not hasattr(values, "tolist") else values.tolist()
    try:
        return tensor(to_array(array("f", listed), field))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{field} must hold one number for each head: {error}", field=field) from None


def _is_sequence(values: Any) -> bool:
    """Whether `values` is a list or the like, to be packed; anything else is an array, or an error of `to_array`."""
    return isinstance(values, Sequence) and not isinstance(values, Array | array | memoryview | str | bytes | bytearray)


def _int32_array(values: Any, field: str) -> Array:
    """An int32 Array of a flat sequence of ints, or of any integer array."""
    if _is_sequence(values):
        return _packed("i", values, field)
    elements = _integers(values, field)
    if elements.dtype == tensor_pb2.DTYPE_INT64:
        return _packed("i", _to_list(elements), field)._replace(shape=elements.shape)
    return elements


def _packed(code: str, values: Sequence[int], field: str) -> Array:
    try:
        # Not a ctypes array: that takes six times as long, and wraps what does not fit.
        return to_array(array(code, values), field)
    except (TypeError, OverflowError) as error:
        bits = 8 * array(code).itemsize
        raise InvalidRequest(f"{field} must hold {bits}-bit integers: {error}", field=field) from None


def _integers(values: Any, field: str) -> Array:
    elements = to_array(values, field)
    if elements.dtype not in (tensor_pb2.DTYPE_INT32, tensor_pb2.DTYPE_INT64):
        name = DTYPE_NAMES.get(elements.dtype, elements.dtype)
        raise InvalidRequest(f"{field} has dtype {name}, but must be int32 or int64", field=field)
    return elements


def _to_list(elements: Array) -> list[int]:
    if not elements.data.nbytes:
        return []
    listed: list[int] = elements.data.cast("i" if elements.dtype == tensor_pb2.DTYPE_INT32 else "q").tolist()
    return listed


def tensor(elements: Array) -> tensor_pb2.Tensor:
    """A small Array as a message; its elements are copied."""
    return tensor_pb2.Tensor(
        dtype=tensor_pb2.Dtype.ValueType(elements.dtype), shape=elements.shape, data=bytes(elements.data)
    )

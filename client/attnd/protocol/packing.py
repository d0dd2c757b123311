"""Python numbers to the wire's tensors and back, without numpy."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import index
from typing import Any

from attnd.errors import InvalidRequest
from attnd.protocol.integers import elements_of, integers, is_sequence
from attnd.protocol.tensors import ITEM_SIZES, Array, to_array
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
    if is_sequence(values):
        try:
            return list(map(index, values))
        except TypeError as error:
            raise InvalidRequest(f"{field} must hold integers: {error}", field=field) from None
    return elements_of(integers(values, field, is_wide=True), field)


def int32_tensor(values: Any, field: str) -> tensor_pb2.Tensor | None:
    """An int32 tensor of any sequence or array of integers; None stays None.

    Raises:
        InvalidRequest: not integers, or beyond 32 bits.
    """
    return None if values is None else tensor(integers(values, field))


def slots_tensor(values: Any, field: str, num_tokens: int | None = None) -> tensor_pb2.Tensor | None:
    """As `int32_tensor`, but int64 where it must be: a cache may have 2^31 slots or more.

    Args:
        values: slot of each token.
        field: the name to use in errors.
        num_tokens: of the step; more slots are cut off if they are -1. None: as many as there are.

    Raises:
        InvalidRequest: not integers, or a slot of no token.
    """
    if values is None:
        return None
    slots = integers(values, field, is_wide=True)
    if num_tokens is not None and len(slots.shape) == 1 and slots.shape[0] > num_tokens:
        slots = _cut(slots, num_tokens, field)
    return tensor(slots)


def _cut(slots: Array, num_tokens: int, field: str) -> Array:
    size = num_tokens * ITEM_SIZES[slots.dtype]
    rest = slots.data[size:]
    if rest != b"\xff" * rest.nbytes:  # -1 in int32 and int64
        further = elements_of(slots, field)[num_tokens:]
        token, slot = next((token, slot) for token, slot in enumerate(further, num_tokens) if slot != -1)
        rule = f"must be -1 past the step's {num_tokens} tokens"
        raise InvalidRequest(f"{field}[{token}] is {slot}, but {rule}", field=field)
    return Array(slots.dtype, (num_tokens,), slots.data[:size])


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


def tensor(elements: Array) -> tensor_pb2.Tensor:
    """A small Array as a message; its elements are copied."""
    return tensor_pb2.Tensor(
        dtype=tensor_pb2.Dtype.ValueType(elements.dtype), shape=elements.shape, data=bytes(elements.data)
    )

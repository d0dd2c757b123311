"""Arrays off the wire: header against bytes first, then values against a range. Nothing is copied here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from attnd.errors import InvalidRequest
from attnd.protocol.tensors import DTYPE_NAMES, ITEM_SIZES, Array
from attnd.v1 import tensor_pb2

INT32 = (tensor_pb2.DTYPE_INT32,)
INT32_OR_INT64 = (tensor_pb2.DTYPE_INT32, tensor_pb2.DTYPE_INT64)

# Little-endian whatever the host is.
_NUMPY_DTYPES: dict[int, str] = {
    tensor_pb2.DTYPE_FLOAT32: "<f4",
    tensor_pb2.DTYPE_INT32: "<i4",
    tensor_pb2.DTYPE_INT64: "<i8",
}

Integers = npt.NDArray[np.integer[Any]]


def refuse(field: str, message: str) -> NoReturn:
    """Raises InvalidRequest for the request's field `field`."""
    raise InvalidRequest(message, field=field)


def required(parent: Message, field: str) -> Any:
    """The sub-message `field` of `parent`.

    Raises:
        InvalidRequest: it is absent.
    """
    if not parent.HasField(field):
        refuse(field, f"{field} is absent, but must be given")
    return getattr(parent, field)


def check_header(
    dtype: int, shape: Sequence[int], num_bytes: int, field: str, dtypes: Sequence[int], expected: Sequence[int | str]
) -> None:
    """Checks what an array says of itself; allocates nothing.

    Args:
        dtype: the wire's Dtype, any number.
        shape: any length and any numbers.
        num_bytes: length of the elements as received.
        field: the name to use in errors.
        dtypes: the wire's Dtypes that the field takes.
        expected: extent of each dimension, or the name of one that is free.

    Raises:
        InvalidRequest: type, shape or length is not what the field takes.
    """
    if dtype == dtypes[0] and tuple(shape) == expected and num_bytes == math.prod(shape) * ITEM_SIZES[dtype]:
        return  # as nearly always
    if dtype not in dtypes:
        names = " or ".join(DTYPE_NAMES[allowed] for allowed in dtypes)
        refuse(field, f"{field} has dtype {DTYPE_NAMES.get(dtype, dtype or 'unspecified')}, but must be {names}")
    if len(shape) != len(expected) or any(
        extent < 0 if isinstance(rule, str) else extent != rule for extent, rule in zip(shape, expected, strict=True)
    ):
        refuse(field, f"{field} has shape {_spell(shape)}, but must be {_spell(expected)}")
    # Python's integers: a product of huge extents does not overflow.
    expected_bytes = math.prod(shape) * ITEM_SIZES[dtype]
    if num_bytes != expected_bytes:
        header = f"{DTYPE_NAMES[dtype]} {_spell(shape)}"
        refuse(field, f"{field} has {num_bytes} bytes of data, but must have {expected_bytes} for {header}")


def _spell(shape: Sequence[int | str]) -> str:
    more = ", ..." if len(shape) > 8 else ""
    return f"[{', '.join(str(extent) for extent in shape[:8])}{more}]"


def view(
    tensor: tensor_pb2.Tensor, field: str, dtypes: Sequence[int], expected: Sequence[int | str]
) -> npt.NDArray[Any]:
    """A read-only view of a tensor's bytes, of a dtype in `dtypes` and of shape `expected` (see `check_header`).

    Raises:
        InvalidRequest: the header is not what the field takes, or the elements are not in the message.
    """
    if tensor.HasField("region"):
        refuse(field, f"{field}.region.id is {tensor.region.id}, but must be a region that OpenPlane registered")
    data, shape = tensor.data, tensor.shape
    check_header(tensor.dtype, shape, len(data), field, dtypes, expected)
    return np.frombuffer(data, _NUMPY_DTYPES[tensor.dtype]).reshape(tuple(shape))


def optional_int32(parent: Message, field: str, expected: Sequence[int | str]) -> Integers | None:
    """A view of the int32 tensor `field` of `parent`, or None if it is absent."""
    return view(getattr(parent, field), field, INT32, expected) if parent.HasField(field) else None


def payload(payloads: Mapping[str, Array], field: str, dtype: int, expected: Sequence[int | str]) -> Array:
    """The array `field` of `payloads`, of type `dtype` and shape `expected`.

    Raises:
        InvalidRequest: it is absent, or the header is not what the field takes.
    """
    array = payloads.get(field)
    if array is None:
        refuse(field, f"{field} is absent, but must be given")
    check_header(array.dtype, array.shape, array.data.nbytes, field, (dtype,), expected)
    return array


def check_range(values: Integers, low: int, high: int, field: str, rule: str) -> None:
    """Refuses the first of `values` outside low..high (both inclusive), as "field[index] is VALUE, but RULE"."""
    if values.size and (values.min() < low or values.max() > high):
        refuse_first((values < low) | (values > high), values, field, rule)


def refuse_first(wrong: npt.NDArray[np.bool_], values: Integers, field: str, rule: str) -> NoReturn:
    """Refuses the first of `values` that is `wrong`; at least one is. Both arrays have the same shape."""
    index = np.unravel_index(int(wrong.argmax()), wrong.shape)
    refuse(field, f"{field}[{', '.join(map(str, index))}] is {values[index]}, but {rule}")

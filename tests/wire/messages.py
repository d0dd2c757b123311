"""Bytes of protobuf messages, changed in place and told to people."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from attnd.v1 import error_pb2, tensor_pb2

# By the full name of a field, what makes another value of its value: an int, or bytes of whatever has a length; None
# leaves the field out.
Changes = Mapping[str, Callable[[Any], Any] | None]

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FORMATS = {
    tensor_pb2.DTYPE_FLOAT32: "f",
    tensor_pb2.DTYPE_INT32: "i",
    tensor_pb2.DTYPE_INT64: "q",
}


def changed(data: bytes, descriptor: Any, changes: Changes) -> bytes:
    """The bytes of a message of the type `descriptor` with other values in some fields, in the order as they came.

    protobuf would put the fields into its own order, and hide in which order somebody else has written them.
    """
    result = b""
    for number, key, value in _fields(data):
        field = descriptor.fields_by_number.get(number)
        name = "" if field is None else field.full_name
        if name in changes:
            change = changes[name]
            if change is None:
                continue
            value = change(value)
        elif (inner := _message_type(field)) is not None:
            value = changed(value, inner, changes)
        result += key + _content(value, key[0] & 7)
    return result


def described(message: Message) -> dict[str, Any]:
    """The fields that a message has, for people."""
    return {field.name: _described(field, value) for field, value in message.ListFields()}


def _described(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tensor_pb2.Tensor):
        return _described_tensor(value)
    if isinstance(value, Message):
        return described(value)
    if not isinstance(value, str | int | float):
        items = [_described(field, item) for item in value]
        return items if items and isinstance(items[0], dict) else " ".join(map(str, items))
    if field.enum_type is not None and isinstance(value, int):
        return field.enum_type.values_by_number[value].name
    return value


def _described_tensor(tensor: tensor_pb2.Tensor) -> str:
    kind = tensor_pb2.Dtype.Name(tensor.dtype).removeprefix("DTYPE_").lower()
    start = f"{kind} {list(tensor.shape)}"
    if tensor.HasField("region"):
        return f"{start} in region {tensor.region.id} at {tensor.region.offset}"
    form = _FORMATS[tensor.dtype]
    values = [item for (item,) in struct.iter_unpack(f"<{form}", tensor.data)]
    return f"{start}: {' '.join(f'{item:.5g}' for item in values)}"


def _message_type(field: FieldDescriptor | None) -> Any:
    if field is None:
        return None
    if field.full_name == "google.protobuf.Any.value":  # of a Status
        return error_pb2.Error.DESCRIPTOR
    return field.message_type


def _fields(data: bytes) -> Iterator[tuple[int, bytes, Any]]:
    """Number, key as it is written, and value of each field."""
    position = 0
    while position < len(data):
        start = position
        key, position = _read_varint(data, position)
        written = data[start:position]
        kind = key & 7
        value: int | bytes
        if kind == _VARINT:
            value, position = _read_varint(data, position)
        else:
            if kind == _LENGTH:
                size, position = _read_varint(data, position)
            else:
                size = {_FIXED64: 8, _FIXED32: 4}[kind]
            value = data[position : position + size]
            assert len(value) == size, f"the message ends within field {key >> 3}"
            position += size
        yield key >> 3, written, value


def _content(value: Any, kind: int) -> bytes:
    if kind == _VARINT:
        return _varint(value)
    return _varint(len(value)) + bytes(value) if kind == _LENGTH else bytes(value)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[position]
        position += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, position
        shift += 7


def _varint(value: int) -> bytes:
    result = b""
    while value > 127:
        result += bytes([value & 127 | 128])
        value >>= 7
    return result + bytes([value])

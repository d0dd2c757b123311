"""Protobuf's encoding, field by field, before protobuf itself makes an object of each.

What protobuf builds of a message can take hundreds of times the message's bytes: an empty submessage has two bytes on
the wire, and an unknown field as few. So fields are counted here first: more than a message of ours has are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NoReturn

# Most fields of one message, with those of its submessages: a step has under a hundred.
MAX_FIELDS = 1 << 12
# Wire types of protobuf's encoding (https://protobuf.dev/programming-guides/encoding/).
VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = range(6)
# Bytes of a field's key, and of a length, that protobuf reads at the most, however few bits they hold.
KEY_BYTES = 5
# Of a table of fields: one whose bytes are its elements, each of at least one.
_PACKED = object()


def walk(view: memoryview, most: int = MAX_FIELDS) -> Iterator[tuple[int, int, memoryview | None, int]]:
    """Yields `(number, start, value, end)` for each field; `value` is the content if it is length-delimited, else None.

    Args:
        view: the encoded message.
        most: fields that it may have.

    Raises:
        IndexError: the bytes end within a field, are no protobuf at all, or have more fields.
    """
    position, size, left = 0, len(view), most
    while position < size:
        start = position
        left -= 1
        if left < 0:
            _refuse_more(start, most)
        key = view[position]
        position += 1
        if key > 127:
            key, position = _read_varint(view, start, KEY_BYTES)
            if key >= 1 << 32:
                raise IndexError(f"byte {start} starts a field whose key has more than 32 bits")
        kind = key & 7
        value = None
        if kind == LENGTH:
            length = view[position]
            position += 1
            if length > 127:
                length, position = _read_varint(view, position - 1, KEY_BYTES)
            value = view[position : position + length]
            position += length
        elif kind == VARINT:
            _, position = _read_varint(view, position)
        elif kind in (FIXED64, FIXED32):
            position += 8 if kind == FIXED64 else 4
        else:
            raise IndexError(f"byte {start} starts a field of wire type {kind}, but there is no such type")
        if position > size:
            raise IndexError(f"byte {start} starts a field that ends at byte {position}, past the end")
        yield key >> 3, start, value, position


def refuse_many(data: bytes, descriptor: Any, most: int = MAX_FIELDS) -> None:
    """Counts the fields of a message and of its submessages, and the elements of packed fields, up to a limit.

    A message of no more than twice `most` bytes is not looked at: a field has two of them. (An element of a packed
    field has one, and protobuf keeps eight for it.)

    Args:
        data: the encoded message.
        descriptor: of its type.
        most: fields that it may have.

    Raises:
        IndexError: it has more, or is no protobuf at all.
    """
    if len(data) > 2 * most:
        _counted(memoryview(data), descriptor, most, most)


def _counted(view: memoryview, descriptor: Any, left: int, most: int) -> int:
    """How many fields are left of `left`."""
    table = _table(descriptor)
    for number, start, value, _ in walk(view, most):
        left -= 1
        inner = None if value is None else table.get(number)
        if value is not None and inner is _PACKED:
            left -= len(value)
        if left < 0:
            _refuse_more(start, most)
        if value is not None and inner is not None and inner is not _PACKED:
            left = _counted(value, inner, left, most)
    return left


@cache
def _table(descriptor: Any) -> dict[int, Any]:
    """By field, what its content is where that is more than one object: the fields of a type, or numbers."""
    table: dict[int, Any] = {}
    for field in descriptor.fields:
        if field.message_type is not None:
            table[field.number] = field.message_type
        elif field.type not in (field.TYPE_BYTES, field.TYPE_STRING):
            table[field.number] = _PACKED
    return table


def _refuse_more(start: int, most: int) -> NoReturn:
    raise IndexError(f"byte {start} starts a field beyond the {most} that a message may have")


def _read_varint(view: memoryview, position: int, most_bytes: int = 10) -> tuple[int, int]:
    byte = view[position]
    if byte < 128:
        return byte, position + 1
    result, shift = byte & 127, 7
    while True:
        position += 1
        byte = view[position]
        result |= (byte & 127) << shift
        if byte < 128:
            return result, position + 1
        shift += 7
        if shift >= 7 * most_bytes:
            raise IndexError(f"a varint is longer than {most_bytes} bytes at byte {position}")

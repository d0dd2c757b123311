"""What turns a valid message into one that almost is: one thing about it is extreme, short, swapped or unknown."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from attnd.protocol.tensors import ITEM_SIZES
from attnd.v1 import cache_pb2, step_pb2, tensor_pb2

_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e-45, 3.4e38, 1e300)
_EXTENTS = (-1, 0, 1, 2, 3, 4, 9, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))
# Elements of index tensors: around the ends of pages, slots and types.
_ELEMENTS = (-(2**31), -2, -1, 0, 1, 4, 5, 6, 7, 8, 9, 15, 16, 18, 20, 23, 24, 25, 28, 2**31 - 1, 2**15, 2**24)


def mutate(message: Any, random_: random.Random, refs: Sequence[cache_pb2.CacheRef]) -> None:
    """Spoils one thing, wherever in the message it is.

    Args:
        message: changed in place.
        random_: decides.
        refs: caches that exist, the caller's and others'.
    """
    places = list(_places(message))
    if not places:
        return
    holder, field = random_.choice(places)
    value = getattr(holder, field.name)
    if field.is_repeated:
        _spoil_list(value, random_)
    elif field.message_type is cache_pb2.CacheRef.DESCRIPTOR and random_.random() < 0.8:
        _swap(value, random_, refs)
    elif field.message_type is tensor_pb2.Tensor.DESCRIPTOR and random_.random() < 0.9:
        _spoil_tensor(value, random_, places)
    elif field.message_type is not None or random_.random() < 0.1:
        holder.ClearField(field.name)
    else:
        _set(holder, field, random_)


def mutate_bytes(data: bytes, random_: random.Random) -> bytes:
    """Spoils a serialized message: bytes changed, cut off, put in, or taken twice; or fields put in by the thousand."""
    spoiled = bytearray(data)
    for _ in range(random_.randint(1, 3)):
        start = random_.randrange(len(spoiled) + 1)
        size = random_.choice((1, 1, 1, 2, 4, 8, 40))
        kind = random_.randrange(5)
        if random_.random() < 0.02:
            # Unknown ones, as numbers and as empty bytes, and empty ones of any number that may be a message's.
            field = random_.choice((b"\x78\x01", b"\x7a\x00", bytes([random_.randrange(1, 16) << 3 | 2, 0])))
            spoiled[start:start] = field * random_.choice((100, 5_000, 50_000))
        elif kind == 0:
            spoiled[start : start + 1] = bytes([random_.randrange(256)])
        elif kind == 1:
            del spoiled[start:]
        elif kind == 2:
            del spoiled[start : start + size]
        elif kind == 3:
            spoiled[start:start] = bytes(random_.randrange(256) for _ in range(size))
        else:
            spoiled[start:start] = spoiled[start : start + size]
    return bytes(spoiled)


def _places(message: Any) -> Any:
    """Every field that is set, and some that are not: `(holder, field)`."""
    for field in message.DESCRIPTOR.fields:
        if field.is_repeated:
            if field.message_type is not None and field.containing_type is not tensor_pb2.Tensor.DESCRIPTOR:
                yield message, field
                for element in getattr(message, field.name):
                    yield from _places(element)
        elif field.message_type is None:
            yield message, field
        elif message.HasField(field.name):
            yield message, field
            if field.message_type not in (tensor_pb2.Tensor.DESCRIPTOR, cache_pb2.CacheRef.DESCRIPTOR):
                yield from _places(getattr(message, field.name))


def _spoil_list(elements: Any, random_: random.Random) -> None:
    """A layer group goes, comes twice, has another's place or tables, or there are empty ones, a few or hundreds."""
    kind = random_.randrange(6)
    if kind == 0 or not elements:
        for _ in range(random_.choice((1, 2, 300))):
            elements.add()
    elif kind == 1:
        elements.pop(random_.randrange(len(elements)))
    elif kind == 2:
        elements.add().CopyFrom(random_.choice(elements))
    elif kind == 3 or not isinstance(elements[0], step_pb2.StepGroup):
        first, second = (random_.choice(elements) for _ in range(2))
        first.CopyFrom(second)
    else:
        index = random_.randrange(len(elements))
        elements[index].CopyFrom(step_pb2.StepGroup(tables_of=random_.randint(0, index)))


def _set(holder: Message, field: FieldDescriptor, random_: random.Random) -> None:
    """Gives a number, a flag, a string or bytes another value."""
    old = getattr(holder, field.name)
    kind = field.cpp_type
    new: Any
    if kind in _RANGES:
        low, high = _RANGES[kind]
        near = [old - 1, old + 1, 0, 1, 2, 9, 77, 2**31, old * 2]
        new = random_.choice([low, high, random_.randint(low, high), *near])
        new = min(max(new, low), high)
    elif kind == FieldDescriptor.CPPTYPE_BOOL:
        new = not old
    elif kind == FieldDescriptor.CPPTYPE_STRING:
        new = random_.choice(["", "x" * 129, "\0", "\u20ac" * 128, "../..", old * 2])
    elif kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        new = random_.choice(_FLOATS)
    else:
        new = random_.choice([b"", old[:-1], old + b"\0", old * 2, bytes(len(old))])
    try:
        setattr(holder, field.name, new)
    except (ValueError, TypeError):  # a closed range of this version of protobuf
        holder.ClearField(field.name)


def _swap(ref: cache_pb2.CacheRef, random_: random.Random, refs: Sequence[cache_pb2.CacheRef]) -> None:
    """Another's cache, another of the caller's, or one that is none; or another epoch."""
    kind = random_.randrange(8)
    if kind < 4:
        ref.CopyFrom(random_.choice(list(refs)))
    elif kind == 4:
        ref.id = random_.choice([b"", ref.id[:15], ref.id + b"\0", bytes(16)])
    elif kind == 5:
        ref.id = ref.id[:-1] + bytes([ref.id[-1] ^ 1]) if ref.id else b"\1"
    else:
        ref.epoch = random_.choice([0, 1, 2**64 - 1, (ref.epoch + 1) % 2**64, ref.epoch ^ 1 << 40])


def _spoil_tensor(
    tensor: tensor_pb2.Tensor, random_: random.Random, places: Sequence[tuple[Any, FieldDescriptor]]
) -> None:
    """Spoils the header, the elements or the place of a tensor."""
    random_.choice(_TENSOR_MUTATIONS)(tensor, random_)
    if random_.random() < 0.05:
        others = [(holder, field) for holder, field in places if field.message_type is tensor.DESCRIPTOR]
        holder, field = random_.choice(others)
        tensor.CopyFrom(getattr(holder, field.name))


def _dtype(tensor: tensor_pb2.Tensor, random_: random.Random) -> None:
    tensor.dtype = tensor_pb2.Dtype.ValueType(random_.choice([-1, 0, 1, 2, 3, 4, 5, 6, 7, 2**31 - 1]))


def _shape(tensor: tensor_pb2.Tensor, random_: random.Random) -> None:
    kind, shape = random_.randrange(4), list(tensor.shape)
    if kind == 0 or not shape:
        shape.insert(random_.randint(0, len(shape)), random_.choice(_EXTENTS))
    elif kind == 1:
        shape.pop(random_.randrange(len(shape)))
    elif kind == 2:
        shape = shape * random_.choice([2, 3]) if len(shape) < 30 else [1]
    else:
        index = random_.randrange(len(shape))
        shape[index] = random_.choice([*_EXTENTS, min(shape[index], 2**60) + 1, shape[index] - (shape[index] > 0)])
    tensor.shape[:] = shape


def _length(tensor: tensor_pb2.Tensor, random_: random.Random) -> None:
    """Elements come short or long; every other time the shape says so."""
    size = ITEM_SIZES.get(tensor.dtype, 4)
    tensor.data = random_.choice(
        [tensor.data[:-1], tensor.data[:-size], tensor.data[size:], tensor.data + bytes(size), tensor.data * 2, b""]
    )
    if len(tensor.shape) == 1 and random_.random() < 0.5:
        tensor.shape[0] = len(tensor.data) // size


def _element(tensor: tensor_pb2.Tensor, random_: random.Random) -> None:
    """One element, or several, become extreme."""
    size = ITEM_SIZES.get(tensor.dtype, 4)
    data = bytearray(tensor.data)
    for _ in range(random_.randint(1, 2)):
        if len(data) < size:
            break
        start = random_.randrange(len(data) // size) * size
        value = random_.choice(_ELEMENTS) if random_.random() < 0.7 else random_.getrandbits(8 * size - 1)
        data[start : start + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    tensor.data = bytes(data)


def _repeat(tensor: tensor_pb2.Tensor, random_: random.Random) -> None:
    """One element takes the value of another: a slot or a page comes twice."""
    size = ITEM_SIZES.get(tensor.dtype, 4)
    count = len(tensor.data) // size
    if count > 1:
        source, target = random_.randrange(count) * size, random_.randrange(count) * size
        data = bytearray(tensor.data)
        data[target : target + size] = data[source : source + size]
        tensor.data = bytes(data)


def _region(tensor: tensor_pb2.Tensor, random_: random.Random) -> None:
    tensor.region.id = random_.choice([0, 1, 2, 2**64 - 1])
    tensor.region.offset = random_.choice([0, 64, 63, 1, 1 << 15, (1 << 16) - 64, 1 << 16, 2**64 - 64, 2**64 - 1])


_TENSOR_MUTATIONS: tuple[Callable[[tensor_pb2.Tensor, random.Random], None], ...] = (
    _dtype,
    _shape,
    _length,
    _element,
    _element,
    _element,
    _repeat,
    _region,
)

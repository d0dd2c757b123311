"""Messages with big tensors, to bytes and back, copying the tensors once down and not at all up.

protobuf copies a `bytes` field when it is set, when it is serialized and on every read. So the tensors of the hot-path
messages are kept out of protobuf: the header is an ordinary message, and each tensor's bytes are framed by hand as the
length-delimited field that they are in the .proto. What travels is plain protobuf: any generated stub reads it and
may write it, in any order of fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from google.protobuf.message import DecodeError, Message

from attnd.errors import InvalidRequest
from attnd.protocol.fields import LENGTH, MAX_FIELDS, refuse_many, walk
from attnd.protocol.loose import Loose, Sendable, joined
from attnd.protocol.regions import Region
from attnd.protocol.tensors import Array
from attnd.v1 import attention_pb2, step_pb2, tensor_pb2

# One constant for both sides: gRPC's own default for receiving is 4 MiB.
MAX_MESSAGE_BYTES = 256 << 20

# Most fields of a message about one cache: a thousand layer groups, each with all that the server fills in, have fewer.
MAX_CACHE_FIELDS = 1 << 15
# Most fields of a message that lists caches: ten thousand of them have as many.
MAX_LIST_FIELDS = 1 << 19
# Most bytes of a tensor beside its elements: its dtype, its shape, and where it lies.
_MAX_TENSOR_HEADER_BYTES = 1 << 10
_NO_HEADER: tuple[int, bytes, int, tuple[int, ...]] = (-1, b"", 0, ())
_DATA = tensor_pb2.Tensor.DESCRIPTOR.fields_by_name["data"].number


class Framed(NamedTuple):
    """A message whose tensors are held beside it.

    Attributes:
        message: the protobuf message, without the tensors of `tensors`.
        tensors: by field name, those that were present.
    """

    message: Any
    tensors: Mapping[str, Array]


class Stripped(NamedTuple):
    """A message that was taken apart and is not parsed yet.

    Attributes:
        header: its bytes, without the tensors of `tensors`.
        tensors: by field name, those that were present.
        num_bytes: of the whole message.
    """

    header: bytes
    tensors: Mapping[str, Array]
    num_bytes: int


class Frame:
    """How one message type carries tensors: which sub-message holds them, and in which fields."""

    def __init__(self, message_type: type[Message], holder: str, *fields: str) -> None:
        """Describes `message_type`, whose field `holder` (or, if "", the message itself) has tensors in `fields`."""
        self.message_type = message_type
        descriptor: Any = message_type.DESCRIPTOR
        self._holder_name = holder
        self._holder = descriptor.fields_by_name[holder].number if holder else 0
        inner = descriptor.fields_by_name[holder].message_type if holder else descriptor
        self._fields = {inner.fields_by_name[name].number: name for name in fields}
        self._tags = {name: _varint(number << 3 | LENGTH) for number, name in self._fields.items()}
        self._holder_tag = _varint(self._holder << 3 | LENGTH)
        # By field: the tensor message's length, its bytes before the elements, and what they say.
        self._last_headers: dict[str, tuple[int, bytes, int, tuple[int, ...]]] = {}

    def encode(self, holder: Message, tensors: Mapping[str, Sendable], outer: bytes = b"") -> bytes:
        """The wire's bytes.

        Args:
            holder: the message with the tensor fields, those left unset.
            tensors: values of these fields.
            outer: the enclosing message, serialized, without the holder.
        """
        first = holder.SerializeToString()
        chunks: list[Any] = [first]  # bytes, memoryviews and Loose
        size, is_dense = len(first), True
        for name, array in tensors.items():
            if isinstance(array, Array):
                elements: memoryview | Loose = array.data
                num_bytes = array.data.nbytes
            else:
                elements, num_bytes, is_dense = array, array.num_bytes, False
            header = _tensor_header(self._tags[name], array.dtype, array.shape, num_bytes)
            chunks += (header, elements)
            size += len(header) + num_bytes
        if self._holder:
            chunks.insert(0, outer + self._holder_tag + _varint(size))
        return b"".join(chunks) if is_dense else joined(chunks)

    def decode(self, data: bytes, region: Region | None = None, max_header_bytes: int = MAX_MESSAGE_BYTES) -> Framed:
        """Reads the wire's bytes; the tensors are views into `data`, or into `region` if that is where they lie.

        Args:
            data: what was received.
            region: of the plane on which it was; None: the plane has none.
            max_header_bytes: most bytes beside the tensors' elements: those that protobuf copies.

        Raises:
            InvalidRequest: `data` is no such message, or has more beside the tensors, or too many fields; or it is one
                of those that no generated code writes, and of which protobuf would merge the parts: the holder or a
                tensor comes twice, or a tensor has two storages.
        """
        return self.parsed(self.stripped(data, region, max_header_bytes))

    def stripped(
        self, data: bytes, region: Region | None = None, max_header_bytes: int = MAX_MESSAGE_BYTES
    ) -> Stripped:
        """As `decode`, up to what protobuf makes of the header, which takes longer the more it has to say."""
        view = memoryview(data)
        tensors: dict[str, Array] = {}
        try:
            if self._holder:
                header = self._strip(view, tensors, region, max_header_bytes)
            else:
                header = self._strip_holder(view, tensors, region, max_header_bytes)
        except (DecodeError, IndexError) as error:
            raise _not_whole(self.message_type, len(data), error) from None
        return Stripped(header, tensors, len(data))

    def parsed(self, stripped: Stripped) -> Framed:
        """What `decode` returns. Raises as it does."""
        header, tensors, num_bytes = stripped
        try:
            refuse_many(header, self.message_type.DESCRIPTOR)
            message: Any = self.message_type.FromString(header)
        except (DecodeError, IndexError) as error:
            raise _not_whole(self.message_type, num_bytes, error) from None
        if tensors and self._holder and not message.HasField(self._holder_name):
            tensors = {}  # another field of the oneof came behind it
        return Framed(message, tensors)

    def _strip(self, view: memoryview, tensors: dict[str, Array], region: Region | None, most: int) -> bytes:
        """The message without its tensors' fields, which go to `tensors`; at most `most` bytes."""
        kept: list[bytes | memoryview] = []
        has_holder = False
        for number, start, value, end in walk(view):
            if number == self._holder and value is not None:
                if has_holder:
                    _refuse_second(self._holder_name)
                has_holder = True
                inner = self._strip_holder(value, tensors, region, most)
                kept += (self._holder_tag + _varint(len(inner)), inner)
            else:
                kept.append(view[start:end])
        return self._joined(kept, most)

    def _strip_holder(self, view: memoryview, tensors: dict[str, Array], region: Region | None, most: int) -> bytes:
        kept: list[bytes | memoryview] = []
        for number, start, value, end in walk(view):
            name = self._fields.get(number)
            if name is None or value is None:
                kept.append(view[start:end])
            elif name in tensors:
                _refuse_second(name)
            else:
                tensors[name] = self._tensor(name, value, region)
        return self._joined(kept, most)

    def _joined(self, kept: list[bytes | memoryview], most: int) -> bytes:
        num_bytes = sum(map(len, kept))
        if num_bytes > most:
            name = self.message_type.DESCRIPTOR.name
            rule = f"must have at most {most}: more than the largest step"
            raise InvalidRequest(f"{name} has {num_bytes} bytes beside the tensors of a call, but {rule}")
        return b"".join(kept)

    def _tensor(self, name: str, view: memoryview, region: Region | None) -> Array:
        """A tensor message as an Array over `view`. Layer after layer has the same header, so the last one is kept."""
        size, prefix, dtype, shape = self._last_headers.get(name, _NO_HEADER)
        if len(view) == size and view[: len(prefix)] == prefix:
            return Array(dtype, shape, view[len(prefix) :])
        array, before = _tensor(name, view, region)
        if 0 < len(before) <= 64:
            self._last_headers[name] = (len(view), bytes(before), array.dtype, array.shape)
        return array


def _refuse_second(field: str) -> NoReturn:
    raise InvalidRequest(f"{field} comes twice, but must be given once", field=field)


def parse(message_type: type[Message], data: bytes, max_fields: int = MAX_FIELDS) -> Any:
    """An ordinary message from the wire.

    Args:
        message_type: of it.
        data: what was received.
        max_fields: most fields that it may have, with those of its submessages; counted before there are any.

    Raises:
        InvalidRequest: `data` is no such message, or has more fields.
    """
    try:
        refuse_many(data, message_type.DESCRIPTOR, max_fields)
        return message_type.FromString(data)
    except (DecodeError, IndexError) as error:
        raise _not_whole(message_type, len(data), error) from None


def _not_whole(message_type: type[Message], num_bytes: int, error: Exception) -> InvalidRequest:
    return InvalidRequest(f"message of {num_bytes} bytes is not a whole {message_type.DESCRIPTOR.name}: {error}")


def step_request(step: step_pb2.Step) -> bytes:
    """The AttendRequest that opens `step`."""
    return attention_pb2.AttendRequest(step=step).SerializeToString()


@lru_cache(maxsize=1024)
def _tensor_header(tag: bytes, dtype: int, shape: tuple[int, ...], num_bytes: int) -> bytes:
    """All of a tensor's field before its elements: the same for every layer, hence kept."""
    header = tensor_pb2.Tensor(dtype=tensor_pb2.Dtype.ValueType(dtype), shape=shape).SerializeToString()
    header += _varint(_DATA << 3 | LENGTH) + _varint(num_bytes)
    return tag + _varint(len(header) + num_bytes) + header


def _tensor(name: str, view: memoryview, region: Region | None) -> tuple[Array, memoryview]:
    """A tensor message as an Array over `view`, and what stands before its elements if nothing stands behind them."""
    header, prefix = [], memoryview(b"")
    data: memoryview | None = None
    for number, start, value, end in walk(view):
        if number == _DATA and value is not None:
            data, prefix = value, view[: end - len(value)]
        else:
            header.append(view[start:end])
            prefix = memoryview(b"")
    num_bytes = sum(map(len, header))
    if num_bytes > _MAX_TENSOR_HEADER_BYTES:
        rule = f"must have at most {_MAX_TENSOR_HEADER_BYTES}"
        raise InvalidRequest(f"{name} has {num_bytes} bytes beside its elements, but {rule}", field=name)
    message = tensor_pb2.Tensor.FromString(b"".join(header))
    if message.HasField("region"):
        if region is None:
            raise InvalidRequest(f"{name} lies in region {message.region.id}, but this plane is inline", field=name)
        if data is not None:
            raise InvalidRequest(f"{name} has data and a region, but must have one of the two", field=name)
        return region.array(message, name), memoryview(b"")
    return Array(message.dtype, tuple(message.shape), memoryview(b"") if data is None else data), prefix


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)


ATTEND_REQUEST = Frame(attention_pb2.AttendRequest, "call", "q", "k", "v")
ATTEND_RESPONSE = Frame(attention_pb2.AttendResponse, "call", "lse", "output")
PREFILL_REQUEST = Frame(attention_pb2.PrefillRequest, "call", "q", "k", "v")
PREFILL_RESPONSE = Frame(attention_pb2.PrefillResponse, "reply", "lse", "output")
DECODE_REQUEST = Frame(attention_pb2.DecodeRequest, "call", "q", "k", "v")
DECODE_RESPONSE = Frame(attention_pb2.DecodeResponse, "reply", "lse", "output")
STORE_KV_REQUEST = Frame(attention_pb2.StoreKvRequest, "", "k", "v")
READ_KV_RESPONSE = Frame(attention_pb2.ReadKvResponse, "", "k", "v")

"""The hand-framed decoder beside protobuf's own parser: they agree, or the decoder is stricter by a rule it names."""

from __future__ import annotations

import math
import mmap
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from attnd.errors import InvalidRequest
from attnd.protocol import frames
from attnd.protocol.regions import Region
from attnd.protocol.tensors import ITEM_SIZES
from attnd.v1 import tensor_pb2


class Frame(NamedTuple):
    """A frame of the contract.

    Attributes:
        frame: decodes it.
        holder: its field that holds the tensors; "" if it does so itself.
        tensors: their fields.
    """

    frame: frames.Frame
    holder: str
    tensors: tuple[str, ...]


FRAMES = {
    "AttendRequest": Frame(frames.ATTEND_REQUEST, "call", ("q", "k", "v")),
    "AttendResponse": Frame(frames.ATTEND_RESPONSE, "call", ("lse", "output")),
    "PrefillRequest": Frame(frames.PREFILL_REQUEST, "call", ("q", "k", "v")),
    "PrefillResponse": Frame(frames.PREFILL_RESPONSE, "reply", ("lse", "output")),
    "DecodeRequest": Frame(frames.DECODE_REQUEST, "call", ("q", "k", "v")),
    "DecodeResponse": Frame(frames.DECODE_RESPONSE, "reply", ("lse", "output")),
    "StoreKvRequest": Frame(frames.STORE_KV_REQUEST, "", ("k", "v")),
    "ReadKvResponse": Frame(frames.READ_KV_RESPONSE, "", ("k", "v")),
}

# What protobuf takes and the decoder does not. No generated code writes any of it.
STRICTER = (
    "but there is no such type",  # groups, which proto3 does not have
    "but must be given once",  # protobuf merges a field that comes twice
    "but must have one of the two",  # a tensor with data and a region: protobuf keeps the last
    "but this plane is inline",  # a tensor in a region that is not there
    "but this plane has region",
    "but must have a multiple of 64",
    "but the plane's region ends at byte 256",
    "but must be one of",  # a dtype that has no size
    "but must have at most 8 extents",
    "starts a field beyond the",  # more fields than a message of ours has
)

_memory = mmap.mmap(-1, 256)
_memory[:] = bytes(range(256))
REGION = Region(1, _memory)


def check(name: str, data: bytes, region: Region | None = None) -> str:
    """Decodes `data` as the frame `name` in both ways, and fails if they differ.

    Args:
        name: a key of `FRAMES`.
        data: anything.
        region: `REGION`, or None for a plane that has none.

    Returns:
        What came of it: "accepted", "refused" or "stricter".
    """
    frame, holder, fields = FRAMES[name]
    try:
        plain: Any = frame.message_type.FromString(data)
    except DecodeError:
        plain = None
    try:
        message, tensors = frame.decode(data, region)
    except InvalidRequest as refusal:
        if plain is None:
            return "refused"
        told = str(refusal)
    else:
        told = ""
    if told:
        assert any(rule in told for rule in STRICTER), f"{name} {data[:999]!r}: {told}"
        return "stricter"
    assert plain is not None, f"{name} {data[:999]!r}: protobuf refuses what was accepted"
    expected = {}
    held = getattr(plain, holder) if holder else plain
    for field in fields:
        if (not holder or plain.HasField(holder)) and held.HasField(field):
            tensor = getattr(held, field)
            found = tensors[field]
            expected[field] = (tensor.dtype, tuple(tensor.shape), _elements(tensor, found.data.nbytes))
            held.ClearField(field)
    found_all = {field: (array.dtype, array.shape, bytes(array.data)) for field, array in tensors.items()}
    assert found_all == expected, f"{name} {data[:999]!r}: {found_all} instead of {expected}"
    assert message == plain, f"{name} {data[:999]!r}: {message} instead of {plain}"
    return "accepted"


def _elements(tensor: tensor_pb2.Tensor, num_bytes: int) -> bytes:
    """What lies where protobuf says that the elements are; `num_bytes` of them if that is in the region."""
    if tensor.WhichOneof("storage") != "region":
        return tensor.data
    assert tensor.region.id == REGION.id
    assert num_bytes == ITEM_SIZES[tensor.dtype] * math.prod(tensor.shape)
    return bytes(range(256))[tensor.region.offset :][:num_bytes]

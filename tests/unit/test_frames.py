"""Framing by hand gives what protobuf gives, and reads whatever protobuf writes."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from attnd.errors import InvalidRequest
from attnd.protocol import frames
from attnd.protocol.tensors import Array, to_array, torch_tensor
from attnd.v1 import attention_pb2, cache_pb2, step_pb2, tensor_pb2

FRAMES = {
    "AttendRequest": (frames.ATTEND_REQUEST, "call", step_pb2.Call),
    "AttendResponse": (frames.ATTEND_RESPONSE, "call", step_pb2.CallReply),
    "PrefillRequest": (frames.PREFILL_REQUEST, "call", step_pb2.Call),
    "PrefillResponse": (frames.PREFILL_RESPONSE, "reply", step_pb2.CallReply),
    "DecodeRequest": (frames.DECODE_REQUEST, "call", step_pb2.Call),
    "DecodeResponse": (frames.DECODE_RESPONSE, "reply", step_pb2.CallReply),
    "StoreKvRequest": (frames.STORE_KV_REQUEST, "", attention_pb2.StoreKvRequest),
    "ReadKvResponse": (frames.READ_KV_RESPONSE, "", attention_pb2.ReadKvResponse),
}
arrays = st.builds(
    lambda shape, seed: to_array(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), "q"),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.integers(0, 2**31),
)


def fields(message_type: type[Message]) -> list[str]:
    names = [
        field.name for field in message_type.DESCRIPTOR.fields if field.message_type is tensor_pb2.Tensor.DESCRIPTOR
    ]
    return [name for name in names if name != "slot_mapping"]


def as_message(array: Array) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=array.dtype, shape=array.shape, data=bytes(array.data))


@pytest.mark.parametrize("name", FRAMES)
@given(data=st.data())
def test_framed_is_what_protobuf_serializes(name: str, data: st.DataObject) -> None:
    frame, holder, holder_type = FRAMES[name]
    tensors = data.draw(st.dictionaries(st.sampled_from(fields(holder_type)), arrays))
    header = (
        holder_type(layer=data.draw(st.integers(0, 2**32 - 1))) if name != "ReadKvResponse" else holder_type(first=7)
    )
    plain: Any = frame.message_type()
    target = getattr(plain, holder) if holder else plain
    target.MergeFrom(header)
    if holder:
        target.SetInParent()
    for field, array in tensors.items():
        getattr(target, field).CopyFrom(as_message(array))
    outer = b""
    if name in ("PrefillRequest", "DecodeRequest"):
        plain.step.id = 9
        outer = frame.message_type(step=step_pb2.Step(id=9)).SerializeToString()

    encoded = frame.encode(header, tensors, outer)
    assert frame.message_type.FromString(encoded) == plain
    for data_on_the_wire in (encoded, plain.SerializeToString()):
        message, read = frame.decode(data_on_the_wire)
        assert {field: (array.dtype, array.shape, bytes(array.data)) for field, array in read.items()} == {
            field: (array.dtype, array.shape, bytes(array.data)) for field, array in tensors.items()
        }
        held = getattr(message, holder) if holder else message
        assert held == header


@pytest.mark.parametrize("name", FRAMES)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_as_protobuf_reads_them_or_refused(name: str, data: bytes) -> None:
    frame, _, _ = FRAMES[name]
    try:
        frame.decode(data)
    except InvalidRequest as refused:
        told = str(refused)
    else:
        return
    assert "is not a whole" in told or "region" in told


@given(st.data())
def test_a_message_with_flipped_bytes_never_gives_more_than_protobuf_does(data: st.DataObject) -> None:
    tensors = {name: to_array(torch.randn(2, 3), name) for name in ("q", "k", "v")}
    whole = bytearray(frames.ATTEND_REQUEST.encode(step_pb2.Call(step_id=3, layer=200), tensors))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        message, read = frames.ATTEND_REQUEST.decode(bytes(whole))
    except InvalidRequest:
        return
    try:
        plain = attention_pb2.AttendRequest.FromString(bytes(whole))
    except DecodeError:
        return  # stricter inside a field that we leave to the validator, such as an enum's bytes
    assert message.WhichOneof("message") == plain.WhichOneof("message")
    for name, array in read.items():
        assert array.data.nbytes <= len(whole), name


@pytest.mark.parametrize("length", range(1, 60))
def test_a_message_cut_short_is_refused(length: int) -> None:
    tensors = {name: to_array(torch.randn(2, 3), name) for name in ("q", "k", "v")}
    whole = frames.ATTEND_REQUEST.encode(step_pb2.Call(step_id=3, layer=200), tensors)
    with pytest.raises(InvalidRequest, match=f"message of {length} bytes is not a whole AttendRequest"):
        frames.ATTEND_REQUEST.decode(whole[:length])


def test_tensors_are_views_of_the_received_bytes() -> None:
    data = frames.ATTEND_REQUEST.encode(step_pb2.Call(), {"q": to_array(torch.randn(256, 1024), "q")})
    tracemalloc.start()
    try:
        _, tensors = frames.ATTEND_REQUEST.decode(data)
        tensor = torch_tensor(tensors["q"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 10 < len(data)
    assert tensor.shape == (256, 1024)


def test_encoding_copies_a_tensor_once() -> None:
    tensor = torch.randn(256, 1024)
    tracemalloc.start()
    try:
        data = frames.ATTEND_REQUEST.encode(step_pb2.Call(), {"q": to_array(tensor, "q")})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tensor.nbytes <= len(data) <= peak < len(data) + (64 << 10)


def test_a_region_is_refused_on_the_inline_plane() -> None:
    region = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[1], region=tensor_pb2.Region(id=4))
    data = attention_pb2.AttendRequest(call=step_pb2.Call(q=region)).SerializeToString()
    with pytest.raises(InvalidRequest, match="q lies in region 4, but this plane is inline"):
        frames.ATTEND_REQUEST.decode(data)


def test_parse_names_the_message() -> None:
    with pytest.raises(InvalidRequest, match="message of 2 bytes is not a whole CreateCacheRequest"):
        frames.parse(cache_pb2.CreateCacheRequest, b"\xff\xff")

"""Fields are counted before protobuf makes an object of each, wherever in a message they are."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from google.protobuf.message import Message

from attnd.errors import InvalidRequest
from attnd.protocol import fields, frames
from attnd.v1 import attention_pb2, cache_pb2, plane_pb2, step_pb2, tensor_pb2
from attnd_server import inproc
from attnd_server.config import ServerConfig
from attnd_server.planes.cuda.session import MAX_STEP_FIELDS
from attnd_server.service.session import BIG_HEADER_BYTES
from tests.servers import ROOT

UNKNOWN = b"\x78\x01"  # field 15, varint 1
MANY = fields.MAX_FIELDS + 1
REQUESTS: dict[str, type[Message]] = {
    "Attend": attention_pb2.AttendRequest,
    "Prefill": attention_pb2.PrefillRequest,
    "Decode": attention_pb2.DecodeRequest,
    "StoreKv": attention_pb2.StoreKvRequest,
    "ReadKv": attention_pb2.ReadKvRequest,
    "CreateCache": cache_pb2.CreateCacheRequest,
    "RenewCache": cache_pb2.RenewCacheRequest,
    "CopyPages": cache_pb2.CopyPagesRequest,
    "WarmUp": attention_pb2.WarmUpRequest,
    "OpenPlane": plane_pb2.OpenPlaneRequest,
    "ClosePlane": plane_pb2.ClosePlaneRequest,
}


def inside(message: bytes, *numbers: int) -> bytes:
    """A message that has another, in fields from the innermost outwards."""
    for number in numbers:
        size, length = len(message), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        message = bytes([number << 3 | 2]) + length + bytes([size]) + message
    return message


WAYS = {
    "unknown": UNKNOWN * MANY,
    "unknown, empty": b"\x7a\x00" * MANY,
    "in a submessage": inside(UNKNOWN * MANY, 1),
    "in submessages of a submessage": inside(inside(UNKNOWN * 8, 2) * MANY, 1),
    "the same submessage": b"\x0a\x00" * MANY,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", REQUESTS)
def test_a_message_with_more_fields_than_the_limit_is_refused(method: str, way: str) -> None:
    rule = f"beyond the {fields.MAX_FIELDS} that a message may have|a field of wire type|past the end"
    with pytest.raises(InvalidRequest, match=rule):
        frames.parse(REQUESTS[method], WAYS[way])


@pytest.mark.parametrize("frame", [frames.ATTEND_REQUEST, frames.PREFILL_REQUEST, frames.STORE_KV_REQUEST])
@pytest.mark.parametrize(
    "data",
    [
        UNKNOWN * MANY,
        inside(UNKNOWN * MANY, 1),
        inside(UNKNOWN * MANY, 2),
        inside(UNKNOWN * MANY, 3, 2),
        inside(UNKNOWN * (MANY // 2), 3) + inside(UNKNOWN * (MANY // 2), 4, 2),
    ],
)
def test_a_message_with_tensors_is_counted_too(frame: frames.Frame, data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        frame.decode(data)


def test_elements_of_packed_fields_count() -> None:
    shape = inside(b"\x01" * (3 * MANY), 2)
    with pytest.raises(InvalidRequest, match=f"beyond the {fields.MAX_FIELDS}"):
        frames.parse(attention_pb2.ReadKvRequest, inside(shape, 3))
    with pytest.raises(InvalidRequest, match="q has 12294 bytes beside its elements, but must have at most 1024"):
        frames.ATTEND_REQUEST.decode(inside(shape, 4, 2))


def test_a_header_beyond_the_limit_is_refused_before_it_is_copied() -> None:
    data = inside(bytes(1000), 15, 2)
    with pytest.raises(InvalidRequest, match="AttendRequest has 1003 bytes beside the tensors of a call"):
        frames.ATTEND_REQUEST.decode(data, max_header_bytes=1002)


def test_empty_options_of_a_cuda_step_are_counted_within_the_limit_of_one() -> None:
    def step(num_options: int) -> bytes:
        options = [step_pb2.AttentionOptions(scale=1, softcap=2, window=3)] * num_options
        message = attention_pb2.AttendRequest(cuda_step=attention_pb2.CudaStep(num_heads=1, options=options))
        return message.SerializeToString()

    message: Any = frames.parse(attention_pb2.AttendRequest, step(1_000), MAX_STEP_FIELDS)
    assert len(message.cuda_step.options) == 1_000
    for data in (step(5_000), inside(b"\x1a\x00" * 2_000_000, 3)):
        with pytest.raises(InvalidRequest, match=f"beyond the {MAX_STEP_FIELDS}"):
            frames.parse(attention_pb2.AttendRequest, data, MAX_STEP_FIELDS)


def test_what_honest_peers_send_is_within_the_limits() -> None:
    table = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT32, shape=[1, 1 << 21], data=bytes(8 << 20))
    names = [field.name for field in step_pb2.Step.DESCRIPTOR.fields if field.message_type is table.DESCRIPTOR]
    step = step_pb2.Step(id=1, **dict.fromkeys(names, table))
    message, _ = frames.ATTEND_REQUEST.decode(frames.step_request(step))
    assert message.step == step
    info = cache_pb2.CacheInfo(cache=cache_pb2.CacheRef(id=b"1" * 16, epoch=1), name="name", num_bytes=1, ttl_s=1)
    info.config.k_scales.CopyFrom(tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[1024], data=bytes(4096)))
    response = cache_pb2.ListCachesResponse(caches=[info] * 10_000)
    parsed: Any = frames.parse(cache_pb2.ListCachesResponse, response.SerializeToString(), frames.MAX_LIST_FIELDS)
    assert len(parsed.caches) == 10_000


def test_a_call_with_a_header_like_that_of_a_step_is_refused() -> None:
    transport = inproc.connect(ServerConfig(device="cpu"))
    try:
        stream = transport.attend()
        stream.send(inside(inside(bytes(BIG_HEADER_BYTES), 15), 2))
        answer = stream.receive(30)
    finally:
        transport.close()
    assert "bytes beside the tensors of a call, but must have at most 262144" in answer.message.message


LIMITED = """
import resource
from attnd.errors import InvalidRequest
from attnd.protocol import frames
from attnd.v1 import attention_pb2
import torch  # what a server has loaded
data = {ways}
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
for each in data:
    for read in (frames.ATTEND_REQUEST.decode, lambda data: frames.parse(attention_pb2.AttendRequest, data)):
        try:
            read(each)
        except InvalidRequest:
            print("refused")
"""


def test_refusing_millions_of_fields_takes_no_memory() -> None:
    """Of 8 MiB of unknown fields protobuf makes 1.5 GB."""
    ways = r'[b"\x78\x01" * (4 << 20), b"\x0a\x80\x80\x80\x04" + b"\x78\x01" * (4 << 20), b"\x1a\x80\x80\x80\x02"'
    ways += r' + b"\x1a\x00" * (2 << 20)]'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "client"), *filter(None, sys.path)])}
    command = [sys.executable, "-c", LIMITED.format(ways=ways)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["refused"] * 6, done.stderr

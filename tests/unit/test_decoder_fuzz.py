"""The hand-framed decoder reads what protobuf reads, or refuses by a rule that it names."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnd.errors import InvalidRequest
from attnd.protocol import frames
from attnd.v1 import attention_pb2, step_pb2, tensor_pb2
from tests.fuzz.decoder import FRAMES, REGION, check
from tests.fuzz.decoder_target import check_input, read_corpus


def test_what_a_fuzzer_found_is_read_alike() -> None:
    outcomes = Counter(check_input(data) for data in read_corpus())
    assert min(outcomes[outcome] for outcome in ("accepted", "refused", "stricter")) >= 5


def tensor(**changes: Any) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[1, 2], **(changes or {"data": bytes(8)}))


@pytest.mark.parametrize("name", FRAMES)
@settings(deadline=None, derandomize=True, max_examples=100)
@given(data=st.data())
def test_parts_of_valid_messages_in_any_order_are_read_alike(name: str, data: st.DataObject) -> None:
    frame, holder, fields = FRAMES[name]
    pieces = []
    for field in fields:
        for value in (tensor(), tensor(region=tensor_pb2.Region(id=1, offset=64))):
            message = frame.message_type()
            getattr(getattr(message, holder) if holder else message, field).CopyFrom(value)
            pieces.append(message.SerializeToString())
    pieces += [bytes([number << 3 | 2, 0]) for number in (1, 2, 3)]
    chosen = b"".join(data.draw(st.lists(st.sampled_from(pieces), max_size=4)))
    check(name, chosen, data.draw(st.sampled_from([None, REGION])))


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content


CALL, STEP = 2, 1  # of AttendRequest
Q = 4  # of Call


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (field(CALL, field(Q, b"") * 2), "q comes twice, but must be given once"),
        (field(CALL, b"") * 2, "call comes twice, but must be given once"),
        (b"\x0b\x0c", "wire type 3, but there is no such type"),
        (b"\x8a\x80\x80\x80\x10", "key has more than 32 bits"),
        (b"\x92\x80\x80\x80\x80\x00\x00", "longer than 5 bytes"),
        (b"\x12\x80\x80\x80\x80\x80\x00", "longer than 5 bytes"),
    ],
)
def test_what_no_generated_code_writes_is_refused(data: bytes, rule: str) -> None:
    with pytest.raises(InvalidRequest, match=rule):
        frames.ATTEND_REQUEST.decode(data)


def test_a_tensor_has_one_storage() -> None:
    both = tensor().SerializeToString() + tensor(region=tensor_pb2.Region(id=1)).SerializeToString()
    with pytest.raises(InvalidRequest, match="q has data and a region, but must have one of the two"):
        frames.ATTEND_REQUEST.decode(field(CALL, field(Q, both)), REGION)


def test_tensors_of_a_call_are_gone_if_a_step_comes_behind_it() -> None:
    call = attention_pb2.AttendRequest(call=step_pb2.Call(q=tensor())).SerializeToString()
    message, tensors = frames.ATTEND_REQUEST.decode(call + field(STEP, b""))
    assert message.WhichOneof("message") == "step"
    assert tensors == {}

"""`KVSplit` to the wire."""

from __future__ import annotations

import numpy as np
import pytest

from attnd import InvalidRequest, KVSplit
from attnd.v1 import cache_pb2


def test_defaults_are_an_empty_message() -> None:
    message = KVSplit().to_message()
    assert message.SerializeToString() == b""
    assert not message.HasField("batch_invariant")


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_every_field_travels(batch_invariant: bool) -> None:
    sent = KVSplit(chunk_size=np.int64(256), max_splits=7, batch_invariant=batch_invariant).to_message()
    message = cache_pb2.KvSplit.FromString(sent.SerializeToString())
    assert (message.chunk_size, message.max_splits, message.batch_invariant) == (256, 7, batch_invariant)
    assert message.HasField("batch_invariant")


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("chunk_size", -16, "is -16, but must be an integer in 0..4294967295"),
        ("chunk_size", 16.0, "is 16.0, but must be an integer in 0..4294967295"),
        ("max_splits", 1 << 32, "is 4294967296, but must be an integer in 0..4294967295"),
        ("max_splits", None, "is None, but must be an integer in 0..4294967295"),
        ("batch_invariant", "no", "is 'no', but must be True, False or None"),
        ("batch_invariant", 1, "is 1, but must be True, False or None"),
    ],
)
def test_refuses_what_the_wire_cannot_carry(field: str, value: object, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        KVSplit(**{field: value}).to_message()  # type: ignore[arg-type]
    assert str(caught.value) == f"kv_split.{field} {text}"
    assert caught.value.field == f"kv_split.{field}"

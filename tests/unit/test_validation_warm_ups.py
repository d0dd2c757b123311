"""Which warm-ups are refused, and why."""

from __future__ import annotations

import pytest

from attnd.errors import InvalidRequest
from attnd.v1 import attention_pb2, step_pb2
from attnd_server.attention.backends.base import DecodeShape
from attnd_server.attention.config import AttentionBackend
from attnd_server.config import ServerConfig
from attnd_server.service import validation
from attnd_server.service.validation.warm_ups import WarmSteps
from attnd_server.service.warm_up import shapes_of
from tests.unit.wire_messages import CONFIG, LIMITS, NUM_PAGES, PAGE_SIZE, tensor

VALID = {"num_heads": 4, "query_len": 2, "max_reqs": 3, "max_context_len": 9}


def check(**changes: object) -> WarmSteps:
    return validation.warm_up(attention_pb2.WarmUpRequest(**{**VALID, **changes}), CONFIG, LIMITS)


def test_a_valid_one() -> None:
    options = step_pb2.AttentionOptions(softcap=3, sinks=tensor([0, 1, 2, 3], "float32"))
    options, *sizes = check(options=options)
    assert sizes == [2, 3, 9]
    assert (options.num_heads, options.softcap, options.scale) == (4, 3.0, 0.25)
    assert options.sinks.tolist() == [0, 1, 2, 3]
    assert options.backend is AttentionBackend.AUTO


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("num_heads", 0, "is 0, but must be a multiple of the cache's 2 KV heads, and at least 2"),
        ("num_heads", 3, "is 3, but must be a multiple of the cache's 2 KV heads, and at least 2"),
        ("query_len", 0, "is 0, but must be 1..16"),
        ("query_len", 17, "is 17, but must be 1..16"),
        ("query_len", 6, "max_reqs is 3 with a query_len of 6, but a step has at most 16 new tokens"),
        ("max_reqs", 0, "is 0, but must be 1..4"),
        ("max_reqs", 5, "is 5, but must be 1..4"),
        ("max_context_len", (1 << 20) + 1, "is 1048577, but must be 0..1048576"),
        ("options", step_pb2.AttentionOptions(softcap=-1), "softcap is -1, but must be finite and at least 0"),
        ("options", step_pb2.AttentionOptions(sinks=tensor([0], "float32")), "sinks has shape [1], but must be [4]"),
        ("num_heads", 1 << 30, "max_reqs asks for calls of 618475290624 bytes of q or output, but a message has room"),
    ],
)
def test_refusals(field: str, value: object, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(**{field: value})
    assert text in str(caught.value)
    assert str(caught.value).startswith(caught.value.field)


def test_contexts_are_as_long_as_steps_can_be() -> None:
    def shapes(max_context_len: int, limits: ServerConfig) -> list[DecodeShape]:
        return shapes_of(check(max_context_len=max_context_len, query_len=1), CONFIG, limits)

    whole = NUM_PAGES * PAGE_SIZE
    assert shapes(9, ServerConfig()) == [DecodeShape(1, 1, 9), DecodeShape(3, 1, 9)]
    assert shapes(0, ServerConfig()) == [DecodeShape(1, 1, whole), DecodeShape(3, 1, whole)]
    assert shapes(1 << 20, ServerConfig()) == [DecodeShape(1, 1, whole), DecodeShape(3, 1, whole)]
    assert shapes(0, ServerConfig(max_context_len=7)) == [DecodeShape(1, 1, 7), DecodeShape(3, 1, 7)]
    # 8 pages in a table for one request, 2 for each of three.
    assert shapes(0, ServerConfig(max_page_table_elements=8)) == [DecodeShape(1, 1, whole), DecodeShape(3, 1, 8)]

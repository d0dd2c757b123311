"""What resident steps have in common: which numbers a server takes, and what it says of others."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from attnd.errors import InvalidRequest
from attnd.v1 import attention_pb2, step_pb2
from attnd_server.attention.metadata import MOST_COLUMN
from attnd_server.config import ServerConfig
from attnd_server.service import validation
from tests.unit.wire_messages import CONFIG, NUM_PAGES, PAGE_SIZE

LIMITS = ServerConfig(max_step_tokens=64, max_step_reqs=16, max_page_table_elements=128, max_context_len=777)


def message(**changes: Any) -> attention_pb2.ResidentSteps:
    """Eight requests of two new tokens and four pages."""
    fields: dict[str, Any] = {"query_len": 2, "max_reqs": 8, "max_pages": 4, "mask": step_pb2.MASK_CAUSAL}
    return attention_pb2.ResidentSteps(**fields | changes)


def refusal(**changes: Any) -> tuple[str, str]:
    """Field and text."""
    with pytest.raises(InvalidRequest) as refused:
        validation.resident_sizes(message(**changes), CONFIG, LIMITS)
    return refused.value.field, str(refused.value)


def test_sizes_are_those_of_the_message_the_cache_and_the_server() -> None:
    sizes = validation.resident_sizes(message(), CONFIG, LIMITS)
    assert sizes._asdict() == {
        "max_reqs": 8,
        "max_pages": 4,
        "query_len": 2,
        "page_size": PAGE_SIZE,
        "num_pages": NUM_PAGES,
        "max_context_len": 777,
        "window": 0,
        "block_size": 1,
    }
    assert validation.resident_sizes(message(), replace(CONFIG, window=6), LIMITS).window == 6


def test_requests_and_pages_are_rounded_up_as_their_metadata_is_laid_out() -> None:
    sizes = validation.resident_sizes(message(max_reqs=5, max_pages=1), CONFIG, LIMITS)
    assert (sizes.max_reqs, sizes.max_pages) == (8, 4)


@pytest.mark.parametrize(
    ("name", "value", "most"),
    [
        ("query_len", 0, 64),
        ("query_len", 65, 64),
        ("max_reqs", 0, 16),
        ("max_reqs", 17, 16),
        ("max_pages", 0, 128),
        ("max_pages", 129, 128),
        ("max_reqs", (1 << 32) - 1, 16),
        ("query_len", (1 << 32) - 1, 64),
        ("max_pages", (1 << 32) - 1, 128),
    ],
)
def test_numbers_have_limits(name: str, value: int, most: int) -> None:
    assert refusal(**{name: value}) == (name, f"{name} is {value}, but must be 1..{most}")


@pytest.mark.parametrize(
    "changes",
    [
        {"query_len": 64, "max_reqs": 1, "max_pages": 1},
        {"query_len": 4, "max_reqs": 16, "max_pages": 8},
        {"query_len": 1, "max_reqs": 4, "max_pages": 32},
    ],
)
def test_no_more_tokens_or_elements_than_those_of_a_step(changes: dict[str, int]) -> None:
    """What just fits, where requests are not rounded up, and one more of either."""
    changes["max_reqs"] = max(4, changes["max_reqs"])
    tokens = changes | {"query_len": 64 // changes["max_reqs"]}
    pages = tokens | {"max_pages": 128 // changes["max_reqs"]}
    assert validation.resident_sizes(message(**pages), CONFIG, LIMITS).max_pages == pages["max_pages"]
    reqs = changes["max_reqs"]
    assert refusal(**pages | {"query_len": pages["query_len"] + 1}) == (
        "max_reqs",
        f"max_reqs is {reqs} with {pages['query_len'] + 1} new tokens each, but a step has at most 64 new tokens",
    )
    assert refusal(**pages | {"max_pages": pages["max_pages"] + 1}) == (
        "max_pages",
        f"max_pages is {pages['max_pages'] + 4} for each of {reqs} requests, but page tables have at most 128 elements",
    )


def test_tokens_of_requests_that_are_there_because_of_rounding_count() -> None:
    """The memory of a step is laid out for them."""
    assert validation.resident_sizes(message(max_reqs=9, query_len=5), CONFIG, LIMITS).max_reqs == 12
    assert refusal(max_reqs=13, query_len=4 + 1)[1].startswith("max_reqs is 16 with 5 new tokens each")


@pytest.mark.parametrize(
    ("mask", "block_size", "expected"),
    [
        (step_pb2.MASK_CAUSAL, 0, 1),
        (step_pb2.MASK_CAUSAL, 9, 1),
        (step_pb2.MASK_BLOCK_CAUSAL, 1, 1),
        (step_pb2.MASK_BLOCK_CAUSAL, 32, 32),
        (step_pb2.MASK_BLOCK_CAUSAL, (1 << 32) - 1, MOST_COLUMN),
        (step_pb2.MASK_BIDIRECTIONAL, 0, 0),
        (step_pb2.MASK_BIDIRECTIONAL, 9, 0),
    ],
)
def test_a_mask_is_told_by_the_size_of_its_blocks(mask: step_pb2.Mask, block_size: int, expected: int) -> None:
    sizes = validation.resident_sizes(message(mask=mask, block_size=block_size), CONFIG, LIMITS)
    assert sizes.block_size == expected


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (step_pb2.MASK_UNSPECIFIED, "unspecified"),
        (step_pb2.MASK_PREFIX_FULL, str(int(step_pb2.MASK_PREFIX_FULL))),
        (99, "99"),
    ],
)
def test_other_masks_are_refused(mask: int, told: str) -> None:
    rule = "must be MASK_CAUSAL, MASK_BLOCK_CAUSAL or MASK_BIDIRECTIONAL in resident steps"
    assert refusal(mask=mask, block_size=4) == ("mask", f"mask is {told}, but {rule}")


def test_blocks_of_a_block_causal_mask_have_a_size() -> None:
    expected = "block_size is 0, but must be at least 1 for a block-causal mask"
    assert refusal(mask=step_pb2.MASK_BLOCK_CAUSAL) == ("block_size", expected)


def test_a_class_has_no_more_requests_than_a_step_may_have() -> None:
    """The GPU would accept a step of seven requests, which the host refuses."""
    limits = replace(LIMITS, max_step_reqs=6)
    with pytest.raises(InvalidRequest, match="max_reqs"):
        assert validation.resident_sizes(message(max_reqs=6), CONFIG, limits).max_reqs <= 6


@pytest.mark.parametrize("seed", range(3))
def test_sizes_that_are_taken_are_within_every_limit(seed: int) -> None:
    chance, num_taken, fields = random.Random(seed), 0, set[str]()
    for _ in range(2000):
        numbers = [chance.choice((1, 2, 3, chance.randint(0, 140))) for _ in range(3)]
        asked = dict(zip(("query_len", "max_reqs", "max_pages"), numbers, strict=True))
        try:
            sizes = validation.resident_sizes(message(**asked), CONFIG, LIMITS)
        except InvalidRequest as refused:
            fields.add(refused.field)
            continue
        num_taken += 1
        assert asked["max_reqs"] <= sizes.max_reqs <= LIMITS.max_step_reqs
        assert asked["max_pages"] <= sizes.max_pages
        assert sizes.max_reqs * sizes.query_len <= LIMITS.max_step_tokens
        assert sizes.max_reqs * sizes.max_pages <= LIMITS.max_page_table_elements
    assert num_taken > 100
    assert fields == {"query_len", "max_reqs", "max_pages"}

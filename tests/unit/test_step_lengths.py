"""Lengths of a step as engines have them: cumulated, with the new tokens counted, and padded to a fixed batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnd.errors import InvalidRequest
from attnd.protocol.step_metadata import StepMetadata
from attnd.v1 import cache_pb2, step_pb2, tensor_pb2
from tests.unit.plain import elements, with_narrow_slots
from tests.unit.test_step_metadata import KINDS_OF_ARRAYS

REF = cache_pb2.CacheRef(id=bytes(range(16)), epoch=7)
# New and cached tokens of requests: none, one, a page less one, a page, a page and one; and a row that pads.
QUERY_LENS, CONTEXT_LENS = [3, 1, 0, 1, 5], [16, 15, 17, -1, 0]
TABLES = [[4, 9], [2, -1], [7, 3], [-1, -1], [5, -1]]
SLOTS = [144, 145, 146, 47, -1, 80, 81, 82, 83, 84]


def said(make=lambda values: values, *, lens: str, contexts: str, slots=SLOTS, **changes) -> step_pb2.Step:
    """The same step in one of four ways."""
    given = {
        "query_lens": QUERY_LENS,
        "cu_seqlens_q": [0, 3, 4, 4, 5, 10],
        "context_lens": CONTEXT_LENS,
        "seq_lens": [19, 16, 17, 0, 5],
    }
    fields = {name: make(given[name]) for name in (lens, contexts)}
    return StepMetadata(page_tables=make(TABLES), slot_mapping=make(slots), **{**fields, **changes}).to_message(3, REF)


@pytest.mark.parametrize("contexts", ["context_lens", "seq_lens"])
@pytest.mark.parametrize("lens", ["query_lens", "cu_seqlens_q"])
@pytest.mark.parametrize("make", KINDS_OF_ARRAYS.values(), ids=KINDS_OF_ARRAYS)
def test_every_way_to_say_lengths_gives_the_same_message(make, lens: str, contexts: str) -> None:
    message = said(make, lens=lens, contexts=contexts)
    assert elements(message.cu_seqlens_q) == [0, 3, 4, 4, 5, 10]
    assert elements(message.context_lens) == CONTEXT_LENS
    assert with_narrow_slots(message) == said(lens="query_lens", contexts="context_lens")


def test_ways_may_be_mixed_of_different_kinds_of_arrays() -> None:
    message = said(lens="query_lens", contexts="seq_lens", seq_lens=torch.tensor([19, 16, 17, 0, 5]))
    mixed = said(np.array, lens="cu_seqlens_q", contexts="context_lens", context_lens=CONTEXT_LENS)
    assert with_narrow_slots(mixed) == message


def test_a_padded_row_says_that_it_has_not_even_its_new_tokens() -> None:
    metadata = StepMetadata(cu_seqlens_q=[0, 1, 2, 2], seq_lens=[9, 0, 0], page_tables=[[1], [0], [0]], kind="decode")
    message = metadata.to_message(1, REF)
    assert elements(message.context_lens) == [8, -1, 0]


def test_a_step_knows_its_size() -> None:
    for fields in ({"query_lens": QUERY_LENS}, {"cu_seqlens_q": torch.tensor([0, 3, 4, 4, 5, 10])}):
        metadata = StepMetadata(context_lens=CONTEXT_LENS, page_tables=TABLES, **fields)
        assert (metadata.num_tokens, metadata.num_reqs) == (10, 5)
    empty = StepMetadata([], [], [], [])
    assert (empty.num_tokens, empty.num_reqs) == (0, 0)


def test_a_step_is_read_anew_each_time_it_is_sent() -> None:
    lens = np.array([1, 1], np.int32)
    metadata = StepMetadata(lens, [0, 0], [[1], [2]])
    assert metadata.num_tokens == 2
    lens[:] = 3, 2
    assert metadata.num_tokens == 5
    assert elements(metadata.to_message(1, REF).cu_seqlens_q) == [0, 3, 5]


@pytest.mark.parametrize("make", KINDS_OF_ARRAYS.values(), ids=KINDS_OF_ARRAYS)
def test_slots_past_the_tokens_are_cut_off(make) -> None:
    whole = said(lens="query_lens", contexts="context_lens")
    by_context = said(make, lens="query_lens", contexts="context_lens", slots=[*SLOTS, -1, -1, -1])
    by_length = said(make, lens="cu_seqlens_q", contexts="seq_lens", slots=[*SLOTS, -1])
    assert with_narrow_slots(by_context) == with_narrow_slots(by_length) == whole


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_slots_beyond_32_bits_are_cut_off_too(make) -> None:
    message = said(lens="query_lens", contexts="context_lens", slots=make([1 << 40, *SLOTS[1:], -1, -1]))
    assert message.slot_mapping.dtype == tensor_pb2.DTYPE_INT64
    assert elements(message.slot_mapping) == [1 << 40, *SLOTS[1:]]


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
@pytest.mark.parametrize("slot", [0, -2, 1 << 40])
def test_a_slot_of_no_token_is_refused(make, slot: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        said(lens="query_lens", contexts="context_lens", slots=make([*SLOTS, -1, slot, -1]))
    assert str(caught.value) == f"slot_mapping[11] is {slot}, but must be -1 past the step's 10 tokens"
    assert caught.value.field == "slot_mapping"


def test_too_few_slots_are_left_for_the_server_to_refuse() -> None:
    assert elements(said(lens="query_lens", contexts="context_lens", slots=SLOTS[:-1]).slot_mapping) == SLOTS[:-1]


REFUSED = {
    "both_new": (
        {"query_lens": [1], "cu_seqlens_q": [0, 1], "context_lens": [0]},
        "query_lens and cu_seqlens_q are both given, but must be one of the two",
    ),
    "no_new": (
        {"context_lens": [0]},
        "query_lens and cu_seqlens_q are None, but one of the two must be given",
    ),
    "both_cached": (
        {"query_lens": [1], "context_lens": [0], "seq_lens": [1]},
        "context_lens and seq_lens are both given, but must be one of the two",
    ),
    "no_cached": ({"query_lens": [1]}, "context_lens and seq_lens are None, but one of the two must be given"),
    "no_bounds": ({"cu_seqlens_q": [], "context_lens": []}, "cu_seqlens_q has 0 elements, but must have one more than"),
    "bounds_2d": ({"cu_seqlens_q": np.zeros((2, 2), np.int32), "seq_lens": [1]}, "cu_seqlens_q has shape [2, 2]"),
    "seq_lens_2d": ({"query_lens": [1], "seq_lens": torch.zeros(1, 1).int()}, "seq_lens has shape [1, 1], but must"),
    "seq_lens_short": (
        {"query_lens": [1, 1], "seq_lens": [4]},
        "seq_lens has 1 elements, but must have 2",
    ),
    "seq_lens_long": ({"cu_seqlens_q": [0, 1], "seq_lens": [4, 4]}, "seq_lens has 2 elements, but must have 1, one"),
    "seq_lens_less_than_new": (
        {"query_lens": [3, 1, 3], "seq_lens": [0, 1, 2]},
        "seq_lens[2] is 2, but must be at least 3, its new tokens, or 0 for a row that pads",
    ),
    "seq_lens_negative": ({"query_lens": [0, 1], "seq_lens": np.array([4, -1])}, "seq_lens[1] is -1, but must be at"),
    "seq_lens_floats": ({"query_lens": [1], "seq_lens": [4.0]}, "seq_lens must hold 32-bit integers"),
    "cu_floats": ({"cu_seqlens_q": torch.zeros(2), "seq_lens": [1]}, "cu_seqlens_q has dtype float32, but must be"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_lengths_that_say_nothing(fields: dict, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        StepMetadata(page_tables=[[0]], **fields).to_message(1, REF)
    assert message in str(caught.value)
    assert caught.value.field == message.split()[0].partition("[")[0]


def test_what_refused_normal_steps_of_vllm_is_said_as_it_stands_there() -> None:
    first = StepMetadata([4, 1], [0, 4], [[1, -1], [1, 2]], [4, 5, 6, 7, 8], store_first=True).to_message(1, REF)
    assert first.store_first
    assert elements(first.slot_mapping) == [4, 5, 6, 7, 8]
    behind = StepMetadata([1, 1], [8, 0], [[3, 4, 5], [3, -1, -1]], [20, 12], window=4).to_message(1, REF)
    assert behind.window == 4
    assert elements(behind.page_tables) == [[3, 4, 5], [3, -1, -1]]
    no_tokens = StepMetadata([1, 0], [0, 0], [[1], [0]], [4, -1], kind="decode").to_message(1, REF)
    assert elements(no_tokens.cu_seqlens_q) == [0, 1, 1]
    assert elements(no_tokens.slot_mapping) == [4]
    no_length = StepMetadata([1, 1], [0, -1], [[1], [0]], [4, -1], kind="decode").to_message(1, REF)
    assert elements(no_length.context_lens) == [0, -1]
    assert elements(no_length.slot_mapping) == [4, -1]

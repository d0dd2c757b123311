"""Slots and pages that are written: none twice, and none that the same step reads."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from attnd.errors import InvalidRequest
from attnd.v1 import attention_pb2, cache_pb2, step_pb2
from attnd_server.service import validation
from attnd_server.service.validation import pages
from tests.unit.wire_messages import CONFIG, LIMITS, PAGE_SIZE, step, tensor


def stored_slots(**changes):
    return validation.step(step(**changes), CONFIG, LIMITS).slot_mapping.tolist()


def refuse_step(text, **changes):
    with pytest.raises(InvalidRequest) as caught:
        validation.step(step(**changes), CONFIG, LIMITS)
    assert str(caught.value) == text
    assert caught.value.field == "slot_mapping"


def test_slots_past_the_32_bits_of_page_ids():
    page = 5 << 20
    config = replace(CONFIG, num_pages=page + 1, page_size=1024)
    one = step(
        cu_seqlens_q=tensor([0, 1]),
        context_lens=tensor([10]),
        page_tables=tensor([[page]]),
        slot_mapping=tensor([page * 1024 + 9], "int64"),
    )
    with pytest.raises(InvalidRequest) as caught:
        validation.step(one, config, LIMITS)
    assert "is 5368709129, but must not be a slot that request 0 of the step reads" in str(caught.value)


@pytest.mark.parametrize("context_len", [1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE - 1])
def test_a_token_may_follow_its_context_and_not_overwrite_it(context_len):
    table = [3, 6, 1]
    slots = [table[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE for position in range(3 * PAGE_SIZE)]
    one = {
        "kind": step_pb2.STEP_KIND_DECODE,
        "cu_seqlens_q": tensor([0, 1]),
        "context_lens": tensor([context_len]),
        "page_tables": tensor([table]),
    }
    assert stored_slots(**one, slot_mapping=tensor([slots[context_len]])) == [slots[context_len]]
    for position in range(context_len):
        slot = slots[position]
        text = f"slot_mapping[0] is {slot}, but must not be a slot that request 0 of the step reads"
        refuse_step(text, **one, slot_mapping=tensor([slot]))


def test_a_slot_comes_once():
    refuse_step("slot_mapping[3] is 6, but must differ from slot_mapping[1]", slot_mapping=tensor([5, 6, 11, 6]))


def test_minus_one_may_come_often():
    assert stored_slots(slot_mapping=tensor([-1, -1, -1, 11])) == [-1, -1, -1, 11]
    assert stored_slots(slot_mapping=tensor([-1, -1, -1, -1])) == [-1, -1, -1, -1]


def test_other_requests_of_the_step_count_as_readers():
    text = "slot_mapping[3] is 4, but must not be a slot that request 0 of the step reads"
    refuse_step(text, slot_mapping=tensor([5, 6, 11, 4]))


def test_requests_may_share_pages_of_context():
    shared = {"page_tables": tensor([[0, 1], [0, -1]]), "context_lens": tensor([5, 3])}
    assert stored_slots(**shared, slot_mapping=tensor([5, 6, 12, 13])) == [5, 6, 12, 13]
    # Slot 3 is past the second request's context, but within the first's.
    text = "slot_mapping[2] is 3, but must not be a slot that request 0 of the step reads"
    refuse_step(text, **shared, slot_mapping=tensor([5, 6, 3, 4 * 4]))


def test_a_page_may_come_twice_in_one_table():
    twice = {"cu_seqlens_q": tensor([0, 1]), "page_tables": tensor([[2, 2]]), "context_lens": tensor([6])}
    text = "slot_mapping[0] is 11, but must not be a slot that request 0 of the step reads"
    refuse_step(text, **twice, slot_mapping=tensor([11]))
    assert stored_slots(**twice, slot_mapping=tensor([12])) == [12]


@pytest.mark.parametrize(
    ("hole", "free"),
    [
        ((0, 0), []),
        ((3, 3), []),
        ((1, 3), [1, 2]),
        ((2, 7), [2, 3, 4, 5, 6]),
        ((4, 8), [4, 5, 6, 7]),
        ((0, 100), list(range(10))),
        ((9, 100), [9]),
        ((50, 100), []),
    ],
)
def test_the_prefix_hole_is_not_read(hole, free):
    context_len = 10
    one = {
        "cu_seqlens_q": tensor([0, 1]),
        "context_lens": tensor([context_len]),
        "page_tables": tensor([[0, 1, 2]]),
        "prefix_lens": tensor(hole[:1]),
        "padded_prefix_lens": tensor(hole[1:]),
    }
    accepted = []
    for slot in range(context_len):
        with contextlib.suppress(InvalidRequest):
            accepted += stored_slots(**one, mask_prefix_hole=True, slot_mapping=tensor([slot]))
    assert accepted == free


def test_many_hits_are_looked_at_in_chunks(monkeypatch):
    monkeypatch.setattr(pages, "_CHUNK", 3)
    one = {"cu_seqlens_q": tensor([0, 1]), "context_lens": tensor([39]), "page_tables": tensor([[5] * 9 + [6]])}
    text = "slot_mapping[0] is 26, but must not be a slot that request 0 of the step reads"
    refuse_step(text, **one, slot_mapping=tensor([26]))
    assert stored_slots(**one, slot_mapping=tensor([27])) == [27]


def test_slots_to_store_and_to_read():
    for dtype in ("int32", "int64"):
        slots = validation.slots(tensor([31, 0, 7], dtype), CONFIG, "slot_mapping", unique=True)
        assert slots.tolist() == [31, 0, 7]
        assert slots.dtype == torch.int64
    assert validation.slots(tensor([7, 7]), CONFIG, "slot_mapping", unique=False).tolist() == [7, 7]
    assert validation.slots(tensor([]), CONFIG, "slot_mapping", unique=True).tolist() == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([7, -1], "slot_mapping[1] is -1, but the cache has slots 0..31"),
        ([32, 0], "slot_mapping[0] is 32, but the cache has slots 0..31"),
        ([7, 5, 7], "slot_mapping[2] is 7, but must differ from slot_mapping[0]"),
        ([[7]], "slot_mapping has shape [1, 1], but must be [num_tokens]"),
    ],
)
def test_slots_are_refused(values, text):
    with pytest.raises(InvalidRequest) as caught:
        validation.slots(tensor(values), CONFIG, "slot_mapping", unique=True)
    assert str(caught.value) == text
    assert caught.value.field == "slot_mapping"


def test_read_kv():
    message = attention_pb2.ReadKvRequest(layer=2, slot_mapping=tensor([3, 3]))
    slots = validation.read_kv(message, CONFIG)
    assert slots.tolist() == [3, 3]
    with pytest.raises(InvalidRequest, match=r"^slot_mapping is absent, but must be given$"):
        validation.read_kv(attention_pb2.ReadKvRequest(layer=2), CONFIG)


def copy(sources, targets):
    message = cache_pb2.CopyPagesRequest(source_pages=sources, target_pages=targets)
    return tuple(pages.tolist() for pages in validation.copy_pages(message, CONFIG))


def test_copy_pages():
    assert copy(tensor([0, 0, 7]), tensor([1, 2, 3])) == ([0, 0, 7], [1, 2, 3])
    assert copy(tensor([]), tensor([])) == ([], [])


@pytest.mark.parametrize(
    ("sources", "targets", "field", "text"),
    [
        (None, tensor([1]), "source_pages", "source_pages is absent, but must be given"),
        (tensor([1]), None, "target_pages", "target_pages is absent, but must be given"),
        (tensor([1], "int64"), tensor([2]), "source_pages", "source_pages has dtype int64, but must be int32"),
        (tensor([0, 1]), tensor([2]), "target_pages", "target_pages has shape [1], but must be [2]"),
        (tensor([8]), tensor([2]), "source_pages", "source_pages[0] is 8, but the cache has pages 0..7"),
        (tensor([0]), tensor([-1]), "target_pages", "target_pages[0] is -1, but the cache has pages 0..7"),
        (tensor([0, 1]), tensor([2, 2]), "target_pages", "target_pages[1] is 2, but must differ from target_pages[0]"),
        (tensor([0, 1]), tensor([2, 0]), "target_pages", "target_pages[1] is 0, but must not be one of source_pages"),
        (tensor([3]), tensor([3]), "target_pages", "target_pages[0] is 3, but must not be one of source_pages"),
    ],
)
def test_copies_are_refused(sources, targets, field, text):
    with pytest.raises(InvalidRequest) as caught:
        copy(sources, targets)
    assert str(caught.value) == text
    assert caught.value.field == field

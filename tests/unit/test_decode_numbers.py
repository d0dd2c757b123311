"""Which steps may be resident ones, and that the server makes of them what it makes of their messages."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

import attnd
from attnd.errors import AttndError
from attnd.planes.cuda.decode_numbers import DecodeNumbers, DecodeReader
from attnd.protocol.cuda.resident import CONTEXT_LENS, LENS_ROWS, NUM_REQS, STORED_LENS, VALID_LENS, VERSION
from attnd.v1 import cache_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.resident import ResidentSizes
from attnd_server.config import ServerConfig
from attnd_server.service import validation

PAGE, NUM_PAGES, MAX_PAGES, MAX_REQS = 4, 64, 8, 8
CONFIG = AttentionConfig(num_layers=1, num_kv_heads=1, head_dim=16, num_pages=NUM_PAGES, page_size=PAGE)
LIMITS = ServerConfig()


def step(**changes: Any) -> attnd.StepMetadata:
    """Two requests of one new token each, at 5 and 4 cached ones."""
    fields = {
        "query_lens": [1, 1],
        "context_lens": [5, 4],
        "page_tables": [[3, 9, -1], [1, 2, -1]],
        "slot_mapping": [9 * PAGE + 1, 2 * PAGE],
        "kind": "decode",
    }
    return attnd.StepMetadata(**{**fields, **changes})


def numbers_of(metadata: attnd.StepMetadata, reader: DecodeReader | None = None) -> DecodeNumbers | str:
    return (reader or DecodeReader(PAGE, NUM_PAGES)).read(metadata)


def test_a_decode_step_is_told_in_numbers() -> None:
    numbers = numbers_of(step())
    assert isinstance(numbers, DecodeNumbers)
    assert (numbers.query_len, numbers.num_reqs, numbers.num_pages) == (1, 2, 2)
    assert numbers.context_lens.tolist() == [5, 4]
    assert numbers.valid_lens.tolist() == numbers.stored_lens.tolist() == [1, 1]
    assert numbers.page_tables.tolist() == [[3, 9, -1], [1, 2, -1]]


@pytest.mark.parametrize(
    "as_given",
    [
        list,
        np.array,
        torch.tensor,
        lambda values: np.array(values, np.int64),
        lambda values: torch.tensor(values).int(),
    ],
)
def test_arrays_of_any_kind_are_the_same_step(as_given: Any) -> None:
    fields = {name: getattr(step(), name) for name in ("query_lens", "context_lens", "page_tables", "slot_mapping")}
    given = numbers_of(step(**{name: as_given(values) for name, values in fields.items()}))
    assert isinstance(given, DecodeNumbers)
    assert all(torch.equal(one, other) for one, other in zip(given[1:5], numbers_of(step())[1:5], strict=True))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "prefill"}, "kind is 'prefill'"),
        ({"mask": "prefix_full", "prefix_lens": [0, 0], "padded_prefix_lens": [0, 0]}, "mask is 'prefix_full'"),
        ({"mask": ["causal", "bidirectional"]}, "mask is"),
        ({"store_first": True}, "it says store_first"),
        ({"window": 3}, "it says window"),
        ({"attend_new": [1, 1]}, "it says attend_new"),
        ({"first_position": torch.tensor([0, 8])}, "it says first_position"),
        ({"prefix_lens": [1, 1], "padded_prefix_lens": [2, 2], "mask_prefix_hole": True}, "it says prefix_lens"),
        ({"cache_only": True, "slot_mapping": None}, "it says cache_only"),
        ({"store_only": True}, "it says store_only"),
        ({"query_lens": [2, 0]}, "requests differ in new tokens, or have none"),
        ({"query_lens": [0, 0], "slot_mapping": []}, "requests differ in new tokens, or have none"),
        ({"query_lens": [], "context_lens": [], "page_tables": [], "slot_mapping": []}, "requests differ"),
        ({"context_lens": [5]}, "its fields are of different lengths"),
        ({"valid_lens": [1]}, "its fields are of different lengths"),
        ({"page_tables": [[3, 9]]}, "its fields are of different lengths"),
        ({"slot_mapping": [37]}, "slot_mapping is not of its tokens"),
        ({"slot_mapping": [37, 8, 4]}, "slot_mapping is not of its tokens"),
        ({"slot_mapping": [38, 8]}, "slot_mapping is not where page_tables puts the tokens"),
        ({"slot_mapping": [37, 12]}, "slot_mapping is not where page_tables puts the tokens"),
        ({"page_tables": [[3], [1]]}, "slot_mapping is not where page_tables puts the tokens"),
        ({"page_tables": [[3], [1]], "slot_mapping": None}, "page_tables is too short"),
        ({"page_tables": [[3, 9], [1, 64]]}, "page_tables has pages that the cache has not"),
        ({"page_tables": [[-1, 9], [1, 2]]}, "page_tables has absent pages within a context"),
        ({"page_tables": [[], []], "context_lens": [0, 0]}, "page_tables is too short"),
        ({"slot_mapping": [37, -2]}, "slot_mapping is not where page_tables puts the tokens"),
        ({"context_lens": [1 << 30, 4]}, "slot_mapping is not where page_tables puts the tokens"),
        ({"context_lens": [-1, 4]}, "slot_mapping is not where page_tables puts the tokens"),
        (
            {"query_lens": [2, 2], "slot_mapping": [-1, 38, 8, 9]},
            "slot_mapping stores others than the first new tokens of a request",
        ),
    ],
)
def test_why_a_step_goes_by_message(changes: dict[str, Any], reason: str) -> None:
    said = numbers_of(step(**changes))
    assert isinstance(said, str)
    assert said.startswith(reason)


def test_slots_past_the_tokens_do_not_count_where_they_are_none() -> None:
    assert isinstance(numbers_of(step(slot_mapping=[37, 8, -1, -1])), DecodeNumbers)


def test_rows_that_pad_a_batch_are_told_as_such() -> None:
    numbers = numbers_of(step(context_lens=[5, -1], page_tables=[[3, 9], [-1, -1]], slot_mapping=[37, -1]))
    assert isinstance(numbers, DecodeNumbers)
    assert numbers.context_lens.tolist() == [5, -1]
    assert numbers.stored_lens.tolist() == [1, 0]


def test_page_tables_are_remembered_by_what_they_hold() -> None:
    reader, tables = DecodeReader(PAGE, NUM_PAGES), np.array([[3, 9, -1], [1, 2, -1]])
    first, again = (numbers_of(step(page_tables=tables), reader) for _ in range(2))
    assert isinstance(first, DecodeNumbers)
    assert isinstance(again, DecodeNumbers)
    assert again.page_tables is first.page_tables
    tables[0, 1] = 10
    assert numbers_of(step(page_tables=tables), reader) == "slot_mapping is not where page_tables puts the tokens"
    changed = numbers_of(step(page_tables=tables, slot_mapping=[41, 8]), reader)
    assert isinstance(changed, DecodeNumbers)
    assert changed.page_tables.tolist() == [[3, 10, -1], [1, 2, -1]]
    assert first.page_tables.tolist() == [[3, 9, -1], [1, 2, -1]]


def test_what_is_given_stays_as_it_is() -> None:
    lens = np.array([5, 4], np.int64)
    numbers = numbers_of(step(context_lens=lens))
    assert isinstance(numbers, DecodeNumbers)
    assert lens.tolist() == [5, 4]


def random_step(chance: random.Random) -> attnd.StepMetadata:
    """One of an engine's, or nearly: one number may be wrong."""
    num_reqs, query_len = chance.randint(1, MAX_REQS), chance.choice([1, 1, 2, 4])
    pages = chance.sample(range(NUM_PAGES), num_reqs * MAX_PAGES)
    tables = [pages[MAX_PAGES * request :][:MAX_PAGES] for request in range(num_reqs)]
    if num_reqs > 1 and chance.random() < 0.2:  # pages of two requests, into which one may store
        tables[1] = list(tables[0])
    contexts, slots = [], []
    for table in tables:
        context, stored = chance.randint(0, MAX_PAGES * PAGE - query_len), chance.choice([query_len, query_len, 0, 1])
        if chance.random() < 0.2:  # a row that only pads the batch
            context, stored = -query_len, 0
        positions = range(max(0, context), context + stored)
        slots += [table[position // PAGE] * PAGE + position % PAGE for position in positions]
        slots += [-1] * (query_len - len(positions))
        contexts.append(context)
        used = -(-max(0, context + query_len) // PAGE)
        table[used:] = [-1] * (MAX_PAGES - used)
    if chance.random() < 0.3:  # something that may be wrong
        chance.choice([slots, contexts, chance.choice(tables)])[0] = chance.randint(-2, 40)
    mask, block_size = chance.choice([("causal", 0), ("block_causal", 4), ("bidirectional", 0)])
    valid = [chance.randint(0, query_len) for _ in range(num_reqs)] if chance.random() < 0.2 else None
    return attnd.StepMetadata([query_len] * num_reqs, contexts, tables, slots, "decode", mask, block_size, valid)


def by_message(metadata: attnd.StepMetadata) -> Any:
    """What the server makes of the message, or what it says."""
    try:
        return validation.step(metadata.to_message(1, cache_pb2.CacheRef()), CONFIG, LIMITS)
    except AttndError as error:
        return str(error)


def as_resident(metadata: attnd.StepMetadata, numbers: DecodeNumbers) -> Any:
    """What it makes of the numbers."""
    lens = np.zeros((LENS_ROWS, MAX_REQS), np.int32)
    lens[NUM_REQS, :2] = numbers.num_reqs, VERSION
    for row, values in (
        (CONTEXT_LENS, numbers.context_lens),
        (VALID_LENS, numbers.valid_lens),
        (STORED_LENS, numbers.stored_lens),
    ):
        lens[row, : numbers.num_reqs] = values
    tables = np.full((MAX_REQS, MAX_PAGES), 1 << 29, np.int32)
    tables[: numbers.num_reqs, : numbers.num_pages] = numbers.page_tables[:, : numbers.num_pages]
    block_size = {"causal": 1, "bidirectional": 0, "block_causal": metadata.block_size}[str(metadata.mask)]
    sizes = ResidentSizes(
        MAX_REQS, MAX_PAGES, numbers.query_len, PAGE, NUM_PAGES, LIMITS.max_context_len, 0, block_size
    )
    try:
        return validation.resident_step(lens, tables, sizes, CONFIG, LIMITS)
    except AttndError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(4))
def test_the_server_makes_the_same_of_numbers_and_message(seed: int) -> None:
    chance, num_served, num_refused = random.Random(seed), 0, 0
    reader = DecodeReader(PAGE, NUM_PAGES)  # which remembers
    for _ in range(250):
        metadata = random_step(chance)
        numbers = numbers_of(metadata, reader)
        if isinstance(numbers, str):
            continue
        told, expected = as_resident(metadata, numbers), by_message(metadata)
        assert isinstance(told, str) == isinstance(expected, str), (metadata, told, expected)
        if isinstance(told, str):
            num_refused += 1
            continue
        num_served += 1
        assert torch.equal(told.slot_mapping, expected.slot_mapping), metadata
        for name in ("context_lens", "valid_lens", "cu_seqlens_q"):
            assert torch.equal(getattr(told, name), getattr(expected, name)), (name, metadata)
    assert num_served > 100
    assert num_refused > 0


def test_slots_of_absent_pages_are_no_positions() -> None:
    """A page -1 gives negative slots, which are as wrong as others."""
    tables = [[-1, 9], [1, 2]]
    assert numbers_of(step(context_lens=[1, 4], page_tables=tables, slot_mapping=[1 - PAGE, 8])) == (
        "slot_mapping is not where page_tables puts the tokens"
    )
    assert numbers_of(step(context_lens=[0, 4], page_tables=tables, slot_mapping=[-PAGE, 8])) == (
        "slot_mapping is not where page_tables puts the tokens"
    )
    assert numbers_of(step(context_lens=[3, 4], page_tables=tables, slot_mapping=[-1, 8])) == (
        "page_tables has absent pages within a context"
    )
